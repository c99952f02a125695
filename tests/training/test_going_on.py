"""`--resume` and `--ckpt_path`: the newest whole checkpoint, and what is refused rather than taken for one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mmpeft.cli import main
from mmpeft.runs.manifest import MANIFEST
from mmpeft.training.checkpoint_files import damage, newest_whole_checkpoint
from tests.training.run_life import assert_equal_runs, contents, flip


@pytest.mark.parametrize(
    "harm", [flip, lambda path: os.truncate(path, 999), lambda path: path.write_bytes(b"")]
)
def test_resume_passes_over_a_damaged_checkpoint_aloud(stopped, whole, capsys, harm):
    harm(stopped / "checkpoints" / "last.ckpt")
    main(["fit", "--run", str(stopped), "--resume"])
    told = capsys.readouterr()
    assert f"{stopped}/checkpoints/last.ckpt is damaged" in told.err
    assert f"going on from {stopped}/checkpoints/previous.ckpt" in told.out
    assert_equal_runs(whole, stopped)


def test_a_flipped_byte_anywhere_in_a_tensor_is_noticed(stopped):
    path = stopped / "checkpoints" / "last.ckpt"
    data = path.read_bytes()
    tensor = max(torch.load(path, weights_only=True)["state_dict"].values(), key=torch.numel)
    flip(path, share=(data.index(tensor.numpy().tobytes()) + 5) / len(data))
    with pytest.raises(
        SystemExit, match=r"last\.ckpt is no whole checkpoint \(.* does not have its checksum\)"
    ):
        main(["fit", "--run", str(stopped), "--ckpt_path", str(path)])


def test_resume_without_a_whole_checkpoint_is_refused(stopped):
    (folder := stopped / "checkpoints" / "folder.ckpt").mkdir()
    assert newest_whole_checkpoint(stopped).name == "last.ckpt"
    assert damage(folder) == "it cannot be read: Is a directory"
    folder.rmdir()
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"--resume: .*it is empty.*it is empty"):
        main(["fit", "--run", str(stopped), "--resume"])
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(SystemExit, match="has no checkpoint"):
        main(["fit", "--run", str(stopped), "--resume"])
    with pytest.raises(SystemExit, match=r"--ckpt_path last: .* has no checkpoints/last\.ckpt"):
        main(["fit", "--run", str(stopped), "--ckpt_path", "last"])


@pytest.mark.parametrize("later", [0, 10**9])
def test_a_copied_run_goes_on_from_its_last_checkpoint(stopped, later):
    """Whatever was copied first, or has the same time by seconds."""
    last, previous = (stopped / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    time = last.stat().st_mtime_ns
    os.utime(previous, ns=(time + later, time + later))
    assert newest_whole_checkpoint(stopped) == last
    shutil.copy(previous, stopped / "checkpoints" / "step=9.ckpt")  # of a callback of the user's
    os.utime(stopped / "checkpoints" / "step=9.ckpt", ns=(time + 2, time + 2))
    assert newest_whole_checkpoint(stopped).name == "step=9.ckpt"


def test_checkpoints_that_cannot_be_gone_on_with_are_passed_over_and_refused(stopped, capsys):
    """Of weights alone, as Lightning's `save_weights_only` makes them, and of no run at all."""
    folder = stopped / "checkpoints"
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    some = {key: own for key, own in whole.items() if key != "optimizer_states"}
    for name, content, told in (
        ("some", some, "has no optimizer_states, as one of weights alone"),
        ("list", [1, 2], r"list\.ckpt is no checkpoint of a run, or was not written by mmpeft"),
        ("bare", whole["state_dict"], r"bare\.ckpt is no checkpoint of a run, or was not written by mmpeft"),
    ):
        torch.save(content, folder / f"{name}.ckpt")
        with pytest.raises(SystemExit, match=told):
            main(["fit", "--run", str(stopped), "--ckpt_path", str(folder / f"{name}.ckpt")])
    (folder / "list.ckpt").unlink()
    (folder / "bare.ckpt").unlink()
    assert newest_whole_checkpoint(stopped) == folder / "last.ckpt"
    assert f"{folder}/some.ckpt holds weights alone" in capsys.readouterr().err


def test_damage_of_any_kind_is_a_reason(tmp_path, monkeypatch):
    torch.save({}, path := tmp_path / "x.ckpt")
    for error in (IndexError(), TypeError("first\nsecond")):
        monkeypatch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert damage(path) == (str(error).partition("\n")[0] or "IndexError")


def test_ckpt_path_last_is_the_runs_own(stopped, whole):
    shutil.copy(stopped / "checkpoints" / "previous.ckpt", stopped / "checkpoints" / "last.ckpt")
    main(["fit", "--run", str(stopped), "--ckpt_path", "last"])
    assert_equal_runs(whole, stopped)


def test_to_resume_a_run_that_has_ended_changes_nothing_and_says_so(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "ended")
    main(["test", "--run", str(run)])
    before = contents(run)
    main(["fit", "--run", str(run), "--resume"])
    assert "has ended already; raise trainer.max_steps" in capsys.readouterr().out
    after = contents(run)
    assert {path: after[path] for path in before} == before
    assert {path.parts[0] for path in after.keys() - before.keys()} <= {"tensorboard"}


def test_a_run_that_was_stopped_before_its_card_gets_it_and_nothing_else(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "ended")
    before = contents(run)
    shutil.rmtree(run / "examples")
    drawn = [Path("README.md"), Path("report.png")]  # which show the name of the directory
    for path in drawn:
        (run / path).unlink()
    main(["fit", "--run", str(run), "--resume"])
    assert "has ended already" in capsys.readouterr().out
    after = contents(run)
    assert all(after[path] for path in drawn)
    assert {path: after[path] for path in before if path not in drawn} == {
        path: content for path, content in before.items() if path not in drawn
    }


def test_a_run_that_was_killed_before_it_was_written_is_written_by_resume(stopped, whole):
    shutil.rmtree(stopped / "adapters")
    main(["fit", "--run", str(stopped), "--resume"])
    assert_equal_runs(whole, stopped)


@pytest.mark.parametrize("how", [["--resume"], []])
def test_a_stopped_run_is_not_made_a_finished_one_without_training(stopped, how):
    before = contents(stopped)
    with pytest.raises(SystemExit, match=r"max_epochs is 0, and the fit of .* has not ended"):
        main(["fit", "--run", str(stopped), *how, "--trainer.max_epochs=0"])
    assert contents(stopped) == before


def test_the_time_of_a_run_is_that_of_all_its_parts(stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert 0 < checkpoint["callbacks"]["RunWriter"]["seconds"] < 60
    checkpoint["callbacks"]["RunWriter"]["seconds"] = 6000.0
    torch.save(checkpoint, last)
    main(["fit", "--run", str(stopped), "--resume"])
    assert json.loads((stopped / MANIFEST).read_text())["facts"]["time"].startswith("100.")
