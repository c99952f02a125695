"""`mmpeft inspect`: a batch token by token, without any weights."""

import pytest

from mmpeft.cli import main
from tests.tiny import make_config


@pytest.fixture
def inspect(tiny_base, tiny_data, tmp_path, capsys):
    """Runs the command on a changed config; what it printed."""

    def run(*words: str, **changes) -> str:
        config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, **changes)
        main(["inspect", "--config", str(config), *words])
        return capsys.readouterr().out

    return run


def test_it_shows_segments_images_and_what_must_be_predicted_of_so_many_rows(inspect):
    told = inspect("--rows", "2")
    assert "row 0: " in told
    assert "row 1: " in told
    assert "row 2: " not in told
    assert "image features" in told
    assert "must predict" in told
    assert "train: 24 examples, 24 conversations in 4 batches" in " ".join(told.split())


def test_it_shows_the_validation_data_too_and_takes_overrides(inspect):
    told = " ".join(inspect("--split", "val", "--data.packing.batch_size=3").split())
    assert "val: 6 examples, 6 conversations in 2 batches" in told


def test_a_split_without_data_is_told(inspect):
    with pytest.raises(SystemExit, match=r"the config has no data\.val"):
        inspect("--split", "val", data={"val": None})


@pytest.mark.parametrize("rows", ["0", "-1"])
def test_less_than_a_row_is_refused(inspect, rows):
    with pytest.raises(SystemExit, match=rf"--rows is {rows}; it must be at least 1"):
        inspect("--rows", rows)


def test_no_weights_are_loaded(inspect, monkeypatch):
    monkeypatch.setattr("mmpeft.training.start.build_model", None)
    vision = {"name": "test_vit", "weights": "not/there.safetensors", "image_size": 32, "crop": False}
    assert "tokens carry loss" in " ".join(inspect(model={"vision": vision}).split())
