"""Preferences as examples: rows that say what is preferred, KTO's labels, and answers to other questions."""

import pytest
import torch

from mmpeft.data.examples import Examples
from mmpeft.data.loader import JointLoader, PackedLoader
from mmpeft.data.packing import Role
from mmpeft.data.plan import PackingConfig
from mmpeft.data.preferred import answers_of_another, encode_preferred
from mmpeft.data.shares import Share
from mmpeft.data.sources import DataError, load_records
from mmpeft.data.template import IGNORE_INDEX, Template
from tests.data.layouts.rows import chat
from tests.tiny import make_record, write_jsonl

ROOM = 60


@pytest.fixture
def template(tiny_tokenizer):
    return Template(tiny_tokenizer, image_tokens=3, max_length=ROOM)


def read(tmp_path, *rows, labelled=True):
    return load_records(write_jsonl(tmp_path / "rows.jsonl", list(rows)), labelled=labelled)


def pair(question="what?", chosen="red", rejected="blue", images=(), **more):
    return make_record(question, chosen, images, choices=[chosen, rejected], **more)


def labelled(question, answer, good, images=()):
    return make_record(question, answer, images, desirable=good)


def test_labels_are_kept_where_they_are_asked_for(tmp_path):
    good, bad, pair = read(
        tmp_path,
        {"prompt": "what?", "completion": "red", "label": True},
        {"prompt": "what?", "completion": "blue", "label": False},
        {"prompt": "what?", "chosen": "red", "rejected": "blue"},
    )
    assert (good["desirable"], bad["desirable"]) == (True, False)
    assert "desirable" not in pair
    (alone,) = read(tmp_path, {"prompt": "what?", "completion": "red", "label": True}, labelled=False)
    assert "desirable" not in alone
    with pytest.raises(
        DataError, match=r"label is false: the answer is a wrong one.*set model.objective to kto"
    ):
        read(tmp_path, {"prompt": "what?", "completion": "red", "label": False}, labelled=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "what?", "completion": "red", "label": True, "kto_tag": False},
            "label is true, another key of the row says otherwise",
        ),
        (
            {"messages": chat("what?", "red"), "rejected_response": "blue", "label": False},
            "labelled as a wrong one beside others",
        ),
    ],
)
def test_labels_that_contradict_the_row_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize("spelt", [("True", "false"), ("1", "0"), ("1.0", "0.0")])
def test_labels_of_a_table_are_texts(tmp_path, spelt):
    (tmp_path / "rows.csv").write_text("question,answer,label\nwhat?,red,{}\nwhat?,blue,{}\n".format(*spelt))
    found = [row.get("desirable") for row in load_records(tmp_path / "rows.csv", labelled=True)]
    assert found == [True, False]


def test_labels_of_another_kind_are_named(tmp_path):
    rows = [{"question": "what?", "answer": "red", "label": label} for label in (1, 0)]
    found = [row.get("desirable") for row in read(tmp_path, *rows)]
    assert found == [True, False]
    for label in ("maybe", 2, -1):
        with pytest.raises(DataError, match=rf"the key 'label' .*{label}.*not understood"):
            read(tmp_path, {"question": "what?", "answer": "red", "label": label})


def test_a_labelled_answer_is_a_right_or_a_wrong_one(template):
    examples = [
        encode_preferred(template, record, "labels")
        for record in (labelled("what?", "red", True), labelled("what?", "blue", False), pair())
    ]
    loader = PackedLoader(
        examples, lambda images: torch.zeros(len(images), 3, 2), PackingConfig(3), "mine", None
    )
    (batch,) = loader
    table = batch.conversations
    assert [table.roles[table.rows == row].tolist() for row in range(3)] == [
        *([Role.RIGHT], [Role.WRONG]),
        [Role.RIGHT, Role.WRONG],
    ]
    counts = batch.of_step["mine"]
    assert (counts.questions, counts.choices) == (3, 4)
    carrying = [
        len(own.targets) - own.targets.count(IGNORE_INDEX) for e in examples for own in e.conversations
    ]
    assert (counts.answers, counts.wrong) == (carrying[0] + carrying[2], carrying[1] + carrying[3])


def test_a_row_without_both_sides_is_refused_by_name(template):
    alone, wrong = make_record("what?", "red"), labelled("what?", "blue", False)
    for sides, rows in (("pairs", [pair(), alone]), ("pairs", [wrong]), ("labels", [wrong, alone])):
        with pytest.raises(
            DataError, match=r"train\.jsonl:1 \(id '1'\) has one answer, of which nobody says"
        ):
            Examples(rows, template, sides, "train")
    assert len(Examples([pair(), wrong], template, "labels", "train")) == 2


def test_a_question_is_given_the_answers_of_another(template):
    asked, told = (
        encode_preferred(template, record, "labels")
        for record in (
            labelled("<image>is it red?", "yes", True, ["a"]),
            pair("name a color", "blue", "red square"),
        )
    )
    found = answers_of_another(asked, told, ROOM)
    assert found.right is None
    assert found.images == ["a"]
    for own, other in zip(found.conversations, told.conversations, strict=True):
        answer = [target for target in other.targets if target != IGNORE_INDEX]
        want = template.encode_answer(
            template.encode_prompt(labelled("<image>is it red?", "yes", True, ["a"])), "x"
        )
        start = next(place for place, target in enumerate(want.targets) if target != IGNORE_INDEX)
        assert own.ids == [*want.ids[: start + 1], *answer[:-1]]
        assert own.targets == [IGNORE_INDEX] * start + answer
    most = len(asked.conversations[0].ids) + 1
    short = answers_of_another(asked, told, most)
    assert sum(len(own.ids) for own in short.conversations) - (len(short.conversations) - 1) * start <= most


def rows(template, count):
    records = [
        pair(f"is it {n}?", "yes", "no", images=[f"{n % 3}"] * (n % 2))
        if n % 3
        else labelled(f"what is {n}?", "red " * (n % 5 + 1), n % 2 == 0)
        for n in range(count)
    ]
    return [encode_preferred(template, record, "labels") for record in records]


def features(images):
    return torch.stack([torch.full((3, 2), float(image)) for image in images])


def mismatched_rows(batch):
    own = batch.mismatched
    of_images = {}
    for number, row in enumerate(own.image_rows.tolist()):
        of_images.setdefault(row, []).append(own.features[number].tolist())
    width = [int((own.segments[row] >= 0).sum()) for row in range(len(own.adapters))]
    return [
        (own.input_ids[r, :w].tolist(), own.targets[r, :w].tolist(), of_images.get(r, []))
        for r, w in enumerate(width)
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_have_their_share_of_the_mismatched_rows(template, size):
    """Whose answers a question is given is a matter of the whole batch."""
    every, packing = rows(template, 13), PackingConfig(5, 3, ROOM)

    def of(share):
        return list(PackedLoader(every, features, packing, "mine", 4, share=share, mismatches=True))

    for batch, *own in zip(of(Share()), *(of(Share(rank, size)) for rank in range(size)), strict=True):
        assert len(batch.mismatched.adapters) == len(batch.adapters)
        numbered = {
            number: row
            for part in own
            for number, row in zip(part.row_numbers.tolist(), mismatched_rows(part), strict=True)
        }
        assert [numbered[number] for number in range(len(batch.adapters))] == mismatched_rows(batch)
        asked = batch.input_ids[:, :3].tolist()
        assert batch.mismatched.input_ids[:, :3].tolist() == asked


def test_mismatched_rows_of_joint_finetunes_stay_together(template):
    def of(name, **how):
        return PackedLoader(rows(template, 6), features, PackingConfig(3, 3, ROOM), name, 0, **how)

    loader = JointLoader({"a": of("a"), "b": of("b", mismatches=True)}, {}, cycle=False)
    for batch in loader:
        assert set(batch.adapters) == {"a", "b"}
        assert batch.mismatched.adapters == ["b"] * batch.adapters.count("b")
        assert batch.part(0, 1).mismatched is None
        moved = batch.to("cpu")
        assert (moved.mismatched.on_host.input_ids == batch.mismatched.input_ids.numpy()).all()


def test_a_single_row_is_no_answer_to_another(template):
    (batch,) = PackedLoader(
        rows(template, 1), features, PackingConfig(3, 3, ROOM), "mine", 0, mismatches=True
    )
    assert batch.mismatched is None
