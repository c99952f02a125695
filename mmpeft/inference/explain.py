"""Explaining an answer: which patches it rests on, checked by deletion, and what the finetune changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.records import IMAGE_MARKER
from mmpeft.data.template import Encoded
from mmpeft.errors import RefusedError
from mmpeft.inference.attribution import (
    Answered,
    attention_rollout,
    gradient_times_input,
    losses_without,
)
from mmpeft.inference.engine import Engine
from mmpeft.inference.explanation import (
    GRADIENT,
    METHODS,
    ROLLOUT,
    Deletion,
    Explanation,
    HeatMap,
    HeatMaps,
    TokenProbability,
)
from mmpeft.inference.requests import Request
from mmpeft.models.layer_outputs import layer_outputs
from mmpeft.models.patch_places import patch_places
from mmpeft.models.vision import VisionEncoder
from mmpeft.names import RESERVED_NAME

REMOVED = 0.5
"""The share of the patches that the check by deletion takes. What a few of them say, others often say too."""
LAYERS = "layers"
WEIGHED = {GRADIENT: gradient_times_input, ROLLOUT: attention_rollout}
"""How each of `METHODS` weighs patches."""


def explain(engine: Engine, request: Request, answer: str, deletions: int, ends: bool = True) -> Explanation:
    """Args:
        engine: of the model.
        request: the question.
        answer: to be explained, whoever gave it.
        deletions: random draws that a map is compared with; 0 leaves the check out.
        ends: whether the answer's end is explained with it; not of one that was cut, which the model did not end.

    Raises:
        RefusedError: no image, or what `Engine.encode` refuses.
    """
    if not isinstance(deletions, int) or deletions < 0:
        raise RefusedError(f"deletions is {deletions!r}; wanted how many draws, 0 or more")
    if not isinstance(answer, str):
        raise RefusedError(f"the answer is {answer!r:.80}; wanted text")
    answered = _answered(engine, request, answer, ends)
    maps = _heat_maps(engine, request, answered, METHODS, deletions)
    tokens = compare_tokens(answered, engine)
    layers: list[float] = []
    try:
        layers = moved_layers(answered)
    except RefusedError as error:
        maps.refused[LAYERS] = str(error)
    question = request.record["turns"][-1][0].replace(IMAGE_MARKER, "").strip()
    name = request.adapter or RESERVED_NAME
    return Explanation(
        **vars(maps), question=question, adapter=name, answer=answer, tokens=tokens, layers=layers
    )


def heat_maps(
    engine: Engine, request: Request, answer: str, methods: Sequence[str], ends: bool = True
) -> HeatMaps:
    """The heat maps of `explain` alone, unchecked; gradient x input is one forward and backward.

    Args:
        methods: of `METHODS`, which to compute.
        ends: as in `explain`.

    Raises:
        RefusedError: as `explain`.
    """
    return _heat_maps(engine, request, _answered(engine, request, answer, ends), methods, deletions=0)


def _answered(engine: Engine, request: Request, answer: str, ends: bool) -> Answered:
    images = request.record["images"]
    if not images:
        raise RefusedError(f"{request.record['where']} has no image, and heat maps lie on one; give an image")
    prompt = engine.encode(replace(request, rank=False))
    assert isinstance(prompt, Encoded), "a question that is not ranked is one conversation"
    encoded = engine.template.encode_answer(prompt, answer, ends)
    return Answered(engine.model, encoded, list(engine.features(images)), request.adapter)


def _heat_maps(
    engine: Engine, request: Request, answered: Answered, methods: Sequence[str], deletions: int
) -> HeatMaps:
    encoder = engine.model.vision_encoder
    assert isinstance(encoder, VisionEncoder), "without one every image was refused"
    decode = engine.features.encoding.decode
    pictures = [decode(image, encoder.image_config) for image in request.record["images"]]
    places = [patch_places(encoder, picture.size) for picture in pictures]
    found, refused = dict[str, np.ndarray](), dict[str, str]()
    for method in methods:
        try:
            found[method] = WEIGHED[method](answered)
        except RefusedError as error:
            refused[method] = str(error)
    checks = check_by_deletion(answered, found, deletions)
    inside = np.concatenate([own.inside() for own in places])
    ends = np.cumsum([len(own) for own in answered.features])[:-1]
    maps: dict[str, HeatMap] = {}
    for name, values in found.items():
        total = np.abs(values).sum()
        outside = float((np.abs(values) * (1 - inside)).sum() / total) if total else 0.0
        maps[name] = HeatMap(np.split(values, ends), outside, checks.get(name))
    return HeatMaps(maps, refused, pictures, places)


def check_by_deletion(answered: Answered, found: Mapping[str, np.ndarray], draws: int) -> dict[str, Deletion]:
    """By method, what the answer loses without the patches of the highest values, beside as many at random.

    Args:
        found: method -> (patches,) values.
        draws: how often patches are drawn, the same for all methods; 0 checks nothing.
    """
    total = len(answered.image_columns)
    count = max(1, round(REMOVED * total))
    if draws == 0 or count == total:
        return {}
    generator = np.random.default_rng(0)
    named = [np.argsort(-values, kind="stable")[:count] for values in found.values()]
    random = [generator.choice(total, count, replace=False) for _ in range(draws)]
    losses = losses_without(answered, [*named, *random])
    return {
        name: Deletion(count, total, own, losses[len(found) :])
        for name, own in zip(found, losses, strict=False)
    }


@torch.no_grad()
def compare_tokens(answered: Answered, engine: Engine) -> list[TokenProbability]:
    """The probability of every token of the answer under base and finetune."""
    each = [
        own.log_probabilities(own.model.hidden_states(own.batch())[0]).exp().tolist()
        for own in (replace(answered, adapter=None), answered)
    ]
    texts = [engine.template.tokenizer.decode([token]) for token in answered.answer]
    return [TokenProbability(*own) for own in zip(texts, *each, strict=True)]


@torch.no_grad()
def moved_layers(answered: Answered) -> list[float]:
    """Of every layer how far the finetune's hidden states are from the base's where the answer is predicted, relative
    to the base's.

    Raises:
        RefusedError: the layers are not recognised.
    """
    base, own = _behind_layers(replace(answered, adapter=None)), _behind_layers(answered)
    return [float((b - o).norm() / b.norm()) for b, o in zip(base, own, strict=True)]


def _behind_layers(answered: Answered) -> list[Tensor]:
    """(..., answer tokens, dim) float32 of every layer. A row by itself has its own columns last, whichever way the
    model reads it."""
    with layer_outputs(answered.model.language_model) as found:
        answered.model.hidden_states(answered.batch())
    own = len(answered.encoded.ids)
    return [hidden[..., -own:, :][..., answered.columns, :].float() for hidden in found]
