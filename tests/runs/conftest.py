"""Runs with several finetunes that are far from their base."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from mmpeft.adapters import IA3Config
from mmpeft.models.projector import Projector
from mmpeft.runs.files import load_run, save_run


@pytest.fixture(scope="session")
def add_tfew(randomise) -> Callable[[Path], Path]:
    """Gives a run an IA3 beside its LoRA, both far from the base, and another projector."""

    def add(run: Path) -> Path:
        model, _, manifest = load_run(run)
        randomise(model.bank, "default")
        model.bank.add("tfew", IA3Config())
        randomise(model.bank, "tfew")
        torch.nn.init.normal_(model.projector.weight)
        save_run(run, manifest, model)
        return run

    return add


@pytest.fixture(scope="session")
def make_joint(tiny_run, randomise) -> Callable[[Path, Mapping, str], Path]:
    """Writes a run of finetunes with random weights, one of them with a projector of its own."""

    def make(folder: Path, finetunes: Mapping, owner: str) -> Path:
        model, _, manifest = load_run(tiny_run, with_adapters=False)
        width = model.language_model.get_input_embeddings().embedding_dim
        model.projector = Projector(model.vision_encoder.dim, width, num_slots=2)
        torch.nn.init.normal_(model.projector.weight)
        model.projector_slots = {owner: 1}
        for name, config in finetunes.items():
            model.bank.add(name, config)
            randomise(model.bank, name)
        save_run(folder, manifest, model)
        return folder

    return make
