"""A callback for processes of their own: which weights of the decoder layers a process has between steps."""

import gc

import lightning as L
from torch import Tensor, nn

from mmpeft.adapters.architecture import find_layers
from mmpeft.transfer import is_sharded


class HeldWeights(L.Callback):
    """Prints, after every step, how many bytes of matrices of the layers' shapes there are, whole."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        model = pl_module.model.language_model
        print(f"whole between steps: {whole_bytes(model)} of {layer_bytes(model)} bytes", flush=True)


def layer_bytes(model: nn.Module) -> int:
    """Of all matrices of the layers, whichever process holds them."""
    return sum(own.nbytes for own in _matrices(model))


def whole_bytes(model: nn.Module) -> int:
    """Of tensors in memory that have the shape of one of them; shards have another."""
    shapes = {own.shape for own in _matrices(model)}
    found = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    alike = [each for each in found if each.shape in shapes and not is_sharded(each)]
    storages = {id(own.untyped_storage()): own.untyped_storage() for own in alike}
    pointers = {own.data_ptr(): own.nbytes() for own in storages.values()}
    return sum(pointers.values())


def _matrices(model: nn.Module) -> list[Tensor]:
    layers = [model.get_submodule(path) for path in find_layers(model)]
    return [own for layer in layers for own in layer.parameters() if own.dim() > 1]
