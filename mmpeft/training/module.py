"""The LightningModule: Lightning's hooks, each a call of what does the work."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from mmpeft.adapters import AdapterConfig
from mmpeft.data.batch import Batch, Conversations
from mmpeft.data.features import FeatureCache
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.evaluation.evaluate import Evaluation, EvaluationConfig
from mmpeft.hashing import hash_json, hash_tensors
from mmpeft.inference.engine import Engine, Work
from mmpeft.models.language import LanguageConfig
from mmpeft.models.token_losses import TokenLosses
from mmpeft.models.vision import VisionConfig
from mmpeft.runs.manifest import LEAST_NEW_TOKENS, MANIFEST
from mmpeft.training import checkpoint
from mmpeft.training.batches import Loader, ends_by_steps, loader_of, make_loader, total_steps
from mmpeft.training.datamodule import VisionLanguageData, all_records, refuse_images
from mmpeft.training.finetune import Finetune, FinetuneConfig, Schedule, Settings, make_finetunes
from mmpeft.training.objectives import ChoiceLosses, exactly_right, in_answers, objective, rank_accuracy
from mmpeft.training.optim import make_optimizer
from mmpeft.training.start import Started, add_adapters, build_start

Owned = tuple[Finetune, TokenLosses, Conversations]
"""A finetune, and of a batch what is its own."""


class VisionLanguageModule(L.LightningModule):
    """A frozen encoder and language model; a projector and adapters that train.

    Args:
        language: the language model and how it is held.
        vision: the vision encoder and what becomes of its features; null trains on text alone.
        adapter: the method, one of mmpeft.adapters' configs; None trains the projector alone.
        adapter_name: the finetune's name, also its folder's.
        adapters: name -> a finetune of its own method, data and settings: all train in one pass on one base, each
            with its own projector, exactly as each would alone. Takes the place of ``adapter``.
        train_projector: whether the projector trains.
        start_from: run directory to go on from: its projector, and its adapter of this name where it has one.
        start_adapter: an adapter of that run which every finetune begins as that has none of its own name there.
        learning_rate: of the adapter.
        projector_learning_rate: of the projector.
        weight_decay: of both, towards zero: the base model, but for prompts, prefixes and DoRA's magnitudes.
        schedule: decay of both learning rates after warm-up.
        warmup: share of the steps over which they rise from zero.
        optimizer: "adamw", or T-Few's "adafactor", which scales steps by the size of what they change.
        choice_losses: weights of T-Few's losses on examples that carry choices, beside the right answer's loss.
        seed: start of the adapter and of a fresh projector.
    """

    def __init__(
        self,
        language: LanguageConfig = LanguageConfig(),  # noqa: B008 shown by --print_config, never written to
        vision: VisionConfig | None = VisionConfig(),  # noqa: B008
        adapter: AdapterConfig | None = None,
        adapter_name: str = "default",
        adapters: dict[str, FinetuneConfig] | None = None,
        train_projector: bool = True,
        start_from: str | None = None,
        start_adapter: str | None = None,
        learning_rate: float = 1e-3,
        projector_learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Schedule = "cosine",
        warmup: float = 0.03,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        choice_losses: ChoiceLosses = ChoiceLosses(),  # noqa: B008
        seed: int = 0,
    ):
        super().__init__()
        defaults = Settings(
            learning_rate, projector_learning_rate, weight_decay, schedule, warmup, choice_losses
        )
        self.finetunes = make_finetunes(adapter, adapter_name, adapters, defaults)
        if start_adapter is not None and start_from is None:
            raise RefusedError(f"model.start_adapter is {start_adapter!r} of which run? Set model.start_from")
        self.language, self.vision, self.optimizer, self.seed = language, vision, optimizer, seed
        self.train_projector = train_projector and vision is not None
        self.start_from, self.start_adapter = start_from, start_adapter
        self.evaluation_config = EvaluationConfig()
        """How a test answers and measures; the command line sets it from the section ``test:``."""
        self.strict_loading = False  # a checkpoint holds what trains, not the frozen base
        self.started: Started
        self.evaluation: Evaluation
        self._train_loader: Loader | None = None
        self._tokens: Counter[str] = Counter()
        self._with_images: set[str] = set()
        self._correct: dict[str, list[bool]] = {}

    # -- building -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Loads the frozen parts, once the data has been checked."""
        data, finetunes = self._data, list(self.finetunes.values())
        self._check(stage)
        if self.vision is None:
            refuse_images(all_records(finetunes), "model.vision is null")
        source, own_run = self._source()
        fresh = not hasattr(self, "model")
        if fresh:
            self.started = build_start(
                *(self.language, self.vision, self.finetunes, self.trainer.strategy.root_device, self.seed),
                *(source, self.start_adapter, own_run),
            )
            self.model = self.started.model
        self.features = FeatureCache(data.cache, self.model.vision_encoder)
        images = [image for record in all_records(finetunes) for image in record["images"]]
        self.features.build(images, skip_unreadable=stage in ("test", "predict"))
        self.template = Template(
            *(
                self.started.tokenizer,
                self.model.vision_encoder.num_tokens,
                data.style,
                data.packing.max_length,
            )
        )
        if fresh:
            answering = self.trainer.state.fn != "fit"
            add_adapters(self.model, self.finetunes, self.seed, self.some_batches, str(source), answering)
            self.model.projector.requires_grad_(self.train_projector)
        if stage in ("test", "predict"):
            self.evaluation = self._make_evaluation(stage)

    @property
    def _data(self) -> VisionLanguageData:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def _check(self, stage: str) -> None:
        trains = self.train_projector or any(own.adapter for own in self.finetunes.values())
        if self.trainer.world_size > 1:
            raise RefusedError(
                f"the trainer has {self.trainer.world_size} processes, among which batches are not divided yet; "
                "set trainer.devices to 1"
            )
        if stage == "fit" and not trains:
            raise RefusedError("nothing would train: give an adapter, or set train_projector to true")
        if len(self.finetunes) > 1 and self.trainer.accumulate_grad_batches > 1:
            raise RefusedError(
                "a joint run takes one batch of each finetune a step; set accumulate_grad_batches to 1"
            )

    def _source(self) -> tuple[str | None, bool]:
        """The run to begin from, and whether it is this very one: outside of fit, a run's own results are meant."""
        directory = Path(self.trainer.default_root_dir)
        own = self.trainer.state.fn != "fit" and (directory / MANIFEST).exists()
        return (str(directory), True) if own else (self.start_from, False)

    def adapters(self) -> dict[str, str | None]:
        """Finetune -> the adapter of its rows; None is the base, where the projector alone trains."""
        return {
            name: name if own.adapter is not None or name in self.model.bank else None
            for name, own in self.finetunes.items()
        }

    def train_loader(self) -> Loader:
        if self._train_loader is None:
            made = self._loader("train", self._data.seed, ends_by_steps(self.trainer))
            assert made is not None, "a fit without training data was refused"
            self._train_loader = made
        return self._train_loader

    def val_loader(self) -> Loader | list:
        return self._loader("val") or []

    def some_batches(self, name: str, number: int) -> list[Batch]:
        """The first batches of a finetune's training data, without taking them from its epoch."""
        own = loader_of(self.train_loader(), name)
        return [own.batch(index) for index in range(min(number, len(own)))]

    def _loader(self, split: Any, seed: int | None = None, cycle: bool = False) -> Loader | None:
        how = (self.template, self.features, self._data.packing, self.adapters(), seed, cycle)
        return make_loader(self.finetunes, split, *how)

    # -- training -------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        # from_pretrained leaves modules in eval mode and Lightning keeps each as it is, so dropout would stay off.
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum over answers' tokens; the finetunes make it the mean over all their tokens of the step, which stays
        exact when micro-batches of different length are accumulated (the terms that come from wrong choices are then
        averaged by the tokens of the right ones)."""
        losses = self.model.token_losses(batch)
        total = losses.nll.new_zeros(())
        for finetune, own, conversations in self._by_finetune(batch, losses):
            name, tokens = finetune.name, int(in_answers(own, conversations).sum())
            self._tokens[name] += tokens
            terms: dict[str, Tensor] = {}
            if tokens == len(own.nll):  # summed as they are: a mean times its number would round
                loss = own.nll.sum()
            else:
                terms = objective(own, None, conversations, finetune.settings.choice_losses)
                loss = tokens * torch.stack(list(terms.values())).sum()
            total = total + loss
            # NaN where it has no tokens: Lightning would repeat the last value of a finetune that has left
            mean = loss.detach() / tokens if tokens else torch.nan
            self.log(self.curve("train_loss", name), mean, prog_bar=True, batch_size=max(1, tokens))
            for term, value in terms.items():
                self.log(self.curve(f"train_{term}", name), value.detach(), batch_size=tokens)
        self.log("conversations", float(batch.conversations.num_examples), reduce_fx="sum", on_step=True)
        return total

    def curve(self, metric: str, name: str) -> str:
        """What a metric of a finetune is logged as: the report tells the curves of a joint run by it."""
        return metric if len(self.finetunes) == 1 else f"{metric}/{name}"

    def _by_finetune(self, batch: Batch, losses: TokenLosses) -> Iterator[Owned]:
        """Each finetune with its own rows of a batch; a single one has all of them."""
        with_images = {batch.adapters[row] for row in batch.image_rows.tolist()}
        for name, adapter in self.adapters().items():
            if adapter in with_images:
                self._with_images.add(name)
            if len(self.finetunes) == 1:
                yield self.finetunes[name], losses, batch.conversations
                continue
            owned = torch.tensor([owner == adapter for owner in batch.adapters], device=losses.rows.device)
            table = batch.conversations
            yield self.finetunes[name], losses.where(owned[losses.rows]), table.where(owned[table.rows])

    def on_train_batch_end(self, *_: Any) -> None:
        if getattr(self._train_loader, "everybody_left", bool)():
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameters in self._trained():
            # Lightning divided the loss by the number of accumulated batches
            tokens = self._tokens[name] / self.trainer.accumulate_grad_batches
            parameters.take_gradients(tokens, name in self._with_images)
        self._tokens.clear()
        self._with_images.clear()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each finetune by its own norm; one whose norm is not finite sits the step out."""
        for name, parameters in self._trained():
            skipped = parameters.skipped
            norm = parameters.clip(gradient_clip_val)
            if norm is not None:
                self.log(self.curve("gradient_norm", name), norm)
            if parameters.skipped > skipped:
                end = "; it is given up, as it was left" if parameters.given_up else ""
                told = f"{name!r} has a gradient that is not finite; its step is skipped"
                print(f"step {self.global_step}: {told}{end}")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for parameter in self.parameters():  # the stacks, whose slots the optimiser's Parameters are
            parameter.grad = None

    def configure_optimizers(self) -> Any:
        groups = []
        for finetune in self.finetunes.values():
            steps = total_steps(finetune, self.train_loader(), self.trainer)
            parameters = finetune.train_in(self.model, self.train_projector)
            groups.append((parameters, finetune.settings, steps))
        optimizer, scheduler = make_optimizer(self.optimizer, groups)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((name, own.parameters) for name, own in self.finetunes.items() if own.parameters)

    # -- evaluation -----------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.model.token_losses(batch)
        for finetune, own, conversations in self._by_finetune(batch, losses):
            answers, name = own.where(in_answers(own, conversations)), finetune.name
            if tokens := len(answers.nll):
                terms = objective(own, None, conversations, finetune.settings.choice_losses)
                loss = torch.stack(list(terms.values())).sum()
                self.log(self.curve("val_loss", name), loss, batch_size=tokens, prog_bar=True)
            right, ranked = list(exactly_right(answers).values()), rank_accuracy(own, conversations)
            for metric, correct in (("val_exact_match", right), ("val_rank_accuracy", ranked)):
                self._correct.setdefault(self.curve(metric, name), []).extend(correct)
        self._with_images.clear()

    def on_validation_epoch_end(self) -> None:
        for name, correct in self._correct.items():
            if correct:
                self.log(name, sum(correct) / len(correct), prog_bar=True)
        self._correct = {}

    def test_step(self, work: Work, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluation.run(work)

    predict_step = test_step

    def engine(self) -> Engine:
        """Answers questions with the finetunes as they are."""
        return Engine(self.model, self.template, self.features, self._data.packing)

    def _make_evaluation(self, stage: Any) -> Evaluation:
        config = self.evaluation_config
        records = {name: own.records[stage] for name, own in self.finetunes.items()}
        if stage == "test":
            config.check(all_records(self.finetunes.values(), stage))
        manifest = self.started.manifest
        longest = manifest.max_new_tokens if manifest else LEAST_NEW_TOKENS
        trained = dict(self.model.projector.named_parameters(prefix="projector"))
        trained |= {str(number): tensor for number, tensor in enumerate(self.model.bank.state())}
        identity = hash_json([self.started.identity, list(self.finetunes), hash_tensors(trained)])
        log = Path(self.trainer.default_root_dir) / f"{stage}.partial.jsonl"
        return Evaluation(
            *(
                self.engine(),
                records,
                self.adapters(),
                config,
                config.max_new_tokens or longest,
                log,
                identity,
            ),
            truths=stage == "test",
        )

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What trains, and nothing of the frozen base."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint_dict: dict[str, Any]) -> None:
        checkpoint_dict["mmpeft"] = checkpoint.stamp(self._belongs_to())
        checkpoint_dict["mmpeft"]["finetunes"] = [
            parameters.state_dict() for _, parameters in self._trained()
        ]

    def on_load_checkpoint(self, checkpoint_dict: dict[str, Any]) -> None:
        checkpoint.verify(checkpoint_dict, self._belongs_to())
        self._resumed = checkpoint_dict["mmpeft"]

    def on_train_start(self) -> None:
        if (resumed := getattr(self, "_resumed", None)) is not None:
            checkpoint.restore_rng(resumed["rng"])
            for (_, parameters), state in zip(self._trained(), resumed["finetunes"], strict=True):
                parameters.load_state_dict(state)

    def _belongs_to(self) -> dict[str, Any]:
        shapes = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        run = {"optimizer": self.optimizer, "seed": self.seed}
        return checkpoint.belongs_to(self.started.identity, run, self.finetunes, self._data, shapes)
