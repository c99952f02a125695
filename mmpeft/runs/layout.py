"""The names of what a run directory holds beside its finetunes; no library comes in with them."""

from pathlib import Path

RUN = "runs/quickstart"
"""Where the first run lies that people make."""
MANIFEST = "mmpeft.json"
PROJECTOR = "projector.safetensors"
CONFIG = "config.yaml"
"""What the run was trained with."""
WHAT_WAS_WANTED = ("seed_everything", "trainer", "model", "data", "test")
"""The sections of a run's config: what decides about the outcome, not how a command was called."""
CURVES = "metrics.csv"
BOARD = "tensorboard"
CARD = "README.md"
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
PICTURES = ("confusion", "calibration", "changes")
"""What `mmpeft test` draws beside the report."""
TESTS = "tests"
"""Folder of the results of tests that differ from the run's own."""
EARLIER = "previous"
"""Folder of what was there before the last fit: itself a run directory."""
LOCK = ".lock"


def adapter_folder(directory: str | Path, name: str) -> Path:
    """Where a run keeps a finetune."""
    return Path(directory) / "adapters" / name


def config_of(split: str) -> str:
    """The file that says with which settings results were made."""
    return f"config_{split}.yaml"
