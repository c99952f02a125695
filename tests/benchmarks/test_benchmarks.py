"""The benchmarks: what is measured and told, what is written, and that cases run; never how fast anything is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import race as races
from benchmarks import table, timing
from benchmarks.race import Race, case_names, measure
from benchmarks.versus import versus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a run says so."""
    passed = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: passed[0])
    return passed


def lasting(clock, *seconds):
    """A run of another length at each turn."""
    left = list(seconds)

    def run():
        clock[0] += left.pop(0)

    return run


def test_medians_of_runs_that_take_turns_after_a_warm_up(clock):
    turns = []
    runs = {
        name: lambda name=name, run=run: (turns.append(name), run())
        for name, run in {"ours": lasting(clock, 9, 2, 4, 3), "theirs": lasting(clock, 9, 6, 6, 7)}.items()
    }
    rows = measure(Race("a step", runs, ("theirs",)), repeats=3)
    assert turns == ["ours", "theirs"] * 4
    assert [(row["run"], row["unit"], row["median"], row["lowest"], row["highest"]) for row in rows] == [
        ("ours", "s", 3, 2, 4),
        ("theirs", "s", 6, 6, 7),
    ]
    assert [row["ratios"] for row in rows] == [{"theirs": 0.5}, {"theirs": 1}]
    assert rows[0]["cpu"] == races.processor()


def test_a_rate_is_what_is_done_by_the_time(clock):
    race = Race("a step", {"ours": lasting(clock, 9, 2)}, unit="questions/s", amount=40, repeats=1)
    assert measure(race, None)[0]["median"] == 20


def test_runs_may_measure_themselves_and_tell_more():
    race = Race(
        "memory",
        {"ours": lambda: 7, "theirs": lambda: 14},
        ("theirs",),
        "MB",
        measured=True,
        facts={"rows": 3},
        told=lambda name, figure: {"twice": 2 * figure},
    )
    ours, _ = measure(race, 0)
    assert (ours["median"], ours["ratios"], ours["rows"], ours["twice"]) == (7, {"theirs": 0.5}, 3, 14)
    (only,) = measure(race, 0, "their")
    assert only["run"] == "theirs"


@pytest.mark.parametrize(("repeats", "calls", "memory"), [(0, 1, None), (2, 4, 7)])
def test_a_long_run_is_not_called_again_for_its_memory(monkeypatch, repeats, calls, memory):
    for name, stand_in in {"is_available": True, "get_device_name": "a GPU", "synchronize": None}.items():
        monkeypatch.setattr(races.torch.cuda, name, lambda value=stand_in: value)
    monkeypatch.setattr(timing, "gpu_memory", lambda run: run() or 7)
    turns = []
    (row,) = measure(Race("a sweep", {"ours": lambda: turns.append(1)}, repeats=repeats), None)
    assert (len(turns), row.get("added_gb"), row["gpu"]) == (calls, memory, "a GPU")


def test_a_table_takes_the_place_of_its_last_one_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    path = tmp_path / table.DOCUMENT
    path.parent.mkdir()
    path.write_text(f"# Benchmarks\n\n{table.END}\n\nmore\n")

    def rows(median):
        race = Race("a step", {"ours": lambda: median, "theirs": lambda: 8}, ("theirs",), "MB", measured=True)
        return measure(race, 0)

    table.write_table("first", "What it is.\n\nMore of it.", "python -m benchmarks first", rows(2))
    table.write_table("second", "Another.", "python -m benchmarks second", rows(3))
    table.write_table("first", "What it is.", "python -m benchmarks first --repeats 3", rows(6))
    text = path.read_text()
    assert text.index("### first") < text.index("### second") < text.index(table.END) < text.index("more")
    assert text.count("### first") == 1
    assert "What it is. `python -m benchmarks first --repeats 3`; " in text
    assert "More of it" not in text
    assert (
        "| a step | MB | / theirs |\n| --- | ---: | ---: |\n| ours | 6 | 0.75x |\n| theirs | 8 | 1.00x |"
        in text
    )
    assert "| ours | 3 | 0.38x |" in text


def test_every_case_is_a_file_with_a_function_of_its_name_and_listed(capsys):
    command.main([])
    listed = capsys.readouterr().out
    assert len(case_names()) >= 15
    for name in case_names():
        assert f"\n  {name} " in listed
        assert callable(races.case_function(name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dekoding"], "there is no case 'dekoding'; there are .*decoding"),
        (["text", "--image", "a.png"], "--image is an option of none of text"),
        (["text", "--rows"], "'--rows' is no option with a value"),
        (["--repeats", "1", "text"], "text stands behind an option; cases come first"),
        (["commands", "--repeats", "-1"], "--repeats is -1; it is 0, .* or more"),
        (["commands", "--only", "import", "--write"], "--only leaves runs out, .* or --write"),
        (["commands", "--json", "/nosuch/folder/rows"], "--json: .*/nosuch/folder/rows: No such file"),
        (["commands", "--only", "nosuch"], "no run of commands has 'nosuch' in its name"),
    ],
)
def test_what_is_not_known_is_refused(words, message):
    with pytest.raises(SystemExit, match=message):
        command.main(words)


def test_gpu_cases_are_no_work_for_a_processor(monkeypatch):
    """7B would be made in main memory."""
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    with pytest.raises(
        SystemExit, match="7B is measured on a GPU, which torch does not see here; `--tiny true`"
    ):
        command.main(["gpu_7b", "--repeats", "0"])


@pytest.mark.slow
def test_gpu_cases_run_to_the_end_on_any_machine(tmp_path):
    """Tiny shapes, and nothing is written."""
    before = (ROOT / table.DOCUMENT).read_text()
    file = tmp_path / "rows.jsonl"
    environment = os.environ | {"PYTHON": sys.executable}
    words = ["bash", ROOT / "benchmarks" / "gpu.sh", "--tiny", "true", "--repeats", "0", "--json", file]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["case"] for row in rows} == {name for name in case_names() if name.startswith("gpu_")}
    runs = {"mmpeft, features kept", "peft, features for free", "one pass", "one sweep"}
    assert {row["run"] for row in rows} >= runs
    assert (ROOT / table.DOCUMENT).read_text() == before


@pytest.mark.parametrize("vision", [True, False], ids=["images", "text"])
def test_a_recipe_learns_the_same_from_all(vision, tiny_base, tiny_data):
    """The same mean loss over the same rows: the first epoch's batches are one, and LoRA begins as the base."""
    from benchmarks.recipe import BARE, ONLINE, OURS, Recipe
    from mmpeft.data.plan import PackingConfig
    from mmpeft.models.language import LanguageConfig
    from mmpeft.models.vision import VisionConfig

    encoder = VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32, fit="squash")
    recipe = Recipe(
        str(tiny_data / ("train.jsonl" if vision else "text.jsonl")),
        rows=6 if vision else 3,
        vision=encoder if vision else None,
        packing=PackingConfig(batch_size=6),
        language=LanguageConfig(str(tiny_base / "language"), "float32"),
    )
    rows = measure(recipe.race("tiny"), 0)
    assert next(row["run"] for row in rows) == OURS
    assert {row["run"] for row in rows} >= {BARE, ONLINE if vision else "Trainer"}
    assert all(row["median"] > 0 for row in rows)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == len(rows) - 1
    # projectors begin at random, and otherwise on either side
    assert max(losses) - min(losses) < (0.5 if vision else 0.005)


@pytest.mark.slow
def test_two_checkouts_take_turns(tmp_path):
    """The same one twice, each with its own package and cases."""
    case = tmp_path / "benchmarks" / "cases"
    case.mkdir(parents=True)
    for file in (ROOT / "benchmarks").glob("*.py"):
        (case.parent / file.name).symlink_to(file)
    (case / "__init__.py").write_text("")
    (case / "own.py").write_text(
        '"""A case."""\n\nfrom benchmarks.race import Race\n\n\ndef own():\n'
        '    yield Race("first", {"a": lambda: 2}, measured=True)\n'
        '    yield Race("second", {"a": lambda: 4}, measured=True)\n'
    )
    (tmp_path / "mmpeft").symlink_to(ROOT / "mmpeft")
    words = [sys.executable, "-m", "benchmarks.versus", str(tmp_path), str(tmp_path), "own", "--repeats", "1"]
    told = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert [json.loads(line) for line in told.splitlines()] == [
        {"run": "1: a", "a": 2, "b": 2, "ratio": 1},
        {"run": "2: a", "a": 4, "b": 4, "ratio": 1},
    ]


def test_a_folder_without_the_project_is_not_compared(tmp_path):
    """Python would find the package of this very checkout, and the ratio would be 1."""
    for checkouts in ((tmp_path, ROOT), (ROOT, tmp_path / "none")):
        with pytest.raises(
            SystemExit, match=r"is no checkout of the project: there is no .*mmpeft/__init__\.py"
        ):
            versus(*map(str, checkouts), "commands")
