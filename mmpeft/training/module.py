"""The LightningModule: what trains, by which loss, with which optimiser, and what a checkpoint holds."""

from collections import Counter
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from mmpeft.adapters import AdapterConfig
from mmpeft.data.batch import Batch
from mmpeft.data.features import FeatureCache
from mmpeft.data.packing import NO_CHOICES
from mmpeft.errors import RefusedError
from mmpeft.evaluation.answer_log import AnswerLog
from mmpeft.hashing import hash_json, hash_tensors
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import TokenLosses, length_normalised
from mmpeft.models.vision import VisionConfig
from mmpeft.runs.files import load_trained
from mmpeft.runs.identity import check_identity, describe
from mmpeft.runs.manifest import MANIFEST, read_manifest
from mmpeft.training import checkpoint
from mmpeft.training.answering import add_likelihoods, answer
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.finetune_config import FinetuneConfig, Schedule
from mmpeft.training.objectives import ChoiceLosses, exactly_right, in_answers, objective
from mmpeft.training.optim import Finetune, Slice, TFewAdafactor, warmup_then
from mmpeft.training.start import add_adapters, earlier_adapters

SETTINGS = ("learning_rate", "projector_learning_rate", "weight_decay", "schedule", "warmup", "choice_losses")
"""What a finetune of a joint run may have of its own."""
ORDER_SETTINGS = ("seed", "shots", "shots_seed", "weights", "limit", "task", "style", "image_root")
"""Of the data: what decides which example comes when, and how it reads."""
RESUMED_SETTINGS = (*SETTINGS, "optimizer", "seed")


class VisionLanguageModule(L.LightningModule):
    """A frozen encoder and language model; a projector and an adapter that train.

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
        if adapters is not None and (adapter is not None or not adapters):
            raise RefusedError(
                "model.adapters holds the finetunes of a joint run: give at least one, and no model.adapter beside them"
            )
        self.language, self.vision = language, vision
        self.adapter, self.adapter_name, self.adapters = adapter, adapter_name, adapters
        if start_adapter is not None and start_from is None:
            raise RefusedError(f"model.start_adapter is {start_adapter!r} of which run? Set model.start_from")
        self.train_projector = train_projector and vision is not None
        self.start_from, self.start_adapter = start_from, start_adapter
        self.learning_rate, self.projector_learning_rate = learning_rate, projector_learning_rate
        self.weight_decay, self.schedule, self.warmup, self.seed = weight_decay, schedule, warmup, seed
        self.optimizer, self.choice_losses = optimizer, choice_losses
        self.strict_loading = False  # a checkpoint holds what trains, not the frozen base
        self.model: MultimodalModel
        self.tokenizer: Any
        self.finetunes: list[Finetune] = []
        self.answer_log: AnswerLog
        self._tokens: Counter[str] = Counter()
        self._with_images: set[str | None] = set()
        self._correct: dict[str, list[bool]] = {}
        self.earlier_instructions: dict[str, str | None] = {}

    # -- building -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Loads the frozen parts, once the data has been checked, and connects the data to them."""
        fresh = not hasattr(self, "model")
        if self.trainer.world_size > 1:
            raise RefusedError(
                f"the trainer has {self.trainer.world_size} processes, among which batches are not divided yet; "
                "set trainer.devices to 1"
            )
        if stage == "fit" and not any(self.wanted.values()) and not self.train_projector:
            raise RefusedError("nothing would train: give an adapter, or set train_projector to true")
        if self.adapters is not None and self.trainer.accumulate_grad_batches > 1:
            raise RefusedError(
                "a joint run takes one batch of each finetune a step; set accumulate_grad_batches to 1"
            )
        data: VisionLanguageData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self.vision is None:
            data.refuse_images("model.vision is null")
        if fresh:
            self.model = self._build()
        cache = FeatureCache(data.cache, self.model.vision_encoder)
        cache.build(data.images())
        data.connect(
            self.tokenizer,
            self.model.vision_encoder.num_tokens,
            cache,
            self._served_adapter,
            self.with_choices,
        )
        if fresh:
            source = str(self._own_run() or self.start_from)
            answering = self.trainer.state.fn != "fit"
            add_adapters(
                self.model, self.wanted, self.seed, lambda *of: data.some_batches(*of), source, answering
            )
            self.model.projector.requires_grad_(self.train_projector)
        if stage in ("test", "predict"):
            self.answer_log = self._open_answer_log(data, cache)
            data.answered = set(self.answer_log.answers)
            if data.answered:
                print(
                    f"{len(data.answered)} of {len(data.records[self._split])} answers are there already; going on"
                )

    @property
    def wanted(self) -> dict[str, AdapterConfig | None]:
        """Finetune -> its method; None trains the projector alone."""
        if self.adapters is None:
            return {self.adapter_name: self.adapter}
        return {name: finetune.adapter for name, finetune in self.adapters.items()}

    @property
    def with_choices(self) -> dict[str, bool]:
        """Finetune -> whether it learns from wrong choices; under "" where there is just one."""
        return {
            name if self.adapters else "": self._settings(name)["choice_losses"].wanted
            for name in self.wanted
        }

    @property
    def _served_adapter(self) -> str | None:
        """Whose rows those of a run of one finetune are."""
        trains = self.adapter is not None
        return self.adapter_name if trains or self.adapter_name in self.model.bank else None

    def _build(self) -> MultimodalModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = build_model(
                self.language, self.vision, self.trainer.strategy.root_device, list(self.adapters or ())
            )
        self.tokenizer = load_tokenizer(self.language.name)
        self.identity = describe(self.language, model, self.tokenizer)
        own_run = self._own_run()
        if source := own_run or self.start_from:
            manifest = read_manifest(source)
            check_identity(manifest, self.identity, source)
            self.earlier_instructions = manifest.instructions
            start = None if own_run else self.start_adapter
            sources = earlier_adapters(self.wanted, manifest.adapters, source, start, bool(own_run))
            own = sources.get(self.adapter_name, self.adapter_name) if self.adapters is None else "base"
            load_trained(source, model, sources, own)
        return model

    def _own_run(self) -> str | None:
        """Outside of fit, a run's own results are what is meant."""
        directory = Path(self.trainer.default_root_dir)
        fitting = self.trainer.state.fn == "fit"
        return str(directory) if not fitting and (directory / MANIFEST).exists() else None

    def _finetune(self, name: str, config: AdapterConfig | None) -> Finetune:
        adapter: list[Slice] = []
        if config is not None:
            for _, stack, slot in self.model.bank.places(name):
                adapter += [
                    Slice(parameter, slot, stack.origin, stack.own_dims(key, slot), stack.of_images)
                    for key, parameter in stack.named_parameters()
                ]
        slot = self.model.projector_slots.get(name, 0)
        projector = list(self.model.projector.parameters()) if self.train_projector else []
        return Finetune(name, adapter, [Slice(parameter, slot, of_images=True) for parameter in projector])

    # -- training -------------------------------------------------------------------------------------------

    def on_train_batch_end(self, *_: Any) -> None:
        if self.adapters is not None and self.trainer.train_dataloader.everybody_left():  # pyright: ignore
            self.trainer.should_stop = True

    def on_fit_start(self) -> None:
        # from_pretrained leaves modules in eval mode and Lightning keeps each as it is, so dropout would stay off.
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum over answers' tokens; the finetunes make it the mean over all their tokens of the step, which stays
        exact when micro-batches of different length are accumulated (the terms that come from wrong choices are then
        averaged by the tokens of the right ones)."""
        losses = self.model.token_losses(batch)
        self._with_images |= {batch.adapters[row] for row in batch.image_rows.tolist()}
        total = losses.nll.new_zeros(())
        for name, (own, right) in self._by_finetune(batch, losses).items():
            tokens = int(in_answers(own, right).sum())
            self._tokens[name] += tokens
            terms: dict[str, Tensor] = {}
            if tokens == len(own.nll):  # summed as they are: a mean times its number would round
                loss = own.nll.sum()
            else:
                terms = objective(own, right, self._settings(name)["choice_losses"])
                loss = tokens * torch.stack(list(terms.values())).sum()
            total = total + loss
            # NaN where it has no tokens: Lightning would repeat the last value of a finetune that has left
            mean = loss.detach() / tokens if tokens else torch.nan
            self.log(self._curve("train_loss", name), mean, prog_bar=True, batch_size=max(1, tokens))
            for term, value in terms.items():
                self.log(self._curve(f"train_{term}", name), value.detach(), batch_size=tokens)
        self.log("conversations", float(sum(map(len, batch.examples))), reduce_fx="sum", on_step=True)
        return total

    def _curve(self, metric: str, name: str) -> str:
        """What a metric of a finetune is logged as: the report tells the curves of a joint run by it."""
        return metric if self.adapters is None else f"{metric}/{name}"

    def _by_finetune(self, batch: Batch, losses: TokenLosses) -> dict[str, tuple[TokenLosses, list[int]]]:
        """The token losses of each finetune's rows, and `Batch.right` with the rows of others blank."""
        if self.adapters is None:
            return {self.adapter_name: (losses, batch.right)}
        found: dict[str, tuple[TokenLosses, list[int]]] = {}
        for name in self.adapters:
            owned = torch.tensor([owner == name for owner in batch.adapters], device=losses.rows.device)
            right = [
                segment if own else NO_CHOICES
                for segment, own in zip(batch.right, owned.tolist(), strict=True)
            ]
            found[name] = losses.where(owned[losses.rows]), right
        return found

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for finetune in self.finetunes:
            # Lightning divided the loss by the number of accumulated batches
            tokens = self._tokens[finetune.name] / self.trainer.accumulate_grad_batches
            images = self.adapters is None or finetune.name in self._with_images
            finetune.take_gradients(tokens, images)
        self._tokens.clear()
        self._with_images.clear()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each finetune by its own norm; one whose norm is not finite sits the step out."""
        for finetune in self.finetunes:
            skipped = finetune.skipped
            norm = finetune.clip(gradient_clip_val)
            if norm is not None:
                self.log(self._curve("gradient_norm", finetune.name), norm)
            if finetune.skipped > skipped:
                end = "; it is given up, as it was left" if finetune.given_up else ""
                told = f"{finetune.name!r} has a gradient that is not finite; its step is skipped"
                print(f"step {self.global_step}: {told}{end}")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for parameter in self.parameters():  # the stacks, whose slots the optimiser's Parameters are
            parameter.grad = None

    def configure_optimizers(self) -> Any:
        self.finetunes = [self._finetune(name, config) for name, config in self.wanted.items()]
        data: VisionLanguageData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        groups, factors, longest = [], [], 1
        for finetune in self.finetunes:
            setting = self._settings(finetune.name)
            steps = data.total_steps(finetune.name)
            longest = max(longest, steps)
            factor = warmup_then(setting["schedule"], setting["warmup"], steps)
            own = finetune.groups(
                setting["learning_rate"], setting["projector_learning_rate"], setting["weight_decay"]
            )
            groups += own
            # by the finetune's own steps: one that sat a step out goes on where it was
            factors += [lambda _, finetune=finetune, factor=factor: factor(finetune.steps)] * len(own)
        optimizer = torch.optim.AdamW(groups) if self.optimizer == "adamw" else TFewAdafactor(groups, longest)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _settings(self, name: str) -> dict[str, Any]:
        """A finetune's own settings, and the run's where it has none."""
        own = self.adapters[name] if self.adapters else None
        return {
            key: value if (value := getattr(own, key, None)) is not None else getattr(self, key)
            for key in SETTINGS
        }

    # -- evaluation -----------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.model.token_losses(batch)
        for name, (own, right) in self._by_finetune(batch, losses).items():
            answers = own.where(in_answers(own, right))
            if tokens := len(answers.nll):
                terms = objective(own, right, self._settings(name)["choice_losses"])
                loss = torch.stack(list(terms.values())).sum()
                self.log(self._curve("val_loss", name), loss, batch_size=tokens, prog_bar=True)
            matches = self._correct.setdefault(self._curve("val_exact_match", name), [])
            matches += exactly_right(answers).values()
            if any(segment != NO_CHOICES for segment in right):
                best = length_normalised(own, len(right)).argmax(1).tolist()
                ranked = self._correct.setdefault(self._curve("val_rank_accuracy", name), [])
                ranked += [
                    b + 1 == segment for b, segment in zip(best, right, strict=True) if segment != NO_CHOICES
                ]

    def on_validation_epoch_end(self) -> None:
        for name, correct in self._correct.items():
            if correct:
                self.log(name, sum(correct) / len(correct), prog_bar=True)
        self._correct = {}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answers a batch and puts the answers on disk."""
        data: VisionLanguageData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert data.template is not None
        answers = answer(self.model, data.template, batch, data.records[self._split])
        if data.wants_likelihoods:
            add_likelihoods(self.model, answers, batch, lambda own: data.with_truths(self._split, own))
        self.answer_log.append(answers)

    test_step = predict_step

    @property
    def _split(self) -> Any:
        """The split that is being answered."""
        return self.trainer.state.fn.value  # pyright: ignore[reportOptionalMemberAccess]

    def _open_answer_log(self, data: VisionLanguageData, cache: FeatureCache) -> AnswerLog:
        """The answers so far, if the same model was stopped while it answered the same questions."""
        trained = dict(self.model.projector.named_parameters(prefix="projector"))
        trained |= {str(number): tensor for number, tensor in enumerate(self.model.bank.state())}
        questions = [
            (r["id"], r["turns"], r.get("choices"), r["task"], [cache.key(image) for image in r["images"]])
            for r in data.records[self._split]
        ]
        how = [data.answer_by, data.style, data.wants_likelihoods, asdict(data.packing)]
        asked = [questions, how]
        belongs_to = hash_json([self.identity, list(self.wanted), hash_tensors(trained), asked])
        path = Path(self.trainer.default_root_dir) / f"{self._split}.partial.jsonl"
        return AnswerLog(path, belongs_to)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What trains, and nothing of the frozen base."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint_dict: dict[str, Any]) -> None:
        checkpoint_dict["mmpeft"] = checkpoint.stamp(self._belongs_to())
        checkpoint_dict["mmpeft"]["finetunes"] = [finetune.state_dict() for finetune in self.finetunes]

    def on_load_checkpoint(self, checkpoint_dict: dict[str, Any]) -> None:
        checkpoint.verify(checkpoint_dict, self._belongs_to())
        self._resumed = checkpoint_dict["mmpeft"]

    def on_train_start(self) -> None:
        if (resumed := getattr(self, "_resumed", None)) is not None:
            checkpoint.restore_rng(resumed["rng"])
            for finetune, state in zip(self.finetunes, resumed["finetunes"], strict=True):
                finetune.load_state_dict(state)

    def _belongs_to(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed. The settings are those whose old value resuming would
        bring back, whatever the command line says."""
        data: VisionLanguageData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        settings = {name: _plain(getattr(self, name)) for name in RESUMED_SETTINGS}
        settings["methods"] = {name: _parts(config) for name, config in self.wanted.items()}
        settings["adapters"] = {
            name: {
                field.name: _plain(getattr(own, field.name))
                for field in fields(own)
                if field.name != "adapter"
            }
            for name, own in (self.adapters or {}).items()
        }
        order = {name: getattr(data, name) for name in ORDER_SETTINGS}
        order |= {"packing": asdict(data.packing), "train": data.paths["train"]}
        shapes = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        return {"base": self.identity, "model": settings, "data": order, "tensors": shapes}


def _plain(value: Any) -> Any:
    """A checkpoint holds no classes of ours: torch would refuse to load them."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _parts(config: AdapterConfig | None) -> list[dict[str, Any]]:
    """A config in plain types, method by method."""
    parts = config.parts() if config else []
    return [{"method": part.method, **vars(part)} for part in parts]
