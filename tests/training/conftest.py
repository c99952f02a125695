"""Runs that tests of a run's life begin from."""

import shutil

import pytest

from mmpeft.runs.manifest import MANIFEST
from tests.training.run_life import fit, make


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tiny_base, tiny_data):
    """A run that nothing disturbed."""
    return fit(make(tmp_path_factory.mktemp("whole"), tiny_base, tiny_data))


@pytest.fixture
def stopped(tmp_path, whole):
    """A run directory with two checkpoints and no end."""
    run = shutil.copytree(whole, tmp_path / "stopped")
    (run / MANIFEST).unlink()
    return run
