"""Adapter files by PEFT's options on many families: each computes what PEFT computes, or is refused by its field."""

import re
from collections import Counter

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft.adapters import AdapterBank
from mmpeft.adapters.architecture import find_linears
from mmpeft.adapters.blocks import last_name
from mmpeft.adapters.peft_format import load_adapter
from mmpeft.adapters.targets import is_norm
from mmpeft.errors import RefusedError
from tests.adapters.test_architecture_roles import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]
CALL = [3, 4]
"""The invocation tokens of activated adapters, which the first row of `IDS` has once and the last twice."""
FAMILIES = (
    "llama",
    "smollm",
    "qwen2",
    "mistral",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon-7b",
    "bloom",
)
"""Separate and fused projections, tied and free heads, Conv1D, biases, one feed-forward that gets flat rows."""


def names(model):
    """Last names of the linears in the blocks, in order."""
    return list(dict.fromkeys(last_name(path) for path in find_linears(model)))


def head(model):
    return next(path for path, module in model.named_modules() if module is model.get_output_embeddings())


def embedding(model):
    return next(path for path, module in model.named_modules() if module is model.get_input_embeddings())


def norms(model):
    """Last names of the norms, in order."""
    return list(dict.fromkeys(last_name(path) for path, module in model.named_modules() if is_norm(module)))


def last_of(model):
    return last_name(embedding(model))


def lora(**fields):
    return lambda model: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": names(model)[:2]}
        | {name: value(model) if callable(value) else value for name, value in fields.items()}
    )


def ia3(**fields):
    return lambda model: peft.IA3Config(
        **{"target_modules": names(model)[:2], "feedforward_modules": []}
        | {name: value(model) if callable(value) else value for name, value in fields.items()}
    )


VARIANTS = {
    "plain": lora(),
    "all-linear": lora(target_modules="all-linear"),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pattern": lora(target_modules=lambda m: rf".*\.1\..*({'|'.join(names(m))})"),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="OLoRA"),
    "exclude names": lora(target_modules="all-linear", exclude_modules=lambda m: names(m)[:1]),
    "exclude pattern": lora(target_modules="all-linear", exclude_modules=r".*\.0\..*"),
    "layers": lora(layers_to_transform=[1]),
    "one layer": lora(layers_to_transform=0),
    "rank pattern": lora(rank_pattern=lambda m: {names(m)[0]: 7}),
    "alpha pattern": lora(alpha_pattern=lambda m: {names(m)[-1]: 3, names(m)[1]: 5}),
    "both patterns": lora(
        rank_pattern=lambda m: {rf".*\.1\..*{names(m)[0]}": 2}, alpha_pattern=lambda m: {names(m)[0]: 9}
    ),
    "dora with patterns": lora(use_dora=True, rank_pattern=lambda m: {names(m)[0]: 7}),
    "a name that matches nothing": lora(target_modules=lambda m: [*names(m)[:2], "nothing_here"]),
    "bias of the layers": lora(bias="lora_only"),
    "bias of all": lora(bias="all"),
    "lora bias": lora(lora_bias=True),
    "head": lora(target_modules=lambda m: [names(m)[0], head(m)]),
    "head alone": lora(target_modules=lambda m: [head(m)]),
    "embedding": lora(target_modules=lambda m: [names(m)[0], last_of(m)]),
    "dora embedding": lora(use_dora=True, target_modules=lambda m: [names(m)[0], last_of(m)]),
    "norms retrained": lora(modules_to_save=lambda m: norms(m)),
    "norm and its bias retrained": lora(bias="all", modules_to_save=lambda m: norms(m)[-1:]),
    "head retrained": lora(modules_to_save=lambda m: [head(m)]),
    "embedding retrained": lora(modules_to_save=lambda m: [last_of(m)]),
    "tokens": lora(trainable_token_indices=[1, 5, 9]),
    "activated": lora(alora_invocation_tokens=CALL, task_type="CAUSAL_LM"),
    "activated everywhere in the blocks": lora(
        alora_invocation_tokens=CALL, task_type="CAUSAL_LM", target_modules="all-linear"
    ),
    "replicated": lora(layer_replication=[[0, 2], [1, 2]]),
    "ia3": ia3(),
    "ia3 inputs": ia3(target_modules=lambda m: names(m)[:3], feedforward_modules=lambda m: names(m)[2:3]),
    "ia3 exclude": ia3(exclude_modules=r".*\.0\..*"),
    "ia3 head retrained": ia3(modules_to_save=lambda m: [head(m)]),
    "vera": lambda m: peft.VeraConfig(target_modules=names(m)[:1]),
    "prompt": lambda _: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda _: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
"""Name -> what makes PEFT's config for a model."""
REFUSED = {
    "pissa": "init_lora_weights",
    "olora": "init_lora_weights",
    "replicated": "layer_replication",
    "vera": "peft_type is 'VERA'",
    "prompt": "peft_type PROMPT_TUNING",
    "prefix": "peft_type PREFIX_TUNING",
}
"""Variant -> what its refusal names; every other is exact."""
FORMS = ("pickled", "with the adapter's name", "compiled")
"""Ways in which the plain variant's file is written."""

IDS = torch.randint(5, 64, (3, 7), generator=torch.Generator().manual_seed(1))
IDS[0, 2:4] = IDS[2, 1:3] = IDS[2, 4:6] = torch.tensor(CALL)


def written(family, variant, folder):
    """Writes PEFT's file of a variant; the logits that PEFT computes with it, or None if PEFT cannot make it."""
    torch.manual_seed(0)
    try:
        model = build(family)
        theirs = peft.get_peft_model(model, VARIANTS.get(variant, VARIANTS["plain"])(model)).eval()
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn_like(parameter)
        with torch.no_grad():
            logits = theirs(IDS).logits[:, -IDS.shape[1] :]
        theirs.save_pretrained(folder)
        back = peft.PeftModel.from_pretrained(build(family), folder).eval()
        with torch.no_grad():
            assert torch.allclose(back(IDS).logits[:, -IDS.shape[1] :], logits, atol=1e-4)
        reform(variant, folder)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError):
        return None
    return logits


def reform(variant, folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) if variant in FORMS else {}
    if variant == "pickled":
        torch.save(tensors, folder / "adapter_model.bin")
        path.unlink()
    elif variant == "with the adapter's name":
        save_file({key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}, path)
    elif variant == "compiled":
        save_file({key.replace(".weight", "._orig_mod.weight"): t for key, t in tensors.items()}, path)


def outcome(family, variant, folder):
    """exact, refused, or what is wrong."""
    want = written(family, variant, folder)
    if want is None:
        return "not of PEFT"
    bank = AdapterBank(build(family))
    try:
        load_adapter(bank, "a", folder)
    except RefusedError as error:
        field = REFUSED.get(variant)
        return "refused" if field and re.search(field, str(error)) else f"unclear: {error}"
    bank.route(["a", None, "a"], IDS)
    with torch.no_grad():
        got, base = bank.model(IDS).logits, build(family)(IDS).logits
    if not torch.equal(got[1], base[1]):
        return "base row changed"
    off = (got - want)[[0, 2]].abs().max() / want.abs().max()
    return "exact" if off < 1e-5 else f"different by {off:.2g}"


@pytest.mark.parametrize("variant", [*VARIANTS, *FORMS])
def test_it_computes_what_peft_does_or_is_refused_by_its_field(variant, tmp_path):
    outcomes = {family: outcome(family, variant, tmp_path / family) for family in FAMILIES}
    print(f"{variant}: {dict(Counter(outcomes.values()))}")
    wanted = "refused" if variant in REFUSED else "exact"
    assert {family: o for family, o in outcomes.items() if o not in (wanted, "not of PEFT")} == {}
    assert Counter(outcomes.values())["not of PEFT"] <= (7 if variant == "replicated" else 1)
