"""Where the markers of images go, and every refused row, which is named by file, line and id."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.data.records import IMAGE_MARKER
from tests.data.row_files import llava, load_row, qa, refuse


@pytest.mark.parametrize(
    ("question", "images", "wanted"),
    [
        ("<image>\n\n What? ", 1, "<image>What?"),
        ("What?\n <image> ", 1, "<image>What?"),
        ("Is <image> a cat?", 1, "Is <image> a cat?"),
        ("<image>", 1, "<image>"),
        ("Compare.", 2, "<image><image>Compare."),
        ("<image>\n<image>\nCompare.", 2, "<image><image>Compare."),
        ("Compare <image> with <image>", 2, "Compare <image> with<image>"),
        ("<image> or\n<image>?", 2, "<image>or\n<image>?"),
        (" \n<image>  <image>", 2, "<image><image>"),
        ("  Text ", 0, "Text"),
    ],
)
def test_where_markers_go(folder, question, images, wanted):
    record = load_row(folder, llava(question, "A.", images=["a.png", "b.png"][:images]))
    assert record["turns"] == [(wanted, "A.")]


def test_markers_of_later_turns_stay_in_their_turn(folder):
    row = llava("<image>\nFirst?", "One.", "Second?\n<image>", "Two.", images=["a.png", "b.png"])
    assert load_row(folder, row)["turns"] == [("<image>First?", "One."), ("Second?<image>", "Two.")]
    row = llava("Hello", "Hi", "Second?\n<image>", " Two.\n", image="a.png")
    assert load_row(folder, row)["turns"] == [("Hello", "Hi"), ("<image>Second?", " Two.\n")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([IMAGE_MARKER, " ", "\n", "Text", "?"]), max_size=12))
def test_the_number_and_order_of_markers_and_words_is_kept(tmp_path_factory, pieces):
    folder, question = tmp_path_factory.getbasetemp(), "".join(pieces)
    count = pieces.count(IMAGE_MARKER)
    row = llava(question, "A.", images=[f"{number}.png" for number in range(count)])
    if not question.strip():
        refuse(folder, row, "question is empty")
        return
    ((placed, _),) = load_row(folder, row)["turns"]
    assert placed.count(IMAGE_MARKER) == count
    assert "".join(placed.replace(IMAGE_MARKER, "").split()) == "".join(
        question.replace(IMAGE_MARKER, "").split()
    )
    assert load_row(folder, llava(placed, "A.", images=row["images"]))["turns"] == [(placed, "A.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("<image><image>", "A.", image="a.png"), "found 2 <image> for 1 image"),
        (llava("<image>What?", "A."), "found 1 <image> for 0 image"),
        (llava("<image>What?", "A.", images=["a.png", "b.png"]), "found 1 <image> for 2 image"),
        (llava("What?", "A <image>.", image="a.png"), "an answer, holds <image>"),
        (llava("What?", " \n", image="a.png"), "turn 2, an answer, is empty"),
        (llava("What?", "A.", "And?", image="a.png"), "no answer"),
        (llava("What?", "A.", " ", "B."), "question is empty"),
        ({"conversations": []}, "wanted a list that is not empty"),
        ({"conversations": "text"}, "wanted a list"),
        (
            {"conversations": [{"from": "gpt", "value": "A."}]},
            "turn 1 is from the assistant; wanted the user",
        ),
        ({"conversations": [{"from": "robot", "value": "A."}]}, "robot"),
        ({"conversations": [["human", "A."]]}, "found the turn list"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "no turn but the system's"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "found the part"),
        ({"messages": [{"role": "user", "content": None}]}, "wanted text"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]},
            "turn 3 is from the assistant; wanted the user",
        ),
        (qa(answer=None), "no answer"),
        (qa(answer=True), "answer is True; wanted text"),
        (qa(answer=3.0), "answer is 3.0, which may be meant as 3"),
        (qa(answer={"text": "3"}), "answer is dict .*; wanted text"),
        (qa(question=["What?"]), "question is list"),
        (qa(image=5), "found the image int 5"),
        (qa(image=""), "wanted a local path"),
        (qa(image="a\0.png"), "wanted a local path"),
        (qa(image="https://example.org/a.png"), "download URLs first"),
        (qa(image="a.png", images=["a.png"]), r"more than once, under \['image', 'images'\]"),
        (qa(images=["a.png", None]), "found the image NoneType"),
        (qa(id=""), "the id is empty"),
        (qa(id=True), "id is bool"),
        (qa(task=4), "task is int"),
        (qa(choices=[]), "choices is list"),
        (qa(choices=["a", True]), "choices is True"),
        (qa(choices=["a", 2.0]), "choices is 2.0, which may be meant as 2"),
        (qa(question="half \ud800"), "lone surrogate at character 5"),
        (
            {"prompter": "x", "picture": "a.png"},
            r"found the keys \['picture', 'prompter'\]; wanted one of .*messages",
        ),
        ([1, 2], "found a list|something follows|wanted an object"),
        ("17", "found a int; wanted an object"),
    ],
)
def test_refused_rows(folder, row, message):
    refuse(folder, row, message)


def test_an_error_names_the_id(folder):
    assert "data.jsonl:1 (id 'q7'): turn 2" in refuse(folder, llava("What?", "", id="q7"), "empty")
