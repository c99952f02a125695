"""The survey of language models: nothing crashes, and what docs/models.md says is what comes out."""

import re
from pathlib import Path

import pytest

from mmpeft.tools import survey as module
from mmpeft.tools.survey import CRASHED, count, survey, table

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
WANTED = {"exact": 165, "LoRA": 150, "IA3": 130}
"""Of the causal LM classes of transformers 5.24, at least."""


def test_a_class_is_read_and_adapted_or_refused_with_a_reason():
    llama, hybrid, encoder = survey(["llama", "qwen3_5_text", "bert"])
    assert (llama.reading, set(llama.methods.values())) == ("packed", {"yes"})
    assert hybrid.reading == "unpacked"
    assert "second conversation" in hybrid.why
    assert encoder.reading == "refused"
    assert "no causal model" in encoder.why
    assert count([llama, hybrid, encoder])["exact"] == 2
    assert "| llama | packed | yes | yes | yes | yes | yes |  |" in table([llama, hybrid, encoder])


def test_a_crash_is_counted_as_one(monkeypatch):
    def broken(model, checked):
        raise IndexError("out of range")

    monkeypatch.setattr(module, "check_adapters", broken)
    (found,) = survey(["llama"])
    assert set(found.methods.values()) == {CRASHED}
    assert found.refusals["LoRA"] == "IndexError: out of range"


@pytest.mark.slow
def test_the_table_of_every_class_is_what_the_survey_finds():
    counted = count(list(survey()))
    told = {
        name: int(number) for name, number in re.findall(r"^- (.+): (\d+) of \d+$", TABLE.read_text(), re.M)
    }
    assert counted == told
    assert CRASHED not in counted
    assert all(counted[name] >= number for name, number in WANTED.items())
