"""Proof on the very model: that what we compute is what it computes by itself, and if not packed, then unpacked.

A few short forwards on random tokens. Two conversations ``a`` and ``b`` behind a shared prefix ``p``, packed into one
row beside a shorter one, are compared with the model's own forwards of ``p a`` and ``p b``; then both are decoded for
some tokens and compared with the model's own forwards of what was written. Windows are made shorter than these rows
while they are tried.

Such a comparison is as sharp as the dtype rounds. Whether anything reaches a conversation from where it must not is
told exactly, in any dtype: the same forward with other neighbours must give the same numbers.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mmpeft.data.batch import Batch
from mmpeft.data.packing import PREFIX
from mmpeft.errors import RefusedError
from mmpeft.inference.comparison import distance, random_tokens, shared_batch, tolerance
from mmpeft.inference.last_layer_check import token_by_token
from mmpeft.inference.own_memory import OwnMemory
from mmpeft.inference.packed_memory import PackedMemory
from mmpeft.models.evaluating import evaluating
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.reader import FOLLOWED, Reading
from mmpeft.models.vision import NoVision

STEPS = 3
SHORT = 3
"""How long the windows of a config are while the model is tried, and the tiles of its rows."""


@dataclass
class Checked:
    """What came out."""

    reading: Reading
    by_segments: bool
    """Whether packed rows are attended to by segments."""
    last_modules: list[str]
    """What of the last layer is computed for labelled tokens alone."""
    failures: dict[str, str]
    """Every way that was tried before -> what was wrong with it."""
    seconds: float


def ensure_checked(model: MultimodalModel, language: LanguageConfig, known: dict[str, Any]) -> dict[str, Any]:
    """Sets how the model must be read: as is known of the same base under the same versions, or as a check finds now,
    which is told where it is not the usual way or took a second.

    Args:
        model: to be read.
        language: as it was loaded.
        known: what this function returned before; empty for nothing.

    Returns:
        Plain data for a run's manifest.

    Raises:
        RefusedError: see `check_language_model`.
    """
    under = {
        "transformers": version("transformers"),
        "torch": version("torch"),
        "device": model.device.type,
        "dtype": str(model.dtype),
        "attention": model.language_model.config._attn_implementation,
        "by_segments": language.attention == "auto",
        "quantization": language.quantization,
    }
    if known.get("under") == under:
        model.reader.reading, model.reader.by_segments = Reading(**known["reading"]), known["by_segments"]
        model.reader.last_modules = known["last_modules"]
        return known
    checked = check_language_model(model, under["by_segments"])
    name = type(model.language_model).__name__
    if checked.seconds > 1:
        print(f"{name} was checked against its own forward in {checked.seconds:.1f} s", file=sys.stderr)
    if not checked.reading.packed:
        why = (*checked.failures.values(), "it takes no positions")[max(0, len(checked.failures) - 1)]
        print(
            f"{name} reads every conversation in a row of its own, which takes longer than packed rows: {why}",
            file=sys.stderr,
        )
    if not checked.reading.cached:
        print(
            f"{name} keeps nothing of what it has read: for every token of an answer the conversation is read once "
            f"more, so that answers are slow, the slower the longer ({checked.failures[_name(Reading(packed=False))]})",
            file=sys.stderr,
        )
    found = {"by_segments": checked.by_segments, "last_modules": checked.last_modules}
    return {"under": under, "reading": asdict(checked.reading), **found}


def check_language_model(model: MultimodalModel, by_segments: bool = True) -> Checked:
    """Finds how the model must be read, packed rows first, and sets it.

    Args:
        model: to be read.
        by_segments: whether our attention may take the place of the model's own.

    Raises:
        RefusedError: it attends to later tokens, or its numbers cannot be reproduced.
    """
    started, failures = time.monotonic(), dict[str, str]()
    reader = model.reader
    before = reader.reading, reader.by_segments
    with evaluating(model):
        noise = _require_causal(model)
        for reader.reading, reader.by_segments in _candidates(model, by_segments):
            wrong = _what_is_wrong(model, noise)
            if wrong is None:
                reader.last_modules = token_by_token(model)
                found = reader.reading, reader.by_segments, reader.last_modules
                return Checked(*found, failures, time.monotonic() - started)
            failures[_name(reader.reading, reader.by_segments)] = wrong
    reader.reading, reader.by_segments = before
    raise RefusedError(
        f"{type(model.language_model).__name__} cannot be adapted exactly: "
        + "; ".join(f"{name}: {wrong}" for name, wrong in failures.items())
        + ". Choose another model.language.name"
    )


def _candidates(model: MultimodalModel, by_segments: bool) -> Iterator[tuple[Reading, bool]]:
    """Readings, and whether by segments."""
    reader = model.reader
    kinds = set(getattr(reader.config, "layer_types", None) or ())
    packed = [Reading(masks="by layer type")] * bool(kinds - {"full_attention"}) + [Reading()]
    packed += [Reading(windows=False)] * bool(getattr(reader.config, "sliding_window", None))
    for reading in packed if reader.takes_positions else ():
        if by_segments and reader.may_attend_by_segments:
            yield reading, True
        yield reading, False
    yield Reading(packed=False), False
    yield Reading(packed=False, cached=False), False


def _name(reading: Reading, by_segments: bool = False) -> str:
    if not reading.packed:
        return "unpacked" if reading.cached else "unpacked, without a cache"
    masks = "a mask by layer type" if reading.masks == "by layer type" else "one mask"
    how = ("" if reading.windows else ", within the window") + (", by segments" if by_segments else "")
    return f"packed with {masks}{how}"


def _what_is_wrong(model: MultimodalModel, noise: float) -> str | None:
    """None where every number is the model's own; ``noise`` is what other rows may change."""
    try:
        with _short_windows(model):
            return _compare(model, noise)
    except RefusedError as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of somebody else's code, for inputs that it may not know
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _compare(model: MultimodalModel, noise: float) -> str | None:
    prefix, first, second = random_tokens(model)
    alone = [_own_logits(model, [[*prefix, *own]])[0] for own in (first, second)]
    batch = shared_batch(prefix, (first, second), model.device)
    logits = model.logits(model.hidden_states(batch), batch.adapters)
    for ours, own, what in (
        (_conversation(logits[1], batch, 1, 1), alone[0], "a row beside a longer one"),
        (_conversation(logits[0], batch, 0, 1), alone[0], "the first conversation of a row"),
        (_conversation(logits[0], batch, 0, 2), alone[1], "the second conversation of a row"),
    ):
        if not (off := distance(ours, own)) <= tolerance(model):
            return f"logits of {what} are {off:.2g} off"
    other = shared_batch(prefix, (first[::-1], second), model.device)
    again = model.logits(model.hidden_states(other), other.adapters)
    here, there = _conversation(again[0], other, 0, 2), _conversation(logits[0], batch, 0, 2)
    if not (off := distance(here, there)) <= noise:
        return f"a conversation changes the next one of its row by {off:.2g}"
    if not isinstance(model.vision_encoder, NoVision):
        _read_other_embeddings(model, batch)
    return _compare_decoding(model, batch, [[*prefix, *first], [*prefix, *second]])


def _read_other_embeddings(model: MultimodalModel, batch: Batch) -> None:
    """Image features are no token's embedding, which some models look for."""
    inputs = model.inputs(batch)
    inputs.embeds = inputs.embeds.roll(1, -1)
    model.read(inputs)


def _noise(model: MultimodalModel, prefix: list[int], first: list[int], second: list[int]) -> float:
    """What another row's content does to a row of the model's own forward: nothing, or what experts round otherwise in
    other company; a margin with it."""
    rows = [[*prefix, *first], [*prefix, *second[: len(first)]]]
    here, there = (_own_logits(model, [rows[0], other])[0] for other in (rows[1], rows[1][::-1]))
    return 1e-5 + 10 * distance(here, there)


def _require_causal(model: MultimodalModel) -> float:
    """What another row changes in a row, see `_noise`.

    Raises:
        RefusedError: what tokens do to the logits of those before them is more than that.
    """
    prefix, first, second = random_tokens(model)
    try:
        here, there = (_own_logits(model, [[*prefix, *own]])[0] for own in (first, second[: len(first)]))
        noise = _noise(model, prefix, first, second)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise RefusedError(
            f"{type(model.language_model).__name__} cannot be run on plain tokens as transformers has it: "
            f"{type(error).__name__}: {error}. Choose another model.language.name"
        ) from error
    off = distance(here[: len(prefix)], there[: len(prefix)])
    if off > noise:
        raise RefusedError(
            f"{type(model.language_model).__name__} is no causal model: a later token changes what stands before it "
            f"(its logits by {off:.2g}). Choose a decoder as model.language.name"
        )
    return noise


def _conversation(logits: Tensor, batch: Batch, row: int, segment: int) -> Tensor:
    """(tokens, vocabulary) of one conversation, its prefix included."""
    segments = batch.segments[row]
    return logits[(segments == PREFIX) | (segments == segment)]


def _compare_decoding(model: MultimodalModel, batch: Batch, prompts: Sequence[list[int]]) -> str | None:
    """The same for tokens that are written one by one."""
    memory = PackedMemory(model) if model.reader.reading.packed else OwnMemory(model)
    hidden, written = memory.join(batch), [[*prompts[0]], [*prompts[1]], [*prompts[0]]]
    steps: list[Tensor] = [model.logits(hidden, [None] * len(hidden))]
    for _ in range(STEPS):
        tokens = steps[-1].argmax(-1)
        for own, token in zip(written, tokens.tolist(), strict=True):
            own.append(token)
        steps.append(model.logits(memory.advance(tokens), [None] * len(tokens)))
    for number in (0, 1, 2):
        ours = torch.stack([step[number] for step in steps])
        own = _own_logits(model, [written[number]])[0, -STEPS - 1 :]
        if not (off := distance(ours, own)) <= tolerance(model):
            return f"logits while decoding are {off:.2g} off"
    return None


@contextmanager
def _short_windows(model: MultimodalModel) -> Iterator[None]:
    """Inside, layers that see only so far see less than the rows that are tried, which are several tiles long."""
    reader = model.reader
    windows = [name for name in FOLLOWED if (getattr(reader.config, name, None) or 0) > SHORT]
    places = [(reader.config, name, SHORT) for name in windows if reader.reading.windows]
    places += [(reader, "tile_sizes", (SHORT,))]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, short in places:
            setattr(owner, name, short)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _own_logits(model: MultimodalModel, rows: list[list[int]]) -> Tensor:
    """(rows, tokens, vocabulary) of the model's own forward on rows of one length."""
    model.bank.route([None] * len(rows))
    return model.language_model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits
