"""`mmpeft compare-prompting`: what is counted, and what is refused instead of counted wrongly."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

import mmpeft
from mmpeft.adapters import IA3Config
from mmpeft.cli import main
from mmpeft.data.sources import DataError
from mmpeft.experiments.compare_prompting import compare_prompting, demonstrations, read
from mmpeft.experiments.prompting import FewShotPrompt
from mmpeft.experiments.prompting_cost import operations, training_cost
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.vision import VisionConfig
from mmpeft.runs.files import load_run, save_run
from mmpeft.runs.identity import describe
from mmpeft.runs.manifest import Manifest
from tests.tiny import COLOURS, make_config, write_jsonl


@pytest.fixture(scope="module")
def choices(tiny_data):
    """train.jsonl and test.jsonl with the question for the colour alone and its choices."""
    folder = tiny_data / "choices"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (tiny_data / f"{split}.jsonl").read_text().splitlines()]
        rows = [row | {"choices": list(COLOURS), "task": "vqa"} for row in rows if row["id"].endswith("-0")]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base, tiny_data, choices, randomise):
    """A run of T-Few as `mmpeft fit` leaves it, with random weights."""
    folder = tmp_path_factory.mktemp("prompting") / "run"
    language = LanguageConfig(str(tiny_base / "language"), dtype="float32")
    vision = VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32, crop=False)
    torch.manual_seed(0)
    model = build_model(language, vision)
    model.bank.add("tfew", IA3Config())
    randomise(model.bank, "tfew")
    manifest = Manifest(
        asdict(language),
        asdict(vision),
        {"style": "instruct", "max_length": 256},
        describe(language, model, load_tokenizer(language.name)),
        instructions={"vqa": None},
    )
    save_run(folder, manifest, model)
    make_config(folder / "config.yaml", tiny_base, tiny_data)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["model"] |= {"choice_losses": {"unlikelihood": 1.0}, "train_projector": False}
    data = {split: str(choices / f"{split}.jsonl") for split in ("train", "test")}
    settings["data"] |= data | {"val": None, "image_root": str(tiny_data), "packing": {"batch_size": 4}}
    settings["trainer"] |= {"accumulate_grad_batches": 2, "max_epochs": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def arguments(run, choices, tiny_data, tmp_path):
    return {
        "run": str(run),
        "data": str(choices / "test.jsonl"),
        "train": str(choices / "train.jsonl"),
        "image_root": str(tiny_data),
        "output": str(tmp_path / "prompting.json"),
        "counted": 1,
        "seeds": 2,
    }


@pytest.fixture(scope="module")
def vlm(run):
    return mmpeft.load(str(run), "cpu")


@pytest.fixture(scope="module")
def records(choices, tiny_data):
    return [read(str(choices / f"{split}.jsonl"), str(tiny_data), None) for split in ("test", "train")]


def ranked_right(vlm, records, adapter) -> float:
    right = 0
    for record in records:
        question = record["turns"][0][0].replace("<image>", "")
        best = vlm.rank(record["images"][0], question, record["choices"], adapter)[0][0]
        right += best == record["turns"][0][1]
    return right / len(records)


def test_the_table_has_every_way_to_answer(arguments, vlm, records, capsys):
    result = compare_prompting(**arguments, shots=[1, 2])
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [
        "finetune",
        "base",
        *(f"base, {k} shots{kept}" for k in (1, 2) for kept in ("", ", kept")),
    ]
    for method, adapter in (("finetune", "tfew"), ("base", "base")):
        assert rows[method]["accuracy"] == ranked_right(vlm, records[0], adapter)
    assert result["questions"] == len(records[0])
    assert rows["finetune"]["times"] == 1
    # its vectors stand in the last feed-forward, half of this model, which the base computes for labelled tokens alone
    assert 0.8 < rows["base"]["times"] < 1
    assert 0 < result["adapter_share"] < 0.2
    assert rows["base, 2 shots"]["times"] > 1.5 * rows["base, 1 shots"]["times"] > 1.5
    for k in (1, 2):
        whole, kept = rows[f"base, {k} shots"], rows[f"base, {k} shots, kept"]
        assert whole["accuracies"] == kept["accuracies"]
        assert 1 < kept["times"] < whole["times"]
        images = 1 + k * len(COLOURS)
        assert whole["gflop"] - kept["gflop"] > (images - 1) * result["vision_gflop"]
    assert json.loads(Path(arguments["output"]).read_text()) == result
    told = capsys.readouterr().out
    assert "base, 2 shots, kept" in told
    assert "It has paid for itself\n  after" in told


def test_training_is_its_real_batches_times_their_number(arguments, run, vlm, records):
    training = compare_prompting(**arguments, shots=[])["training"]
    assert (training["batches"], training["images"]) == (2 * 10, len(records[1]))
    forward = operations(FewShotPrompt(vlm.model, vlm.template, adapter="tfew"), records[1][0]).products / 1e9
    assert 4 * forward < training["gflop_of_a_batch"] < 2 * 4 * forward  # 4 questions a batch, and no encoder
    assert training["gflop"] > 20 * training["gflop_of_a_batch"]


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("model", {"adapters": {"a": None}}, "joint run"),
        ("trainer", {"max_steps": None}, "neither trainer.max_steps nor"),
        ("data", {"train": "gone.jsonl"}, "gone.jsonl"),
    ],
)
def test_training_that_cannot_be_counted_says_why(run, vlm, tmp_path, section, changes, reason):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[section] |= changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert reason in training_cost(str(tmp_path), vlm.model, vlm.template, "tfew")["note"]


def test_the_count_does_not_depend_on_answers_or_weights(vlm, records, run):
    asked, pool = records
    base = load_run(run, vlm.model.device, with_adapters=False)[0].eval()
    examples = demonstrations(pool, 1, seed=0)
    counted = operations(FewShotPrompt(base, vlm.template, examples[:2]), asked[0])
    wrong = next(choice for choice in asked[0]["choices"] if choice != asked[0]["turns"][0][1])
    answered = asked[0] | {"turns": [(asked[0]["turns"][0][0], wrong)]}
    assert operations(FewShotPrompt(base, vlm.template, examples[:2]), answered) == counted
    with torch.no_grad():
        base.projector.weight.mul_(-3)
    assert operations(FewShotPrompt(base, vlm.template, examples[:2]), asked[0]) == counted
    assert operations(FewShotPrompt(base, vlm.template, examples[:3]), asked[0]).products > counted.products


def test_prompts_that_do_not_fit_are_marked(arguments, capsys):
    rows = compare_prompting(**arguments, shots=[1, 2], max_length=170)["rows"]
    assert "gflop" in rows[3]
    assert rows[-1] == {"method": "base, 2 shots", "note": rows[-1]["note"], "times": None}
    assert "max_length = 170" in rows[-1]["note"]
    assert "too long" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(arguments, choices, tiny_data, run, tmp_path):
    with pytest.raises(DataError, match=r"test\.jsonl:1: '.*' has no choices to rank"):
        compare_prompting(**arguments | {"data": str(tiny_data / "test.jsonl")})
    with pytest.raises(ValueError, match=r"no adapter 'other'; it has \['tfew'\]"):
        compare_prompting(**arguments, adapter="other")


def test_both_files_are_read_by_the_columns_that_are_given(arguments, choices, tmp_path, capsys):
    files = {}
    for name, split in (("data", "test"), ("train", "train")):
        rows = [json.loads(line) for line in (choices / f"{split}.jsonl").read_text().splitlines()]
        rows = [row | {"allowed": row.pop("choices"), "note": 1, "source": "web"} for row in rows]
        files[name] = str(write_jsonl(tmp_path / f"{split}.jsonl", rows))
    words = [f"--{name}={value}" for name, value in (arguments | files).items()]
    main(["compare-prompting", *words, "--shots=[]", "--columns={choices: allowed}", "--ignore=[note]"])
    renamed = json.loads(Path(arguments["output"]).read_text())
    plain = compare_prompting(**arguments, shots=[])
    assert [row["accuracies"] for row in renamed["rows"]] == [row["accuracies"] for row in plain["rows"]]
    assert "set aside: source" in capsys.readouterr().err
    with pytest.raises(
        SystemExit, match=r"data\.columns maps \['alowed'\], which no row of .*test\.jsonl and"
    ):
        main(["compare-prompting", *words, "--columns={choices: allowed, task: alowed}", "--ignore=[note]"])


def test_examples_are_drawn_and_shuffled_by_the_seed(records):
    _, pool = records
    orders = [[r["id"] for r in demonstrations(pool, 2, seed)] for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(r["id"] for r in pool))}
