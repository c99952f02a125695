"""Explaining an answer: each number against a forward of the model itself, what is drawn, and the refusals."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.adapters import LoraConfig, PrefixConfig, PromptConfig
from mmpeft.adapters.architecture import find_layers
from mmpeft.cli import main
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Encoded
from mmpeft.errors import RefusedError
from mmpeft.inference.attribution import Answered, attention_rollout, gradient_times_input, losses_without
from mmpeft.inference.explain import check_by_deletion, heat_maps, moved_layers
from mmpeft.inference.explanation import GRADIENT, METHODS, ROLLOUT, HeatMap
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import NoVision
from mmpeft.tools.tiny_models import tiny_model

QUESTION = "what color is it?"
PATCHES = 4
"""Of each of two images."""
METHODS_OF_INPUTS = {
    "prompt": PromptConfig(num_virtual_tokens=3),
    "prefix": PrefixConfig(num_virtual_tokens=2),
}


def conversation() -> Encoded:
    """Two images among text, and an answer of three tokens."""
    image = [IMAGE_TOKEN] * PATCHES
    prompt, answer = [20, *image, 31, *image, 42, 53], [33, 34, 35]
    return Encoded(prompt + answer[:-1], [IGNORE_INDEX] * (len(prompt) - 1) + answer, ["a", "b"])


@pytest.fixture(scope="module")
def make_answered(randomise):
    """A conversation on a tiny model of a family, read as that has proven to be, by a random finetune."""

    def make(family, config=None):
        language_model = tiny_model(family)
        width = language_model.get_input_embeddings().weight.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MultimodalModel(NoVision(), Projector(1, width), language_model).eval()
            features = [torch.randn(PATCHES, 1) for _ in range(2)]
        check_language_model(model)
        model.bank.add("own", config or LoraConfig(rank=2, target_modules="all-linear"))
        randomise(model.bank, "own")
        return Answered(model, conversation(), features, "own")

    return make


def own_log_probability(answered, kept, drop=True, scales=None):
    """The answer's from the language model's own forward, with each image token times its scale, of the columns that
    are kept: the others never were there, or are masked."""
    model, ids = answered.model, torch.tensor(answered.encoded.ids)
    embeds = model.language_model.get_input_embeddings()(ids.clamp(min=0))
    images = torch.cat(answered.features) @ model.projector.weight[0].T + model.projector.bias[0]
    images = images if scales is None else images * scales[:, None]
    embeds = embeds.index_copy(0, torch.from_numpy(answered.image_columns), images)
    targets, given = torch.tensor(answered.encoded.targets), {}
    if drop:
        embeds, targets = embeds[kept], targets[kept]
    else:
        given = {"attention_mask": kept[None].long(), "position_ids": torch.arange(len(ids))[None]}
    model.bank.route([answered.adapter])
    logits = model.language_model(inputs_embeds=embeds[None], **given).logits[0]
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "mpt", "mamba2", "jamba"])
def test_gradient_times_input_is_how_the_answer_changes_with_a_tokens_scale(make_answered, family):
    answered = make_answered(family)
    scales = torch.ones(2 * PATCHES, requires_grad=True)
    everything = torch.ones(len(answered.encoded.ids), dtype=torch.bool)
    (slopes,) = torch.autograd.grad(own_log_probability(answered, everything, scales=scales), scales)
    assert slopes.abs().max() > 1e-6, "little of Bloom, which norms what it embeds"
    found = gradient_times_input(answered)
    np.testing.assert_allclose(found, slopes, rtol=1e-3, atol=2e-3 * float(slopes.abs().max()))


@pytest.mark.parametrize(("family", "drop"), [("llama", False), ("mamba2", True), ("jamba", True)])
def test_deleted_tokens_are_read_by_nobody(make_answered, family, drop):
    answered = make_answered(family)
    removed = [np.array([0, 1]), np.array([3, 5, 7])]
    columns = torch.arange(len(answered.encoded.ids))
    gone = [torch.from_numpy(answered.image_columns[own]) for own in removed]
    with torch.no_grad():
        whole = own_log_probability(answered, columns >= 0, drop)
        others = [own_log_probability(answered, ~torch.isin(columns, own), drop) for own in gone]
    expected = [float(whole - own) for own in others]
    assert losses_without(answered, removed) == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 1e-3


def test_the_rollout_ends_at_the_answer_and_starts_at_the_images(make_answered):
    answered = make_answered("llama")
    answered.model.bank.route(["own"])
    found = attention_rollout(answered)
    answered.model.bank.route(["own"])
    inputs = answered.model.inputs(answered.batch())
    weights = answered.model.language_model(
        inputs_embeds=inputs.embeds, position_ids=inputs.positions, output_attentions=True
    ).attentions
    flow = torch.eye(inputs.embeds.shape[1])
    for own in weights:
        flow = (0.5 * own[0].mean(0) + 0.5 * torch.eye(len(flow))) @ flow
    expected = flow[answered.columns].mean(0)[answered.image_columns]
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-4)


@pytest.mark.parametrize("family", ["mamba2", "jamba"])
def test_state_spaces_have_no_rollout(make_answered, family):
    with pytest.raises(RefusedError, match=r"attention weights in . of its . layers.*Take gradient x input"):
        attention_rollout(make_answered(family))


def test_attention_that_gives_other_numbers_is_no_explanation(make_answered, monkeypatch):
    answered = make_answered("llama")
    reader = answered.model.reader
    assert reader.by_segments, "so that eager attention is another way"
    usual = reader.mask
    monkeypatch.setattr(reader, "mask", lambda *own: usual(*own) if reader.by_segments else 0 * usual(*own))
    with pytest.raises(RefusedError, match=r"not those it is read by: its logits are .* off with eager"):
        attention_rollout(answered)


@pytest.mark.parametrize("method", METHODS_OF_INPUTS)
def test_virtual_tokens_do_not_move_the_patches(make_answered, method):
    """With trained prompts in front, what is scaled, looked at and compared are the image tokens all the same."""
    answered, step = make_answered("llama", METHODS_OF_INPUTS[method]), 0.1
    model, batch = answered.model, answered.batch()
    found = gradient_times_input(answered)
    with torch.no_grad():
        model.bank.route(batch.adapters)
        projected = model.projected(batch)
        ends = [projected * (1 + sign * step * torch.eye(2 * PATCHES)[-1:].T) for sign in (1, -1)]
        higher, lower = (
            answered.log_probabilities(model.read(model.inputs(batch, projected=own))[0]).double().sum()
            for own in ends
        )
    assert found[-1] == pytest.approx(float(higher - lower) / (2 * step), rel=0.1, abs=1e-4)
    assert (attention_rollout(answered) > 0).all()
    assert all(0 < own < math.inf for own in moved_layers(answered))


def test_what_is_read_stands_behind_trained_prompts(make_answered):
    """As the language model's own attention and hidden states have it, where the prompts are its first columns."""
    config = PromptConfig(num_virtual_tokens=3)
    answered = make_answered("llama", config)
    found, moved = attention_rollout(answered), moved_layers(answered)
    states = []
    for name, before in ((None, 0), ("own", config.num_virtual_tokens)):
        inputs = answered.model.inputs(replace(answered, adapter=name).batch())
        with torch.no_grad():
            output = answered.model.language_model(
                inputs_embeds=inputs.embeds,
                position_ids=inputs.positions,
                output_attentions=True,
                output_hidden_states=True,
            )
        columns = before + torch.tensor(answered.columns)
        states.append([own[0, columns] for own in output.hidden_states[1:-1]])
    expected = [float((own - base).norm() / base.norm()) for base, own in zip(*states, strict=True)]
    assert moved[:-1] == pytest.approx(expected, rel=1e-3)
    flow = torch.eye(inputs.embeds.shape[1])
    for own in output.attentions:
        flow = (0.5 * own[0].mean(0) + 0.5 * torch.eye(len(flow))) @ flow
    wanted = flow[columns].mean(0)[config.num_virtual_tokens + torch.from_numpy(answered.image_columns)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_layers_have_moved_as_their_own_hidden_states_say(make_answered):
    answered = make_answered("llama")
    found = moved_layers(answered)
    answered.model.bank.route([None])
    embeds = answered.model.inputs(answered.batch()).embeds
    states = []
    for name in (None, "own"):
        answered.model.bank.route([name])
        with torch.no_grad():
            output = answered.model.language_model(inputs_embeds=embeds, output_hidden_states=True)
        states.append([own[0, answered.columns] for own in output.hidden_states[1:-1]])  # the last is normed
    expected = [float((own - base).norm() / base.norm()) for base, own in zip(*states, strict=True)]
    assert found[:-1] == pytest.approx(expected, rel=1e-3)
    answered.adapter = None
    assert moved_layers(answered) == [0.0] * len(found)


def test_deletion_takes_the_patches_that_a_map_names_first(make_answered):
    """Of all sets of half of the patches the one that hurts most, and least, as a map would name them."""
    answered = make_answered("llama")
    sets = [np.array(own) for own in combinations(range(2 * PATCHES), PATCHES)]
    losses = np.array(losses_without(answered, sets))
    named = {"best": losses.argmax(), "worst": losses.argmin()}
    maps = {name: np.isin(np.arange(2 * PATCHES), sets[own]) * 1.0 for name, own in named.items()}
    checks = check_by_deletion(answered, maps, draws=20)
    for name, own in checks.items():
        assert (own.removed, own.of, len(own.random)) == (4, 8, 20)
        assert own.named == pytest.approx(losses[named[name]], abs=1e-5)
        assert all(np.abs(losses - drawn).min() < 1e-5 for drawn in own.random)
    assert len({round(drawn, 4) for drawn in checks["best"].random}) > 10
    assert checks["best"].better_than >= 0.9 > 0.1 >= checks["worst"].better_than
    assert check_by_deletion(answered, maps, draws=0) == {}


@pytest.fixture(scope="module")
def explained(vlm, images):
    return vlm.explain(images[0], QUESTION, "other", answer="red")


def test_tokens_have_the_probabilities_of_rank(vlm, images, explained):
    for name in ("base", "other"):
        (score,) = [
            own for choice, own in vlm.rank(images[0], QUESTION, ["red", "blue"], name) if choice == "red"
        ]
        field = "base" if name == "base" else "finetune"
        own = [math.log(getattr(token, field)) for token in explained.tokens]
        assert sum(own) / len(own) == pytest.approx(score, abs=1e-4)
    assert "".join(token.text for token in explained.tokens[:-1]).strip() == "red"


def test_an_explanation_is_of_the_finetunes_own_answer(vlm, images):
    found = vlm.explain(images[0], QUESTION, deletions=0)
    assert found.answer == vlm.ask(images[0], QUESTION)
    assert found.adapter == vlm.adapters[0]
    assert found.question == QUESTION
    assert set(found.heat_maps) == set(METHODS)
    assert found.heat_maps[ROLLOUT].deletion is None
    same = vlm.explain(images[0], QUESTION, "base", deletions=0)
    assert same.layers == [0.0, 0.0]
    assert all(token.base == token.finetune for token in same.tokens)


def test_the_end_of_an_answer_that_was_cut_is_not_explained(vlm, images, monkeypatch):
    monkeypatch.setattr(type(vlm.manifest), "max_new_tokens", 3)
    found = vlm.explain(images[0], QUESTION, "base", deletions=0)
    assert vlm.answer(vlm.requests(images[0], QUESTION, "base")[0])[0].cut
    given = vlm.explain(images[0], QUESTION, "base", found.answer, deletions=0)
    assert given.tokens[:-1] == found.tokens
    assert not np.allclose(
        given.heat_maps[GRADIENT].values[0], found.heat_maps[GRADIENT].values[0], rtol=1e-3
    )


def test_heat_maps_alone_are_those_of_the_explanation_and_compute_no_more(vlm, images):
    """A forward for the gradient, two for the rollout: of the usual attention, and of the eager one."""
    both = (images[0], images[5])
    found = vlm.explain(both, QUESTION, "other", answer="red", deletions=0)
    (request,), _ = vlm.requests(both, QUESTION, "other")
    first = vlm.model.language_model.get_submodule(find_layers(vlm.model.language_model)[0])
    for methods, wanted in (((GRADIENT,), 1), ((ROLLOUT,), 2), (METHODS, 3)):
        forwards: list[int] = []
        hook = first.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        own = heat_maps(vlm.engine, request, "red", methods)
        hook.remove()
        assert len(forwards) == wanted
        assert tuple(own.heat_maps) == methods
        for method in methods:
            for number in range(2):
                values = (each.heat_maps[method].values[number] for each in (own, found))
                np.testing.assert_array_equal(*values)
                assert own.overlay(method, number).tobytes() == found.overlay(method, number).tobytes()
    only = heat_maps(vlm.engine, request, "red", [GRADIENT])
    with pytest.raises(RefusedError, match="no heat map by attention rollout was asked for"):
        only.overlay(ROLLOUT)


def test_several_images_have_a_map_each(vlm, images):
    found = vlm.explain((images[0], images[5]), QUESTION, answer="red", deletions=2)
    assert [len(own) for own in found.heat_maps[GRADIENT].values] == [4, 4]
    assert found.heat_maps[GRADIENT].deletion.of == 8
    assert found.overlay(number=1, side=80).size == (80, 80)
    with pytest.raises(RefusedError, match="image 2 of a question with 2"):
        found.overlay(number=2)


def test_the_overlay_shows_each_value_where_its_patch_is(explained):
    """Of 2x2 patches, row by row."""
    shown = replace(explained, heat_maps={GRADIENT: HeatMap([np.array([1.0, -1.0, 0.5, 0.0])], 0, None)})
    pixels = np.asarray(shown.overlay(side=64), int)
    assert pixels.shape == (64, 64, 3)
    warmth = (pixels[..., 0] - pixels[..., 2]).reshape(2, 32, 2, 32).mean((1, 3)).flatten()
    assert warmth[0] == pytest.approx(2 * warmth[2], abs=1)
    assert warmth[0] > 50 > -50 > warmth[1]
    assert warmth[3] == 0


def test_the_images_of_a_question_have_one_scale(vlm, images, tmp_path):
    """Half the heat is half the colour, also on another image, and on one of more pixels."""
    large = tmp_path / "large.png"
    Image.open(images[0]).resize((320, 320)).save(large)
    found = vlm.explain((images[0], str(large)), QUESTION, answer="red", deletions=0)
    values = [np.array([1.0, -0.5, 0.0, 0.0]), np.array([0.5, 0.0, 0.0, 0.0])]
    shown = replace(found, heat_maps={GRADIENT: HeatMap(values, 0, None)})
    grey = replace(found, heat_maps={GRADIENT: HeatMap([0 * own for own in values], 0, None)})
    one, other = (
        np.asarray(shown.overlay(number=n, side=64), int) - np.asarray(grey.overlay(number=n, side=64), int)
        for n in range(2)
    )
    warmth = [(own[..., 0] - own[..., 2])[:32, :32].mean() for own in (one, other)]
    assert warmth[0] == pytest.approx(2 * warmth[1], rel=0.03)
    assert warmth[1] > 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None}, "has no image"),
        ({"question": [QUESTION]}, "one question is explained at a time"),
        ({"adapter": "nobody"}, "no finetune 'nobody'"),
        ({"deletions": -1}, "deletions is -1"),
        ({"deletions": 1.5}, "deletions is 1.5"),
        ({"answer": 3}, "the answer is 3; wanted text"),
    ],
)
def test_what_cannot_be_explained_is_refused(vlm, images, given, message):
    with pytest.raises(RefusedError, match=message):
        vlm.explain(**{"image": images[0], "question": QUESTION, "answer": "red"} | given)


def test_an_unknown_method_is_refused_and_a_missing_map_says_why(explained):
    with pytest.raises(
        KeyError, match="no method 'saliency'; there are: gradient x input, attention rollout"
    ):
        explained.overlay("saliency")
    explained.refused[ROLLOUT] = "state spaces have none"
    with pytest.raises(RefusedError, match="state spaces have none"):
        explained.overlay(ROLLOUT)
    del explained.refused[ROLLOUT]


def test_the_command_writes_a_picture_and_the_same_as_json(tiny_run, images, tmp_path, capsys):
    output = tmp_path / "new" / "why.png"
    main(
        [
            "explain",
            "--run",
            str(tiny_run),
            "--image",
            *images[:2],
            "--question",
            QUESTION,
            "--output",
            str(output),
        ]
    )
    told = capsys.readouterr()
    written = json.loads(output.with_suffix(".json").read_text())
    assert told.out.strip() == written["answer"]
    assert set(written["heat_maps"]) == set(METHODS)
    assert [len(own["boxes"]) for own in written["patches"]] == [4, 4]
    assert {"named", "random", "mean_random", "better_than"} <= written["heat_maps"][GRADIENT][
        "deletion"
    ].keys()
    assert Image.open(output).width == 1600
    assert "draws hurt less" in told.err


def test_the_command_refuses_before_it_loads(tiny_run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.inference.vlm.load", None)
    words = ["explain", "--run", str(tiny_run), "--image", images[0], "--question", QUESTION]
    for more, message in (
        (["--output", str(tmp_path / "why.jpg")], "wanted a .png file"),
        (["--adapter", "nobody"], "no finetune 'nobody'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*words, *more])
