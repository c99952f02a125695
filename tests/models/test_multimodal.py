"""The model: packed rows equal rows of their own, and both equal Hugging Face's own forward and generate."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from mmpeft.data.batch import PADDING
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Encoded
from mmpeft.inference.decoding import generate
from mmpeft.models.masks import attention_mask
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.training.objectives import exactly_right

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
"""fp32 sums in another order. Losses are about 6, gradients up to about 10."""
QUESTIONS = [
    ("what color is it?", "red"),
    ("is it red?", "yes"),
    ("is it blue?", "no it is not"),
    ("a?", "b"),
]


@pytest.fixture
def rows(conversations):
    """Packed rows of every kind: one image, two images, an image in the middle, text alone."""
    return [
        conversations("a", *QUESTIONS),
        conversations("bc", *QUESTIONS[:2]),
        conversations("b", ("is <image> red?", "yes"), ("is <image> a square?", "no")),
        conversations("", ("is red a color?", "yes"), ("is red a number?", "no"), ("who?", "me"), task=None),
    ]


ADAPTERS = ["lora", "ia3", None, "lora"]


def separate(rows, adapters):
    """Every conversation in a row of its own."""
    alone = [[one] for row in rows for one in row]
    return alone, [name for row, name in zip(rows, adapters, strict=True) for _ in row]


def gradients(model):
    named = {"projector.weight": model.projector.weight, "projector.bias": model.projector.bias}
    named |= {f"stack {n}": parameter for n, parameter in enumerate(model.bank.parameters())}
    return {name: parameter.grad for name, parameter in named.items()}


def test_every_parameter_of_the_model_has_one_name(model):
    """The bank is a child of the model, and its language model is not a child of the bank too."""
    named = list(model.named_parameters(remove_duplicate=False))
    assert len({id(parameter) for _, parameter in named}) == len(named)
    parts = (model.vision_encoder, model.projector, model.language_model, model.bank)
    assert {id(p) for _, p in named} == {id(p) for part in parts for p in part.parameters()}
    assert {name.split(".")[0] for name, p in named if p.requires_grad} == {"projector", "bank"}
    model.train()
    assert all(stack.training for stack in model.bank.stacks.values())
    assert not any(stack.training for stack in model.eval().bank.stacks.values())


def embeds_of(model, encoded, features_of):
    """(1, tokens, dim): what the language model reads of one conversation, put together by hand."""
    table = model.language_model.get_input_embeddings().weight
    images = torch.cat([features_of(image) for image in encoded.images] or [torch.zeros(0, 64)])
    projected = iter(images @ model.projector.weight[0].T + model.projector.bias[0])
    return torch.stack([next(projected) if t == IMAGE_TOKEN else table[t] for t in encoded.ids])[None]


def test_packed_rows_have_the_losses_and_gradients_of_rows_of_their_own(make_model, make_batch, rows):
    results = []
    for some_rows, names in ((rows, ADAPTERS), separate(rows, ADAPTERS)):
        model = make_model()
        losses = model.token_losses(make_batch(some_rows, names))
        losses.nll.sum().backward()
        results.append((losses, gradients(model)))
    (packed, packed_gradients), (alone, alone_gradients) = results
    torch.testing.assert_close(packed.nll, alone.nll, **CLOSE)
    assert torch.equal(packed.correct, alone.correct)
    for name, gradient in alone_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            packed_gradients[name], gradient, **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_losses_say_which_conversation_they_belong_to(model, make_batch, rows):
    losses = model.token_losses(make_batch(rows))
    labelled = [
        [sum(target != IGNORE_INDEX for target in conversation.targets) for conversation in row]
        for row in rows
    ]
    for row, counts in enumerate(labelled):
        for segment, count in enumerate(counts, start=1):
            assert int(((losses.rows == row) & (losses.segments == segment)).sum()) == count


@pytest.mark.parametrize("adapter", [None, "lora", "ia3"])
def test_loss_of_a_single_row_is_hugging_faces_own(model, make_batch, conversations, features_of, adapter):
    for images in ("a", "bc", ""):
        (one,) = conversations(images, ("what color is it?", "red and green"))
        losses = model.token_losses(make_batch([[one]], [adapter]))
        shifted = [IGNORE_INDEX, *one.targets[:-1]]
        # the last target is no input of ours; Hugging Face wants it as one
        embeds = embeds_of(model, Encoded([*one.ids, one.targets[-1]], [], one.images), features_of)
        labels = torch.tensor([[*shifted, one.targets[-1]]])
        model.bank.route([adapter])
        theirs = model.language_model(inputs_embeds=embeds, labels=labels).loss
        torch.testing.assert_close(losses.nll.mean(), theirs, **CLOSE)


@pytest.mark.parametrize("adapter", [None, "lora", "ia3"])
@pytest.mark.parametrize("images", ["a", "bc", ""])
def test_greedy_answer_of_a_single_row_is_hugging_faces_own(
    model, make_batch, conversations, features_of, adapter, images
):
    (prompt,) = conversations(images, ("what color is it?", ""), prompts=True)
    model.bank.route([adapter])
    embeds = embeds_of(model, prompt, features_of)
    theirs = model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0].tolist()
    assert len(set(theirs)) > 1
    batch = make_batch([[prompt]], [adapter])
    assert generate(model, batch, eos_token_id=-5, max_new_tokens=12) == [[theirs]]
    end = theirs[4]
    assert generate(model, batch, end, max_new_tokens=12) == [[theirs[: theirs.index(end)]]]


def prompt_rows(conversations):
    return [
        conversations("a", *QUESTIONS, prompts=True),
        conversations("", ("is red a color?", ""), task=None, prompts=True),
        conversations("bc", *QUESTIONS[:3], prompts=True),
        conversations("b", ("is <image> red?", ""), ("is <image> a square?", ""), prompts=True),
    ]


def test_packed_answers_are_those_of_rows_of_their_own(model, make_batch, conversations):
    rows = prompt_rows(conversations)
    names = ["lora", None, "ia3", "lora"]
    batch = make_batch(rows, names)
    endless = generate(model, batch, eos_token_id=-5, max_new_tokens=8)
    ends = {answer[3] for row in endless for answer in row}
    for end in [-5, *sorted(ends)[:4]]:
        packed = generate(model, batch, end, max_new_tokens=8)
        alone_rows, alone_names = separate(rows, names)
        alone = [
            generate(model, make_batch([row], [name]), end, max_new_tokens=8)[0][0]
            for row, name in zip(alone_rows, alone_names, strict=True)
        ]
        assert [len(row) for row in packed] == [len(row) for row in rows]
        assert [answer for row in packed for answer in row] == alone
    assert len({len(answer) for answer in alone}) > 1, "some answers ended before others"


def test_every_row_gets_its_own_adapter(model, make_batch, conversations):
    row = conversations("a", *QUESTIONS[:2])
    names = ["lora", None, "ia3", "lora", None]
    together = model.token_losses(make_batch([row] * 5, names))
    seen = []
    for number, name in enumerate(names):
        alone = model.token_losses(make_batch([row], [name])).nll
        torch.testing.assert_close(together.nll[together.rows == number], alone, **CLOSE)
        seen.append(alone)
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])


def test_rows_keep_their_order(model, make_batch, rows):
    forward = model.token_losses(make_batch(rows, ADAPTERS))
    turned = model.token_losses(make_batch(rows[::-1], ADAPTERS[::-1]))
    for number in range(len(rows)):
        mirror = len(rows) - 1 - number
        torch.testing.assert_close(
            forward.nll[forward.rows == number], turned.nll[turned.rows == mirror], **CLOSE
        )


def test_padding_changes_nothing(model, make_batch, conversations):
    short, long = conversations("", ("a?", "b")), conversations("bc", ("what color is it?", "red " * 30))
    alone = model.token_losses(make_batch([short])).nll
    padded = model.token_losses(make_batch([short, long]))
    torch.testing.assert_close(padded.nll[padded.rows == 0], alone, **CLOSE)


def test_an_adapter_may_own_its_projector(model, make_batch, conversations):
    row = conversations("a", *QUESTIONS[:2])
    plain = model.token_losses(make_batch([row], ["lora"])).nll
    own = Projector(64, 64, num_slots=2)
    own.fill(model.projector.tensors(0), slot=0)
    model.projector, model.projector_slots = own, {"lora": 1}
    changed = model.token_losses(make_batch([row, row], ["lora", None]))
    own.fill(own.tensors(0), slot=1)
    restored = model.token_losses(make_batch([row], ["lora"])).nll
    torch.testing.assert_close(restored, plain, **CLOSE)
    assert not torch.allclose(changed.nll[changed.rows == 0], plain)
    base = model.token_losses(make_batch([row], [None])).nll
    torch.testing.assert_close(changed.nll[changed.rows == 1], base, **CLOSE)


def test_eager_and_sdpa_attention_agree(make_model, make_batch, rows, conversations):
    eager, sdpa = make_model(attention="eager"), make_model(attention="sdpa")
    sdpa.projector.fill(eager.projector.tensors())
    batch = make_batch(rows, ADAPTERS)
    torch.testing.assert_close(eager.token_losses(batch).nll, sdpa.token_losses(batch).nll, **CLOSE)
    prompts = make_batch(prompt_rows(conversations), ADAPTERS)
    assert generate(eager, prompts, -5, 6) == generate(sdpa, prompts, -5, 6)


def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_batch, rows):
    found = []
    for recompute in (False, True):
        model = make_model(gradient_checkpointing=recompute).train()
        model.token_losses(make_batch(rows, ADAPTERS)).nll.sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)
        assert gradient.abs().max() > 0


def test_features_that_do_not_fill_the_image_tokens_are_refused(model, make_batch, conversations):
    batch = make_batch([conversations("a", *QUESTIONS)])
    batch.features = torch.randn(1, 5, 64)
    with pytest.raises(ValueError, match="4 image tokens, but 1 images of 5 tokens"):
        model.token_losses(batch)


def test_an_unknown_adapter_is_never_served(model, make_batch, conversations):
    with pytest.raises(KeyError, match="no finetune 'nobody'"):
        model.token_losses(make_batch([conversations("a", *QUESTIONS)], ["nobody"]))


def test_all_labels_most_likely_is_the_same_as_greedy_writing_that_answer(model, make_batch, conversations):
    prompts = prompt_rows(conversations)[0]
    outcomes = []
    for prompt in prompts:
        ((greedy,),) = generate(model, make_batch([[prompt]]), -5, max_new_tokens=5)
        end = greedy[-1]
        greedy = greedy[: greedy.index(end)]
        candidates = [greedy, [*greedy, 7], greedy[:-1], [7, *greedy[1:]], [*greedy[:-1], 7], [7]]
        for answer in candidates:
            tokens = [*answer, end]
            ids, targets = [*prompt.ids, *answer], [*prompt.targets[:-1], *tokens]
            losses = model.token_losses(make_batch([[Encoded(ids, targets, prompt.images)]]))
            written = generate(model, make_batch([[prompt]]), end, max_new_tokens=8)[0][0]
            assert exactly_right(losses).tolist() == [written == answer]
            outcomes.append(written == answer)
    assert True in outcomes, "no candidate was what is written, so only one side was compared"
    assert False in outcomes, "every candidate was what is written, so only one side was compared"


def test_softcapped_logits_are_hugging_faces_own(make_batch, make_model, conversations, tiny_tokenizer):
    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=2.0,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    language_model = Gemma2ForCausalLM(config).eval()
    encoder = nn.Identity()
    encoder.num_tokens, encoder.dim = 4, 64
    model = MultimodalModel(encoder, Projector(64, 64), language_model)
    row = conversations("", ("is red a color?", "yes"), task=None)
    theirs = language_model(torch.tensor([row[0].ids])).logits
    assert theirs.abs().max() > 1.5, "capped"
    losses = model.token_losses(make_batch([row]))
    targets = torch.tensor(row[0].targets)
    expected = nn.functional.cross_entropy(theirs[0], targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(losses.nll, expected[targets != IGNORE_INDEX], **CLOSE)


def test_attention_mask_is_the_one_of_its_docstring():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, PADDING]])
    wanted = ["1......", "11.....", "111....", "1111...", "11..1..", "11..11.", "......1"]
    mask = attention_mask(segments, segments)
    assert mask.shape == (1, 1, 7, 7)
    assert ["".join("1" if seen else "." for seen in query) for query in mask[0, 0].tolist()] == wanted
    assert torch.equal(attention_mask(segments[:, 5:], segments), mask[:, :, 5:])
