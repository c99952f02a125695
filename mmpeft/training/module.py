"""The LightningModule: Lightning's hooks, each a call of what does the work."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from mmpeft.adapters import AdapterConfig
from mmpeft.data.batch import Batch
from mmpeft.data.features import FeatureCache
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.evaluation.evaluate import Evaluation, EvaluationConfig
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.inference.engine import Engine, Work
from mmpeft.models.language import LanguageConfig
from mmpeft.models.vision import VisionConfig
from mmpeft.runs.files import LeftOut, tell_left_out
from mmpeft.training import checkpoint
from mmpeft.training.batches import Batches, ends_by_steps, total_steps
from mmpeft.training.cache_use import fill_cache, leave_out_undecodable
from mmpeft.training.compiled_steps import Compile, CompiledSteps
from mmpeft.training.datamodule import VisionLanguageData, all_records, refuse_images, require_some_image
from mmpeft.training.finetune import FinetuneConfig, Schedule, Settings, Split, make_finetunes
from mmpeft.training.objectives import ChoiceLosses
from mmpeft.training.optim import make_optimizer
from mmpeft.training.preferences import Objective, PreferenceConfig
from mmpeft.training.processes import require_alike
from mmpeft.training.questions import evaluation_of
from mmpeft.training.sharding import sharded
from mmpeft.training.start import (
    Started,
    add_adapters,
    build_start,
    check_length,
    check_settings,
    run_to_begin_from,
)
from mmpeft.training.step import Step, make_step
from mmpeft.training.step_losses import Logged

ON_THE_BAR = ("train_loss", "val_loss", "val_exact_match", "val_rank_accuracy", "val_reward_accuracy")
"""Curves that the progress bar shows."""


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
        compile: whether steps are compiled (torch.compile): true, false, or "auto", where it pays within the run. The
            fit begins with a trial and says what it costs and saves.
        lora_b_ratio: learning rate of LoRA's B in multiples of that of its A; LoRA+ is 16.
        objective: "likelihood" of the answers; or what is preferred, by dpo, ipo, orpo, simpo or kto.
        preferences: settings of the latter.
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
        compile: Compile = False,
        lora_b_ratio: float = 1.0,
        objective: Objective = "likelihood",
        preferences: PreferenceConfig = PreferenceConfig(),  # noqa: B008
        seed: int = 0,
    ):
        super().__init__()
        defaults = Settings(
            *(learning_rate, projector_learning_rate, weight_decay, schedule, warmup, choice_losses),
            *(lora_b_ratio, objective, preferences),
        )
        self.finetunes = make_finetunes(adapter, adapter_name, adapters, defaults)
        if start_adapter is not None and start_from is None:
            raise RefusedError(f"model.start_adapter is {start_adapter!r} of which run? Set model.start_from")
        self.language, self.vision, self.optimizer, self.seed = language, vision, optimizer, seed
        self.train_projector = train_projector and vision is not None
        self.start_from, self.start_adapter = start_from, start_adapter
        self.compiled_steps = CompiledSteps(compile)
        self.evaluation_config = EvaluationConfig()
        """How a test answers and measures; the command line sets it from the section ``test:``."""
        self.results: Path | None = None
        """Folder of a test's or a prediction's results; the run directory by default."""
        self.left_out: LeftOut = {}
        """The finetunes of a run that a test cannot ask, and why."""
        self.strict_loading = False  # a checkpoint holds what trains, not the frozen base
        self.started: Started
        self.evaluation: Evaluation
        self.step: Step

    # -- building -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Loads the frozen parts, once the data has been checked."""
        data, records = self._data, all_records(self.finetunes.values())
        check_settings(self.trainer, self.finetunes, self.train_projector, stage)
        if self.vision is None:
            refuse_images(records, "model.vision is null")
        elif stage == "fit" and not data.text_only:
            require_some_image(records)
        source, own_run = run_to_begin_from(self.trainer, self.start_from)
        fresh = not hasattr(self, "model")
        if fresh:
            asked = stage in ("test", "predict")  # the others are answered
            self.started = build_start(
                *(self.language, self.vision, self.finetunes, self.trainer.strategy.root_device, self.seed),
                *(data.template, source, self.start_adapter, own_run, self.left_out if asked else None),
                sharded(self.trainer),
            )
            self.model = self.started.model
        started, longest = self.started, data.packing.max_length
        check_length(self.model, longest)
        features = FeatureCache(data.cache.path, self.model.vision_encoder, data.cache.max_gb)
        template = Template(started.tokenizer, features.image_tokens, started.layout, longest)
        self.engine = Engine(self.model, template, features, data.packing)
        cycle, skipped = ends_by_steps(self.trainer), Notes()
        skips = stage == "fit" and data.skips_late
        self.batches = Batches(
            *(self.finetunes, template, features, data.packing, self.adapters(), data.seed, cycle),
            *(data.workers, skipped if skips else None, self.trainer),
        )
        if stage == "fit" and not skips and any(own.records.get("train") for own in self.finetunes.values()):
            self.batches.train()  # what cannot be learnt from is refused before images are encoded
        fill_cache(features, data, self.finetunes, self.trainer, stage)
        if skips:
            leave_out_undecodable(features, self.finetunes, skipped)
            self.batches.train()
            data.tell_skipped(skipped)
        self._learnt_from = checkpoint.hash_learnt_from(self.finetunes, features.key)
        if fresh:
            own, failed = {n: own for n, own in self.finetunes.items() if n not in self.left_out}, LeftOut()
            add_adapters(
                *(self.model, own, self.seed, self.batches.some, str(source)), self.trainer.state.fn != "fit"
            )
            started.self_check = check_adapters(self.model, started.self_check, failed if asked else None)
            tell_left_out(str(source), failed, self.model.bank.names)
            self.left_out |= failed
            self.model.projector.requires_grad_(self.train_projector)
            begun = self.started, self.start_from, self.trainer.strategy
            self.step = make_step(self.model, self.finetunes, self.adapters(), *begun)
        if stage == "fit" and self.step.processes is not None:
            require_alike(self.step.processes, self._belongs_to())

    @property
    def _data(self) -> VisionLanguageData:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def adapters(self) -> dict[str, str | None]:
        """Finetune -> the adapter of its rows; None is the base, where the projector alone trains."""
        return {
            name: name if own.adapter is not None or name in self.model.bank else None
            for name, own in self.finetunes.items()
        }

    # -- training -------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.compiled_steps]

    def on_fit_start(self) -> None:
        # Lightning keeps each module in the mode that it has, so the dropout of adapters would stay off.
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.step.forward(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.step.backward(loss)

    def _log(self, logged: Sequence[Logged]) -> None:
        """The report tells the curves of a joint run by their finetune's name. Lightning would move plain numbers to
        the device and wait for it."""
        for metric, name, value, size in logged:
            curve = metric if len(self.finetunes) == 1 else f"{metric}/{name}"
            value = value if isinstance(value, Tensor) else torch.tensor(value)
            self.log(curve, value, prog_bar=metric in ON_THE_BAR, batch_size=size)

    def on_train_batch_end(self, *_: Any) -> None:
        if getattr(self.trainer.train_dataloader, "everybody_left", bool)():
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step.take_gradients(self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        number = torch.tensor(float(self.step.losses.sums.conversations))
        self.log("conversations", number, reduce_fx="sum", on_step=True, on_epoch=False)
        logged, told = self.step.clip(gradient_clip_val)
        self._log(logged)
        for line in told:
            print(f"step {self.global_step}: {line}")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for parameter in self.parameters():  # the stacks, whose slots the optimiser's Parameters are
            parameter.grad = None

    def configure_optimizers(self) -> Any:
        groups = []
        for finetune in self.finetunes.values():
            steps = total_steps(finetune, self._data.train_dataloader(), self.trainer)
            parameters = finetune.train_in(self.model, self.train_projector)
            groups.append((parameters, finetune.settings, steps))
        optimizer, scheduler = make_optimizer(self.optimizer, groups)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((name, own.parameters) for name, own in self.finetunes.items() if own.parameters)

    # -- evaluation -----------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.step.validate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log([*self.step.losses.val_losses(), *self.step.losses.accuracies()])

    def test_step(self, work: Work, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluation.run(work)

    predict_step = test_step

    def on_test_epoch_end(self) -> None:
        self.evaluation.log.join()

    on_predict_epoch_end = on_test_epoch_end

    def begin_evaluation(self, split: Split) -> Evaluation:
        self.evaluation = evaluation_of(self, split)
        return self.evaluation

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
        answering = self.trainer.state.fn != "fit"
        checkpoint.verify(checkpoint_dict, self._belongs_to(), answering)
        if not answering:
            checkpoint.verify_end(checkpoint_dict, self.trainer)
        self._resumed = checkpoint_dict["mmpeft"]

    def on_train_start(self) -> None:
        if (resumed := getattr(self, "_resumed", None)) is not None:
            checkpoint.restore_rng(resumed["rng"])
            for (_, parameters), state in zip(self._trained(), resumed["finetunes"], strict=True):
                parameters.load_state_dict(state)

    def _belongs_to(self) -> dict[str, Any]:
        shapes = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        run = {"optimizer": self.optimizer, "seed": self.seed}
        return checkpoint.belongs_to(
            *(self.started, self.language, self.trainer, run, self.finetunes, self._data),
            *(self.engine.template.settings, self._learnt_from, shapes),
        )
