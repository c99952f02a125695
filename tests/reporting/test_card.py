"""The card says what a run is, and no text of the user's breaks its YAML, its tables or its code."""

import ast
import re
import shlex

import pytest
import yaml

from mmpeft.reporting.card import model_card
from mmpeft.reporting.report import ShownExample

HOSTILE = "a|b \"'`$(x)` \n---\n# no: [head]{y}: !!x & *z \x00\x85\u2028\x7f\ud800 ```` 🙂 <script> \\"


@pytest.fixture
def make_card():
    def make(base="org/base", text="plain", **changes) -> str:
        manifest = {
            "language": {"name": base},
            "vision": {"name": text},
            "adapters": [text],
            "projector": "f00",
            "instructions": {text: None},
            "identity": {
                "language": {"name": base, "config": "abc"},
                "tokenizer": "def",
                "vision": {"weights": None},
            },
        } | changes.pop("manifest", {})
        fields = {
            "title": text,
            "metrics": {"exact_match": 0.98, "questions": 1, "cut_answers": 0},
            "facts": {text: text},
            "examples": [
                ShownExample("/x/examples/00.png", text, text, text),
                ShownExample(None, text, None, ""),
            ],
            "command": text,
        }
        return model_card(manifest, **(fields | changes))

    return make


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def code_blocks(card: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks, as CommonMark delimits them."""
    return [(m[2], m[3] or "") for m in re.finditer(r"^(`{3,})(\w+)\n(?:(.*?)\n)?\1$", card, re.M | re.S)]


def test_front_matter(make_card):
    assert front_matter(make_card()) == {
        "base_model": "org/base",
        "library_name": "mmpeft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmpeft", "peft", "vision-language"],
        "metrics": ["exact_match"],
    }


def test_the_base_is_named_only_as_a_hub_id(make_card):
    for base in ("/home/me/model", "embedded/mine", "./a/b", HOSTILE, "gpt2", "a/b\n"):
        assert "base_model" not in front_matter(make_card(base=base))
    embedded = front_matter(make_card(base="embedded/smollm2-135m-instruct"))
    assert embedded["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("text", [HOSTILE, "plain", "", "```", "|", "\n"])
def test_hostile_text_breaks_nothing(make_card, text):
    card = make_card(base=text or "org/base", text=text, metrics={text: 0.5})
    card.encode()
    parsed = front_matter(card)
    assert parsed["library_name"] == "mmpeft"
    assert len(parsed["metrics"]) == 1
    prose = re.sub(r"^(`{3,})\w+\n.*?\1$", "", card, flags=re.M | re.S)
    headings = re.findall(r"^##? .*", prose, re.M)
    assert headings[-6:] == ["## Use", "## Facts", "## Examples", "## Made by", "## Identity", "## Limits"]
    for row in re.findall(r"^\| .*", card, re.M):
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) in (3, 4)
    assert [language for language, _ in code_blocks(card)] == ["python", "bash", "python", "bash"]


def test_the_code_can_be_pasted(make_card):
    for text in ("what's `this`?", HOSTILE):
        blocks = code_blocks(make_card(text=text))
        for language, code in blocks:
            if language == "python":
                ast.parse(code)
        command = shlex.split(blocks[1][1])
        assert command[:6] == ["mmpeft", "ask", "--run", ".", "--image", "examples/00.png"]
        assert len(command) == 7


def test_the_code_asks_what_the_example_was(make_card):
    """Not the question about several images about the first of them."""
    several = ShownExample("/x/examples/00.png", "or , which?", "a", "a", whole=False)
    one = ShownExample("/x/examples/01.png", "which?", "a", "a")
    for examples, image in (([several, one], "examples/01.png"), ([several], "photo.png")):
        command = shlex.split(code_blocks(make_card(examples=examples))[1][1])
        assert command[5] == image
    text = ShownExample(None, "sure?", "a", "a", whole=False)
    card = make_card(examples=[text, ShownExample(None, "why?", "a", "a")], manifest={"vision": None})
    assert shlex.split(code_blocks(card)[1][1])[-1] == "why?"


def test_what_it_tells(make_card):
    card = make_card(text="default", command="mmpeft fit \\\n  --config a.yaml")
    for wanted in ("![report](report.png)", "mmpeft.load", '"adapters/default"', "| projector | f00 |",
                   "| language config | abc |", "mmpeft fit \\\n  --config a.yaml", "✓ default"):  # fmt: skip
        assert wanted in card
    assert "None" not in card


@pytest.mark.parametrize(
    ("manifest", "held"),
    [
        ({}, "holds the finetune default and a projector, which turns"),
        ({"adapters": ["a", "b"]}, "holds the finetunes a, b and a projector, which turns"),
        ({"adapters": []}, "holds a projector, which turns"),
        (
            {"vision": None},
            "holds the finetune default. Not in it but needed: the frozen language model org/base, which",
        ),
    ],
)
def test_a_stranger_is_told_what_the_folder_holds_and_what_it_needs(make_card, manifest, held):
    card = make_card(text="default", manifest=manifest)
    assert held in card
    assert ("the frozen language model org/base and the image encoder default, which" in card) == (
        "vision" not in manifest
    )


def test_a_projector_alone(make_card):
    card = make_card(manifest={"adapters": []}, examples=[], facts={}, metrics={})
    assert "PeftModel" not in card
    assert "## Facts" not in card
    assert "metrics" not in front_matter(card)
    assert "photo.png" in card
