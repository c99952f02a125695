"""`mmpeft test` by the command line: choices are ranked, a killed run goes on, text alone needs no encoder."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmpeft
from mmpeft.cli import main
from mmpeft.data.formats import DataError
from mmpeft.data.layouts.columns import Columns
from mmpeft.evaluation.answer_log import AnswerLog
from mmpeft.evaluation.evaluate import EvaluationConfig, as_answer
from mmpeft.inference.engine import Engine
from mmpeft.inference.requests import Completion
from mmpeft.runs.manifest import MANIFEST
from tests.tiny import COLOURS, make_config, make_record, run_directory, write_jsonl


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tfew_config(tiny_base, tiny_data, choice_data, tmp_path_factory):
    """A T-Few run on two shots of every colour; it has been fitted."""
    path = tmp_path_factory.mktemp("tfew") / "config.yaml"
    config = make_config(
        path,
        tiny_base,
        tiny_data,
        model={
            "adapter": {"class_path": "mmpeft.adapters.IA3Config"},
            "optimizer": "adafactor",
            "learning_rate": 3e-2,
            "schedule": "linear",
            "warmup": 0.06,
        },
        data={
            "train": str(choice_data / "train_choices.jsonl"),
            "val": str(choice_data / "val_choices.jsonl"),
            "test": str(choice_data / "test.jsonl"),
            "image_root": str(tiny_data),
            "shots": 2,
            "packing": {"batch_size": 4},
        },
        trainer={"max_steps": 60, "log_every_n_steps": 1, "val_check_interval": 2},
    )
    main(["fit", "--config", str(config)])
    return config


def test_tfew_learns_from_its_choices(tfew_config):
    curves = [
        line.split(",") for line in (run_directory(tfew_config) / "metrics.csv").read_text().splitlines()
    ]
    named = {
        name: [float(row[n]) for row in curves[1:] if row[n]]
        for n, name in enumerate(curves[0])
        if name != "step"
    }
    for term in ("train_lm", "train_length_normalised"):
        assert named[term][-1] < 0.7 * named[term][0], term
    assert named["train_loss"][3] == pytest.approx(
        sum(named[f"train_{term}"][3] for term in ("lm", "unlikelihood", "length_normalised")), rel=1e-5
    )
    assert named["val_rank_accuracy"][-1] in (0, 0.5, 1)


def test_rows_with_choices_are_ranked_and_the_others_written(tfew_config, choice_data):
    main(["test", "--config", str(tfew_config)])
    directory = run_directory(tfew_config)
    predictions = rows_of(directory / "predictions.jsonl")
    assert [row["id"] for row in predictions] == [row["id"] for row in rows_of(choice_data / "test.jsonl")]
    for row in predictions:
        if row["truth"] in COLOURS:
            assert row["scores"].keys() == set(COLOURS)
            assert row["answer"] == max(row["scores"], key=row["scores"].get)
        else:
            assert "scores" not in row
    metrics = json.loads((directory / "metrics.json").read_text())
    right = sum(row["answer"] == row["truth"] for row in predictions)
    assert metrics["exact_match"] == pytest.approx(right / len(predictions))
    assert metrics["questions"] == len(predictions)
    assert not (directory / "test.partial.jsonl").exists()


def test_asking_answers_as_the_test_does(tfew_config, choice_data, tiny_data, tmp_path):
    """The run knows the choices that its training data listed."""
    asked = ["--data.test", str(choice_data / "test_choices.jsonl"), "--output", str(tmp_path)]
    main(["test", "--config", str(tfew_config), *asked])
    directory = run_directory(tfew_config)
    manifest = json.loads((directory / MANIFEST).read_text())
    assert manifest["choices"] == {"default": {"vqa": {"": sorted(COLOURS)}}}
    assert manifest["without_images"] == []
    vlm = mmpeft.load(str(directory), "cpu")
    for row, told in zip(
        rows_of(choice_data / "test_choices.jsonl"), rows_of(tmp_path / "predictions.jsonl"), strict=True
    ):
        image, question = tiny_data / row["image"], told["question"]
        assert vlm.ask(image, question) == told["answer"] == vlm.rank(image, question, sorted(COLOURS))[0][0]


def test_short_captions_are_measured_as_texts(tfew_config, tiny_data, tmp_path):
    asked = ["--data.test", str(tiny_data / "captions.jsonl"), "--output", str(tmp_path)]
    main(["test", "--config", str(tfew_config), *asked])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"exact_match", "rouge1", "rouge2", "rougeL", "cider", "f1/macro"} <= metrics.keys()
    assert not {"bleu", "chrf"} & metrics.keys(), "which say nothing of so few words"


@pytest.mark.parametrize(
    ("record", "caption"),
    [
        (make_record("<image>what?", "red", task="caption"), True),
        (make_record("<image>Describe this image.", "a red cup"), True),
        (make_record("<image>what?", "red", task="vqa"), False),
        (make_record("<image>what?", "red"), False),
    ],
)
def test_what_is_a_caption(record, caption):
    assert as_answer(record, Completion("red")).is_caption == caption


def test_what_a_run_goes_on_from_stays_known(tfew_config, tiny_data, tmp_path):
    """Of tasks that the new data does not have; where it has them, its own choices count."""

    def known_after(task):
        where = tmp_path / task
        data = [
            f"--data.train={tiny_data / 'text.jsonl'}",
            f"--data.task={task}",
            "--data.shots=null",
            "--data.text_only=true",
        ]
        start = [f"--model.start_from={run_directory(tfew_config)}", "--model.optimizer=adamw"]
        steps = [
            "--trainer.max_steps=1",
            "--trainer.val_check_interval=1",
            "--data.val=null",
            f"--trainer.default_root_dir={where}",
        ]
        main(["fit", "--config", str(tfew_config), *data, *start, *steps, "--data.image_root=null"])
        manifest = json.loads((where / MANIFEST).read_text())
        assert manifest["without_images"] == ["default"]
        return manifest["choices"]

    assert known_after("facts") == {"default": {"vqa": {"": sorted(COLOURS)}}}
    assert known_after("vqa") == {}


def test_ranked_classes_have_their_metrics_and_pictures(tfew_config, choice_data):
    directory = run_directory(tfew_config) / "choices"
    data = ["--data.test", str(choice_data / "test_choices.jsonl"), "--output", str(directory)]
    main(["test", "--config", str(tfew_config), *data])
    metrics = json.loads((directory / "metrics.json").read_text())
    assert {
        "accuracy",
        "f1/macro",
        "recall/macro",
        "calibration_error",
        "brier",
        "perplexity",
    } <= metrics.keys()
    assert metrics["accuracy"] == metrics["exact_match"]
    for picture in ("confusion", "calibration"):
        assert (directory / f"{picture}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("metric", "answer_by", "message"),
    [
        ("vqa_accuracy", "auto", r"vqa_accuracy does not fit .*test.jsonl:1.*several people"),
        ("brier", "generate", r"brier does not fit .*test.jsonl:1.*rank its choices"),
    ],
)
def test_a_metric_that_does_not_fit_names_the_row_before_anything_is_answered(
    tfew_config, metric, answer_by, message, monkeypatch
):
    monkeypatch.setattr(AnswerLog, "append", None)
    with pytest.raises(SystemExit, match=message):
        main(
            [
                "test",
                "--config",
                str(tfew_config),
                f"--data.metrics=[{metric}]",
                f"--data.answer_by={answer_by}",
            ]
        )


@pytest.mark.parametrize(
    ("test", "answer_by"), [("test_choices", "rank"), ("test_choices", "auto"), ("test", "generate")]
)
def test_metrics_that_fit_are_not_refused_beforehand(tfew_config, choice_data, tmp_path, test, answer_by):
    wanted = ["brier", "perplexity", "f1/macro"] if answer_by != "generate" else ["perplexity", "f1/macro"]
    asked = [f"--data.test={choice_data / test}.jsonl", f"--data.answer_by={answer_by}"]
    asked += [f"--data.metrics=[{','.join(wanted)}]", f"--output={tmp_path}"]
    main(["test", "--config", str(tfew_config), *asked])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    written = {"cut_answers"} if answer_by == "generate" else set()
    intervals = {f"ci95_{end}/{name}" for end in ("low", "high") for name in wanted}
    assert metrics.keys() - intervals == {*wanted, "questions", *written}


def test_a_killed_evaluation_goes_on_and_ends_the_same(
    tfew_config, monkeypatch, dies_after_4_answers, capsys
):
    directory = run_directory(tfew_config)
    main(["test", "--config", str(tfew_config), "--data.packing.batch_size", "2"])
    whole = (directory / "predictions.jsonl").read_text(), (directory / "metrics.json").read_text()
    dies_after_4_answers(["test", "--config", str(tfew_config), "--data.packing.batch_size", "2"])
    assert len((directory / "test.partial.jsonl").read_text().splitlines()) >= 5
    answered = []
    write = Engine._write
    monkeypatch.setattr(
        Engine,
        "_write",
        lambda self, asked, *rest: answered.extend(asked.numbers) or write(self, asked, *rest),
    )
    main(["test", "--config", str(tfew_config), "--data.packing.batch_size", "2"])
    assert "answers are there already; going on" in capsys.readouterr().out
    assert 0 < len(answered) < 4, "of the four prompts some had been answered"
    assert ((directory / "predictions.jsonl").read_text(), (directory / "metrics.json").read_text()) == whole


def test_ranking_without_choices_is_refused_by_row(tfew_config, capsys):
    with pytest.raises(SystemExit, match=r"test.jsonl:\d+: .* has no choices to rank"):
        main(["test", "--config", str(tfew_config), "--data.answer_by", "rank"])


@pytest.mark.parametrize("command", ["test", "predict"])
def test_where_no_question_can_be_asked_each_row_says_why(
    tfew_config, choice_data, tmp_path, command, capsys
):
    words = [command, "--config", str(tfew_config), "--data.packing.max_length=3", f"--output={tmp_path}"]
    main([*words, f"--data.{command}={choice_data / 'test.jsonl'}"])
    file = "predictions.jsonl" if command == "test" else "answers.jsonl"
    rows = rows_of(tmp_path / file)
    assert len(rows) == 6
    assert all(row["answer"] is None and "max_length" in row["error"] for row in rows)
    if command == "test":
        assert json.loads((tmp_path / "metrics.json").read_text()) == {"questions": 6, "errors": 6}
        assert "6" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_text_alone_needs_no_encoder(tiny_base, tiny_data, tmp_path):
    config = make_config(
        tmp_path / "config.yaml",
        tiny_base,
        tiny_data,
        model={"vision": None},
        data={name: str(tiny_data / "text.jsonl") for name in ("train", "val", "test")},
        trainer={"max_steps": 30},
    )
    main(["fit", "--config", str(config)])
    main(["test", "--config", str(config)])
    metrics = json.loads((run_directory(config) / "metrics.json").read_text())
    assert metrics["perplexity"] < 30
    card = (run_directory(config) / "README.md").read_text()
    assert "It reads text, no images." in card
    assert "--image" not in card


def test_an_image_without_encoder_is_refused(tiny_base, tiny_data, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, model={"vision": None})
    with pytest.raises(SystemExit, match=r"train.jsonl:1: .* has an image, but model.vision is null"):
        main(["fit", "--config", str(config)])


def test_text_and_images_mix_by_weight(tiny_base, tiny_data, tmp_path):
    """A fifth of the examples of an epoch are to be text; both are seen in the same batches."""
    config = make_config(
        tmp_path / "config.yaml",
        tiny_base,
        tiny_data,
        data={
            "train": [str(tiny_data / "train.jsonl"), str(tiny_data / "text.jsonl")],
            "weights": [2, 1],
        },
        trainer={"max_epochs": 1, "max_steps": -1},
    )
    from mmpeft.training.cli import VisionLanguageCLI

    cli = VisionLanguageCLI.parse(["--config", str(config)])
    data = cli.datamodule
    data.read("fit", cli.model.finetunes)
    sizes = dict(cli.model.finetunes["default"].mix)
    assert set(sizes.values()) == {2, 1}
    main(["fit", "--config", str(config)])
    settings = yaml.safe_load((run_directory(config) / "config.yaml").read_text())
    assert settings["data"]["weights"] == [2, 1]


def test_weights_that_do_not_fit_the_files_are_refused(tiny_base, tiny_data, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, data={"weights": [1, 2]})
    with pytest.raises(SystemExit, match=r"data\.weights has 2 numbers for 1 training files"):
        main(["fit", "--config", str(config)])


def test_forgetting_is_measured_told_and_drawn(tfew_config, tiny_data, capsys):
    directory = run_directory(tfew_config)
    main(
        [
            "test",
            "--config",
            str(tfew_config),
            "--forgetting",
            "--data.held_text",
            str(tiny_data / "text.jsonl"),
        ]
    )
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["forgetting/perplexity_base"] > 1
    assert metrics["forgetting/perplexity"] != metrics["forgetting/perplexity_base"]
    assert 0 <= metrics["forgetting/same_token"] <= 1
    assert metrics["forgetting/kl"] > 0
    assert "base weights: unchanged by the training, to the bit" in capsys.readouterr().out
    assert (directory / "changes.png").stat().st_size > 1000
    card = (directory / "README.md").read_text()
    assert "![changes](changes.png)" in card
    assert "same next token" in card


def test_forgetting_on_a_text_whose_rows_are_read_by_the_columns_of_the_data(
    tfew_config, tiny_data, tmp_path
):
    rows = [row | {"note": 1} for row in rows_of(tiny_data / "text.jsonl")]
    found = []
    for ignored, own in (
        ("[note]", rows),
        ("null", [{k: v for k, v in row.items() if k != "note"} for row in rows]),
    ):
        held, output = write_jsonl(tmp_path / "held.jsonl", own), tmp_path / ignored
        words = [
            f"--test.held_text={held}",
            f"--data.ignore={ignored}",
            f"--output={output}",
            "--data.limit=1",
        ]
        main(["test", "--config", str(tfew_config), "--forgetting", *words])
        found.append(json.loads((output / "metrics.json").read_text())["forgetting/kl"])
    assert found[0] == found[1] > 0


def test_held_text_of_ones_own_is_read_by_the_columns_of_the_data(tmp_path, monkeypatch):
    """Not all of which it needs to have; the text that comes with mmpeft is read without them."""
    held = write_jsonl(tmp_path / "held.jsonl", [{"question": "Say it.", "says": "A text.", "note": 1}])
    columns = Columns({"answer": "says", "image": "scan"}, ["note"])
    assert EvaluationConfig(held_text=str(held)).held_texts(columns) == ["A text."]
    monkeypatch.setattr("mmpeft.evaluation.evaluate.HELD_TEXT", str(held))
    with pytest.raises(DataError, match=r"'says'.*'note'"):
        EvaluationConfig(held_text=str(held)).held_texts(columns)


def test_a_finetune_can_begin_as_another_runs_adapter(tfew_config, tiny_base, tiny_data, tmp_path):
    """IA3 that was trained before, under other names and several times."""
    settings = yaml.safe_load(tfew_config.read_text())
    adapter = settings["model"]["adapter"]
    changes = {
        "adapter": None,
        "adapters": {name: {"adapter": adapter} for name in ("one", "two")},
        "start_from": str(run_directory(tfew_config)),
        "start_adapter": "default",
        "learning_rate": 0.0,
        "projector_learning_rate": 0.0,
    }
    config = make_config(
        tmp_path / "config.yaml", tiny_base, tiny_data, model=changes, trainer={"max_steps": 1}
    )
    main(["fit", "--config", str(config)])
    begun = load_file(run_directory(tfew_config) / "adapters/default/adapter_model.safetensors")
    for name in ("one", "two"):
        own = load_file(run_directory(config) / "adapters" / name / "adapter_model.safetensors")
        assert all(torch.equal(own[key], tensor) for key, tensor in begun.items())
    with pytest.raises(SystemExit, match="has no adapter 'nobody'; it has default"):
        main(["fit", "--config", str(config), "--model.start_adapter", "nobody"])
