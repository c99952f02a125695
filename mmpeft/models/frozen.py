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
from mmpeft.models.decoder import decoder_config
from mmpeft.models.segment_attention import attending

READS_CACHE = "_can_checkpoint_with_cache"
"""What a layer of transformers calls that a cache is left to it when it recomputes, since it only reads it: true of
`PrefixCache`, the only one that a layer meets then."""


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
    config = decoder_config(model)
    for layer in _recomputing(model):
        layer._gradient_checkpointing_func = partial(_as_computed, layer, config)
        if hasattr(layer, READS_CACHE):
            setattr(layer, READS_CACHE, True)


def check_reads_cache(model: nn.Module, only_read: bool) -> None:
    """Args:
        model: the language model, in training.
        only_read: whether its cache gets nothing in a forward.

    Raises:
        RefusedError: its layers recompute and so lose a cache, or write into it once more.
    """
    for layer in _recomputing(model):
        if not (only_read and getattr(layer, READS_CACHE, False)):
            raise RefusedError(
                f"prefix tuning keeps its keys and values in the cache, which {type(layer).__name__} does not read "
                "alike when it recomputes its activations: set model.language.gradient_checkpointing to false, or "
                "take transformers 5.24 or newer"
            )


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
