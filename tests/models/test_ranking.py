"""Choices that share a prompt are scored, and train, as if each had a row of its own."""

import math

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mmpeft.adapters import IA3Config
from mmpeft.data.batch import collate
from mmpeft.data.packing import Role, pack, pack_choices
from mmpeft.data.sources import DataError
from mmpeft.data.template import Encoded, Template
from mmpeft.models.token_losses import length_normalised
from mmpeft.training.objectives import FLOOR, ChoiceLosses, objective

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def record(question, choices, answer, images=()):
    return {
        "id": question,
        "images": list(images),
        "turns": [("<image>" * len(images) + question, answer)],
        "task": "vqa",
        "where": "train.jsonl:3",
        "choices": choices,
    }


RECORDS = [
    record("what color is it?", ["red", "a light blue", "green"], "a light blue", "a"),
    record("is it red?", ["no", "yes"], "yes", "b"),
    record("who?", ["me", "you", "they there", "nobody"], "me"),
]


@pytest.fixture
def rows(template):
    return [template.encode_choices(own) for own in RECORDS]


def batch_of(packed, features_of, names):
    images = [features_of(image) for row in packed for image in row.images]
    return collate(packed, torch.stack(images) if images else None, names)


def test_the_right_choice_reads_like_the_example_without_choices(template):
    for own in RECORDS:
        encoded = template.encode_choices(own)
        assert encoded.conversations[encoded.right] == template.encode(own)


def test_shared_prompts_score_like_rows_of_their_own(model, rows, features_of):
    names = ["ia3", "lora", None]
    together = model.token_losses(batch_of([pack_choices(row) for row in rows], features_of, names))
    scores = length_normalised(together, len(rows))
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        for place, conversation in enumerate(row.conversations):
            alone = model.token_losses(batch_of([pack([conversation])], features_of, [name]))
            torch.testing.assert_close(scores[number, place], -alone.nll.mean(), **CLOSE)
    prefixes = [pack_choices(row).segments.count(0) for row in rows]
    assert all(
        prefix >= len(row.conversations[0].ids) - 4 for prefix, row in zip(prefixes, rows, strict=True)
    )


def test_of_a_question_that_nobody_answered_no_choice_is_right(template):
    encoded = template.encode_choices(RECORDS[0] | {"turns": [("<image>what color is it?", None)]})
    assert (encoded.right, pack_choices(encoded).roles) == (None, [Role.CHOICE] * 3)


def test_a_choice_that_does_not_fit_is_named(tiny_tokenizer):
    long = record("what?", ["no", "word " * 60], "no")
    with pytest.raises(DataError, match=r"train.jsonl:3 \(id 'what\?'\) with its 2 choices has \d+ tokens"):
        Template(tiny_tokenizer, 4, max_length=50).encode_choices(long)


def test_ia3_learns_from_choices_as_peft_does_from_the_formulas(make_model, template, features_of, tiny_base):
    """The same IA3 in peft, every choice in a row of its own, the losses written out."""
    generator = torch.Generator().manual_seed(1)
    texts = [own for own in RECORDS if not own["images"]] + [record("is it?", ["yes", "not at all"], "yes")]
    rows = [template.encode_choices(own) for own in texts]
    model = make_model()
    model.bank.add("new", IA3Config())
    base = AutoModelForCausalLM.from_pretrained(tiny_base / "language", dtype=torch.float32)
    theirs = peft.get_peft_model(
        base,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    vectors = {
        name.removeprefix("base_model.model.").rsplit(".ia3_l", 1)[0]: parameter
        for name, parameter in theirs.named_parameters()
        if "ia3_l" in name
    }
    for path, stack, slot in model.bank.places("new"):
        vector = 1 + 0.3 * torch.randn(vectors[path].shape, generator=generator)
        stack.fill(slot, {"ia3_l": vector})
        vectors[path].data.copy_(vector)

    batch = batch_of([pack_choices(row) for row in rows], features_of, ["new"] * len(rows))
    terms = objective(model.token_losses(batch), None, batch.conversations, ChoiceLosses())
    torch.stack([own.mean for own in terms.values()]).sum().backward()

    written_out(theirs, rows).backward()
    for path, stack, slot in model.bank.places("new"):
        want = vectors[path].grad.flatten()
        assert want.abs().max() > 0
        torch.testing.assert_close(stack.ia3_delta.grad[slot], want, **CLOSE)


def written_out(theirs, rows) -> torch.Tensor:
    right, wrong, choice = [], [], []
    for row in rows:
        scores = []
        for place, conversation in enumerate(row.conversations):
            log_p = log_probabilities(theirs, conversation)
            scores.append(log_p.mean())
            (right if place == row.right else wrong).append(log_p)
        choice.append(-torch.log(scores[row.right].exp() / sum(score.exp() for score in scores)))
    return (
        -torch.cat(right).mean()
        - torch.log(1 - torch.cat(wrong).exp() + FLOOR).mean()
        + sum(choice) / len(choice)
    )


def log_probabilities(theirs, conversation: Encoded) -> torch.Tensor:
    logits = theirs(input_ids=torch.tensor([conversation.ids])).logits[0]
    places = [place for place, target in enumerate(conversation.targets) if target >= 0]
    targets = [conversation.targets[place] for place in places]
    return logits[places].log_softmax(-1)[range(len(places)), targets]


def test_more_choices_do_not_change_a_choices_score(model, template, features_of):
    few = template.encode_choices(RECORDS[0])
    many = template.encode_choices(RECORDS[0] | {"choices": [*RECORDS[0]["choices"], *"abcdefg"]})
    scores = [
        length_normalised(model.token_losses(batch_of([pack_choices(c)], features_of, ["ia3"])), 1)[0]
        for c in (few, many)
    ]
    torch.testing.assert_close(scores[1][:3], scores[0], **CLOSE)
    assert math.isfinite(float(scores[1].sum()))
