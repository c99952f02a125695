"""What of PEFT's files is refused, that PEFT accepts in silence or with a warning; the bank is unchanged then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft.adapters import HybridConfig, IA3Config, LoraConfig
from mmpeft.adapters.peft_format import load_adapter, read_config, save_adapter
from tests.adapters.test_peft_format import CASES, OWN

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(params=["lora", "ia3"])
def saved(request, make_bank, tmp_path):
    """A good adapter directory, and a bank without it that holds two others."""
    save_adapter(make_bank({"a": CASES[request.param][0]}), "a", tmp_path, "tiny")
    return tmp_path, make_bank({"b": LoraConfig(rank=2), "c": IA3Config(["k_proj"])})


def rewrite(change):
    """A corruption of the weights file: ``change`` gets its dict of tensors."""

    def corrupt(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return corrupt


def drop_half(tensors):
    for key in sorted(tensors)[::2]:
        del tensors[key]


def first(tensors):
    return min(tensors)


def reconfigure(**fields):
    """A corruption of the config file; a value of ... removes the field."""

    def corrupt(directory):
        path = directory / "adapter_config.json"
        raw = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return corrupt


def truncate(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(make=dict):
    """The weights as a pickle of what ``make`` makes of them."""

    def corrupt(directory):
        path = directory / "adapter_model.safetensors"
        torch.save(
            load_file(path) if make is dict else make(load_file(path)), directory / "adapter_model.bin"
        )
        path.unlink()

    return corrupt


def truncated_pickle(directory):
    pickled()(directory)
    path = directory / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:-100])


def two_adapters(directory):
    """As whoever saves ``model.state_dict()`` gets it."""
    rewrite(lambda t: t.update({renamed(k, name): t[k].clone() for k in list(t) for name in ("one", "two")}))(
        directory
    )


def renamed(key, name):
    return key.replace(".weight", f".{name}.weight") if key.endswith(".weight") else f"{key}.{name}"


WEIGHTS, CONFIG = r"adapter_model\.safetensors", r"adapter_config\.json"
CORRUPTIONS = {
    "half the keys": (rewrite(drop_half), rf"{WEIGHTS} .* are missing \(such as base_model\.model\."),
    "unexpected key": (
        rewrite(lambda t: t.update({"lm_head.weight": torch.ones(1)})),
        rf"{WEIGHTS} .* 1 are unexpected \(such as lm_head\.weight\)",
    ),
    "keys of another base": (
        rewrite(lambda t: t.update({k.replace("layers.1", "layers.7"): t.pop(k) for k in list(t)})),
        rf"{WEIGHTS} .* unexpected \(such as base_model\.model\.model\.layers\.7",
    ),
    "NaN": (rewrite(lambda t: t[first(t)].fill_(torch.nan)), rf"{WEIGHTS}: base_model\..* holds NaN"),
    "infinity": (rewrite(lambda t: t[first(t)][0].fill_(torch.inf)), rf"{WEIGHTS}: base_model\..* infinite"),
    "wrong shape": (
        rewrite(lambda t: t.update({first(t): torch.ones(3, 64)})),
        rf"{WEIGHTS}: base_model\..* has shape \[3, 64\], wanted \[",
    ),
    "integers": (
        rewrite(lambda t: t.update({first(t): t[first(t)].to(torch.int8)})),
        rf"{WEIGHTS}: base_model\..* holds torch\.int8",
    ),
    "truncated": (truncate, rf"{WEIGHTS}: not a readable safetensors file .*truncated"),
    "empty file": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b""),
        rf"{WEIGHTS}: not a readable",
    ),
    "no weights": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        rf"no {WEIGHTS} and no adapter_model\.bin \(found adapter_config\.json\)",
    ),
    "a pickle of code": (
        pickled(lambda _: {"a": Path()}),
        r"adapter_model\.bin: not readable as tensors alone .* safetensors",
    ),
    "a pickle of a list": (pickled(list), r"adapter_model\.bin: wanted a dict of tensors, got list"),
    "a truncated pickle": (truncated_pickle, r"adapter_model\.bin: not readable as tensors alone"),
    "several adapters": (two_adapters, rf"{WEIGHTS} holds several adapters \(see base_model"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), rf"it has no {CONFIG}"),
    "config is not JSON": (
        lambda d: (d / "adapter_config.json").write_text("{"),
        rf"{CONFIG}: not valid JSON",
    ),
    "config is a list": (lambda d: (d / "adapter_config.json").write_text("[]"), rf"{CONFIG}: .*JSON object"),
    "config is binary": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\0"), rf"{CONFIG}: not"),
    "unknown target": (reconfigure(target_modules=["v_prj"]), rf"{CONFIG}: .*v_prj.*closest: 'v_proj'"),
    "no target": (reconfigure(target_modules=...), rf"{CONFIG}: target_modules is missing"),
    "unknown method": (reconfigure(peft_type="VERA"), rf"{CONFIG}: peft_type is 'VERA'"),
    "retrained modules": (
        reconfigure(modules_to_save=["lm_head"]),
        rf"{WEIGHTS}: modules_to_save is \[.*\], but lm_head\.weight is not in",
    ),
    "excluded though it is there": (
        reconfigure(exclude_modules=["v_proj"]),
        rf"{WEIGHTS} .* unexpected \(such as base_model\.model\.model\.layers\.0\.self_attn\.v_proj",
    ),
    "layers that are not there": (
        reconfigure(layers_to_transform=[0]),
        rf"{WEIGHTS} .* unexpected \(such as base_model\.model\.model\.layers\.1",
    ),
}
LORA_CORRUPTIONS = {
    "wrong rank": (reconfigure(r=4), rf"{WEIGHTS}: base_model\..*lora_.* has shape \[.*8.*\], wanted \[.*4"),
    "rank of nothing": (reconfigure(r=-1), rf"{CONFIG}: LoraConfig\.rank is -1"),
    "rank in words": (reconfigure(r="8"), rf"{CONFIG}: LoraConfig\.rank is '8'"),
    "no alpha": (reconfigure(lora_alpha=None), rf"{CONFIG}: LoraConfig\.alpha is None"),
    "DoRA": (reconfigure(use_dora=True), "tensors are missing"),
    "QALoRA": (reconfigure(use_qalora=True), rf"{CONFIG}: use_qalora is True"),
    "activated LoRA": (
        reconfigure(alora_invocation_tokens=["call"]),
        rf"{CONFIG}: .*invocation_tokens is \['call'\]",
    ),
    "per-layer ranks": (
        reconfigure(rank_pattern={"q_proj": 2}),
        rf"{WEIGHTS}: base_model\..*q_proj.* has shape \[8, 64\], wanted \[2, 64\]",
    ),
    "rank in words for a layer": (
        reconfigure(rank_pattern={"q_proj": "2"}),
        rf"{CONFIG}: .*rank_pattern\['q_pro",
    ),
    "a pattern that is none": (reconfigure(alpha_pattern={"(": 2}), rf"{CONFIG}: .*alpha_pattern '\('"),
    "biases of the update": (
        reconfigure(lora_bias=True),
        rf"{WEIGHTS}: lora_bias is True, but model\.layers\.0.*lora_B\.bias is not in the file",
    ),
    "start that changed the base": (reconfigure(init_lora_weights="pissa_niter_4"), rf"{CONFIG}: init_lora_"),
    "the same in another case": (
        reconfigure(init_lora_weights="OLoRA"),
        rf"{CONFIG}: init_lora_weights is 'OLoRA'",
    ),
    "config of the other method": (
        reconfigure(peft_type="IA3"),
        rf"{WEIGHTS} .* are missing \(such as .*ia3_l\) .* unexpected \(such as .*lora_A",
    ),
}


def state_of(bank):
    """Every tensor of base and stacks."""
    return {**bank.model.state_dict(), **bank.state_dict()}


def check_refusal(directory, bank, corrupt, message):
    """Loading raises ``message``; not a bit, Parameter or wrapped module of the bank has changed."""
    parameters, state = list(bank.parameters()), {k: t.clone() for k, t in state_of(bank).items()}
    corrupt(directory)
    with pytest.raises(ValueError, match=message):
        load_adapter(bank, "new", directory)
    assert bank.names == ["b", "c"]
    assert all(new is old for new, old in zip(bank.parameters(), parameters, strict=True))
    assert state_of(bank).keys() == state.keys()
    assert all(torch.equal(t, state[key]) for key, t in state_of(bank).items())


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_faulty_directory_is_refused_by_name_and_the_bank_is_unchanged(saved, corrupt, message):
    """PEFT warns about most of these, or accepts them in silence."""
    check_refusal(*saved, corrupt, message)


@pytest.mark.parametrize(("corrupt", "message"), LORA_CORRUPTIONS.values(), ids=LORA_CORRUPTIONS)
@pytest.mark.parametrize("saved", ["lora"], indirect=True)
def test_a_faulty_lora_directory_is_refused_by_name_and_the_bank_is_unchanged(saved, corrupt, message):
    check_refusal(*saved, corrupt, message)


def test_a_good_directory_under_a_bad_or_taken_name_is_refused(saved):
    directory, bank = saved
    for name, message in (("../a", "adapter name"), ("b", "already has")):
        with pytest.raises(ValueError, match=message):
            load_adapter(bank, name, directory)
    assert bank.names == ["b", "c"]


def test_unknown_fields_and_fields_for_training_are_ignored(saved):
    """Files of newer versions load as long as nothing that is known to matter is set."""
    directory, _ = saved
    plain = read_config(directory)
    fields = {"of_the_future": 1, "fan_in_fan_out": True, "init_lora_weights": "gaussian", "bias": "none"}
    reconfigure(**fields)(directory)
    assert read_config(directory) == plain


def test_a_hybrid_that_names_a_folder_outside_is_refused(make_bank, tmp_path):
    save_adapter(make_bank({"a": OWN["hybrid"]}), "a", tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"parts": ["../elsewhere"]}))
    with pytest.raises(ValueError, match="names of its subfolders"):
        read_config(tmp_path)


def test_two_parts_of_one_method_must_not_share_a_layer(make_bank):
    with pytest.raises(ValueError, match=r"two lora parts of one adapter both change model\.layers\.1\."):
        make_bank({"a": HybridConfig([LoraConfig(rank=2), LoraConfig(rank=5, layers=[1])])})
