"""The base of every method's config: the hooks by which a method of finetuning says everything about itself.

A method is one file beside this one, with a config and a `Stack`, and one line in `registry.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mmpeft.adapters.methods.stack import Stack
from mmpeft.adapters.roles import ROLES, Role, roles_called
from mmpeft.errors import RefusedError

TargetNames = Callable[[list[str]], list[str]]
"""Paths of what an adapter changes -> how ``target_modules`` names them in its file."""

Beyond = Literal["head", "embedding", "norms"]
"""Layers that are no linears of the blocks."""


@dataclass(frozen=True)
class ModelInputs:
    """The sizes of what a language model reads: what methods that change it build their tensors from."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    image_shape: tuple[int | None, int] | None
    """(tokens, dim) of one image's features, None tokens where their number depends on the image; None where the model
    reads no images."""
    no_prefix: str | None = None
    """Why the layers' keys and values cannot begin with a prefix; None where they can."""


class AdapterConfig:
    """Base of the method configs; the CLI offers every subclass under ``adapter:``."""

    method: ClassVar[str]
    """The name that files, routing and reports use for the method."""
    home: ClassVar[Literal["layers", "inputs"]] = "layers"
    """Whether the method changes layers of the model or what the model reads."""
    second_factor: ClassVar[str | None] = None
    """Of its stack, the Parameter that LoRA+ trains faster than the rest; None where there is none."""
    composed: ClassVar[bool] = False
    """Whether it consists of other methods and has no tensors of its own."""
    auto: ClassVar[tuple[Role, ...]] = ROLES
    """The roles of the linears that ``target_modules: auto`` means."""
    whole_feedforwards: ClassVar[bool] = False
    """Whether "auto" means the whole feed-forward of each block instead, which may then be named too."""
    beyond: ClassVar[tuple[Beyond, ...]] = ()
    """What may be named beside linears: the output head, the input embedding, a norm."""
    fields_of_targets: ClassVar[tuple[str, ...]] = ()
    """Further fields that name some of the targets; names that match none are refused."""
    on_experts: ClassVar[bool] = False
    """Whether it changes experts that are one tensor per projection, see `make_experts_stack`."""
    changes_weight: ClassVar[bool] = False
    """Whether it changes a weight of the base, see `change_weight`."""
    peft_type: ClassVar[str]
    """``peft_type`` of its files; it begins with "MMPEFT_" for methods that PEFT has no format for."""
    peft_refused: ClassVar[tuple[str, ...]] = ()
    """Fields of the method's config in PEFT that, when set, change what the tensors mean and are lacking here."""
    usual: ClassVar[dict[str, dict[str, Any]]] = {}
    """Label -> the fields of a usual size, for tables that compare methods."""

    target_modules: str | list[str] = "auto"
    """Which layers it changes: by their names, or by a word, "auto" or as of `roles_called`."""
    layers: list[int] | str | None = None
    """Only those of these decoder layers, see `choose_layers`; None is all."""

    # -- shapes ---------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The dimension that may differ from slot to slot (rank, width, tokens); 0 for methods without."""
        return 0

    @property
    def roles(self) -> tuple[Role, ...] | None:
        """The roles of the linears that ``target_modules`` means; None where it means some by their names."""
        if self.target_modules == "auto":
            return None if self.whole_feedforwards else self.auto
        return roles_called(self.target_modules)

    @property
    def invocation(self) -> Sequence[int]:
        """The ids of tokens from whose last occurrence on the method acts; empty where it acts on all tokens."""
        return ()

    def parts(self) -> list["AdapterConfig"]:
        """The methods that a finetune consists of."""
        return [self]

    def place(self, path: str) -> str:
        """The key of the method's stack among those of the layer at ``path``."""
        return self.method

    def input_features(self, inputs: ModelInputs) -> tuple[int, int]:
        """What a method that changes the model's inputs counts as (in, out) features.

        Raises:
            RefusedError: the model does not read what the method changes.
        """
        return inputs.hidden_size, inputs.hidden_size

    def make_stack(self, path: str, in_features: int, out_features: int, num_slots: int, size: int) -> Stack:
        """An empty stack for the layer at ``path``. Every method has one; a hybrid has those of its parts."""
        raise NotImplementedError(f"{type(self).__name__} has no make_stack")

    def shapes(self, path: str, in_features: int, out_features: int) -> dict[str, list[int]]:
        """What `Stack.tensors` returns for a slot of this config: its names and shapes. Every method has them; a hybrid
        has those of its parts."""
        raise NotImplementedError(f"{type(self).__name__} has no shapes")

    def make_experts_stack(
        self, path: str, num_experts: int, in_features: int, out_features: int, num_slots: int, size: int
    ) -> Stack:
        """An empty stack for a projection of packed experts. Only of methods with `on_experts`."""
        raise NotImplementedError(f"{type(self).__name__} changes no experts")

    def expert_shapes(
        self, path: str, num_experts: int, in_features: int, out_features: int
    ) -> dict[str, list[int]]:
        """`shapes` of a projection of packed experts. Only of methods with `on_experts`."""
        raise NotImplementedError(f"{type(self).__name__} changes no experts")

    def check_experts(self, path: str) -> None:
        """Raises:
        RefusedError: the method, or this config of it, cannot change the packed experts at ``path``.
        """
        if not self.on_experts:
            raise RefusedError(
                f"{path} holds all experts of a mixture in one tensor, which {self.method} cannot change; name the "
                "linears that you mean in target_modules, or choose LoRA or IA3"
            )

    def check_layer(self, path: str, layer: nn.Module) -> None:
        """Raises:
        RefusedError: the method cannot change what the layer at ``path``, a target, computes.
        """

    def settled(self, downs: list[str]) -> "AdapterConfig":
        """The config with what it leaves to the model's architecture written out.

        Args:
            downs: paths of the last linears of the feed-forwards.
        """
        return self

    def check_fits(self, features: Sequence[tuple[int, int]]) -> None:
        """Called before a new finetune trains, with the (in, out) features of every place that it is to have.

        Raises:
            RefusedError: its size makes no sense there.
        """

    def trained_roles(self, path: str) -> tuple[Role, ...] | None:
        """The roles whose features train where the linear at ``path`` is fused; None is all of them. A method that
        says so has a stack with `Stack.train_only`."""
        return None

    # -- files ----------------------------------------------------------------------------------------------

    @classmethod
    def reads_peft(cls, raw: dict[str, Any]) -> bool:
        """Whether a file with these fields is of this method."""
        return raw.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, raw: dict[str, Any]) -> "AdapterConfig":
        """The config that a file's fields stand for.

        Raises:
            RefusedError: a field is missing, impossible, or changes what the tensors mean.
        """
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})  # pyright: ignore

    def to_peft(self, sites: list[str], names: TargetNames, inputs: ModelInputs | None) -> dict[str, Any]:
        """The fields of its file beside the base's name. Targets are always written out, because PEFT's own defaults
        differ from the papers' for several architectures.

        Args:
            sites: paths of what the adapter changes.
            names: of the sites.
            inputs: of a method that changes the model's inputs; None for one of layers.
        """
        targets = {} if inputs else {"target_modules": names(sites)}
        return {"peft_type": self.peft_type, **vars(self), **targets, "layers": None}

    def experts_to_peft(self, paths: list[str], fields: dict[str, Any]) -> dict[str, Any]:
        """What the file's ``fields`` become where the adapter also changes packed experts, by the paths of their
        projections. Only of methods with `on_experts`."""
        raise NotImplementedError(f"{type(self).__name__} changes no experts")

    def peft_head(self) -> dict[str, Any]:
        """What the files of PEFT's own methods begin with."""
        return {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}

    def changes_nothing(self, layer: nn.Module, tensors: dict[str, Tensor]) -> bool:
        """Whether a layer with these tensors of a slot, named as `shapes` does, computes what it does without: a
        finetune whose every layer says so is none."""
        return False

    # -- the weights of the base ----------------------------------------------------------------------------

    def fold(self, path: str, model: nn.Module, stack: Any, slot: int) -> Callable[[], None]:
        """What merges a slot into the linear at ``path`` of the plain ``model``. It checks now and changes the linear
        when it is called, so that all of an adapter is checked before anything changes.

        Raises:
            RefusedError: the linear cannot take it exactly.
        """
        raise RefusedError(
            f"{self.method} is no change of a weight and cannot be merged; serve the adapter, or merge one of a method "
            "that changes weights, such as LoRA or IA3"
        )

    def change_weight(self, change: Tensor, weight: Tensor, path: str, stack: Any, slot: int) -> None:
        """Turns ``change`` (O, I), what earlier methods did to ``weight`` (O, I), into what they and this slot do. Only
        of methods with `changes_weight`.

        The difference itself is carried along: taking it from two weights would lose the digits that a small one has.
        """
        raise NotImplementedError(f"{type(self).__name__} changes no weight")

    def change_experts(self, change: Tensor, weight: Tensor, stack: Any, slot: int) -> None:
        """`change_weight` of packed experts, all (experts, O, I). Only of methods with `on_experts`."""
        raise NotImplementedError(f"{type(self).__name__} changes no experts")

    def change_norm(self, stack: Any, slot: int) -> Tensor | None:
        """Frobenius norm of the slot's change where no other method acts, if there is a short way to it."""
        return None


@dataclass(kw_only=True)
class LayersConfig(AdapterConfig):
    """Base of the configs of methods that change layers of chosen blocks."""

    layers: list[int] | str | None = None
    """Only these decoder layers: numbers, "8-15", "8:", "last 50%", "middle 1/3"; None is all."""


def names_module(path: str, names: str | list[str]) -> bool:
    """PEFT's rule: a list names modules by their path or the end of it, a string is a pattern for the whole
    path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def required(raw: dict[str, Any], key: str) -> Any:
    """A field of a PEFT config.

    Raises:
        RefusedError: it is missing.
    """
    if not raw.get(key):
        raise RefusedError(f"{key} is missing")
    return raw[key]
