"""`mmpeft continual`: every finetune on every data set after every phase, nothing twice, and old answers kept."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mmpeft
from mmpeft.errors import RefusedError
from mmpeft.experiments import steps
from mmpeft.experiments.continual import continual
from mmpeft.experiments.continual_plan import MEASURED, fit_settings, read_plan
from mmpeft.experiments.steps import merged
from mmpeft.training.cli import VisionLanguageCLI
from tests.tiny import make_config

PLANS = ("facts", "languages")


def write_plan(path: Path, plan: dict) -> str:
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory, tiny_base, tiny_data) -> dict:
    """English questions about colours, then captions: by the same finetune, and by a new one beside it."""
    folder = tmp_path_factory.mktemp("continual")
    config = make_config(folder / "fit.yaml", tiny_base, tiny_data, trainer={"max_steps": 30})
    captions = {"data": {"train": str(tiny_data / "captions.jsonl"), "val": None}}
    beside = {"model": {"adapter_name": "captions", "train_projector": False}}
    return {
        "output": str(folder / "out"),
        "phases": {
            "questions": {"config": str(config)},
            "same": {"config": str(config), "after": "questions", "settings": captions},
            "new": {"config": str(config), "after": "questions", "settings": captions | beside},
        },
        "measure": {
            "questions": {"test": str(tiny_data / "train.jsonl"), "learnt_in": "questions"},
            "captions": {"test": str(tiny_data / "captions.jsonl"), "limit": 5},
        },
    }


@pytest.fixture(scope="module")
def done(plan, tmp_path_factory) -> Path:
    """The output of a whole run."""
    continual(write_plan(tmp_path_factory.mktemp("plan") / "tiny.yaml", plan))
    return Path(plan["output"])


def rows_of(output: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads((output / "results.json").read_text())["rows"]
    return {(row["phase"], row["finetune"]): row for row in rows}


def answers(output: Path, *cell: str) -> str:
    return Path(output, MEASURED, *cell, "predictions.jsonl").read_text()


def test_every_finetune_answers_every_data_set_before_and_after_each_phase(done):
    rows = rows_of(done)
    assert list(rows) == [
        ("before", "default"),
        ("questions", "default"),
        ("same", "default"),
        ("new", "default"),
        ("new", "captions"),
    ]
    for place, row in rows.items():
        assert row["questions"] == {"questions": 24, "captions": 5}
        for name, value in row["exact_match"].items():
            lines = [json.loads(line) for line in answers(done, *place, name).splitlines()]
            assert value == sum(line["answer"].strip() == line["truth"] for line in lines) / len(lines)
    untrained = rows["before", "default"]["exact_match"]
    assert rows["questions", "default"]["exact_match"]["questions"] > untrained["questions"]
    assert rows["new", "captions"]["exact_match"]["captions"] > untrained["captions"]
    table = (done / "table.md").read_text()
    assert all(f"{value:.3f}" in table for row in rows.values() for value in row["exact_match"].values())
    assert Image.open(done / "matrix.png").size[0] > 200


def test_the_same_finetune_forgets_and_a_new_one_leaves_the_old_as_it_was(done):
    found = json.loads((done / "results.json").read_text())["forgetting"]
    same, new = found
    assert (same["after"], new["after"]) == ("same", "new")
    assert same["forgotten"] == same["was"] - same["is"]
    assert same["forgotten"] > 0 < same["other_answers"]
    assert (new["forgotten"], new["other_answers"]) == (0, 0)
    for data in ("questions", "captions"):
        assert answers(done, "new", "default", data) == answers(done, "questions", "default", data)
    assert answers(done, "new", "captions", "captions") != answers(done, "new", "default", "captions")


def test_both_finetunes_answer_in_one_batch(done, tiny_data):
    vlm = mmpeft.load(str(done / "new" / "together"), "cpu")
    assert vlm.adapters == ["default", "captions"]
    lines = {
        name: [json.loads(line) for line in answers(done, "new", name, "questions").splitlines()[:4]]
        for name in vlm.adapters
    }
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()[:4]]
    images = [str(tiny_data / row["image"]) for row in rows] * 2
    names = [name for name, own in lines.items() for _ in own]
    asked = vlm.ask(
        images, [one["question"].strip() for own in lines.values() for one in own], names, task="vqa"
    )
    assert asked == [one["answer"] for own in lines.values() for one in own]
    assert f'mmpeft.load("{done / "new" / "together"}")' in (done / "table.md").read_text()


def test_a_second_start_runs_nothing_anew_and_a_lost_cell_alone(plan, done, tmp_path, monkeypatch):
    before = (done / "results.json").read_text()
    ran, run_here = [], steps.run_here
    monkeypatch.setattr(steps, "run_here", lambda words: ran.append(words) or run_here(words))
    path = write_plan(tmp_path / "tiny.yaml", plan)
    continual(path)
    assert ran == []
    (done / MEASURED / "same" / "default" / "captions.json").unlink()
    continual(path)
    assert [words[0] for words in ran] == ["test"]
    assert (done / "results.json").read_text() == before


def test_a_changed_plan_never_passes_for_the_old_one(plan, done, tmp_path):
    path = write_plan(tmp_path / "tiny.yaml", plan)
    with pytest.raises(ValueError, match=r"settings\.trainer\.max_steps: trained with 30, found 31"):
        continual(path, max_steps=31)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"phases": {"same": {"confg": "x"}}}, "confg"),
        ({"phases": {"same": {"after": "nobody"}}}, "one of those above it: questions"),
        ({"phases": {"questions": {"after": "new"}}}, "none, as it is the first"),
        ({"phases": {"a/b": {"config": "x", "after": "new"}}}, "'a/b' is to be a folder"),
        ({"measure": {"captions": {"learnt_in": "nobody"}}}, "wanted one of questions, same, new"),
        ({"phases": {"same": {"settings": {"model": {"adapter": None}}}}}, "no model.adapter"),
        ({"phases": {"new": {"settings": {"model": {"train_projector": True}}}}}, "train_projector to false"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_runs(plan, tmp_path, changes, told, monkeypatch):
    monkeypatch.setattr(steps, "run_here", None)
    path = write_plan(
        tmp_path / "wrong.yaml", merged(merged(plan, {"output": str(tmp_path / "out")}), changes)
    )
    with pytest.raises(ValueError, match=told):
        continual(path)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", None])
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "some.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RefusedError, match=r"some\.yaml is no plan"):
        read_plan(str(path))


@pytest.mark.parametrize("name", PLANS)
def test_the_phases_of_shipped_plans_are_runs_that_fit_understands(name, tmp_path):
    path = Path("configs/continual") / f"{name}.yaml"
    assert len(path.read_text().splitlines()) <= 40
    plan = read_plan(str(path))
    for phase in plan.phases:
        config = tmp_path / f"{phase}.yaml"
        settings = merged(fit_settings(plan, phase), {"trainer": {"default_root_dir": str(tmp_path)}})
        config.write_text(yaml.safe_dump(settings))
        cli = VisionLanguageCLI.parse(["--config", str(config)])
        assert cli.model.start_from == (
            f"{plan.output}/{plan.phases[phase].after}"
            if plan.phases[phase].after
            else settings["model"].get("start_from")
        )
