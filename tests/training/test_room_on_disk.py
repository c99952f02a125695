"""Files that are written whole or not at all, and disks without room for them."""

import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmpeft.errors import RefusedError
from mmpeft.files import save_tensors, write_whole
from mmpeft.training.checkpoint_files import AtomicCheckpointIO, newest_whole_checkpoint
from tests.training.run_life import fit, make


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
