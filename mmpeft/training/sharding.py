"""A base that is sharded over the processes of a run (FSDP2): each holds a part of every decoder layer and has the
whole of one only while that computes. What trains stays whole in each, and is reduced by hand as without.

A layer is gathered from all processes, so that all must read alike often, whatever they read:

- With gradients every process takes every batch in one forward and one backward, which pass all layers: one without
  rows reads a token in vain (`MultimodalModel.idle`), and the backward goes down to the embeddings everywhere
  (`LanguageReader.together`).
- Without, every forward is announced, and a process that waits for the others at a barrier reads as often as they do:
  questions may be shared out, or answered by one process alone.

Source: torch 2.14, ``torch.distributed.fsdp.fully_shard``.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmpeft.adapters.architecture import find_layers
from mmpeft.errors import RefusedError
from mmpeft.training.finetune import Finetune
from mmpeft.training.processes import Reduced, lost_others
from mmpeft.training.target_choice import has_budget
from mmpeft.transfer import is_sharded

NAME = "model_parallel"
"""Lightning's, as a setting."""
INSTEAD = "leave trainer.strategy at auto, where each process holds all of the base"
OF_A_STAND_IN = r"FSDP2-wrapped module .* returned a view tensor"
"""Warning where the decoder stands for hidden states that are there already: it holds nothing to be gathered."""


class Sharded(Reduced):
    """`Reduced`, with a base of which each process holds a part."""

    idle: Callable[[], object] | None = None
    """A forward that answers nobody, once there is a model."""
    _waits = False
    """Whether this process reads for others at a barrier."""

    def place(self, language_model: Any) -> None:
        """Shards the layers' matrices and moves all else to the device.

        Args:
            language_model: frozen, in main memory.

        Raises:
            RefusedError: its layers are not known, or share weights.
        """
        layers, root = _layers(language_model)
        _check_apart(language_model, layers)
        warnings.filterwarnings("ignore", message=OF_A_STAND_IN)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for layer in layers.values():  # moved and cut one by one, so that no two of them are there whole
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=_small(layer))
            layer.set_custom_all_gather(Gather())
        whole = {own for own in root.parameters() if not is_sharded(own)}
        fully_shard(root, mesh=mesh, ignored_params=whole)  # holds nothing, and has layers fetched ahead
        language_model.to(self.root_device)
        first, *_ = layers.values()
        first.register_forward_pre_hook(self._announce, prepend=True)
        with torch.no_grad():  # torch keeps what it gathers into, which inference mode must not have made
            for layer in layers.values():
                layer.unshard()
                layer.reshard()
        print(_told(language_model, self.world_size), file=sys.stderr)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Reads as often as the others do until all are here."""
        while self.idle is not None and self._are_reading(False):
            self._waits = True
            with torch.no_grad():
                self.idle()
            self._waits = False
        super().barrier(*args, **kwargs)

    def _announce(self, layer: nn.Module, inputs: Any) -> None:
        """Before the first layer of a forward; it then has the layers of all processes."""
        if not (self.idle is None or self._waits or torch.is_grad_enabled()):
            self._are_reading(True)

    def _are_reading(self, this_one: bool) -> bool:
        """Whether any process does; those that wait read a token for those that do."""
        return self.sum_on_host([int(this_one)])[0] > 0

    def teardown(self) -> None:
        """Where Lightning would move the model to main memory, of which no process has a whole one."""
        module, self._lightning_module = self._lightning_module, None
        self.idle = None
        super().teardown()
        self._lightning_module = module


class Gather:
    """torch's own gathering of a layer, which says so where a process has ended.

    Source: torch 2.14, ``AllGather`` of ``FSDPModule.set_custom_all_gather``.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        with lost_others():
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def sharded(trainer: Any) -> Sharded | None:
    """The processes of a run whose base is sharded; None for any other."""
    return trainer.strategy if isinstance(trainer.strategy, Sharded) else None


def check_sharded(trainer: Any) -> None:
    """Before other processes are begun.

    Raises:
        RefusedError: settings of the trainer that a sharded base cannot have.
    """
    if sharded(trainer) is None:
        return
    if trainer.world_size == 1:
        raise RefusedError(
            f"trainer.strategy is {NAME}, but the run has one process, which would hold all of the base: set "
            "trainer.devices or trainer.num_nodes above 1, or leave trainer.strategy at auto"
        )
    if (precision := trainer.precision) != "32-true":
        raise RefusedError(
            f"trainer.precision is {precision}, which would change the dtype of a base that is sharded already; leave "
            "it out, and set model.language.dtype"
        )


def check_finetunes(trainer: Any, finetunes: Mapping[str, Finetune]) -> None:
    """Raises:
    RefusedError: a finetune's places are to be chosen by what the base's weights are worth, or its objective reads
        rows a second time, which processes without such rows would not.
    """
    if sharded(trainer) is None:
        return
    for name, own in finetunes.items():
        if own.settings.kind.has_reference:
            raise RefusedError(
                f"{name!r} has the objective {own.settings.objective}, whose reference reads its rows once more than "
                f"other processes read theirs, so that layers cannot be gathered together: use orpo or simpo, or "
                f"{INSTEAD}"
            )
    budgets = [name for name, own in finetunes.items() if own.adapter and has_budget(own.adapter)]
    if budgets:
        raise RefusedError(
            f"{budgets[0]!r} has its target_modules chosen by a budget, which needs gradients of the base's weights, "
            f"and of these each process has a part: name the modules (`mmpeft sites --data` ranks them), or {INSTEAD}"
        )


def _layers(language_model: Any) -> tuple[dict[str, Any], Any]:
    """The decoder layers by path, and the module that calls them.

    Raises:
        RefusedError: they are not known.
    """
    try:
        paths = find_layers(language_model)
    except RefusedError as error:
        raise RefusedError(f"trainer.strategy is {NAME}: {error}; or {INSTEAD}") from error
    root = paths[0].rpartition(".")[0].rpartition(".")[0]
    return {path: language_model.get_submodule(path) for path in paths}, language_model.get_submodule(root)


def _check_apart(language_model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises:
    RefusedError: a weight belongs to several layers, or to one and to what is around them.
    """
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    around = [module for module in language_model.modules() if id(module) not in inside]
    owners = Counter(id(own) for layer in layers.values() for own in {*layer.parameters()})
    owners.update({id(own) for module in around for own in module.parameters(recurse=False)})
    for path, layer in layers.items():
        for name, own in layer.named_parameters():
            if owners[id(own)] > 1:
                raise RefusedError(
                    f"trainer.strategy is {NAME}, but {type(language_model).__name__} has {path}.{name} in several of "
                    f"its layers, which are gathered one at a time: {INSTEAD}"
                )


def _small(layer: nn.Module) -> set[nn.Parameter]:
    """Norms, biases and scalars: a thousandth of a layer, which stays whole in each process."""
    return {own for own in layer.parameters() if own.dim() < 2}


def _told(language_model: nn.Module, processes: int) -> str:
    parts = [own for own in language_model.parameters() if is_sharded(own)]
    held, whole = sum(local_bytes(own) for own in parts), sum(own.nbytes for own in parts)
    beside = sum(own.nbytes for own in language_model.parameters() if not is_sharded(own))
    return (
        f"sharded: each of {processes} processes holds {held / 1e9:.3g} of the {whole / 1e9:.3g} GB of the layers, and "
        f"embeddings and head, {beside / 1e9:.3g} GB"
    )


def local_bytes(parameter: Tensor) -> int:
    """What this process has of a sharded tensor, between forwards."""
    local: Any = parameter
    return local.to_local().untyped_storage().nbytes()
