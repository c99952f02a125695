"""A base that two processes hold together trains, validates, tests and predicts what one that has all of it does."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from mmpeft.adapters import AdapterBank, DoraConfig, LoraConfig
from mmpeft.adapters.architecture import find_blocks
from mmpeft.cli import main
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack
from mmpeft.errors import RefusedError
from mmpeft.inference.comparison import unlabelled
from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.runs.manifest import read_manifest
from mmpeft.training.compiled_steps import CompiledSteps
from mmpeft.training.pieces import Pieces
from mmpeft.training.run_writer import EvaluationWriter
from mmpeft.training.sharding import NAME, Sharded, check_places, check_sharded, local_bytes
from mmpeft.transfer import is_sharded
from tests.tiny import make_config, make_model_config
from tests.training.held_weights import layer_bytes
from tests.training.of_two import run_on_two
from tests.training.test_processes import (  # noqa: F401 fixtures among them
    LORA,
    assert_close,
    config_of,
    curves,
    folder,
    settings,
)

DORA = {"class_path": "mmpeft.adapters.DoraConfig", "init_args": {"rank": 4, "alpha": 8, "dropout": 0.3}}
HELD = {"class_path": "tests.training.held_weights.HeldWeights"}
CASES = ["lora", "choices", "joint", "one", "projector", "recomputed"]
TOGETHER = SimpleNamespace(strategy=Sharded(), world_size=2, precision="32-true")
"""A trainer of two processes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder, settings, tiny_base, tiny_data):  # noqa: F811
    """Name -> (run directory of one process, of two that share the base); and what the two printed."""
    root = tmp_path_factory.mktemp("sharded")
    cases = settings | {
        "recomputed": {
            "model": {"adapter": DORA, "language": _language(tiny_base)},
            "data": settings["lora"]["data"],
        }
    }
    commands, found = [], {}
    for name in CASES:
        one = config_of(root / "one", tiny_base, tiny_data, name, cases[name])
        callbacks = [*cases[name].get("trainer", {}).get("callbacks", []), HELD]
        how = {"devices": 2, "strategy": NAME, "callbacks": callbacks}
        two = config_of(root / "two", tiny_base, tiny_data, name, cases[name], **how)
        main(["fit", "--config", str(one)])
        commands.append(["fit", "--config", str(two)])
        found[name] = root / "one" / name / "run", root / "two" / name / "run"
    one, two = found["lora"]
    for command in ("test", "predict"):
        words = [command, "--data.predict", str(tiny_data / "text.jsonl"), f"--output={{}}/{command}"]
        main([*(word.format(one) for word in words), f"--run={one}"])
        commands.append([*(word.format(two) for word in words), f"--run={two}"])
    path = next(one.rglob("step=3.ckpt"))
    commands += [
        ["validate", "--run", str(two)],
        [
            *(
                "fit",
                "--config",
                str(one / "config.yaml"),
                "--trainer.devices=2",
                f"--trainer.strategy={NAME}",
            ),
            *("--ckpt_path", str(path), f"--trainer.default_root_dir={root / 'resumed'}"),
        ],
    ]
    told = run_on_two(root, commands)
    assert not [line for line in "".join(told).splitlines() if "ENDED" in line or "Traceback" in line], told
    return found | {"told": told, "root": root}


def _language(base):
    return {"name": str(base / "language"), "dtype": "float32", "gradient_checkpointing": True}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_share_the_base_train_what_one_does(runs, name):
    """Also where a process has no row, or no row whose backward would reach the layers."""
    one, two = runs[name]
    assert_close(one, two)
    for want, got in zip(curves(one), curves(two), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("command", "file"), [("test", "predictions.jsonl"), ("predict", "answers.jsonl")])
def test_questions_are_divided_though_no_process_can_read_alone(runs, command, file):
    one, two = runs["lora"]
    assert (two / command / file).read_text() == (one / command / file).read_text()


def test_the_first_process_answers_examples_while_the_others_read_with_it(runs):
    examples = [(run / "examples" / "examples.jsonl").read_text().splitlines() for run in runs["lora"]]
    assert [json.loads(line) for line in examples[1]] == [json.loads(line) for line in examples[0]]


def test_no_process_has_a_whole_layer_between_steps(runs):
    """What it has is half of every matrix."""
    first, second = runs["told"]
    held = re.findall(r"whole between steps: (\d+) of (\d+) bytes", first)
    assert len(held) > len(CASES)
    assert {int(whole) for whole, _ in held} == {0}
    assert all(int(every) > 0 for _, every in held)
    shares = re.findall(r"sharded: each of 2 processes holds (\S+) of the (\S+) GB", first)
    assert [float(own) / float(every) for own, every in shares] == [pytest.approx(0.5, rel=0.02)] * len(
        shares
    )
    assert len(shares) >= len(CASES)
    assert not second


def test_the_base_is_known_for_what_it_is(runs):
    """Its hash is that of the whole weights, so that a run of a sharded base is one of any other."""
    one, two = (read_manifest(run) for run in runs["lora"])
    assert one.base == two.base
    assert one.identity == two.identity


def test_a_checkpoint_of_a_whole_base_goes_on_with_a_sharded_one(runs):
    assert_close(runs["lora"][0], runs["root"] / "resumed")


# -- in one process ------------------------------------------------------------------------------------------


class Alone(Sharded):
    """All of the processes."""

    root_device = torch.device("cpu")
    world_size = 1


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Alone()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {}), ("falcon", {}), ("opt", {}), ("mixtral", {"num_local_experts": 4})],
)
def test_a_sharded_base_is_taken_apart_and_computes_as_a_whole_one(alone, family, changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_model_config(family, **changes)).eval()
    model.requires_grad_(False)
    ids = torch.arange(12).view(2, 6)
    blocks, want, whole = find_blocks(model), model(input_ids=ids).logits, layer_bytes(model)
    alone.place(model)
    assert find_blocks(model) == blocks
    parts = [own for own in model.parameters() if is_sharded(own)]
    assert sum(map(local_bytes, parts)) == whole > 0
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=0, atol=0)


@pytest.mark.parametrize("config", [LoraConfig(rank=2), DoraConfig(rank=2)], ids=["lora", "dora"])
def test_adapters_of_a_sharded_base_begin_as_of_a_whole_one(alone, make_llama, config):
    """DoRA's magnitudes are norms of the base's weights."""
    models = make_llama(), make_llama()
    alone.place(models[1].requires_grad_(False))
    whole, parts = (AdapterBank(model) for model in models)
    for bank in (whole, parts):
        bank.add("a", config, seed=3)
    for key, tensor in whole.tensors("a").items():
        assert torch.equal(parts.tensors("a")[key], tensor), key


def test_weights_in_several_layers_are_refused(alone, make_llama):
    """They would be gathered by one of them."""
    model = make_llama().requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(RefusedError, match=r"layers\.0\.mlp\.gate_proj\.weight in several of its layers"):
        alone.place(model)


def test_a_base_without_known_layers_is_refused():
    with pytest.raises(RefusedError, match=r"model_parallel: .*no single list of decoder layers.*at auto"):
        Sharded().place(torch.nn.Linear(2, 2))


def test_a_quantised_base_is_refused_before_it_is_loaded(tmp_path, tiny_base):
    config = LanguageConfig(str(tiny_base / "language"), quantization="nf4")
    with pytest.raises(RefusedError, match=r"held as nf4, whose codes cannot be sharded: .*at auto"):
        load_language_model(config, place=lambda _: pytest.fail("it was loaded"))


def test_one_process_has_nobody_to_share_with(tmp_path, tiny_base, tiny_data, monkeypatch):
    monkeypatch.setattr("mmpeft.training.start.build_model", lambda *_: pytest.fail("it was loaded"))
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, trainer={"strategy": NAME})
    with pytest.raises(SystemExit, match="model_parallel, but the run has one process"):
        main(["fit", "--config", str(config)])


def test_settings_that_need_a_whole_base_are_refused_before_it_is_loaded():
    budget = {"a": SimpleNamespace(adapter=LoraConfig(target_modules="top-1000"))}
    with pytest.raises(RefusedError, match="'a' has its target_modules chosen by a budget"):
        check_places(TOGETHER, budget)
    with pytest.raises(RefusedError, match=r"trainer\.precision is bf16-true"):
        check_sharded(SimpleNamespace(**vars(TOGETHER) | {"precision": "bf16-true"}))
    with pytest.raises(RefusedError, match=r"model\.compile: a sharded base"):
        CompiledSteps(True).setup(TOGETHER, None, "fit")
    with pytest.raises(RefusedError, match="--forgetting reads the base's weights"):
        EvaluationWriter(Path(), "", forgetting=True).setup(TOGETHER, None, "test")


def test_compiling_where_it_pays_is_left_out_aloud(capsys):
    steps = CompiledSteps("auto")
    steps.setup(TOGETHER, None, "fit")
    assert steps.wanted is False
    assert "compile: left out, a sharded base" in capsys.readouterr().err


def test_a_process_without_memory_does_not_go_on_in_pieces_of_its_own():
    """The others would wait for its layers for ever."""
    batch = collate([pack([unlabelled([1, 2, 3])])] * 4, None, [None] * 4)

    def no_room(_):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(RefusedError, match=r"no memory for 4 rows .* with a sharded base"):
        Pieces(no_room, [], whole=True).forward(batch)
