"""`mmpeft init`: three answers become a config that a fit takes, with what it will need; bad answers are refused."""

import json
import re
import sys

import pytest
import yaml

from mmpeft.cli import main
from mmpeft.tools import begin, new_config
from mmpeft.tools.data_facts import DataFacts
from mmpeft.tools.image_survey import ImageSurvey
from mmpeft.tools.new_config import Found, make_config, other_split
from tests.tiny import write_jsonl


@pytest.fixture
def place(tiny_base, tmp_path, monkeypatch):
    """A folder to write into; the encoder is the tiny one."""
    files = {"name": "test_vit", "weights": str(tiny_base / "vision.safetensors")}
    for module in (begin, new_config):
        monkeypatch.setattr(
            module, "vision_settings", lambda encoder: files | {"image_size": 32, "fit": "squash"}
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(base, data, goal, *more):
    return ["init", "--data", str(data), "--base", str(base / "language"), "--goal", goal, *more]


def parses(config):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", config, "--print_config"])
    return ended.value.code in (None, 0)


def test_the_config_is_one_that_a_fit_takes_and_says_what_it_needs(place, tiny_base, tiny_data, capsys):
    given = words(tiny_base, tiny_data / "train.jsonl", "answer", "--output", "mine.yaml")
    main(given)
    told, text = capsys.readouterr().out, (place / "mine.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["data"]["val"] == str(tiny_data / "val.jsonl")
    assert config["data"]["test"] == str(tiny_data / "test.jsonl")
    assert config["data"]["packing"] == {"batch_size": 32, "max_conversations": 3, "max_length": 256}
    assert config["model"]["adapter"]["class_path"] == "mmpeft.adapters.LoraConfig"
    assert config["trainer"]["max_epochs"] == 20
    assert text.startswith("# mmpeft fit --config mine.yaml\n")
    steps = re.search(r"(\d+) steps of", text)
    assert steps is not None
    assert int(steps[1]) == 20, "24 questions in one batch, 20 epochs"
    assert "# memory: about " in text
    assert "24 conversations" in told
    assert "next: mmpeft fit --config mine.yaml" in told
    assert not (place / "runs").exists(), "a trial writes nothing"
    assert parses("mine.yaml")
    with pytest.raises(SystemExit, match=r"mine\.yaml is there already"):
        main(given)


@pytest.mark.parametrize("goal", ["answer", "keep", "caption"])
def test_every_goal_becomes_a_config_that_parses(place, tiny_base, tiny_data, goal):
    main(words(tiny_base, tiny_data / "train.jsonl", goal, "--trial", "false"))
    assert parses("config.yaml")
    adapter = yaml.safe_load((place / "config.yaml").read_text())["model"].get("adapter")
    targets = None if adapter is None else adapter["init_args"].get("target_modules", "auto")
    assert targets == {"answer": "auto", "keep": "attention", "caption": None}[goal]


def test_few_examples_with_choices_are_t_few(place, tiny_base, tiny_data, choice_data):
    data = choice_data / "train_choices.jsonl"
    main(words(tiny_base, data, "few", "--trial", "false", "--image_root", str(tiny_data)))
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config["model"]["optimizer"] == "adafactor"
    assert config["trainer"]["max_steps"] == 1000
    assert config["data"]["image_root"] == str(tiny_data)
    assert parses("config.yaml")


def test_what_is_not_given_is_asked(place, tiny_base, tiny_data, monkeypatch):
    asked, answers = [], [str(tiny_data / "train.jsonl"), str(tiny_base / "language"), ""]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answers[len(asked) - 1])
    main(["init", "--trial", "false"])
    assert [word in question for word, question in zip(("data", "model", "keep"), asked, strict=True)] == [
        True
    ] * 3
    adapter = yaml.safe_load((place / "config.yaml").read_text())["model"]["adapter"]
    assert adapter["init_args"] == {"rank": 16, "alpha": 32}


def test_where_nobody_can_be_asked_the_option_is_named(place, tiny_base, tiny_data):
    with pytest.raises(SystemExit, match="--goal is not given: What for"):
        main(words(tiny_base, tiny_data / "train.jsonl", "answer")[:5])


def test_columns_that_are_not_known_are_told_with_a_proposal(place, tiny_base, tiny_data, capsys):
    write_jsonl(place / "own.jsonl", [{"foo_a": "images/red0.png", "foo_b": "what?", "foo_c": "red"}])
    given = words(tiny_base, "own.jsonl", "answer", "--image_root", str(tiny_data))
    with pytest.raises(SystemExit, match=r"own\.jsonl"):
        main(given)
    assert "columns that seem to be known: {image: foo_a}" in capsys.readouterr().out
    assert not (place / "config.yaml").exists()
    mapped = '{"image": "foo_a", "question": "foo_b", "answer": "foo_c"}'
    main([*given, "--columns", mapped, "--trial", "false"])
    assert yaml.safe_load((place / "config.yaml").read_text())["data"]["columns"] == json.loads(mapped)


def test_data_that_do_not_suit_the_goal_are_refused(place, tiny_base, tiny_data):
    with pytest.raises(SystemExit, match=r"not all rows of .* have choices"):
        main(words(tiny_base, tiny_data / "train.jsonl", "few"))
    with pytest.raises(SystemExit, match=r"text\.jsonl names none; take --goal answer"):
        main(words(tiny_base, tiny_data / "text.jsonl", "caption"))
    with pytest.raises(SystemExit, match=r"but .* names no images; leave it out"):
        main(words(tiny_base, tiny_data / "text.jsonl", "answer", "--start_from", "runs/x"))


def found(parameters, room, conversations=100):
    images = ImageSurvey(decode=False, config=begin.DEFAULT)
    return Found(DataFacts(conversations=conversations), images, parameters, 900, 2048, False, room)


def test_what_the_numbers_depend_on():
    sizes = (10**8, 7 * 10**9)
    small, large = (make_config("d", "b", "answer", found(size, 24 * 10**9), "runs/x") for size in sizes)
    assert (small["model"]["learning_rate"], large["model"]["learning_rate"]) == (1e-3, 2e-4)
    assert "quantization" not in small["model"]["language"]
    assert large["model"]["language"]["quantization"] == "nf4"
    assert small["data"]["packing"] == {"batch_size": 32, "max_conversations": 4, "max_length": 960}
    configs = (make_config("d", "b", "answer", found(1, 0, count), "r") for count in (10, 2000, 10**6))
    assert [config["trainer"]["max_epochs"] for config in configs] == [20, 3, 1]


def test_other_splits_lie_beside_the_training_data(tmp_path):
    for name in ("my_train.jsonl", "my_dev.jsonl", "train", "test"):
        (tmp_path / name).touch()
    assert other_split(str(tmp_path / "my_train.jsonl"), "validation") == str(tmp_path / "my_dev.jsonl")
    assert other_split(str(tmp_path / "my_train.jsonl"), "test") is None
    assert other_split(str(tmp_path / "train"), "test") == str(tmp_path / "test")
    assert other_split(str(tmp_path / "all.jsonl"), "test") is None
    for name in ("constraints_train.jsonl", "constraints_val.jsonl"):
        (tmp_path / name).touch()
    found = other_split(str(tmp_path / "constraints_train.jsonl"), "validation")
    assert found == str(tmp_path / "constraints_val.jsonl")


def test_stage_2_sees_as_the_run_of_stage_1_did(tiny_run, tiny_base, tiny_data, tmp_path, monkeypatch):
    """Not with the embedded encoder at its own size, whose projector is another one."""
    monkeypatch.chdir(tmp_path)
    main(
        words(
            tiny_base, tiny_data / "train.jsonl", "answer", "--start_from", str(tiny_run), "--trial", "false"
        )
    )
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    wanted = yaml.safe_load((tiny_run / "config.yaml").read_text())["model"]["vision"]
    assert found["vision"] == {name: wanted[name] for name in ("name", "weights", "image_size", "fit")}
    assert found["start_from"] == str(tiny_run)
    given = words(
        tiny_base, tiny_data / "train.jsonl", "answer", "--start_from", "gone", "--output", "b.yaml"
    )
    with pytest.raises(SystemExit, match="gone is no run of mmpeft"):
        main([*given, "--trial", "false"])


def test_a_goal_or_an_output_that_cannot_be_is_refused_before_the_data_are_read(
    place, tiny_base, tiny_data, monkeypatch
):
    monkeypatch.setattr(begin, "look", lambda *_: pytest.fail("it read the data"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "fly")
    given = words(tiny_base, tiny_data / "train.jsonl", "answer")
    with pytest.raises(SystemExit, match="--goal is 'fly'; it is one of answer, keep, few, caption"):
        main(given[:5])
    (place / "file").touch()
    with pytest.raises(SystemExit, match=r"file/a\.yaml cannot be written, as .*file is no folder"):
        main([*given, "--output", "file/a.yaml"])


def test_an_input_that_ends_is_no_answer(place, tiny_base, tiny_data, monkeypatch):
    def ended(question):
        raise EOFError

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ended)
    with pytest.raises(SystemExit, match=r"--goal is not given: What for.* caption "):
        main(words(tiny_base, tiny_data / "train.jsonl", "answer")[:5])
