"""What a PEFT file holds beside its method, each kind as a part of its own: retrained modules and trained biases.

=========================== ============================= ====================================================
field                       key                           part
=========================== ============================= ====================================================
``modules_to_save``         ``<path>.weight``             the change of the weight of a linear or the embedding
``modules_to_save``         ``<path>.weight``             the change of the weight of a norm
``bias``                    ``<path>.bias``               the change of a bias
``lora_bias``               ``<path>.lora_B.bias``        the change of a bias, times the scaling
``trainable_token_indices`` ``...trainable_tokens_delta`` rows of the embedding, and of a head tied to it
none (a trained base)       ``<path>.weight``             as of modules_to_save, for all that share the weight
=========================== ============================= ====================================================

A part holds what differs from the base, so that rows of such a finetune share a batch with all others.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmpeft.adapters.adapter_file import KEY_PREFIX, AdapterFile
from mmpeft.adapters.base_weights import is_quantised, is_transposed
from mmpeft.adapters.blocks import linear_features
from mmpeft.adapters.methods.base import names_module
from mmpeft.adapters.targets import further_layers, is_norm
from mmpeft.errors import RefusedError

BESIDE = ("modules_to_save", "bias", "lora_bias", "trainable_token_indices")
"""The fields that speak of it."""
WEIGHT_PART, BIAS_PART = ("MMPEFT_FULL", "weight_delta"), ("MMPEFT_BITFIT", "bias_delta")
NORM_PART = ("MMPEFT_NORM_WEIGHTS", "norm_delta")
TOKENS_TYPE = "MMPEFT_TOKEN_ROWS"
TOKENS = ".token_adapter.trainable_tokens_delta"
LORA_BIAS = ".lora_B.bias"


def split(file: AdapterFile, model: nn.Module, scaling_at: Callable[[str], float]) -> list[AdapterFile]:
    """The file without what it holds beside its method, and this as further files.

    Args:
        file: as `fitted` returns it.
        model: the base.
        scaling_at: path -> scaling of the method there, which its own biases are multiplied with.

    Raises:
        RefusedError: a field promises a tensor that is not there, or what is retrained has no part here.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    named = {
        key: key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".") if key.startswith(KEY_PREFIX) else ""
        for key in file.tensors
    }
    saved = {named[key]: tensor for key, tensor in file.tensors.items() if named[key] in known}
    rest = {key: tensor for key, tensor in file.tensors.items() if named[key] not in known}
    _check_all_there(file, model, saved)
    weights, biases = _changes(file, model, saved)
    for key in [key for key in rest if key.endswith(LORA_BIAS) and file.fields.get("lora_bias")]:
        path = key.removeprefix(KEY_PREFIX).removesuffix(LORA_BIAS)
        biases[path] = biases.get(path, 0) + scaling_at(path) * rest.pop(key).float()
    tokens = _tokens(file, model, rest)
    fields = {field: own for field, own in file.fields.items() if field not in BESIDE}
    parts = [replace(file, fields=fields, tensors=rest)]
    norms = {path: weights.pop(path) for path in [*weights] if weights[path].dim() == 1}
    for (peft_type, key), own in ((WEIGHT_PART, weights), (NORM_PART, norms), (BIAS_PART, biases)):
        part = {"peft_type": peft_type, "target_modules": [*own]}
        tensors = {f"{KEY_PREFIX}{path}.{key}": tensor for path, tensor in own.items()}
        parts += [replace(file, fields=part, tensors=tensors)] if own else []
    return parts + tokens


def _tokens(file: AdapterFile, model: nn.Module, rest: dict[str, Tensor]) -> list[AdapterFile]:
    """The part of trained tokens, whose tensors leave ``rest``.

    Raises:
        RefusedError: they are of another module than the input embedding, or not in the file.
    """
    indices = file.fields.get("trainable_token_indices")
    if not indices:
        return []
    (path,) = further_layers(model, ("embedding",), "")
    by_name = indices if isinstance(indices, dict) else {path: indices}
    key = f"{KEY_PREFIX}{path}{TOKENS}"
    if len(by_name) != 1 or not names_module(path, list(by_name)) or key not in rest:
        raise RefusedError(
            f"{file.weights}: trainable_token_indices is {indices!r}, which is served on the input embedding {path} "
            "alone, with its tensor in the file; apply the adapter in PEFT, by merge_and_unload"
        )
    rows, weight = rest.pop(key), model.get_submodule(path).weight
    heads = [p for p, m in further_layers(model, ("head",), "").items() if m.weight is weight]
    own = {
        "token_indices": next(iter(by_name.values())),
        "target_modules": [path, *heads],
        "tied_heads": heads,
    }
    tensors = {f"{KEY_PREFIX}{each}.token_rows": rows for each in (path, *heads)}
    return [replace(file, fields={"peft_type": TOKENS_TYPE, **own}, tensors=tensors)]


def _changes(
    file: AdapterFile, model: nn.Module, saved: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What differs from the base, by path: weights (O, I), or (O,) of norms, and biases (O,), in fp32."""
    weights, biases = dict[str, Tensor](), dict[str, Tensor]()
    retrained = tuple(file.fields.get("modules_to_save") or ())
    modules = dict(model.named_modules())
    for name, tensor in saved.items():
        path, _, kind = name.rpartition(".")
        module: Any = modules[path]
        change = _change(file, module, name, tensor)
        if not change.any():
            continue
        if kind == "bias":
            biases[path] = change
            continue
        shared = [p for p, m in modules.items() if getattr(m, "weight", None) is module.weight]
        for each in [path] if retrained and path.endswith(retrained) else shared:
            weights[each] = change.T if is_transposed(modules[each]) else change
    return weights, biases


def _change(file: AdapterFile, module: Any, name: str, tensor: Tensor) -> Tensor:
    """What a tensor adds to that of the base, laid out as it."""
    base = getattr(module, name.rpartition(".")[2])
    where = f"{file.weights}: {name} of a {type(module).__name__}"
    if not tensor.is_floating_point() or tensor.shape != base.shape:
        is_vocabulary = tensor.dim() == 2 and tensor.shape[1:] == base.shape[1:]
        hint = f"; the vocabulary was resized: call resize_token_embeddings({len(tensor)}) on the base first"
        raise RefusedError(
            f"{where} holds {tensor.dtype} of shape {list(tensor.shape)}, the base has {list(base.shape)}"
            f"{hint if is_vocabulary else ''}"
        )
    change = tensor.float() - base.detach().float().cpu()
    is_bias = name.endswith(".bias")
    if change.any() and not is_bias and (not _may_change(module) or is_quantised(module)):
        raise RefusedError(
            f"{where} is retrained (modules_to_save), which is served on dense linears, embeddings and norms alone; "
            "apply the adapter in PEFT, by merge_and_unload, and serve the model that this makes"
        )
    return change


def _may_change(module: nn.Module) -> bool:
    return linear_features(module) is not None or isinstance(module, nn.Embedding) or is_norm(module)


def _check_all_there(file: AdapterFile, model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Raises:
    RefusedError: a field promises a tensor that the file does not have.
    """
    wanted: dict[str, list[str]] = {}
    names = list(dict(model.named_parameters(remove_duplicate=False)))
    if retrained := tuple(file.fields.get("modules_to_save") or ()):
        paths = tuple(f"{path}." for path, _ in model.named_modules() if path.endswith(retrained))
        wanted["modules_to_save"] = [name for name in names if name.startswith(paths)]
    biases = [name for name in names if name.endswith(".bias")]
    adapted = {key.removeprefix(KEY_PREFIX).split(".lora_A")[0] for key in file.tensors if ".lora_A" in key}
    if (kind := file.fields.get("bias")) in ("all", "lora_only"):
        own = biases if kind == "all" else [b for b in biases if b.removesuffix(".bias") in adapted]
        wanted["bias"] = own
    if file.fields.get("lora_bias"):
        wanted["lora_bias"] = [path + LORA_BIAS for path in sorted(adapted)]
        saved = saved | {key.removeprefix(KEY_PREFIX): tensor for key, tensor in file.tensors.items()}
    for field, expected in wanted.items():
        if missing := [name for name in expected if name not in saved]:
            raise RefusedError(
                f"{file.weights}: {field} is {file.fields[field]!r}, but {missing[0]} is not in the file "
                f"({len(missing)} of {len(expected)} are missing); save the adapter anew"
            )
