"""What a run writes into the feature cache, and that asking and captioning read it."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import mmpeft
from mmpeft.cli import main
from mmpeft.data.feature_cache.encoder_folder import encoder_folders
from mmpeft.data.feature_cache.settings import CacheConfig
from mmpeft.data.plan import PackingConfig
from mmpeft.errors import RefusedError
from mmpeft.models.vision import VisionEncoder
from mmpeft.runs.cache_folder import cache_folder
from mmpeft.training.cache_use import fill_cache
from mmpeft.training.finetune import Finetune, Settings
from mmpeft.training.folder_or_section import with_sections
from mmpeft.training.objectives import ChoiceLosses
from tests.tiny import make_config, make_record, run_directory

TRAIN, VAL = 8, 2
"""Images; 24 conversations about the first make 4 batches an epoch."""


@pytest.fixture
def config(tmp_path, tiny_base, tiny_data):
    return make_config(tmp_path / "config.yaml", tiny_base, tiny_data)


BFLOAT16 = "--model.vision.feature_dtype=bfloat16"


def written(folder):
    return sum(len(shard) for own in encoder_folders(folder) for shard in own.shards())


@pytest.mark.parametrize(
    ("steps", "cache", "wanted"),
    [
        ({"max_steps": 8}, {}, TRAIN + VAL),
        ({"max_steps": 7}, {}, VAL),
        ({"max_steps": 4, "accumulate_grad_batches": 2}, {}, TRAIN + VAL),
        ({"max_epochs": 1}, {}, VAL),
        ({"max_epochs": 2}, {}, TRAIN + VAL),
        ({"max_epochs": 2, "limit_train_batches": 3}, {}, VAL),
        ({"max_steps": 1}, {"build": "always"}, TRAIN + VAL),
        ({"max_steps": 8}, {"build": "never"}, 0),
    ],
    ids=str,
)
def test_training_images_are_written_where_they_are_seen_twice(capsys, steps, cache, wanted):
    built = filled(steps, cache)
    assert len(built.images) == wanted
    told = capsys.readouterr().err
    assert ("the training images of default are not written: they are seen in" in told) == (wanted == VAL)


@pytest.mark.parametrize("there", [0, TRAIN - 1, TRAIN])
def test_images_that_are_there_already_are_not_told_as_not_written(capsys, there):
    built = filled({"max_epochs": 1}, {}, there)
    told = capsys.readouterr().err
    assert ("the training images of default are there already: nothing is to be written" in told) == (
        there == TRAIN
    )
    assert ("are not written: they are seen in 1 epochs" in told) == (there < TRAIN)
    assert len(built.looked_at) == min(there + 1, TRAIN), "the first that is not there ends it"


def filled(steps, cache, there=0):
    """What a cache that holds the first ``there`` training images was asked."""
    usual = {"max_steps": -1, "max_epochs": -1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
    records: Any = {
        split: [make_record(images=[f"{split}{image}"]) for image in range(images) for _ in range(3)]
        for split, images in (("train", TRAIN), ("val", VAL))
    }
    settings = Settings(1e-3, 1e-3, 0.0, "cosine", 0.03, ChoiceLosses())
    finetune = Finetune("default", None, settings, records=records)
    data: Any = SimpleNamespace(
        cache=CacheConfig(**cache), packing=PackingConfig(batch_size=6), skips_late=False
    )
    built: Any = SimpleNamespace(images=set(), looked_at=set())
    held = {f"train{image}" for image in range(there)}
    built.holds = lambda image: built.looked_at.add(image) or image in held
    built.build = lambda images, skip_unreadable: built.images.update(images)
    fill_cache(built, data, {"default": finetune}, SimpleNamespace(**usual | steps), "fit")
    return built


def test_a_fit_of_one_epoch_writes_what_it_validates_on_alone(config, tmp_path):
    main(["fit", "--config", str(config), "--trainer.max_steps=4"])
    assert written(tmp_path / "features") == VAL


def test_a_fit_is_the_same_with_and_without_the_cache(config, tmp_path):
    trained = []
    for build in ("always", "never"):
        run = tmp_path / build
        main(
            [
                "fit",
                "--config",
                str(config),
                f"--data.cache.build={build}",
                f"--trainer.default_root_dir={run}",
            ]
        )
        trained.append((run / "adapters" / "default" / "adapter_model.safetensors").read_bytes())
    assert trained[0] == trained[1]


def test_a_run_is_tested_and_asked_from_its_own_cache(config, tmp_path, tiny_data, monkeypatch):
    main(["fit", "--config", str(config)])
    run = run_directory(config)
    main(["test", "--run", str(run)])
    assert written(tmp_path / "features") == 12
    assert not (run / "tests").exists()  # it is the run's own test, wherever features lie
    main(["test", "--run", str(run), "--data.cache.build=never"])
    assert not (run / "tests").exists()

    def fail(*_):
        raise AssertionError("an image was encoded")

    vlm = mmpeft.load(str(run))
    monkeypatch.setattr(VisionEncoder, "forward", fail)
    images = sorted(map(str, (tiny_data / "images").glob("*.png")))
    assert len(vlm.ask(images, "what color is the shape?", max_new_tokens=1)) == len(images) == 12
    assert len(vlm.caption(images, max_new_tokens=1)) == 12
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(AssertionError, match="was encoded"):
        mmpeft.load(str(run)).ask(images[0], "what color is the shape?")


def test_the_folder_of_a_run_is_that_of_its_config(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    assert cache_folder(tmp_path) == tmp_path / "home" / "features"
    for setting, wanted in (("mine", "mine"), ({"folder": "mine", "max_gb": 3}, "mine")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"cache": setting}}))
        assert str(cache_folder(tmp_path)) == wanted
    (tmp_path / "config.yaml").write_text("data: {cache: {max_gb: 3}}")
    assert cache_folder(tmp_path) == tmp_path / "home" / "features"


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--config", "CONFIG", "--data.cache.max_gb=3"], "from/config"),
        (["--config=CONFIG", "--data.cache.max_gb", "3"], "from/config"),
        (["--config", "CONFIG", "--data.cache=own", "--data.cache.max_gb=3"], "own"),
        (["--data.cache", "own", "--data.cache.max_gb=3"], "own"),
        (["--config", "CONFIG", "--data.cache=null", "--data.cache.max_gb=3"], None),
        (["--data.cache={max_gb: 2}", "--data.cache.build=never"], None),
        (["--config", "gone.yaml", "--data.cache.build=never"], None),
    ],
)
def test_a_key_of_the_section_keeps_the_folder_that_was_given_alone(tmp_path, words, folder):
    path = tmp_path / "config.yaml"
    path.write_text("data: {cache: from/config}")
    words = [word.replace("CONFIG", str(path)) for word in words]
    added = [word for word in with_sections(words) if word not in words]
    assert added == ([] if folder is None else [f"--data.cache.folder={folder}"])


def test_bfloat16_belongs_to_the_base_of_a_run(config, tmp_path):
    main(["fit", "--config", str(config), "--trainer.max_steps=2", BFLOAT16])
    run = run_directory(config)
    vlm = mmpeft.load(str(run))
    assert vlm.engine.features.encoder.fingerprint["feature_dtype"] == "bfloat16"
    ((shard,),) = (own.shards() for own in encoder_folders(tmp_path / "features"))
    assert str(load_file(shard.path)["features"].dtype) == "torch.bfloat16"
    with pytest.raises(
        (RefusedError, SystemExit), match=r"feature_dtype: trained with 'bfloat16', found None"
    ):
        main(["test", "--run", str(run), "--model.vision.feature_dtype=float16"])
