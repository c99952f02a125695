"""`mmpeft compare-methods`: one row per method, made once, whatever fails; and what its figures are taken from."""

import contextlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM

from mmpeft import config_files
from mmpeft.cli import main
from mmpeft.config_files import presets
from mmpeft.experiments import steps
from mmpeft.experiments.compare_methods import TIMING, compare_methods, count_numbers, step_seconds
from mmpeft.experiments.compare_methods_table import COLUMNS, IMAGE_COLUMNS, draw_comparison, make_table
from mmpeft.experiments.methods import METHODS, Preset, common_settings, find_method, method_settings
from mmpeft.experiments.steps import MMPEFT, ChildError
from mmpeft.training.cli import VisionLanguageCLI
from tests.tiny import make_config, write_jsonl

STEPS = 3
SCRIPT = str(Path("scripts/compare_methods.py").resolve())
FIGURES = {
    "accuracy": 0.95,
    "questions": 1000,
    "trained": 921_600,
    "share": 0.00685,
    "files_mb": 3.7,
    "peak_gb": 1.9,
    "step_seconds": 1.2,
    "answer_ms": -0.1,
    "perplexity_base": 27.0,
    "perplexity": 31.0,
    "same_token": 0.9,
    "machine": "a machine",
}


def made_up(name: str, **changes) -> dict:
    method = find_method(name)
    told = {
        "method": name,
        "title": method.title,
        "learning_rate": method.learning_rate,
        "source": method.source,
    }
    return told | FIGURES | changes


class Processes:
    """Runs in this process what the comparison would start, and counts it: importing torch anew takes seconds."""

    def __init__(self, monkeypatch):
        self.started: list[tuple[str, str]] = []
        """(method, what)"""
        self.fail: set[tuple[str, str]] = set()
        self._monkeypatch = monkeypatch

    def __call__(self, words: list[str], log: Path) -> int:
        self.started.append((log.parent.name, log.stem))
        if self.started[-1] in self.fail:
            raise ChildError("no | memory\nleft")
        with log.open("w") as file, contextlib.redirect_stdout(file):
            if tuple(words[:2]) == MMPEFT:
                main(list(words[2:]))
            else:
                assert tuple(words[:2]) == TIMING
                self._monkeypatch.setattr(sys, "argv", ["-c", *words[2:]])
                exec(TIMING[1], {})
        return 10**9

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.started))


@pytest.fixture
def processes(monkeypatch) -> Processes:
    stand_in = Processes(monkeypatch)
    monkeypatch.setattr(steps, "run_process", stand_in)
    return stand_in


@pytest.fixture
def config(tmp_path, tiny_base, tiny_data) -> str:
    """Whose rows are read by columns of their own, as those that are timed must be too."""
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, [row | {"note": 1, "about": "squares"} for row in rows])
    path = make_config(
        tmp_path / "config.yaml", tiny_base, folder, data={"columns": {"task": "about"}, "ignore": ["note"]}
    )
    held = {"held_text": str(folder / "text.jsonl"), "held_images": str(folder / "val.jsonl")}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"test": held}))
    return str(path)


@pytest.fixture
def own_presets(tmp_path, monkeypatch) -> Path:
    """A folder of presets in place of those that come with mmpeft."""
    monkeypatch.setattr(config_files, "INSTALLED", tmp_path / "configs")
    return Path(shutil.copytree("configs/presets", tmp_path / "configs" / "presets"))


def rows_of(table: str) -> list[list[str]]:
    """The cells of every row below the headings."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_one_method_fails_the_other_has_every_figure_and_only_the_first_is_run_again(
    config, processes, tiny_base, tmp_path, capsys
):
    output = tmp_path / "out"

    def compare(**changes) -> list[list[str]]:
        processes.started.clear()
        compare_methods(STEPS, str(output), "prefix, lora", config, limit_test=4, **changes)
        assert (output / "table.md").read_text() in capsys.readouterr().out
        return rows_of((output / "table.md").read_text())

    processes.fail = {("prefix", "test")}
    prefix, lora = compare()
    assert prefix[:2] == ["prefix tuning", r"failed: no \| memory left"]
    assert lora[0] == "LoRA"
    assert len(prefix) == len(lora) == 1 + len(COLUMNS) + len(IMAGE_COLUMNS)
    assert all(re.search(r"\d", cell) for cell in lora[1:])
    found = json.loads((output / "results.json").read_text())["methods"][1]
    weights = output / "lora" / "adapters" / "lora" / "adapter_model.safetensors"
    assert found["trained"] == 2 * 16 * (64 + 64 + 64 + 32)  # q and v of two layers, of width 64 and 32
    language: Any = AutoModelForCausalLM.from_pretrained(tiny_base / "language")
    assert found["share"] == found["trained"] / language.num_parameters()
    assert found["files_mb"] >= weights.stat().st_size / 1e6
    assert found["questions"] == 4
    assert found["peak_gb"] == 1
    tested = json.loads((output / "lora" / "metrics.json").read_text())
    assert (
        found["of_images"]["perplexity"] == tested["forgetting_of_images/perplexity"] != found["perplexity"]
    )
    assert 0 < found["step_seconds"] < 10
    assert not list(output.glob("*/checkpoints/*"))
    with Image.open(output / "compare.png") as picture:
        assert picture.size == (1600, 900)

    processes.fail.clear()
    prefix, again = compare()
    assert processes.methods == ["prefix"]
    assert all(re.search(r"\d", cell) for cell in prefix[1:])
    assert again == lora
    compare()
    assert not processes.started
    processes.fail = {("prefix", "fit"), ("lora", "fit")}
    for again in (True, False):  # the second time since a failed --again leaves no result of before
        assert all(row[1].startswith("failed") for row in compare(again=again))
        assert processes.methods == ["prefix", "lora"]


def test_results_of_another_budget_are_refused(config, processes, tmp_path):
    folder = tmp_path / "out"
    processes.fail = {("lora", "fit")}
    compare_methods(STEPS, str(folder), "lora", config)
    common = common_settings(config, STEPS, None)
    wanted = method_settings("lora", common, folder / "lora", 1000)
    (folder / "lora" / "result.json").write_text(json.dumps({"wanted": wanted, "row": made_up("lora")}))
    compare_methods(STEPS, str(folder), "lora", config)
    with pytest.raises(ValueError, match=r"trainer\.max_steps: made with 3, found 4"):
        compare_methods(STEPS + 1, str(folder), "lora", config)
    with pytest.raises(ValueError, match="limit_test: made with 1000, found 9"):
        compare_methods(STEPS, str(folder), "lora", config, limit_test=9)


@pytest.mark.parametrize("name", METHODS)
def test_methods_differ_in_nothing_but_what_is_their_own(name, config, tmp_path):
    common = common_settings(config, STEPS, None)
    path = tmp_path / "method.yaml"
    settings = method_settings(name, common, tmp_path / name, 1)["config"]
    path.write_text(yaml.safe_dump(settings))
    cli = VisionLanguageCLI.parse(["--config", str(path)])
    assert type(cli.model.finetunes[name].adapter).__name__ == METHODS[name].adapter
    assert (cli.model.language.quantization == "nf4") == (name == "qlora")
    assert cli.trainer.max_steps == STEPS
    own = {"adapter", "adapter_name", "learning_rate", "warmup", "language"}
    other = method_settings("lora", common, tmp_path / "lora", 1)["config"]
    assert settings["data"] == other["data"]
    for section, free in (("model", own), ("trainer", {"default_root_dir"})):
        mine, theirs = settings[section], other[section]
        assert {key: mine[key] for key in mine if key not in free} == {
            key: theirs[key] for key in theirs if key not in free
        }


def test_a_preset_is_trained_and_tested_as_fit_puts_it_over_the_config(
    config, processes, own_presets, tmp_path
):
    output, preset = tmp_path / "out", own_presets / "lora_plus.yaml"
    text = preset.read_text().replace("alpha: 32", "alpha: 32\n      target_modules: top-10_000")
    preset.write_text(text)

    def compare() -> dict:
        processes.started.clear()
        compare_methods(STEPS, str(output), "lora_plus", config, limit_test=4)
        (row,) = json.loads((output / "results.json").read_text())["methods"]
        return row

    row = compare()
    assert "error" not in row
    assert (row["method"], row["title"], row["learning_rate"]) == ("lora_plus", "LoRA+", 2e-4)
    assert "- LoRA+: 0.0002; LoRA whose B learns 16 times" in (output / "table.md").read_text()
    ran = yaml.safe_load((output / "lora_plus" / "config.yaml").read_text())["model"]
    assert (ran["lora_b_ratio"], ran["adapter"]["init_args"]["rank"]) == (16, 16)  # the config has 1 and 4
    files = output / "lora_plus" / "adapters" / "lora_plus"
    chosen = json.loads((files / "adapter_config.json").read_text())["target_modules"]
    assert 0 < len(chosen) < 14  # when the fit began, of two layers; the test answers with them
    assert 5_000 < row["trained"] <= 10_000
    assert compare() == row
    assert not processes.started
    preset.write_text(text.replace("top-10_000", "top-20_000"))
    with pytest.raises(
        ValueError, match=r"preset\.model.*target_modules: made with 'top-10_000', found 'top-20"
    ):
        compare()
    assert not processes.started


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_row_that_differs_in_its_method_alone(name, config, tmp_path):
    common = common_settings(config, STEPS, None)
    wanted, path = method_settings(name, common, tmp_path / name, 1), tmp_path / "method.yaml"
    own = {"adapter_name": name}
    assert wanted["config"]["model"] == common["model"] | own
    assert wanted["config"]["data"] == common["data"]
    preset = find_method(name)
    assert isinstance(preset, Preset)
    assert name not in METHODS
    assert 0 < len(preset.title) <= 30  # it stands beside a point of the picture
    assert len(preset.source) > 50
    path.write_text(yaml.safe_dump(wanted["config"]))
    cli = VisionLanguageCLI.parse(["--config", str(path), "--preset", name])
    assert cli.model.finetunes[name].settings.learning_rate == preset.learning_rate
    assert wanted["preset"]["model"]["adapter"]["class_path"].endswith(
        type(cli.model.finetunes[name].adapter).__name__
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer": {"max_steps": 9}},
            r"odd.yaml sets trainer\.max_steps; presets that .* leave odd out of",
        ),
        ({"data": {"train": "other.jsonl"}}, r"sets data\.train; "),
        ({"seed_everything": 3}, "sets seed_everything; "),
        ({"model": {"adapter_name": "other"}}, r"sets model\.adapter_name; "),
        ({"model": {"start_from": "runs/other"}}, r"sets model\.start_from; "),
        ({"model": {"learning_rate": ...}}, r"has no model\.learning_rate; "),
        ({"model": {"adapter": ...}}, r"has no model\.adapter; "),
    ],
)
def test_a_preset_of_more_than_a_method_is_refused_before_any_trains(
    changes, message, config, processes, own_presets, tmp_path
):
    settings = yaml.safe_load((own_presets / "lora_plus.yaml").read_text())
    for section, own in changes.items():
        both = {**settings.get(section, {}), **own} if isinstance(own, dict) else own
        settings[section] = both
        if isinstance(both, dict):
            settings[section] = {key: value for key, value in both.items() if value is not ...}
    (own_presets / "odd.yaml").write_text(yaml.safe_dump(settings))
    for methods in ("lora,odd", "presets"):
        with pytest.raises(ValueError, match=message):
            compare_methods(STEPS, str(tmp_path / "out"), methods, config)
    assert not processes.started


def test_wrong_arguments(config, tmp_path, tiny_base, tiny_data):
    for changes, message in [
        (
            {"methods": "lora,lorra"},
            "'lorra', which is none of full, lora.* of the presets lora_attention, lora_by",
        ),
        ({"steps": 2}, "2 steps"),
        ({"limit_test": 0}, "0 questions"),
        ({"start_from": str(tmp_path / "gone")}, r"gone.*mmpeft fit --config"),
        (
            {"config": str(make_config(tmp_path / "b.yaml", tiny_base, tiny_data, data={"test": None}))},
            "no data.test",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            compare_methods(**{"config": config, "output": str(tmp_path / "out")} | changes)
    assert not (tmp_path / "out").exists()


def test_a_step_takes_the_median_time_of_the_newest_run(tmp_path):
    for times in ([0, 50, 100, 150], [0, 90, 92, 94, 97, 99]):
        writer = SummaryWriter(str(tmp_path))
        for step, time in enumerate(times):
            writer.add_scalar("train_loss", 1.0, step, walltime=1e9 + time)
        writer.close()
    assert step_seconds(tmp_path) == 2


def test_numbers_are_counted_as_torch_counts_them(tmp_path):
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7), "c": torch.zeros(2, 2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert count_numbers(tmp_path / "x.safetensors") == sum(tensor.numel() for tensor in tensors.values())


def test_the_table_is_ready_for_a_readme():
    broken = made_up("tfew") | {"error": "a | b\n" + "c" * 1000}
    table = make_table([made_up("lora"), broken], "python it --steps 3", "3 steps each")
    assert "other images" not in table
    measured = {"of_images": {"perplexity_base": 5.0, "perplexity": 4.0, "same_token": 0.75}}
    plus = made_up("lora_plus", **measured)
    with_images = make_table([plus, made_up("lora"), broken], "python it", "3 steps each")
    assert [row[-2:] for row in rows_of(with_images)] == [["5.00 → 4.00", "75.0 %"], ["–", "–"], ["–", "–"]]
    assert "- other images: " in with_images
    widths = {len(row) for row in rows_of(table)}
    assert widths == {1 + len(COLUMNS)}
    assert "-0.1" in table
    assert "27.00 → 31.00" in table
    assert "`python it --steps 3`; a machine; 3 steps each" in table
    assert "- LoRA: 0.002; " in table
    assert max(map(len, table.splitlines())) < 500


@pytest.mark.parametrize("perplexities", [[31.0], [27.0, 20.0, 1e9], [float("nan"), 30.0, float("inf")]])
def test_pictures_of_few_equal_and_lost_methods(perplexities, tmp_path):
    rows = [made_up(name, perplexity=value) for name, value in zip(METHODS, perplexities, strict=False)]
    draw_comparison(tmp_path / "compare.png", [*rows, {"title": "failed", "error": "left out"}])
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size == (1600, 900)
        lost = {(194, 74, 0)} & {color[:3] for _, color in picture.getcolors(10**6)}
    assert bool(lost) == (perplexities[0] != perplexities[0])


def test_the_command_line(monkeypatch, capsys):
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
        runpy.run_path(SCRIPT, run_name="__main__")

    with pytest.raises(SystemExit, match="0"):
        run("--help")
    told = capsys.readouterr().out
    assert all(name in told for name in METHODS)
    with pytest.raises(SystemExit, match=r"error: got 1 steps and 5 questions"):
        run("--again", "--steps", "1", "--limit-test", "5")


@pytest.mark.slow
def test_in_processes_of_their_own(config, tmp_path):
    output = tmp_path / "out"
    compare_methods(STEPS, str(output), "tfew", config, limit_test=4)
    (row,) = json.loads((output / "results.json").read_text())["methods"]
    assert "error" not in row, row
    assert row["peak_gb"] > 0.2
