"""A step of an experiment: run once, resumed where it was cut off, refused where it was run otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmpeft.errors import RefusedError
from mmpeft.experiments.steps import (
    MANIFEST,
    ChildError,
    evaluate_once,
    fit_once,
    read_answers,
    read_metrics,
    run_process,
    weights_of,
)
from mmpeft.runs import manifest
from mmpeft.runs.occupancy import held
from tests.tiny import make_config


class Runs:
    """Stands in for `mmpeft`: leaves what a step looks for, or fails half-way after a checkpoint."""

    def __init__(self):
        self.words: list[list[str]] = []
        self.found_checkpoints: list[bool] = []
        self.fails = False

    def __call__(self, words: list[str]) -> int:
        self.words.append(words)
        directory = Path(yaml.safe_load(Path(words[2]).read_text())["trainer"]["default_root_dir"])
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.found_checkpoints.append((directory / "checkpoints" / "last.ckpt").exists())
        (directory / "checkpoints" / "last.ckpt").touch()
        if self.fails:
            raise ChildError("cut off")
        (directory / (MANIFEST if words[0] == "fit" else "metrics.json")).write_text("{}")
        return 10**9

    @property
    def commands(self) -> list[str]:
        """What ran, with its options."""
        return [" ".join([words[0], *words[3:]]) for words in self.words]


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def settings(tmp_path) -> dict:
    return {"model": {"rank": 4}, "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 3}}


def test_what_is_done_with_the_same_settings_is_not_done_again(runs, settings, tmp_path):
    first = fit_once(settings, {"start": None}, run=runs)
    second = fit_once(settings, {"start": None}, run=runs)
    assert (first.ran, second.ran) == (True, False)
    assert first.peak_bytes == second.peak_bytes == 10**9
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == settings
    assert fit_once(settings, {"start": None}, run=runs, again=True).ran
    assert runs.commands == ["fit", "fit"]


def test_what_was_done_with_other_settings_is_refused_field_by_field(runs, settings):
    fit_once(settings, {"start": "a"}, run=runs)
    settings["trainer"]["max_steps"] = 4
    with pytest.raises(
        RefusedError, match=r"max_steps: trained with 3, found 4\n  start: trained with 'a', found 'b'"
    ):
        fit_once(settings, {"start": "b"}, run=runs)
    assert runs.commands == ["fit"]


def test_a_run_that_no_step_made_is_refused(runs, settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MANIFEST).write_text("{}")
    with pytest.raises(RefusedError, match=r"max_steps: trained with None, found 3"):
        fit_once(settings, run=runs)
    assert not runs.words


def test_what_was_cut_off_is_resumed_unless_the_settings_changed(runs, settings, tmp_path):
    runs.fails = True
    for steps in (3, 3, 4):
        settings["trainer"]["max_steps"] = steps
        with pytest.raises(ChildError):
            fit_once(settings, run=runs)
    assert runs.commands == [
        "fit",
        f"fit --ckpt_path {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}",
        "fit",
    ]

    assert runs.found_checkpoints == [False, True, False], (
        "one of other settings is never left to resume from"
    )


def test_what_other_settings_left_is_put_aside_or_refused(runs, settings, tmp_path):
    runs.fails = True
    with pytest.raises(ChildError):
        fit_once(settings, run=runs)
    record, curves = tmp_path / "run.json", tmp_path / "run" / "metrics.csv"
    curves.write_text("step\n")
    before = record.read_text()
    settings["trainer"]["max_steps"] = 4
    with pytest.raises(
        RefusedError, match=r"run was begun otherwise(.|\n)*max_steps: trained with 3, found 4"
    ):
        fit_once(settings, run=runs, keep_begun=True)
    with held(tmp_path / "run"), pytest.raises(RefusedError, match="another mmpeft process is writing"):
        fit_once(settings, run=runs)
    assert record.read_text() == before, "what another process is at is not touched"
    with pytest.raises(ChildError):
        fit_once(settings, run=runs)
    assert (tmp_path / "run" / "previous" / "checkpoints" / "last.ckpt").exists(), (
        "no step that was taken is lost"
    )
    assert runs.found_checkpoints == [False, False]


def test_questions_are_answered_again_for_another_model_alone(runs, settings):
    for weights, again in (("a", False), ("a", False), ("b", False), ("b", True)):
        evaluate_once(settings, {"weights": weights}, run=runs, options=["--forgetting"], again=again)
    where = f"--output {settings['trainer']['default_root_dir']} --untrained"
    assert runs.commands == [f"test {where} --forgetting"] * 3
    runs.fails = True
    with pytest.raises(ChildError):
        evaluate_once(settings, {"weights": "c"}, run=runs)
    runs.fails = False
    evaluate_once(settings, {"weights": "b"}, run=runs)
    assert len(runs.words) == 5, "a test that failed left other answers than those of before"


def test_a_real_fit_that_was_killed_before_its_end_is_completed(tiny_base, tiny_data, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, trainer={"max_steps": 4})
    settings = yaml.safe_load(config.read_text())
    fit_once(settings, config=config)
    whole = weights_of(tmp_path / "run")
    (tmp_path / "run" / MANIFEST).unlink()
    fit_once(settings, config=config)
    assert weights_of(tmp_path / "run") == whole
    evaluate_once(settings, {"weights": whole}, config=tmp_path / "test.yaml")
    assert len(read_answers(tmp_path / "run")) == read_metrics(tmp_path / "run")["questions"] == 6
    assert json.loads((tmp_path / "test.json").read_text()) == {"weights": whole}


def test_a_process_tells_its_own_peak_memory_and_its_last_words(tmp_path):
    log = tmp_path / "log"
    peak = run_process(["-c", "import resource as r; print(r.getrusage(r.RUSAGE_SELF).ru_maxrss)"], log)
    assert 1024 * int(log.read_text()) <= peak < 1024 * int(log.read_text()) + 2**25
    for code, message in [
        ("import sys; print('a'); sys.exit('error: it is\\n  too hot')", "^it is too hot; see"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os._exit(3)", "said nothing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run_process(["-c", code], log)


def test_the_process_that_measures_others_is_small():
    """A child's peak memory begins with its parent's."""
    code = (
        "import sys, mmpeft.cli, mmpeft.experiments.compare_methods;"
        "print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"


def test_a_finished_run_is_known_by_its_manifest():
    assert MANIFEST == manifest.MANIFEST
