"""Questions a second of one training step: ours, and peft's LoRA with a row per question and full logits.

peft gets the vision features for free and takes Hugging Face's own loss. No optimiser on either side.
"""

import random
from collections.abc import Iterator
from typing import Any

from benchmarks.models import METHODS, QV, peft_of
from benchmarks.race import Race
from benchmarks.recipe import embedded_vision
from mmpeft.adapters import LoraConfig
from mmpeft.data.batch import Batch, collate
from mmpeft.data.features import FeatureCache
from mmpeft.data.packing import pack
from mmpeft.data.sources import load_records
from mmpeft.data.template import IGNORE_INDEX, Template
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.paths import home, resolve


def training_step(images: int = 4, seed: int = 0) -> Iterator[Race]:
    """Forward and backward.

    Args:
        images: of a step; each comes with all its questions.
        seed: which images.
    """
    language = LanguageConfig()
    model = build_model(language, embedded_vision())
    check_language_model(model)  # how it is read
    model.bank.add("ours", LoraConfig(target_modules=QV))
    packed, unpacked = batches(model, load_tokenizer(language.name), images, seed)
    peer = peft_of(METHODS["LoRA q,v"][1])
    theirs = "peft, a row per question, full logits"
    runs = {
        "mmpeft, questions of an image in one row": lambda: our_step(model, packed),
        "mmpeft, a row per question": lambda: our_step(model, unpacked),
        theirs: lambda: their_step(peer, model, unpacked),
    }
    yield Race("training step", runs, (theirs,), "questions/s", amount=len(unpacked.input_ids))


def batches(model: MultimodalModel, tokenizer: Any, images: int, seed: int) -> tuple[Batch, Batch]:
    """The same questions packed by image, and one per row."""
    template = Template(tokenizer, model.vision_encoder.num_tokens)
    by_image: dict[str, list[Any]] = {}
    for record in load_records(resolve("embedded/easy-vqa/train.jsonl")):
        by_image.setdefault(str(record["images"][0]), []).append(record)
    chosen = [by_image[key] for key in random.Random(seed).sample(sorted(by_image), images)]
    groups = [[template.encode(record) for record in group] for group in chosen]
    features = FeatureCache(home() / "features", model.vision_encoder)
    packed, single = [pack(group) for group in groups], [pack([one]) for group in groups for one in group]  # pyright: ignore
    made = [
        collate(rows, features([image for row in rows for image in row.images]), ["ours"] * len(rows))
        for rows in (packed, single)
    ]
    return made[0], made[1]


def our_step(model: MultimodalModel, batch: Batch) -> None:
    """Forward and backward of a batch."""
    model.token_losses(batch).nll.mean().backward()
    model.zero_grad()


def their_step(peer: Any, model: MultimodalModel, batch: Batch) -> None:
    """The same by peft, of a batch with a row per question, behind our projector."""
    embeds = model._embed(batch, slice(None))
    mask = (batch.segments >= 0).long()
    # Hugging Face shifts labels itself: label t is what position t - 1 predicts.
    labels = batch.targets.roll(1, 1)
    labels[:, 0] = IGNORE_INDEX
    peer(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions, labels=labels
    ).loss.backward()
    peer.zero_grad()
    model.zero_grad()
