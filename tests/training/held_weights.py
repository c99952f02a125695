"""A callback for processes of their own: the weights of the decoder layers that are whole in steps and between them."""

from typing import Any

import lightning as L

from mmpeft.adapters.architecture import block_linears
from mmpeft.transfer import is_sharded


class HeldWeights(L.Callback):
    """Prints, after every step, how many bytes the layers' linears computed with, and how many of them are there still,
    beside the shards."""

    def __init__(self):
        self.weights: dict[str, Any] = {}
        self.bytes = 0

    def on_train_start(self, trainer, pl_module):
        model = pl_module.model.language_model
        for path in block_linears(model):
            model.get_submodule(path).register_forward_pre_hook(
                lambda own, _, path=path: self._see(path, own.weight)
            )

    def on_train_batch_end(self, *_):
        left = sum(own.untyped_storage().nbytes() for own in self.weights.values())
        print(f"whole in a step {self.bytes}, between steps {left} bytes", flush=True)

    def _see(self, path: str, weight: Any) -> None:
        assert not is_sharded(weight), "whole in a forward"
        if path not in self.weights:
            self.bytes += weight.untyped_storage().nbytes()
        self.weights[path] = weight
