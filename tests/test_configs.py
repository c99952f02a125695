"""Every shipped config parses against the code, and none is longer than a screen."""

from pathlib import Path

import pytest
import yaml

from mmpeft.adapters import AdapterConfig
from mmpeft.cli import main
from mmpeft.config_files import with_presets
from mmpeft.training.cli import VisionLanguageCLI

FILES = sorted(Path("configs").rglob("*.yaml"))
PRESETS = [path for path in FILES if path.parent.name == "presets"]
CONFIGS = [path for path in FILES if "\nphases:" not in path.read_text() and path not in PRESETS]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_builds_model_data_and_trainer_without_loading_weights(path: Path, tmp_path: Path):
    cli = VisionLanguageCLI.parse(["--config", str(path), f"--trainer.default_root_dir={tmp_path}"])
    for finetune in cli.model.finetunes.values():
        assert finetune.adapter is None or isinstance(finetune.adapter, AdapterConfig)
    assert cli.datamodule.paths["train"]


@pytest.mark.parametrize("path", PRESETS, ids=str)
@pytest.mark.parametrize("config", ["configs/text/lora.yaml", "configs/easy_vqa/instruct_tfew.yaml"])
def test_a_preset_goes_over_any_config(path: Path, config: str, tmp_path: Path):
    """Its method takes the place of another one, whose settings do not stay."""
    words = ["--config", config, f"--trainer.default_root_dir={tmp_path}"]
    before = VisionLanguageCLI.parse(words)
    cli = VisionLanguageCLI.parse([*words[:2], "--preset", path.stem, *words[2:]])
    wanted = yaml.safe_load(path.read_text())["model"]
    own, settings = cli.model.finetunes["default"].adapter, cli.model.finetunes["default"].settings
    assert type(own).__name__ == wanted["adapter"]["class_path"].rpartition(".")[2]
    for name, value in wanted["adapter"]["init_args"].items():
        assert getattr(own, name) == value
    assert settings.learning_rate == wanted["learning_rate"]
    assert settings.lora_b_ratio == wanted.get("lora_b_ratio", 1)
    assert cli.datamodule.paths == before.datamodule.paths


def test_a_preset_goes_over_a_config_wherever_it_stands():
    config, plus, up = (
        "configs/text/lora.yaml",
        "configs/presets/lora_plus.yaml",
        "configs/presets/lora_gate_up.yaml",
    )
    given = [
        "fit",
        "--preset=lora_gate_up",
        "--preset",
        "lora_plus",
        "--config",
        config,
        "--model.learning_rate=1",
    ]
    behind = [word for path in (config, up, plus) for word in ("--config", path)]
    found = [
        str(Path(word).relative_to(Path.cwd())) if word.startswith("/") else word
        for word in with_presets(given)
    ]
    assert found == ["fit", *behind, "--model.learning_rate=1"]
    words = ["--preset", "lora_gate_up", f"--config={config}"]
    assert VisionLanguageCLI.parse(words).model.finetunes["default"].adapter.target_modules == "gate+up"
    with pytest.raises(SystemExit, match="--preset is put over a config, and --run goes on"):
        main(["fit", "--run=runs/x", "--preset", "lora_plus"])


def test_presets_are_listed_and_another_is_refused_by_name(tmp_path, capsys):
    main(["configs", "list"])
    told = capsys.readouterr().out
    assert {"tfew_all_linears", "lora_plus", "lora_attention", "lora_gate_up"} <= {
        path.stem for path in PRESETS
    }
    assert all(f"configs/presets/{path.name} " in told for path in PRESETS)
    with pytest.raises(
        SystemExit, match=r"there is no 'lora_pls'; the closest is 'lora_plus'\. There are: lora_att"
    ):
        main(["fit", "--config", "configs/text/lora.yaml", "--preset", "lora_pls"])
    (tmp_path / "own.yaml").write_text("preset: lora_plus\n" + Path("configs/text/lora.yaml").read_text())
    with pytest.raises(SystemExit, match="preset: lora_plus stands in a config"):
        main(["fit", "--config", str(tmp_path / "own.yaml")])


@pytest.mark.parametrize("path", FILES, ids=str)
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
