"""Every shipped config parses against the code, and none is longer than a screen."""

from pathlib import Path

import pytest

from mmpeft.adapters import AdapterConfig
from mmpeft.training.cli import VisionLanguageCLI

CONFIGS = [path for path in sorted(Path("configs").rglob("*.yaml")) if "\nphases:" not in path.read_text()]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_builds_model_data_and_trainer_without_loading_weights(path: Path, tmp_path: Path):
    cli = VisionLanguageCLI.parse(["--config", str(path), f"--trainer.default_root_dir={tmp_path}"])
    for finetune in cli.model.finetunes.values():
        assert finetune.adapter is None or isinstance(finetune.adapter, AdapterConfig)
    assert cli.datamodule.paths["train"]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_is_at_most_forty_lines(path: Path):
    assert len(path.read_text().splitlines()) <= 40


def test_the_promised_configs_are_all_there():
    names = {path.as_posix().removeprefix("configs/") for path in CONFIGS}
    easy_vqa = {
        f"easy_vqa/{name}.yaml" for name in ("caption", "instruct_lora", "instruct_qlora", "instruct_tfew")
    }
    assert names >= easy_vqa | {"minigpt_v2.yaml", "llava_1_5.yaml"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--model.learning_rat=1", "learning_rat"),
        ("--data.packing.batch_sise=4", "batch_sise"),
        ("--model.adapter.init_args.rnk=4", "rnk"),
        ("--trainer.max_step=4", "max_step"),
        ("--model.learning_rate=fast", "learning_rate"),
    ],
)
def test_a_misspelt_or_mistyped_setting_is_refused_by_name(override: str, named: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        VisionLanguageCLI.parse(["--config", "configs/easy_vqa/instruct_lora.yaml", override])
    assert stopped.value.code != 0
    assert named in capsys.readouterr().err
