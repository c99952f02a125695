"""`mmpeft sites MODEL --data DATA`: which linears the loss depends on most, and what a budget buys of them."""

import json

import pytest
import torch

from mmpeft.adapters import LoraConfig
from mmpeft.adapters.places import num_parameters
from mmpeft.adapters.sensitivity import top_sites
from mmpeft.cli import main
from mmpeft.data.layouts.columns import Columns
from mmpeft.models import language
from mmpeft.tools import targets_ranking
from mmpeft.tools.targets_ranking import RANK
from tests.tiny import make_data, write_jsonl


@pytest.fixture
def embedded_encoder_not_needed(monkeypatch):
    """The embedded encoder is not on a machine that never ran `mmpeft prepare`; random weights stand in."""
    real = targets_ranking.make_encoder
    monkeypatch.setattr(targets_ranking, "make_encoder", lambda config: real(config, load_weights=False))


def test_a_ranking_of_text_reads_every_linear(tiny_base, tiny_data):
    scores, model = targets_ranking.rank_sites(str(tiny_base / "language"), str(tiny_data / "text.jsonl"), 2)
    assert len(scores) == 14
    assert all(0 < score < torch.inf for score in scores.values())
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())


def test_a_ranking_is_the_same_each_time(embedded_encoder_not_needed, tiny_base, tiny_data, monkeypatch):
    """With images as well, whose projector is drawn afresh."""
    monkeypatch.setattr(language, "pick_dtype", lambda *_: torch.float32)
    torch.manual_seed(0)  # of the encoder's stand-in
    arguments = str(tiny_base / "language"), str(tiny_data / "train.jsonl"), 1
    first, _ = targets_ranking.rank_sites(*arguments)
    torch.manual_seed(0)
    again, _ = targets_ranking.rank_sites(*arguments)
    assert first == again


def test_rows_are_read_by_the_columns_and_the_folder_that_are_given(tiny_base, tiny_data, tmp_path, capsys):
    """Those of another layout rank the linears as the same rows in ours do."""
    rows = [json.loads(line) for line in (tiny_data / "text.jsonl").read_text().splitlines()]
    own = [{"asks": row["question"], "answer": row["answer"], "note": 1} for row in rows]
    name, data = str(tiny_base / "language"), str(write_jsonl(tmp_path / "own.jsonl", own))
    plain, _ = targets_ranking.rank_sites(name, str(tiny_data / "text.jsonl"), 1)
    columns = Columns({"question": "asks"}, ["note"])
    assert targets_ranking.rank_sites(name, data, 1, str(tiny_data), columns)[0] == plain
    assert "left out by data.ignore: note (3)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"maps \['says'\], which no row of .*own\.jsonl has"):
        main(
            ["sites", name, f"--data={data}", "--columns={question: asks, context: says}", "--ignore=[note]"]
        )


def test_the_command_prints_a_ranking_and_what_a_budget_buys(tiny_base, tmp_path, capsys):
    data = make_data(tmp_path / "squares")
    before = sorted(tmp_path.rglob("*"))
    where = [str(tiny_base / "language"), "--data", str(data / "text.jsonl"), "--batches", "1"]
    main(["sites", *where, "--budget", "5000"])
    out = capsys.readouterr().out
    scores, model = targets_ranking.rank_sites(where[0], where[2], 1)
    costs = {path: num_parameters(model.language_model, path, LoraConfig(rank=RANK)) for path in scores}
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    places = [out.index(path) for path in ranked]
    assert places == sorted(places)
    assert "Molchanov" in out
    named = out.split("target_modules:")[1].replace("\n", "")
    assert named.strip(" []").split(", ") == top_sites(scores, costs, 5000)
    assert sorted(tmp_path.rglob("*")) == before, "it writes nothing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "100"], "give --data"),
        (["--ignore", "[note]"], "--columns and --ignore say how --data is read"),
        (["--data", "text.jsonl", "--batches", "0"], "batches is 0"),
        (["--data", "text.jsonl", "--budget", "1"], "pays for no site"),
    ],
)
def test_impossible_wishes_are_told(tiny_base, tiny_data, monkeypatch, arguments, words):
    monkeypatch.chdir(tiny_data)
    with pytest.raises(SystemExit, match=words):
        main(["sites", str(tiny_base / "language"), *arguments])
