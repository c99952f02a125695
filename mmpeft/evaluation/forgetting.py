"""Forgetting: what a finetune leaves of its base, in perplexity of plain text and of answers about images.

What a model reads may be text, or images and text; what it writes is text. A finetune can keep one and lose the other.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmpeft.data.batch import collate
from mmpeft.data.formats import DataError
from mmpeft.data.loader import Features
from mmpeft.data.packing import pack
from mmpeft.data.records import Record, place_of
from mmpeft.data.sources import check_images
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.data.tokens import PieceTokenizer
from mmpeft.errors import RefusedError
from mmpeft.inference.engine import Engine
from mmpeft.models.evaluating import evaluating
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.vision import NoVision, VisionEncoder

POSITIONS_AT_ONCE = 256
"""Positions whose logits are in memory together: a vocabulary of 49,152 takes 50 MB of fp32 for each model."""


@dataclass(frozen=True)
class Forgetting:
    """How a finetune predicts texts beside its base. All are means over tokens, not over texts."""

    base_perplexity: float
    """exp of the base's mean negative log-likelihood of a token."""
    perplexity: float
    """The same of the finetune."""
    agreement: float
    """Share of the tokens in whose place both find the same token the most likely."""
    divergence: float
    """Kullback-Leibler divergence of the finetune's distribution from the base's, KL(base || finetune), in nats."""
    num_tokens: int
    """Tokens that were predicted."""

    def __str__(self) -> str:
        return (
            f"perplexity {self.base_perplexity:.3f} -> {self.perplexity:.3f} on {self.num_tokens:,} tokens, "
            f"same next token {self.agreement:.1%}, divergence {self.divergence:.3g} nats"
        )


def measure_forgetting(
    model: MultimodalModel,
    tokenizer: Any,
    texts: Sequence[str],
    adapter: str | None,
    max_tokens: int = 256,
    batch_size: int = 8,
) -> Forgetting:
    """Lets base and finetune predict the same texts, in the same batches: each text is a row of both.

    Texts are read as they are, without template or image, after the begin-of-sequence token where the tokenizer
    has one; else their first token is not predicted. A control token spelled in a text stays text. The model's
    weights, modes and gradients stay as they are.

    Args:
        texts: held-out plain text, such as paragraphs.
        adapter: the finetune; None is the base itself.
        max_tokens: tokens read of every text, the begin included; the rest is left out.
        batch_size: texts in a batch, which then has twice as many rows.

    Raises:
        UnknownNameError: no such adapter.
        RefusedError: no texts, one of which nothing can be predicted, or a size below 1.
    """
    if not texts or min(max_tokens, batch_size) < 1:
        raise RefusedError(
            f"found {len(texts)} texts, max_tokens {max_tokens} and batch_size {batch_size}; all must be at least 1"
        )
    pieces = PieceTokenizer(tokenizer)
    rows = [_encode(pieces, text, number, max_tokens) for number, text in enumerate(texts)]
    return _measure(model, rows, adapter, batch_size, "plain text")


def measure_image_forgetting(
    engine: Engine, records: Sequence[Record], adapter: str | None, batch_size: int = 8
) -> Forgetting:
    """The same of the answers of records about images, behind their prompts as the run writes them.

    Args:
        engine: of the model, its template and the features of images.
        records: with their answers.

    Raises:
        UnknownNameError: no such adapter.
        RefusedError: what `encode_held` refuses.
    """
    rows = encode_held(engine, records)
    return _measure(engine.model, rows, adapter, batch_size, "answers about images", engine.features)


def check_held(engine: Engine, records: Sequence[Record]) -> None:
    """Raises:
    DataError: `measure_image_forgetting` would refuse a record or an image, all of which are decoded.
    """
    encode_held(engine, records)
    encoder = engine.model.vision_encoder
    config = encoder.image_config if isinstance(encoder, VisionEncoder) else None
    if problems := check_images(records, decode=True, config=config):
        raise DataError("test.held_images has images that cannot be used\n" + "\n".join(problems))


def encode_held(engine: Engine, records: Sequence[Record]) -> list[Encoded]:
    """Records about images with their answers, whole: perplexities of parts of them would be others.

    Raises:
        DataError: the model sees no images, a record has none, or it is too long.
    """
    if records and isinstance(engine.model.vision_encoder, NoVision):
        raise DataError(
            f"{place_of(records[0])}: the run has no vision encoder, and test.held_images are questions about images: "
            "leave it out"
        )
    return [_held(engine, record) for record in records]


def _held(engine: Engine, record: Record) -> Encoded:
    where, template = place_of(record), engine.template
    if not record["images"]:
        raise DataError(
            f"{where} has no image; test.held_images are questions about images: put it under test.held_text"
        )
    encoded = template.encode(record)
    if encoded.truncated:
        raise DataError(
            f"{where} is longer than max_length = {template.max_length}, so that a part of its answers would not be "
            "read; shorten it or leave it out of test.held_images"
        )
    return encoded


def _measure(
    model: MultimodalModel,
    rows: list[Encoded],
    adapter: str | None,
    batch_size: int,
    what: str,
    features: Features = list,
) -> Forgetting:
    """Args:
    what: is read.
    features: of images.
    """
    rows.sort(key=lambda row: len(row.ids))  # neighbours of equal length need no padding
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(model):
        for start in _told(range(0, len(rows), batch_size), f"forgetting of {adapter or 'the base'}", what):
            totals += _compare(model, rows[start : start + batch_size], adapter, features)
    num_tokens = sum(target != IGNORE_INDEX for row in rows for target in row.targets)
    totals /= num_tokens
    base, finetune, agreement, divergence = [*totals[:2].exp().tolist(), *totals[2:].tolist()]
    return Forgetting(base, finetune, agreement, divergence, num_tokens)


def _told(batches: range, doing: str, what: str) -> Iterable[int]:
    """Says how far it is: by a bar where somebody watches, else in a line."""
    if not sys.stderr.isatty():
        print(f"{doing}: reading {len(batches):,} batches of {what}", file=sys.stderr)
        return batches
    return tqdm(batches, doing, unit="batch")


def _encode(pieces: PieceTokenizer, text: str, number: int, max_tokens: int) -> Encoded:
    """Every position's target is the token after it; the last token is no input."""
    bos = pieces.tokenizer.bos_token_id
    begin, ids = [] if bos is None else [bos], pieces.begin(text)
    tokens = [*begin, *ids][:max_tokens]
    if len(tokens) < 2:
        raise RefusedError(
            f"texts[{number}] is {text[:40]!r}, of which max_tokens = {max_tokens} leaves {len(tokens)} tokens, the "
            "begin included; at least 2 are needed: leave the text out or raise max_tokens"
        )
    return Encoded(tokens[:-1], tokens[1:])


def _compare(
    model: MultimodalModel, texts: Sequence[Encoded], adapter: str | None, features: Features
) -> Tensor:
    """(4,) fp64: sums over the tokens of the base's and the finetune's losses, of agreements and divergences."""
    rows = [pack([text]) for text in texts] * 2
    names = [None] * len(texts) + [adapter] * len(texts)
    images = [image for row in rows for image in row.images]
    batch = collate(rows, features(images) if images else None, names).to(model.device)

    def logits(hidden: Tensor, owner: str | None) -> Tensor:
        return model.logits(hidden, [owner] * len(hidden))

    predicted = batch.targets != IGNORE_INDEX
    base, own = model.hidden_states(batch)[predicted].chunk(2)
    targets, _ = batch.targets[predicted].chunk(2)
    parts = zip(*(tensor.split(POSITIONS_AT_ONCE) for tensor in (base, own, targets)), strict=True)
    return torch.stack([_sums(logits(b, None), logits(o, adapter), t) for b, o, t in parts]).sum(0)


def _sums(base: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """As `_compare`, from the logits (positions, vocabulary) of both and the targets (positions,)."""
    p, q = (logits.float().log_softmax(-1) for logits in (base, own))
    losses = [-each.gather(1, targets[:, None]) for each in (p, q)]
    agreements = base.argmax(-1) == own.argmax(-1)
    divergences = (p.exp() * (p - q)).sum(-1)
    return torch.stack([each.double().sum().cpu() for each in (*losses, agreements, divergences)])
