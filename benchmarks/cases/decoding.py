"""Greedy decoding of prompts of different lengths: eight LoRA finetunes mixed, the base, and `generate` of the base.

Every row writes the same number of tokens.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.models import METHODS, base, fill, names
from benchmarks.race import Race, Run
from mmpeft.data.batch import Batch, collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IMAGE_TOKEN, Encoded
from mmpeft.inference.decoding import generate
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel

NO_TOKEN = -1
LENGTHS = {"paragraphs of 64 tokens": 64, "answers of 4 tokens": 4}
OURS, THEIRS = "mmpeft, eight finetunes", "transformers' generate, base"


def decoding(rows: int = 32, seed: int = 0) -> Iterator[Race]:
    """Paragraphs and short answers of the embedded model.

    Args:
        rows: of the batch.
        seed: of prompts and weights.
    """
    prompts, bare = Prompts(rows, seed), built()
    draw = random.Random(seed + 1)
    several = [pack(about_an_image(draw, 4)) for _ in range(rows // 4)]
    features = torch.randn(len(several), 1, 1, generator=torch.Generator().manual_seed(seed))
    alone = prompts.batch([None] * rows)
    packed = collate(several, features, [None] * len(several))
    for title, tokens in LENGTHS.items():
        runs: dict[str, Run] = {
            OURS: prompts.mixed(tokens),
            "mmpeft, base": answers(bare, alone, tokens),
            THEIRS: prompts.generated(tokens),
            "mmpeft, base, four questions a row": answers(bare, packed, tokens),
        }
        yield Race(title, runs, (THEIRS,), "tokens/s", amount=rows * tokens)


class Prompts:
    """Random ones of different lengths, ours with eight finetunes of random weights and transformers' base to write on.

    Args:
        rows: how many.
        seed: of prompts and weights.
    """

    def __init__(self, rows: int, seed: int):
        self.model, self.theirs = built(), base()
        for name in names(8):
            self.model.bank.add(name, METHODS["LoRA q,v"][0])
        fill(self.model.bank, names(8), seed)
        draw = random.Random(seed)
        self.prompts = [prompt(draw, draw.randint(16, 128)) for _ in range(rows)]

    def batch(self, owners: list[str | None]) -> Batch:
        """A row each."""
        return collate([pack([own]) for own in self.prompts], None, owners)

    def mixed(self, tokens: int) -> Callable[[], Any]:
        """Ours writes so many tokens, every row by the next of the finetunes."""
        owners: list[str | None] = [names(8)[row % 8] for row in range(len(self.prompts))]
        return answers(self.model, self.batch(owners), tokens)

    def generated(self, tokens: int) -> Callable[[], Any]:
        """The same by transformers, of its base."""
        return generated(self.theirs, self.prompts, tokens)


def generated(model: Any, prompts: list[Encoded], tokens: int) -> Callable[[], Any]:
    """So many tokens by transformers, of rows padded on the left."""
    width = max(len(own.ids) for own in prompts)
    ids = torch.tensor([[0] * (width - len(own.ids)) + own.ids for own in prompts])
    mask = torch.tensor([[0] * (width - len(own.ids)) + [1] * len(own.ids) for own in prompts])
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids, attention_mask=mask, **how)


def built() -> MultimodalModel:
    """The embedded language model, with how it is read."""
    model = build_model(LanguageConfig(), None).eval()
    check_language_model(model)
    return model


def answers(model: MultimodalModel, batch: Batch, tokens: int) -> Callable[[], Any]:
    """Writes so many tokens for every conversation of a batch."""
    return lambda: generate(model, batch, NO_TOKEN, tokens)


def prompt(draw: random.Random, length: int) -> Encoded:
    """Random tokens."""
    ids = [draw.randrange(1000, 40000) for _ in range(length)]
    return Encoded(ids, [-100] * length, [])


def about_an_image(draw: random.Random, questions: int) -> list[Encoded]:
    """Questions that share an image and a prefix."""
    shared = [*prompt(draw, 16).ids, IMAGE_TOKEN, *prompt(draw, 40).ids]
    asked = [[*shared, *prompt(draw, draw.randint(6, 16)).ids] for _ in range(questions)]
    return [Encoded(ids, [-100] * len(ids), ["image"]) for ids in asked]
