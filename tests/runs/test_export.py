"""`mmpeft export`: what peft, transformers and vLLM make of the folder is what the finetune does here."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mmpeft.adapters import (
    ALoraConfig,
    BitFitConfig,
    DoraConfig,
    HybridConfig,
    IA3Config,
    LoraConfig,
    PromptConfig,
)
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_file
from mmpeft.runs.export import export_run
from mmpeft.runs.files import PROJECTOR, load_run
from mmpeft.runs.manifest import read_manifest, write_manifest
from tests.runs.vllm_rules import read_as_vllm

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[5, 17, 40, 99, 120, 7, 8]])
LORAS = {
    "plain": LoraConfig(rank=4, alpha=8),
    "stable": LoraConfig(rank=4, alpha=8, rslora=True, target_modules="all-linear"),
    "uneven": LoraConfig(
        rank=4,
        alpha=6.0,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 12, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 3.0},
    ),
}
OTHERS = {
    "tfew": IA3Config(),
    "dora": DoraConfig(rank=2),
    "bias": HybridConfig([LoraConfig(rank=2), BitFitConfig(["o_proj"])]),
    "invoked": ALoraConfig(rank=2, invocation_tokens=[5, 17]),
    "prompt": PromptConfig(),
    "head": LoraConfig(rank=2, target_modules=["q_proj", "lm_head"]),
    "wide": LoraConfig(rank=600, target_modules=["q_proj"]),
}


@pytest.fixture(scope="module")
def run(make_joint, tmp_path_factory):
    """Finetunes that other servers take and that they refuse, one of them with a projector of its own."""
    return make_joint(tmp_path_factory.mktemp("export") / "run", LORAS | OTHERS, "plain")


@pytest.fixture(scope="module")
def adapted(run):
    """Finetune -> its logits of `IDS` here."""
    model, _, _ = load_run(run)

    @torch.no_grad()
    def logits(name):
        model.bank.route([name], IDS)
        return model.language_model(IDS).logits

    return logits


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base / "language").eval()


@torch.no_grad()
def assert_equal(model, want):
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", LORAS)
def test_peft_says_the_same(run, adapted, base, tmp_path, name):
    export_run(run, "transformers", name, tmp_path / "out")
    assert_equal(PeftModel.from_pretrained(base, tmp_path / "out").eval(), adapted(name))


def test_transformers_says_the_same(run, adapted, base, tmp_path):
    export_run(run, "transformers", "uneven", tmp_path / "out")
    base.load_adapter(tmp_path / "out")
    assert_equal(base, adapted("uneven"))


@pytest.mark.parametrize("name", ["tfew", "dora"])
def test_what_other_methods_do_is_merged_for_transformers(run, adapted, tmp_path, name):
    exported = export_run(run, "transformers", name, tmp_path / "out")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), adapted(name))
    assert re.match(rf"a plain model, into which '{name}' is folded: .* rounding", exported.remarks[0])


@pytest.mark.parametrize(("name", "rank"), [("plain", 8), ("stable", 8), ("uneven", 16)])
@torch.no_grad()
def test_vllm_takes_the_folder_and_says_the_same(run, adapted, base, tmp_path, name, rank):
    exported = export_run(run, "vllm", name, tmp_path / "out")
    for path, change in read_as_vllm(tmp_path / "out", LINEARS, rank).items():
        base.get_submodule(path).weight += change
    assert_equal(base, adapted(name))
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules {name}={tmp_path / 'out'}"
    assert exported.remarks[0].endswith(f"/language {options}")


def test_the_projector_goes_along_and_is_told(run, tmp_path):
    exported = export_run(run, "vllm", "plain", tmp_path / "out")
    own, got = load_file(run / "adapters" / "plain" / PROJECTOR), load_file(tmp_path / "out" / PROJECTOR)
    assert all(torch.equal(got[key], tensor) for key, tensor in own.items())
    assert "projector.safetensors lies beside it, which vLLM does not read" in exported.remarks[1]
    exported = export_run(run, "vllm", "plain", tmp_path / "text", text_only=True)
    assert len(exported.remarks) == 1
    assert not (tmp_path / "text" / PROJECTOR).exists()


@pytest.mark.parametrize("to", ["vllm", "gguf"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tfew", r"'tfew' is a finetune by ia3, and of adapters .* applies plain LoRA alone"),
        ("dora", r"by dora, .* --to transformers folds it into its base"),
        ("bias", r"by lora and bitfit, and"),
        ("invoked", r"by alora, and"),
        ("prompt", r"by prompt, and"),
        ("head", r"changes lm_head, and .* takes updates of the linears in the blocks alone"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(run, tmp_path, monkeypatch, to, name, reason):
    monkeypatch.setattr("mmpeft.runs.merge.build_model", None)  # refused before any model is loaded
    with pytest.raises(RefusedError, match=reason):
        export_run(run, to, name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_rank_beyond_vllm_is_refused(run, tmp_path):
    with pytest.raises(RefusedError, match="'wide' has rank 600, and vLLM takes 512 at most"):
        export_run(run, "vllm", "wide", tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "change nothing .every B A is zero."), (float("nan"), "holds NaN")]
)
@pytest.mark.parametrize("to", ["vllm", "gguf", "transformers"])
def test_a_lora_that_a_server_would_take_in_vain_is_refused(run, tmp_path, to, value, reason):
    run = shutil.copytree(run, tmp_path / "run")
    file = run / "adapters" / "plain" / "adapter_model.safetensors"
    save_file({k: t * 0 + value if "lora_B" in k else t for k, t in load_file(file).items()}, file)
    with pytest.raises(RefusedError, match="is not the file that"):
        export_run(run, to, "plain", tmp_path / "out")
    manifest = read_manifest(run)
    manifest.adapter_files["plain"][file.name] = hash_file(file)
    write_manifest(run, manifest)
    with pytest.raises(RefusedError, match=reason):
        export_run(run, to, "plain", tmp_path / "out", text_only=True)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_the_folder_is_used(run, tmp_path, capsys):
    main(["export", "--run", str(run), "--to", "vllm", "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"exported 'plain' to {tmp_path / 'out'}"
    assert lines[1].startswith("vllm serve ")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] in lines[1]
    with pytest.raises(SystemExit, match="is not an empty folder"):
        main(["export", "--run", str(run), "--to", "vllm", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="has no adapter 'plane'"):
        main(["export", "--run", str(run), "--to", "gguf", "--adapter", "plane"])
