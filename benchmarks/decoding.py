"""Greedy decoding of text prompts of different lengths, by the base and by eight LoRA finetunes mixed.

Every row writes the same number of tokens. One JSON line per case, with medians.

    python benchmarks/decoding.py
    python benchmarks/versus.py ../before . benchmarks/decoding.py   # beside another checkout
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import auto_cli
from timing import alternate, report

from mmpeft.adapters import LoraConfig
from mmpeft.data.packing import pack
from mmpeft.data.template import IMAGE_TOKEN, Encoded
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel

try:
    from mmpeft.data.batch import Batch, collate
    from mmpeft.inference.decoding import generate
    from mmpeft.models.build import build_model
except ImportError:  # checkouts from before decoding left the model
    from mmpeft.bundle import build_model
    from mmpeft.data.collate import Batch, collate

    generate: Any = MultimodalModel.generate

NO_TOKEN = -1
FINETUNES = [f"finetune{number}" for number in range(8)]
SHORT, LONG = 4, 64
"""Tokens written: an answer to a question, a paragraph."""


def decoding(rows: int = 32, repeats: int = 5, seed: int = 0, only: str = "") -> None:
    """Times paragraphs and short answers of the embedded model.

    Args:
        rows: of the batch.
        repeats: rounds over all cases.
        seed: of prompts and weights.
        only: the cases that have this in their names.
    """
    model = build_model(LanguageConfig(), None).eval()
    base = build_model(LanguageConfig(), None).eval()
    generator = torch.Generator().manual_seed(seed)
    for name in FINETUNES:
        model.bank.add(name, LoraConfig(rank=16, target_modules=["q_proj", "v_proj"]))
        for _, stack, slot in model.bank.places(name):
            tensors = stack.tensors(slot)
            stack.fill(
                slot, {key: 0.01 * torch.randn(t.shape, generator=generator) for key, t in tensors.items()}
            )
    mixed = [FINETUNES[row % len(FINETUNES)] for row in range(rows)]
    draw = random.Random(seed)
    plain = [[prompt(draw, draw.randint(16, 128))] for _ in range(rows)]
    packed = [about_an_image(draw, 4) for _ in range(rows // 4)]
    features = torch.randn(len(packed), 1, 1, generator=generator)
    text, nobody = collate([pack(row) for row in plain], None, mixed), [None] * rows
    several = [pack(row) for row in packed]
    written = {
        f"base, {LONG} tokens": (base, collate([pack(row) for row in plain], None, nobody), LONG),
        f"eight finetunes, {LONG} tokens": (model, text, LONG),
        f"base, {SHORT} tokens": (base, collate([pack(row) for row in plain], None, nobody), SHORT),
        f"eight finetunes, {SHORT} tokens": (model, text, SHORT),
        f"four questions a row, {SHORT} tokens": (
            base,
            collate(several, features, nobody[: len(several)]),
            SHORT,
        ),
    }
    written = {name: case for name, case in written.items() if only in name}
    seconds = alternate({name: answers(*case) for name, case in written.items()}, repeats)
    for name, (_, batch, tokens) in written.items():
        total = conversations(batch) * tokens
        report(case=name, seconds=round(seconds[name], 2), tokens_per_second=round(total / seconds[name], 1))


def answers(model: MultimodalModel, batch: Batch, tokens: int) -> Callable[[], Any]:
    return lambda: generate(model, batch, NO_TOKEN, tokens)


def conversations(batch: Batch) -> int:
    return sum(len(set(row) - {-1, 0}) for row in batch.segments.tolist())


def prompt(draw: random.Random, length: int) -> Encoded:
    ids = [draw.randrange(1000, 40000) for _ in range(length)]
    return Encoded(ids, [-100] * length, [])


def about_an_image(draw: random.Random, questions: int) -> list[Encoded]:
    """Questions that share an image and a prefix."""
    shared = [*prompt(draw, 16).ids, IMAGE_TOKEN, *prompt(draw, 40).ids]
    asked = [[*shared, *prompt(draw, draw.randint(6, 16)).ids] for _ in range(questions)]
    return [Encoded(ids, [-100] * len(ids), ["image"]) for ids in asked]


if __name__ == "__main__":
    auto_cli(decoding)
