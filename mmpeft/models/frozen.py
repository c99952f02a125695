"""The frozen base in training: in eval mode all the while, also where its layers recompute their activations.

In training mode a base drops by the rates of its config (GPT-2 and OPT a tenth), jitters what its routers read
(Phi-MoE) or clamps its own weights (Gemma 3n): a row would change with every step and with the rows beside it, and
what is trained would not be what is served.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft.errors import RefusedError
from mmpeft.models.segment_attention import attending


def recompute(model: Any) -> None:
    """Lets the layers of a language model recompute their activations in the backward, in eval mode.

    Raises:
        RefusedError: its class cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # of reentrant checkpoints, which lose gradients without
    except ValueError as error:
        raise RefusedError(f"{error} Set model.language.gradient_checkpointing to false") from error
    for layer in _recomputing(model):
        layer._gradient_checkpointing_func = partial(_as_computed, layer, model.get_decoder().config)


def set_mode(model: nn.Module, training: bool) -> None:
    """Eval mode; layers that recompute do so where their own mode, and nothing below them, says ``training``."""
    model.eval()
    for layer in _recomputing(model):
        layer.training = training


def _recomputing(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module


def _as_computed(layer: nn.Module, config: Any, function: Callable[..., Any], *inputs: Any) -> Any:
    """What transformers hands to a checkpoint: ``function`` is the layer's forward. It is computed again in eval mode
    and by the attention of the first time."""
    attention = config._attn_implementation

    def forward(*inputs: Any) -> Any:
        mode, layer.training = layer.training, False
        try:
            with attending(config, attention):
                return function(*inputs)
        finally:
            layer.training = mode

    return checkpoint(forward, *inputs, use_reentrant=False)
