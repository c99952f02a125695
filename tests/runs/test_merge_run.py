"""`mmpeft merge`: a folder that plain transformers loads and that says what the adapted model said."""

import errno
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmpeft.cli import HELP, main
from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.runs.files import PROJECTOR, load_run
from mmpeft.runs.manifest import read_manifest, write_manifest
from mmpeft.runs.merge import PROMPT, Merged, merge_run


@pytest.fixture
def run(tiny_run, tmp_path, add_tfew):
    """A copy of the run with two finetunes far from the base: its LoRA, and an IA3."""
    return add_tfew(shutil.copytree(tiny_run, tmp_path / "run"))


def reload(directory):
    """The folder as anyone loads it; its tokenizer's ids of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model, AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")["input_ids"]


@torch.no_grad()
def adapted_logits(run, name, ids):
    model, _, _ = load_run(run)
    model.bank.route([name])
    return model.language_model(ids).logits


@pytest.mark.parametrize("name", ["default", "tfew"])
def test_the_folder_loads_without_mmpeft_and_says_the_same(run, tmp_path, name):
    merged = merge_run(run, name, tmp_path / "merged")
    model, ids = reload(tmp_path / "merged")
    want = adapted_logits(run, name, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=2e-5)
    assert merged.difference == pytest.approx((model(ids).logits - want).abs().max().item(), abs=1e-5)
    assert merged.change == pytest.approx(
        (want - adapted_logits(run, None, ids)).abs().max().item(), rel=1e-4
    )
    assert merged.difference < 1e-4 < 0.1 < merged.change
    assert not any("lora" in key or "ia3" in key or "base" in key for key in model.state_dict())


def test_no_module_of_mmpeft_is_needed(run, tmp_path):
    merge_run(run, "tfew", tmp_path / "merged")
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); assert 'mmpeft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "merged")], check=True, cwd=tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_stays_so(run, tmp_path, quantization):
    merged = merge_run(run, "tfew", tmp_path / "merged", quantization)
    assert merged.difference < 0.05 * merged.change
    model, ids = reload(tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert settings["load_in_4bit" if quantization == "nf4" else "load_in_8bit"]
    with torch.no_grad():
        error = (model(ids).logits.float() - adapted_logits(run, "tfew", ids)).abs().mean()
    assert error < 0.3 * merged.change, "what 4 bits cost"


def test_lora_is_refused_on_a_quantised_base(run, tmp_path):
    with pytest.raises(ValueError, match=r"q_proj is quantised: .* without --quantization"):
        merge_run(run, "default", tmp_path / "merged", "nf4")
    assert not (tmp_path / "merged").exists()


def test_the_projector_goes_along(run, tmp_path):
    merge_run(run, "default", tmp_path / "merged")
    projector = load_file(tmp_path / "merged" / PROJECTOR)
    trained = load_file(run / "adapters" / "default" / PROJECTOR)
    assert projector.keys() == {"weight", "bias"}
    assert all(torch.equal(projector[key], tensor) for key, tensor in trained.items())


def test_the_command_prints_the_difference(run, tmp_path, capsys):
    main(["merge", str(run), "--adapter", "tfew", "--output", str(tmp_path / "merged")])
    printed = capsys.readouterr().out
    assert f"merged 'tfew' into {tmp_path / 'merged'}" in printed
    assert re.search(
        r"differ from the adapted model's by at most \S+: rounding, and small beside the \d", printed
    )
    main(["merge", str(run)])
    assert f"merged 'default' into {run / 'merged' / 'default'}" in capsys.readouterr().out
    assert (run / "merged" / "default" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("difference", "change", "step", "verdict"),
    [
        (9e-5, 2.4, 1.2e-7, "rounding, and small beside the 2.4 by"),  # SmolLM2 and a LoRA in float32
        (0.7, 9.0, 7.8e-3, "rounding, and small beside"),
        (0.75, 0.6, 7.8e-3, "rounding, and the finetune changes them by 0.6: compare answers"),
        (0.01, 2.4, 1.2e-7, "more than rounding explains, and the finetune changes them by 2.4: compare answers"),
        (0.0, 0.0, 1.2e-7, "rounding, and small"),
    ],
)  # fmt: skip
def test_a_difference_is_judged_by_the_logits_and_by_what_the_finetune_changes(
    tmp_path, difference, change, step, verdict
):
    assert Merged("default", tmp_path, difference, change, 29.5, step).verdict.startswith(verdict)


def test_nothing_is_overwritten(run, tmp_path, monkeypatch):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr("mmpeft.runs.merge.build_model", None)  # refused before any model is loaded
    for output in (folder, folder / "notes.txt"):
        with pytest.raises(ValueError, match="is not an empty folder: choose another output"):
            merge_run(run, "tfew", output)
    with pytest.raises(SystemExit, match=r"error: .* is not an empty folder"):
        main(["merge", str(run), "--output", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_merge_that_does_not_end_leaves_nothing_in_its_way(run, tmp_path, monkeypatch):
    """Half a folder would be neither a model nor empty: the same command could not be given again."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "out" / "merged"
    with monkeypatch.context() as patched:
        patched.setattr("mmpeft.runs.merge.write_manifest", full)
        with pytest.raises(SystemExit, match=rf"error: {folder}: no space left on its disk"):
            main(["merge", str(run), "--output", str(folder)])
    assert not list(folder.parent.iterdir())
    main(["merge", str(run), "--output", str(folder)])
    assert read_manifest(folder).facts == {"merged": f"default of {run}"}


def test_what_is_not_there_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.runs.merge.build_model", None)
    with pytest.raises(ValueError, match=r"has no adapter 'tffew'; it has default, tfew"):
        merge_run(run, "tffew", tmp_path / "merged")
    with pytest.raises(ValueError, match="is no run of mmpeft"):
        merge_run(tmp_path, "tfew", tmp_path / "merged")
    manifest = read_manifest(run)
    manifest.adapters = []
    write_manifest(run, manifest)
    with pytest.raises(ValueError, match=r"has no adapters: .* nothing to merge"):
        merge_run(run, None, tmp_path / "merged")


def test_a_run_of_another_base_is_refused(run, tmp_path):
    manifest = read_manifest(run)
    manifest.identity["language"]["weights"] = "other"
    write_manifest(run, manifest)
    with pytest.raises(ValueError, match="does not belong to this base"):
        merge_run(run, "tfew", tmp_path / "merged")


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_merged_folder_is_a_base(run, tmp_path, quantization):
    """For a second round of training, in the bits it was written with."""
    merge_run(run, "tfew", tmp_path / "merged", quantization)
    plain, ids = reload(tmp_path / "merged")
    model = load_language_model(LanguageConfig(str(tmp_path / "merged"), "float32", quantization))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits.float(), rtol=1e-4, atol=2e-5)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["merge", "--help"])
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert usage.startswith("usage: mmpeft merge ")
    assert all(option in usage for option in ("--adapter", "--output", "--quantization"))
    assert "\n  merge " in HELP
