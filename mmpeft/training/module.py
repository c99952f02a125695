"""The LightningModule: what trains, by which loss, with which optimiser, and what a checkpoint holds."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from mmpeft import bundle
from mmpeft.adapters import AdapterConfig
from mmpeft.adapters.sites import find_sites
from mmpeft.data.collate import Batch
from mmpeft.data.datamodule import VisionLanguageData
from mmpeft.data.features import FeatureCache
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel, TokenLosses
from mmpeft.models.vision import VisionConfig
from mmpeft.training import checkpoint
from mmpeft.training.optim import Finetune, warmup_then

RESUMED_SETTINGS = ("learning_rate", "projector_learning_rate", "weight_decay", "schedule", "warmup", "seed")


class VisionLanguageModule(L.LightningModule):
    """A frozen encoder and language model; a projector and an adapter that train.

    Args:
        language: the language model and how it is held.
        vision: the vision encoder and what becomes of its features.
        adapter: LoraConfig or IA3Config; None trains the projector alone.
        adapter_name: the finetune's name, also its folder's.
        train_projector: whether the projector trains.
        start_from: run directory to go on from: its projector, and its adapter of this name where it has one.
        learning_rate: of the adapter.
        projector_learning_rate: of the projector.
        weight_decay: of both; it pulls towards the base model.
        schedule: decay of both learning rates after warm-up.
        warmup: share of the steps over which they rise from zero.
        seed: start of the adapter and of a fresh projector.
    """

    def __init__(
        self,
        language: LanguageConfig = LanguageConfig(),  # noqa: B008 shown by --print_config, never written to
        vision: VisionConfig = VisionConfig(),  # noqa: B008
        adapter: AdapterConfig | None = None,
        adapter_name: str = "default",
        train_projector: bool = True,
        start_from: str | None = None,
        learning_rate: float = 1e-3,
        projector_learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup: float = 0.03,
        seed: int = 0,
    ):
        super().__init__()
        if adapter is None and not train_projector:
            raise ValueError("nothing would train: give an adapter, or set train_projector to true")
        self.language, self.vision = language, vision
        self.adapter, self.adapter_name = adapter, adapter_name
        self.train_projector, self.start_from = train_projector, start_from
        self.learning_rate, self.projector_learning_rate = learning_rate, projector_learning_rate
        self.weight_decay, self.schedule, self.warmup, self.seed = weight_decay, schedule, warmup, seed
        self.strict_loading = False  # a checkpoint holds what trains, not the frozen base
        self.model: MultimodalModel
        self.tokenizer: Any
        self.finetunes: list[Finetune] = []
        self._tokens: Counter[int] = Counter()
        self._correct: list[bool] = []
        self.earlier_instructions: dict[str, str | None] = {}

    # -- building -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Loads the frozen parts, once the data has been checked, and connects the data to them."""
        if not hasattr(self, "model"):
            self.model = self._build()
        data: VisionLanguageData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        cache = FeatureCache(data.cache, self.model.vision_encoder)
        cache.build(data.images())
        data.connect(self.tokenizer, self.model.vision_encoder.num_tokens, cache, self._served_adapter)

    @property
    def _served_adapter(self) -> str | None:
        return self.adapter_name if self.adapter_name in self.model.bank else None

    def _build(self) -> MultimodalModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = bundle.build_model(self.language, self.vision, self.trainer.strategy.root_device)
        self.tokenizer = load_tokenizer(self.language.name)
        self.identity = bundle.describe(self.language, model, self.tokenizer)
        source = self._own_run() or self.start_from
        if source:
            manifest = bundle.read_manifest(source)
            bundle.check_identity(manifest, self.identity, source)
            self.earlier_instructions = manifest.instructions
            bundle.load_trained(source, model, [n for n in manifest.adapters if n == self.adapter_name])
        if self.adapter and self.adapter_name in model.bank:
            self._check_loaded_adapter(model, self.adapter, str(source))
        elif self.adapter:
            model.bank.add(self.adapter_name, self.adapter, self.seed)
        for (
            parameter
        ) in model.bank.parameters():  # with adapter: null, a loaded one serves but stays as it is
            parameter.requires_grad_(self.adapter is not None)
        model.projector.requires_grad_(self.train_projector)
        self.finetunes = [self._finetune(model)]
        return model

    def _check_loaded_adapter(self, model: MultimodalModel, wanted: AdapterConfig, source: str) -> None:
        """A config that differs from the adapter it goes on from would be ignored without a word."""
        loaded = model.bank.entry(self.adapter_name)
        settings = vars(wanted).keys() - {
            "target_modules",
            "feedforward_modules",
        }  # compared by what they match
        differ = type(wanted) is not type(loaded.config) or any(
            getattr(wanted, name) != getattr(loaded.config, name) for name in settings
        )
        if differ or set(find_sites(model.language_model, wanted)) != set(loaded.sites):
            raise ValueError(
                f"adapter {self.adapter_name!r} of {source} is {loaded.config}, but this run wants {wanted}; "
                "use the same settings to go on with it, or another model.adapter_name to begin a new one"
            )

    def _own_run(self) -> str | None:
        """Outside of fit, a run's own results are what is meant."""
        directory = Path(self.trainer.default_root_dir)
        fitting = self.trainer.state.fn == "fit"
        return str(directory) if not fitting and (directory / bundle.MANIFEST).exists() else None

    def _finetune(self, model: MultimodalModel) -> Finetune:
        slices: list[tuple[nn.Parameter, int]] = []
        if self.adapter is not None:
            slot = model.bank.entry(self.adapter_name).slot
            slices += [(parameter, slot) for parameter in model.bank.parameters()]
        if self.train_projector:
            slices += [(parameter, 0) for parameter in model.projector.parameters()]
        return Finetune(self.adapter_name, slices)

    # -- training -------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        # from_pretrained leaves modules in eval mode and Lightning keeps each as it is, so dropout would stay off.
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum over tokens; `on_before_optimizer_step` makes it the mean over all tokens of the step, which
        stays exact when micro-batches of different length are accumulated."""
        losses = self.model.token_losses(batch)
        self._tokens[0] += len(losses.nll)
        if len(losses.nll):
            self.log("train_loss", losses.nll.detach().mean(), prog_bar=True, batch_size=len(losses.nll))
        self.log("conversations", float(sum(map(len, batch.examples))), reduce_fx="sum", on_step=True)
        return losses.nll.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for number, finetune in enumerate(self.finetunes):
            finetune.scale(self.trainer.accumulate_grad_batches / max(1, self._tokens[number]))
        self._tokens.clear()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each finetune by its own norm; one whose norm is not finite sits the step out."""
        self._held = []
        for finetune in self.finetunes:
            norm = finetune.clip(gradient_clip_val)
            self.log("gradient_norm", norm)
            if not math.isfinite(norm):
                finetune.skipped += 1
                print(
                    f"step {self.global_step}: {finetune.name!r} has a gradient that is not finite; its step is skipped"
                )
                self._held.append(finetune.hold(optimizer))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for restore in self._held:
            restore()

    def configure_optimizers(self) -> Any:
        groups = []
        if self.adapter is not None:
            groups.append(
                {"params": self.model.bank.parameters(), "lr": self.learning_rate, "name": "adapter"}
            )
        if self.train_projector:
            projector = list(self.model.projector.parameters())
            groups.append({"params": projector, "lr": self.projector_learning_rate, "name": "projector"})
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, warmup_then(self.schedule, self.warmup, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- evaluation -----------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.model.token_losses(batch)
        self.log("val_loss", losses.nll.mean(), batch_size=len(losses.nll), prog_bar=True)
        self._correct += exactly_right(losses)

    def on_validation_epoch_end(self) -> None:
        if self._correct:
            self.log("val_exact_match", sum(self._correct) / len(self._correct), prog_bar=True)
        self._correct = []

    def predict_step(self, batch: Batch, batch_idx: int) -> list[tuple[int, str]]:
        """(number of the record, answer) for every prompt of the batch."""
        answers = self.model.generate(batch, self.tokenizer.eos_token_id)
        decode = self.trainer.datamodule.template.decode  # pyright: ignore[reportAttributeAccessIssue]
        return [
            (example, decode(ids))
            for examples, row in zip(batch.examples, answers, strict=True)
            for example, ids in zip(examples, row, strict=True)
        ]

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.predict_step(batch, batch_idx)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What trains, and nothing of the frozen base."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint_dict: dict[str, Any]) -> None:
        checkpoint_dict["mmpeft"] = checkpoint.stamp(self._belongs_to())

    def on_load_checkpoint(self, checkpoint_dict: dict[str, Any]) -> None:
        checkpoint.verify(checkpoint_dict, self._belongs_to())
        self._rng = checkpoint_dict["mmpeft"]["rng"]

    def on_train_start(self) -> None:
        if (rng := getattr(self, "_rng", None)) is not None:
            checkpoint.restore_rng(rng)

    def _belongs_to(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed. The settings are those whose old value resuming would
        bring back, whatever the command line says."""
        data: VisionLanguageData = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        settings = {name: getattr(self, name) for name in RESUMED_SETTINGS}
        order = {"seed": data.seed, "packing": asdict(data.packing), "train": data.paths["train"]}
        shapes = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        return {"base": self.identity, "model": settings, "data": order, "tensors": shapes}


def exactly_right(losses: TokenLosses) -> list[bool]:
    """Per conversation, whether every labelled token was the most likely one.

    Greedy decoding would then have written exactly this answer, and any other otherwise: as long as it has
    written the answer's beginning, it stands where the labels stand.
    """
    conversations: dict[tuple[int, int], bool] = {}
    for row, segment, right in zip(
        losses.rows.tolist(), losses.segments.tolist(), losses.correct.tolist(), strict=True
    ):
        conversations[row, segment] = conversations.get((row, segment), True) and right
    return list(conversations.values())
