"""`mmpeft sweep`: settings side by side, each as alone until it leaves; what cannot be compared is refused by name."""

import csv
import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.experiments import sweep
from mmpeft.experiments.sweep_plan import Plan, make_plan, read_value
from mmpeft.training import module as fit_module
from mmpeft.training.halving import SuccessiveHalving
from mmpeft.training.halving_rule import halving_steps, num_halvings, num_kept, standings
from tests.tiny import make_config

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Rows are padded to the widest of the joint batch: other shapes, other rounding."""
RATES = "[1e-3,1e-2,3e-2,1e-5]"
STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_base, tiny_data):
    folder = tmp_path_factory.mktemp("sweep")
    changes = {
        "max_steps": STEPS,
        "log_every_n_steps": 1,
        "val_check_interval": 1000,
        "check_val_every_n_epoch": None,
    }
    return make_config(folder / "config.yaml", tiny_base, tiny_data, trainer=changes)


def words(config, *more):
    return ["sweep", "--config", str(config), "--model.learning_rate", RATES, *more]


@pytest.fixture(scope="module")
def swept(config):
    """A sweep of four learning rates."""
    output = config.parent / "out"
    main(words(config, "--output", str(output)))
    return output


def curve(run, name):
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name) not in (None, "", "nan")]


def test_the_weak_half_leaves_at_each_halving(swept):
    rows = json.loads((swept / "sweep.json").read_text())["settings"]
    assert [row["steps"] for row in rows] == [12, 6, 3, 3]
    assert rows[0]["val_loss"] < rows[1]["val_loss"]
    run = swept / "joint"
    for row in rows:
        name = row["setting"]
        assert len(curve(run, f"train_loss/{name}")) == row["steps"], "no row of it is computed any more"
        assert len(curve(run, f"val_loss/{name}")) == {3: 1, 6: 2, 12: 3}[row["steps"]]
    at_first = {row["setting"]: curve(run, f"val_loss/{row['setting']}")[0] for row in rows}
    assert set(sorted(at_first, key=at_first.__getitem__)[:2]) == {row["setting"] for row in rows[:2]}


def test_every_setting_is_what_it_would_be_alone_until_it_leaves(swept, config, tmp_path):
    rows = json.loads((swept / "sweep.json").read_text())["settings"]
    for row in rows:
        name, alone = row["setting"], tmp_path / row["setting"]
        rate = f"--model.learning_rate={row['values']['model.learning_rate']}"
        main(["fit", "--config", str(config), rate, f"--trainer.default_root_dir={alone}"])
        losses = curve(alone, "train_loss")
        assert len(losses) == STEPS
        joint = curve(swept / "joint", f"train_loss/{name}")
        assert joint == pytest.approx(losses[: row["steps"]], rel=1e-4, abs=1e-5)
    winner = rows[0]["setting"]
    want = load_file(tmp_path / winner / "adapters" / "default" / "adapter_model.safetensors")
    got = load_file(swept / "joint" / "adapters" / winner / "adapter_model.safetensors")
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, **CLOSE)


def test_the_best_config_is_the_best_setting_as_a_run_of_its_own(swept, config, capsys):
    rows = json.loads((swept / "sweep.json").read_text())["settings"]
    best = yaml.safe_load((swept / "best.yaml").read_text())
    wanted = yaml.safe_load(config.read_text())
    wanted["model"]["learning_rate"] = rows[0]["values"]["model.learning_rate"]
    wanted["trainer"]["default_root_dir"] = str(swept / "best")
    assert best == wanted
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(swept / "best.yaml"), "--print_config"])
    assert ended.value.code in (None, 0)


def test_the_run_of_a_sweep_is_one_as_any(swept, tmp_path, capsys):
    main(["validate", f"--run={swept / 'joint'}"])
    assert "val_loss/learning_rate0.03" in capsys.readouterr().out
    main(["test", f"--run={swept / 'joint'}", "--data.limit=2", f"--output={tmp_path}"])
    assert "exact_match/learning_rate0.03" in json.loads((tmp_path / "metrics.json").read_text())


def test_table_and_picture(swept):
    rows = json.loads((swept / "sweep.json").read_text())["settings"]
    table = (swept / "table.md").read_text().splitlines()
    assert table[0] == "| learning_rate | validation loss | after step |"
    assert table[2] == f"| {rows[0]['values']['model.learning_rate']:g} | {rows[0]['val_loss']:.4f} | 12 |"
    with Image.open(swept / "sweep.png") as picture:
        assert picture.size == (1600, 900)
        assert len(set(picture.convert("RGB").getdata())) > 50


def test_a_second_start_runs_nothing_and_other_settings_are_refused(swept, config, monkeypatch, capsys):
    monkeypatch.setattr("mmpeft.experiments.steps.run_here", lambda words: pytest.fail("it ran again"))
    before = (swept / "sweep.json").read_text()
    main(words(config, "--output", str(swept)))
    assert json.loads((swept / "sweep.json").read_text())["settings"] == json.loads(before)["settings"]
    with pytest.raises(SystemExit, match="was trained otherwise than is wanted now"):
        main(words(config, "--output", str(swept), "--keep", "0.25"))


@pytest.mark.parametrize("stopped_at", [3, 4])
def test_a_sweep_that_was_cut_off_goes_on_as_if_it_had_not(swept, config, tmp_path, monkeypatch, stopped_at):
    """Stopped before the halving that the checkpoint's step brings, or after it."""
    halve, saved = SuccessiveHalving.on_train_batch_end, []

    def save_and_stop(self, trainer, *rest):
        if trainer.global_step == stopped_at and not saved:
            saved.append(tmp_path / "out" / "joint" / "checkpoints" / "last.ckpt")
            trainer.save_checkpoint(saved[0])
            raise KeyboardInterrupt
        halve(self, trainer, *rest)

    monkeypatch.setattr(SuccessiveHalving, "on_train_batch_end", save_and_stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(words(config, "--output", str(tmp_path / "out")))
    main(words(config, "--output", str(tmp_path / "out")))
    want, got = (
        json.loads((out / "sweep.json").read_text())["settings"] for out in (swept, tmp_path / "out")
    )
    assert [row["steps"] for row in got] == [12, 6, 3, 3]
    for row, other in zip(want, got, strict=True):
        assert row["setting"] == other["setting"]
        files = [
            out / "joint" / "adapters" / row["setting"] / "adapter_model.safetensors"
            for out in (swept, tmp_path / "out")
        ]
        a, b = map(load_file, files)
        assert all(torch.equal(a[key], b[key]) for key in a), row["setting"]


@pytest.mark.parametrize("steps", ["null", "many"])
def test_a_number_of_steps_that_is_none_is_the_parsers_to_tell(config, tmp_path, steps):
    epoch = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=1", "--print_config"]
    main(words(config, *epoch, "--output", str(tmp_path / "out")))


def test_seeds_are_finetunes_of_a_setting_and_leave_together(config, tmp_path):
    output = tmp_path / "out"
    rates = ["--model.learning_rate", "[1e-2,1e-5]"]
    main(["sweep", "--config", str(config), *rates, "--seeds", "2", "--output", str(output)])
    first, last = json.loads((output / "sweep.json").read_text())["settings"]
    assert (first["steps"], last["steps"]) == (12, 6)
    assert first["finetunes"] == ["learning_rate0.01-seed0", "learning_rate0.01-seed1"]
    assert first["val_loss"] == pytest.approx(sum(first["val_losses"]) / 2)
    zero, one = (curve(output / "joint", f"train_loss/{name}") for name in first["finetunes"])
    assert zero != one, "other seeds see other batches"
    assert [line for line in (output / "table.md").read_text().splitlines() if "of its seeds" in line]
    alone = yaml.safe_load(config.read_text())
    alone["model"]["adapters"] = {"one": {"adapter": alone["model"].pop("adapter"), "seed": 1}}
    alone["trainer"]["default_root_dir"] = str(tmp_path / "alone")
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    main(["fit", "--config", str(tmp_path / "alone.yaml")])
    assert one == pytest.approx(curve(tmp_path / "alone", "train_loss"), rel=1e-4, abs=1e-5)


REFUSED = [
    (
        ["--data.packing.batch_size", "[2,4]"],
        "--data.packing.batch_size cannot differ .*one for all finetunes",
    ),
    (["--model.language.name", "[a,b]"], "--model.language.name cannot differ"),
    (["--model.learning_rte", "[1e-3,1e-2]"], "the closest that can is model.learning_rate"),
    (["--data.val", "[a,b]"], "--data.val cannot differ .* the same validation data"),
    (["--model.choice_losses.unlikelihood", "[0,1]"], "it changes the loss by which"),
    (["--model.preferences.beta", "[0.1,1]"], "it changes the loss by which"),
    (["--model.seed", "[0,1]"], "give --seeds"),
    (["--model.learning_rate", "[1e-3]"], "found one setting; wanted two or more"),
    (["--model.learning_rate", "[1e-3,0.001]"], "0.001 is there twice"),
    (["--model.adapter", "null", "--model.adapter.rank", "[4,8]"], r"has no model\.adapter; a sweep"),
    (["--model.adapter", "null", "--model.adapter.rank", "4"], "a setting of which adapter"),
    (["--model.learning_rate", "[1e-3,"], "is no YAML"),
    (["--data.val", "null", "--model.learning_rate", "[1e-3,1e-2]"], "has no data.val"),
    (["--settings", "{model.learning_rate: 1}"], "--settings is a list of settings"),
    (["--settings", "[]"], "found no setting; wanted two or more"),
    (
        ["--settings", "[{model.learning_rate: 1e-3}, {model.adapter: null}]"],
        r"has no model\.adapter; a sweep trains one",
    ),
    (["--model.learning_rate.x", "1"], "model.learning_rate is 0.01, which has no settings of its own"),
    (["--model.learning_rate", "[1,2]", "--config", "other.yaml"], "--config is given 2 times, .*other.yaml"),
    (["--settings", "[{trainer.max_steps: 1}]"], "--trainer.max_steps cannot differ .* after the same steps"),
    (["--model.learning_rate", "[1,2]", "--keep", "1"], "--keep is 1.0"),
    (["--model.learning_rate", "[1,2]", "--at", "[0.5]"], "wanted .* a list of steps"),
    (["--model.learning_rate", "[1,2]", "--at", "[6,12]"], r"after the steps \[6, 12\] of 12"),
    (
        ["--model.learning_rate", "[1,2,3,4]", "--trainer.max_steps=2"],
        "halved 2 times, for which 2 steps are too few",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused_by_name(config, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr("mmpeft.experiments.steps.run_here", lambda words: pytest.fail("something ran"))
    with pytest.raises(SystemExit, match=message):
        main(["sweep", "--config", str(config), *given, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("section", ["model: [1]", "model: {}\ntrainer: many"])
def test_sections_that_hold_no_settings_are_refused(tmp_path, section):
    (tmp_path / "config.yaml").write_text(section + "\n")
    with pytest.raises(
        SystemExit, match=r"config.yaml has (model: \[1\]|trainer: 'many'); wanted settings below it"
    ):
        main(["sweep", "--config", str(tmp_path / "config.yaml"), "--model.learning_rate", "[1,2]"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--data.limit=6"],
            "halved 2 times, for which 1 steps",
        ),
        (["--trainer.limit_val_batches=0"], "not all of them are validated"),
        (["--trainer.limit_val_batches=0", "--at", "[]"], "not all of them are validated"),
        (["--trainer.val_check_interval=00:00:01:00"], "val_check_interval no time"),
    ],
)
def test_halvings_that_cannot_be_are_refused_before_the_first_step(
    config, tmp_path, given, message, monkeypatch
):
    monkeypatch.setattr(fit_module.VisionLanguageModule, "training_step", lambda *_: pytest.fail("a step"))
    with pytest.raises(SystemExit, match=message):
        main(words(config, *given, "--output", str(tmp_path / "out")))


def test_grid_and_list_are_settings_of_the_joint_config(config, capsys):
    ranks = [
        "--model.adapter.rank",
        "[2,4]",
        "--settings",
        "[{model.learning_rate: 1e-3}, {model.warmup: 0.5}]",
    ]
    main(["sweep", "--config", str(config), *ranks, "--trainer.max_steps=7", "--print_config"])
    joint = yaml.safe_load(capsys.readouterr().out)
    entries = joint["model"]["adapters"]
    assert list(entries) == [
        *("learning_rate0.001-rank2", "learning_rate0.001-rank4", "warmup0.5-rank2", "warmup0.5-rank4")
    ]
    assert entries["learning_rate0.001-rank4"]["adapter"]["init_args"]["rank"] == 4
    assert entries["learning_rate0.001-rank4"]["learning_rate"] == 1e-3
    assert "learning_rate" not in entries["warmup0.5-rank2"]
    assert joint["trainer"]["max_steps"] == 7
    assert joint["model"]["adapter"] is None


def test_whole_methods_are_settings(config):
    lora = "{class_path: mmpeft.adapters.LoraConfig, init_args: {rank: 2}}"
    methods = f"[{{class_path: mmpeft.adapters.IA3Config}}, {lora}]"
    ranks = make_plan(
        str(config), ["--model.adapter", methods.replace("IA3", "Dora"), "--model.adapter.rank", "[4,8]"]
    )
    entries = ranks.joint("run", 0.5, None)["model"]["adapters"].values()
    assert [entry["adapter"]["init_args"]["rank"] for entry in entries] == [4, 8, 4, 8], "each has its own"
    assert "init_args" not in ranks.settings["adapterDoraConfig-rank4"]["model.adapter"]
    plan = make_plan(str(config), ["--model.adapter", methods])
    assert list(plan.settings) == ["adapterIA3Config", "adapterLoraConfig"]
    assert plan.alone("adapterIA3Config")["model"]["adapter"] == {"class_path": "mmpeft.adapters.IA3Config"}


def test_the_rule_in_numbers():
    assert [num_halvings(number, 0.5) for number in (1, 2, 3, 8, 9)] == [0, 1, 2, 3, 4]
    assert [num_kept(number, 0.5) for number in (2, 3, 8, 9)] == [1, 2, 4, 5]
    assert num_kept(10, 0.7) == 7, "not the eight that 7.000000000000001 rounds up to"
    assert num_kept(3, 0.99) == 2, "one leaves at least"
    assert halving_steps(8, 0.5, 200) == [25, 50, 100]
    assert halving_steps(9, 1 / 3, 90) == [10, 30]


def test_a_callback_that_watches_a_curve_is_refused(config, tmp_path):
    watching = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val_loss"},
    }
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = [watching, {"class_path": "lightning.pytorch.callbacks.Timer"}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        SystemExit, match=r"EarlyStopping watches 'val_loss', .* val_loss/NAME; take it out of"
    ):
        main(words(tmp_path / "config.yaml", "--output", str(tmp_path / "out")))


def test_losses_that_are_no_numbers_are_null(tmp_path):
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "metrics.csv").write_text("step,val_loss/a,val_loss/b\n1,nan,inf\n")
    plan = Plan({"trainer": {}}, {"a": {"model.learning_rate": 1e3}, "b": {"model.learning_rate": 2e3}})
    rows = sweep.standing_rows(plan, tmp_path / "joint")
    with pytest.raises(RefusedError, match=r"no setting of .* has a finite validation loss, a neither"):
        sweep._write(tmp_path, plan, rows, "sweep")
    found = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)["settings"]
    assert [(row["val_loss"], row["val_losses"]) for row in found] == [(None, [None])] * 2


def test_a_setting_that_diverged_is_the_worst():
    nan = float("nan")
    curves = {"val_loss/a": [(4, nan)], "val_loss/b": [(4, 2.0)], "val_loss/c": [(2, 1.0)]}
    assert [setting for setting, *_ in standings(curves, {each: [each] for each in "abc"})] == ["b", "a", "c"]


def test_numbers_of_the_command_line():
    assert read_value("[1e-4,1E3,2.5e-1,x1e3]", "--a") == [1e-4, 1000.0, 0.25, "x1e3"]
