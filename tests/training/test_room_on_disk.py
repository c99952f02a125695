"""Files that are written whole or not at all, and disks without room for them."""

import errno
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.evaluation.answer_log import AnswerLog
from mmpeft.files import no_space, save_tensors, whole_folder, write_whole
from mmpeft.inference.requests import Completion
from mmpeft.training.checkpoint_files import AtomicCheckpointIO, newest_whole_checkpoint
from mmpeft.training.curves import CurvesLogger
from tests.tiny import run_directory
from tests.training.run_life import STEPS, fit, make


@contextmanager
def small_files():
    """Inside, no file may grow beyond 4 kB; also not the one that this suite's own output may go to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_told_with_path_and_bytes_and_keeps_what_was_there(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, last)
    larger = {"step": 2, "weights": torch.zeros(100_000)}
    with pytest.raises(RefusedError, match=r"last\.ckpt: no space left.* 0\.4 MB are needed.*MB are free"):
        with small_files():
            AtomicCheckpointIO().save_checkpoint(larger, last)
    assert torch.load(last, weights_only=True) == {"step": 1}
    assert os.listdir(last.parent) == ["last.ckpt"]
    assert newest_whole_checkpoint(tmp_path) == last
    with pytest.raises(RefusedError, match=r"text\.md: no space left"):
        with small_files():
            write_whole(tmp_path / "text.md", "x" * 5000)
    assert not list(tmp_path.glob("*text.md"))
    save_tensors({"kept": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(RefusedError, match=r"x\.safetensors: no space left"):
        with small_files():
            save_tensors({"lost": torch.ones(2000)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {"kept"}
    assert len(list(tmp_path.glob("*x.safetensors"))) == 1


def test_a_folder_that_has_become_read_only_is_told_with_path_and_bytes_and_keeps_the_checkpoint(
    stopped, monkeypatch
):
    """As a file system that was mounted anew after an error; permissions would not hold a superuser."""
    last, write = stopped / "checkpoints" / "last.ckpt", Path.open

    def refuse(path, mode="r", *rest, **named):
        if "w" in mode and path.name.startswith(".last"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return write(path, mode, *rest, **named)

    before = last.read_bytes()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit, match=r"last\.ckpt cannot be written: Read-only.* (bytes|MB) are needed"):
        main(["fit", "--run", str(stopped), "--resume", f"--trainer.max_steps={STEPS + 2}"])
    assert last.read_bytes() == before


def test_another_reason_than_room_is_not_told_as_that(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(SafetensorError, match="Permission denied"):
        save_tensors({"lost": torch.ones(2)}, tmp_path / "x.safetensors")


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path, tiny_base, tiny_data, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"last\.ckpt: no space left.*0\.0 MB are free"):
        fit(make(tmp_path, tiny_base, tiny_data))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_checkpoints_have_ordinary_permissions(whole, tmp_path):
    (plain := tmp_path / "plain").touch()
    for path in (whole / "checkpoints").iterdir():
        assert path.stat().st_mode == plain.stat().st_mode


def test_what_grows_is_told_with_path_and_bytes_too(tmp_path):
    """The system's own words name neither."""
    log = AnswerLog(tmp_path / "test.partial.jsonl", "this")
    writer = CurvesLogger(tmp_path)
    writer.log_metrics({"loss": 1.0})
    with small_files():
        with pytest.raises(
            RefusedError, match=r"test\.partial\.jsonl: no space left.*[45],\d{3} bytes are needed"
        ):
            log.append([(0, Completion("x" * 4096, "stop"))])
        for step in range(1, 1000):
            writer.experiment.log_metrics({"loss": 1.0}, step)
        with pytest.raises(RefusedError, match=r"metrics\.csv: no space left"):
            writer.save()


def test_a_new_column_leaves_the_curve_whole_where_there_is_no_room(tmp_path):
    writer = CurvesLogger(tmp_path)
    for step in range(1000):
        writer.experiment.log_metrics({"loss": 1.0}, step)
    writer.save()
    before = (tmp_path / "metrics.csv").read_bytes()
    writer.experiment.log_metrics({"val_loss": 1.0}, 1000)
    with pytest.raises(RefusedError, match=r"metrics\.csv: no space left"), small_files():
        writer.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_fit_that_an_error_ends_says_what_it_keeps(tmp_path, tiny_base, tiny_data, monkeypatch, capsys):
    """A full disk at the end of it: the same command would begin from the start."""

    def full(path, *_, **__):
        raise no_space(tmp_path / "adapter_model.safetensors", 5)

    monkeypatch.setattr("mmpeft.training.run_writer.save_run", full)
    config = make(tmp_path, tiny_base, tiny_data)
    with pytest.raises(SystemExit, match="5 bytes are needed"):
        fit(config)
    run = run_directory(config)
    assert (
        f"last.ckpt keeps step {STEPS}. Go on with: mmpeft fit --run {run} --resume"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="is no run"):
        fit(config, "--model.start_from=gone", f"--trainer.default_root_dir={tmp_path / 'other'}")
    assert "keeps step" not in capsys.readouterr().err


def test_a_folder_is_filled_beside_its_place_and_gone_where_it_is_not_filled(tmp_path):
    path = tmp_path / "merged"
    with pytest.raises(RefusedError, match=r"merged: no space left"), small_files():
        with whole_folder(path, 5000) as unfinished:
            (unfinished / "model.safetensors").write_bytes(b"x" * 5000)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".merged.part").mkdir()
    (tmp_path / ".merged.part" / "of one that was killed").touch()
    path.mkdir()
    with whole_folder(path, 1) as unfinished:
        (unfinished / "config.json").touch()
        assert not list(path.iterdir())
    assert [file.name for file in path.iterdir()] == ["config.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]
