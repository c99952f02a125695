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
from mmpeft.training.evaluation_writer import EvaluationWriter
from mmpeft.training.finetune import Settings
from mmpeft.training.pieces import Pieces
from mmpeft.training.sharding import NAME, Sharded, check_finetunes, check_sharded, local_bytes
from mmpeft.transfer import is_sharded
from tests.tiny import make_config, make_model_config
from tests.training.of_two import run_on_two
from tests.training.test_processes import (  # noqa: F401 fixtures among them
    assert_close,
    config_of,
    curves,
    folder,
    settings,
)

DORA = {"class_path": "mmpeft.adapters.DoraConfig", "init_args": {"rank": 4, "alpha": 8, "dropout": 0.3}}
HELD = {"class_path": "tests.training.held_weights.HeldWeights"}
SLOW_CASES = ["lora", "choices", "one", "projector", "recomputed", "methods"]
METHODS = {
    "after": {"class_path": "mmpeft.adapters.BottleneckConfig", "init_args": {"width": 4}},
    "bias": {"class_path": "mmpeft.adapters.BitFitConfig"},
    "prefix": {"class_path": "mmpeft.adapters.PrefixConfig", "init_args": {"num_virtual_tokens": 3}},
    "whole": {"class_path": "mmpeft.adapters.FullConfig", "init_args": {"target_modules": ["v_proj"]}},
    "image": {"class_path": "mmpeft.adapters.ImagePromptConfig"},
}
"""Of those that other cases do not have."""
ALONE = ["--trainer.devices=1", "--trainer.strategy=auto"]
TOGETHER = SimpleNamespace(strategy=Sharded(), world_size=2, precision="32-true", callbacks=[])
"""A trainer of two processes."""


@pytest.fixture(scope="module")
def cases(settings, tiny_base):  # noqa: F811
    """Name of a run -> its sections."""
    recomputing = {"name": str(tiny_base / "language"), "dtype": "float32", "gradient_checkpointing": True}
    methods = {name: {"adapter": own} for name, own in METHODS.items()}
    return settings | {
        "recomputed": {
            "model": {"adapter": DORA, "language": recomputing},
            "data": settings["lora"]["data"],
        },
        "methods": {
            "model": {"adapter": None, "adapters": methods},
            "data": settings["joint"]["data"],
            "trainer": {"max_steps": 4},
        },
    }


class Pairs:
    """Runs of one process, and the commands that make the same ones in two that share the base."""

    def __init__(self, root, base, data):
        self.root, self.base, self.data = root, base, data
        self.commands, self.alone, self.told = [], [], []

    def fit(self, name, sections):
        one = config_of(self.root / "one", self.base, self.data, name, sections)
        callbacks = [*sections.get("trainer", {}).get("callbacks", []), HELD]
        how = {"devices": 2, "strategy": NAME, "callbacks": callbacks}
        two = config_of(self.root / "two", self.base, self.data, name, sections, **how)
        main(["fit", "--config", str(one)])
        self.commands.append(["fit", "--config", str(two)])

    def of(self, name):
        """(run directory of one process, of two)"""
        return self.root / "one" / name / "run", self.root / "two" / name / "run"

    def ask(self, name, command):
        one, two = self.of(name)
        words = [command, "--data.predict", str(self.data / "text.jsonl"), "--run", str(two)]
        self.commands.append([*words, f"--output={two / command}"])
        self.alone.append([*words, f"--output={one / command}", *ALONE])

    def run(self):
        """In two processes; then what one that has all of the base answers with the finetunes of the two."""
        self.told = run_on_two(self.root, self.commands)
        lines = "".join(self.told).splitlines()
        assert not [line for line in lines if "ENDED" in line or "Traceback" in line], self.told
        for words in self.alone:
            main(words)
        return self


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cases, tiny_base, tiny_data):
    """A joint run, of finetunes of which a process has no row, and a test of it."""
    pairs = Pairs(tmp_path_factory.mktemp("sharded"), tiny_base, tiny_data)
    pairs.fit("joint", cases["joint"])
    pairs.ask("joint", "test")
    return pairs.run()


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory, cases, tiny_base, tiny_data):
    """All others, and what else can be done with a run."""
    pairs = Pairs(tmp_path_factory.mktemp("sharded"), tiny_base, tiny_data)
    for name in SLOW_CASES:
        pairs.fit(name, cases[name])
    pairs.ask("lora", "test")
    pairs.ask("lora", "predict")
    one, two = pairs.of("lora")
    whole = str(next(one.rglob("step=3.ckpt")))
    resumed = [f"--trainer.strategy={NAME}", f"--trainer.default_root_dir={pairs.root / 'resumed'}"]
    pairs.commands += [
        ["validate", "--run", str(two)],
        ["fit", "--config", str(one / "config.yaml"), "--trainer.devices=2", "--ckpt_path", whole, *resumed],
    ]
    return pairs.run()


def assert_same_training(one, two):
    assert_close(one, two)
    for want, got in zip(curves(one), curves(two), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6, nan_ok=True)


def test_two_processes_that_share_the_base_train_what_one_does(runs):
    assert_same_training(*runs.of("joint"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_they_do_whatever_trains(slow_runs, name):
    """Also where a process has no row in any step, or no row whose backward would reach the layers by itself."""
    assert_same_training(*slow_runs.of(name))


def test_questions_are_divided_though_no_process_can_read_alone(runs):
    one, two = (run / "test" / "predictions.jsonl" for run in runs.of("joint"))
    assert two.read_text() == one.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test/predictions.jsonl", "predict/answers.jsonl"])
def test_so_are_those_of_a_prediction(slow_runs, file):
    one, two = (run / file for run in slow_runs.of("lora"))
    assert two.read_text() == one.read_text()


def test_the_first_process_answers_examples_while_the_others_read_with_it(runs):
    """Finetunes that differ in their last digits may answer a question otherwise: so much noise is a random base."""
    files = (run / "examples" / "examples.jsonl" for run in runs.of("joint"))
    one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row | {"answer": ""} for row in two] == [row | {"answer": ""} for row in one]
    assert sum(here == there for here, there in zip(two, one, strict=True)) >= 0.75 * len(one) > 0


def test_no_process_has_a_whole_layer_between_steps(runs):
    """What it has is half of every matrix."""
    first, second = runs.told
    held = re.findall(r"whole in a step (\d+), between steps (\d+) bytes", first)
    assert len(held) == 6
    assert {int(left) for _, left in held} == {0}
    assert all(int(used) > 0 for used, _ in held)
    shares = re.findall(r"sharded: each of 2 processes holds (\S+) of the (\S+) GB", first)
    assert len(shares) == len(runs.commands)
    assert [float(own) / float(every) for own, every in shares] == pytest.approx([0.5, 0.5], rel=0.02)
    assert not second


def test_the_base_is_known_for_what_it_is(runs):
    """Its hash is that of the whole weights, so that a run of a sharded base is one of any other."""
    one, two = map(read_manifest, runs.of("joint"))
    assert one.base == two.base
    assert one.identity == two.identity


@pytest.mark.slow
def test_a_checkpoint_of_a_whole_base_goes_on_with_a_sharded_one(slow_runs):
    assert_close(slow_runs.of("lora")[0], slow_runs.root / "resumed")


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
    [
        ("llama", {}),
        ("gpt2", {}),
        ("falcon", {}),
        ("opt", {}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    ],
)
def test_a_sharded_base_is_taken_apart_and_computes_as_a_whole_one(alone, family, changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_model_config(family, **changes)).eval()
    model.requires_grad_(False)
    ids = torch.arange(12).view(2, 6)
    blocks, want = find_blocks(model), model(input_ids=ids).logits
    layers = [model.get_submodule(block.path) for block in blocks]
    matrices = sum(own.nbytes for layer in layers for own in layer.parameters() if own.dim() > 1)
    alone.place(model)
    assert str(find_blocks(model)) == str(blocks)  # tensors among them
    parts = [own for own in model.parameters() if is_sharded(own)]
    assert sum(map(local_bytes, parts)) == matrices > 0
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
    likely, dpo = Settings(), Settings(objective="dpo")
    budget = {"a": SimpleNamespace(adapter=LoraConfig(target_modules="top-1000"), settings=likely)}
    with pytest.raises(RefusedError, match="'a' has its target_modules chosen by a budget"):
        check_finetunes(TOGETHER, budget)
    with pytest.raises(RefusedError, match="'a' has the objective dpo, whose reference"):
        check_finetunes(TOGETHER, {"a": SimpleNamespace(adapter=None, settings=dpo)})
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
