"""Memory said before it is spent: counted without computing, to the byte; and beside what a process then took."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmpeft.adapters import FullConfig, IA3Config, LoraConfig
from mmpeft.cli import main
from mmpeft.models import prepacked
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import NoVision
from mmpeft.tools.tiny_models import tiny_model
from mmpeft.training import memory, step_memory
from mmpeft.training.memory import Estimate, told
from mmpeft.training.step_memory import LiveBytes, count_step
from tests.tiny import make_config
from tests.training.memory_of_a_fit import batch_of, estimated_and_measured

CONFIGS = {"lora": LoraConfig(rank=2), "dropping": LoraConfig(rank=2, dropout=0.2), "tfew": IA3Config()}
CONFIGS |= {"full": FullConfig(), "last": LoraConfig(rank=2, layers=[4, 5])}
GB = 10**9


@pytest.fixture
def deep_model(make_llama, tmp_path):
    """Six layers, of which some stand for others; ``method`` and whether layers recompute."""

    def make(method, recomputes):
        make_llama(num_hidden_layers=6).save_pretrained(tmp_path / "base")
        language = LanguageConfig(str(tmp_path / "base"), "float32", gradient_checkpointing=recomputes)
        model = build_model(language, None).train()
        model.bank.add("own", CONFIGS[method])
        model.projector.requires_grad_(False)
        return model

    return make


def batch(rows, tokens):
    made = batch_of(rows, tokens)
    made.input_ids.remainder_(128)
    made.targets[made.targets >= 0] %= 128
    return made.to("cpu")


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_step_is_counted_to_the_byte_and_changes_nothing(method, recomputes, deep_model):
    model, some = deep_model(method, recomputes), batch(4, 30)
    drawn, tensors = torch.get_rng_state(), [*model.parameters(), *model.bank.parameters()]
    before = [tensor.clone() for tensor in tensors]
    counted = count_step(model, some)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(tensor.grad is None for tensor in tensors)
    assert all(map(torch.equal, before, tensors))
    assert all(type(buffer) is torch.Tensor for buffer in model.buffers())
    with LiveBytes([]) as spent:
        model.token_losses(some).nll.sum().backward()
    assert counted.peak == spent.peak


def test_layers_that_are_alike_are_computed_once(deep_model, monkeypatch):
    model, some = deep_model("last", False), batch(4, 30)
    short = count_step(model, some).peak
    monkeypatch.setattr(step_memory, "COMPUTED", 100)
    assert count_step(model, some).peak == short
    assert [len(run) for run in step_memory._runs_alike(model.language_model, model.bank)] == [4, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_experts_is_counted_and_nothing_is_told(dtype, capfd):
    """Torch tells of a product that it knows in 16 bits alone, by pages."""
    language = tiny_model("qwen3_moe").to(dtype)
    width = language.get_input_embeddings().weight.shape[1]
    model = MultimodalModel(NoVision(), Projector(NoVision().dim, width), language).train()
    model.bank.add("own", LoraConfig(rank=2))
    some = batch(4, 30)
    counted = count_step(model, some)
    with LiveBytes([]) as spent:
        model.token_losses(some).nll.sum().backward()
    assert counted.peak == pytest.approx(spent.peak, rel=0.05)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_to_set_is_said():
    found = Estimate(2 * GB, GB, 0, 3 * GB, GB, 8 * GB, 8 * GB, GB, 0, 8, 120)
    assert found.total == 16 * GB
    assert len(told(found, 9 * GB, 40, False, 0.5)) == 2
    first, parts, last = told(found, 6 * GB, 40, False, 1.5)
    assert first == "memory: about 16.00 GB at most, of 6.00 GB that are there, found in 1.5 s"
    assert "base 2.00" in parts
    assert "activations of 8 x 120 tokens 3.00, logits 1.00" in parts
    assert last.endswith(
        "set data.packing.batch_size to 20, or model.language.gradient_checkpointing to true"
    )
    assert told(found, 3 * GB, 40, True, 0.5)[2].endswith(
        "set model.language.quantization to nf4, or take a smaller model"
    )
    assert "the system does not say" in told(found, 0, 40, True, 0.5)[0]


@pytest.mark.parametrize(
    ("there", "batch_size", "in_4_bits", "instead"),
    [
        (3 * GB, 40, True, "take a smaller model"),
        (5 * GB, 1, True, "set data.packing.max_length lower, or take a smaller model"),
        (
            5 * GB,
            1,
            False,
            "set data.packing.max_length lower, or model.language.quantization to nf4, or take a",
        ),
    ],
)
def test_what_is_set_already_is_not_said(there, batch_size, in_4_bits, instead):
    found = Estimate(2 * GB, GB, 0, 3 * GB, GB, 8 * GB, 8 * GB, GB, 0, 8, 120)
    assert f"it will not fit: {instead}" in told(found, there, batch_size, True, 0.5, in_4_bits)[2]


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 6 * GB)
    monkeypatch.setattr(memory, "resident", lambda: GB)
    assert [memory.room(torch.device("cpu"), number) for number in (1, 2, 3)] == [7 * GB, 4 * GB, 3 * GB]
    found = Estimate(2 * GB, GB, 0, 3 * GB, GB, 8 * GB, 8 * GB, GB, 0, 8, 120)
    assert (
        "of 4.00 GB that are there for each of 2 processes"
        in told(found, 4 * GB, 40, True, 0, processes=2)[0]
    )


@pytest.mark.parametrize("names", prepacked.GROUP_FILES)
@pytest.mark.parametrize("group", ["/", "/system.slice/job_7/step_0", "/../of_another_namespace"])
def test_the_limit_of_a_container_is_seen(names, group, tmp_path, monkeypatch):
    limit, usage, (stat, field) = names
    monkeypatch.setattr(prepacked, "OWN_GROUPS", own := tmp_path / "own")
    own.write_text(f"9:name=systemd:/other\n4:cpu,memory:{group}\n0::{group}\n")
    for name, text in ((limit, "5000"), (usage, "3000"), (stat, f"anon 1\n{field} 1000\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(prepacked, "GROUP", tmp_path)
    assert prepacked.free_memory() == 3000
    (tmp_path / limit).write_text("max\n")
    assert prepacked.free_memory() > 10**6


@pytest.mark.parametrize("names", prepacked.GROUP_FILES)
@pytest.mark.parametrize("limited", ["job_7", "job_7/step_0"])
def test_the_limit_of_a_job_is_seen(names, limited, tmp_path, monkeypatch):
    """Of a group below the root, as Slurm and systemd make them: its own, or one above it."""
    limit, usage, (stat, field) = names
    monkeypatch.setattr(prepacked, "OWN_GROUPS", own := tmp_path / "own")
    own.write_text("9:name=systemd:/other\n4:memory:/job_7/step_0\n0::/job_7/step_0\n")
    monkeypatch.setattr(prepacked, "GROUP", tmp_path)
    for name, text in ((limit, "5000"), (usage, "3000"), (stat, f"anon 1\n{field} 1000\n")):
        file = tmp_path / name
        (folder := file.parent / limited).mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_text(text)
    assert prepacked.free_memory() == 3000
    own.write_text("4:memory:/job_8\n0::/job_8\n")
    assert prepacked.free_memory() > 10**6


def test_a_fit_says_it_first_or_that_it_is_not_known(tmp_path, tiny_base, tiny_data, capsys, monkeypatch):
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer={"max_steps": 1})
    main(["fit", "--config", str(config)])
    shown = capsys.readouterr().err
    assert "memory: about" in shown
    assert "will not fit" not in shown

    def refused(*_):
        raise NotImplementedError("by numbers\nand more")

    monkeypatch.setattr(memory, "count_step", refused)
    main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path / 'other'}"])
    shown = capsys.readouterr().err
    assert "memory: not known before the first step (NotImplementedError: by numbers)" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["lora 8 120 0", "lora 4 60 0", "dropping 8 120 1", "tfew 16 100 0", "full 4 60 0"]
)
def test_the_estimate_is_what_a_process_then_takes(case):
    command = [sys.executable, "-m", "tests.training.memory_of_a_fit", *case.split()]
    found = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[-2]
    )
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [("lora", 8, 120, False), ("full", 4, 60, False), ("dropping", 8, 120, True)]
)
def test_the_estimate_is_what_a_gpu_then_holds(case):
    torch.cuda.reset_peak_memory_stats()
    found = SimpleNamespace(**estimated_and_measured(*case, device="cuda"))
    assert found.estimated == pytest.approx(found.measured, rel=0.15)
