"""A picture of samples of a data set: images as the model sees them, with question and answer."""

import math
from typing import TYPE_CHECKING

from PIL import Image

from mmpeft.data.images import ImageConfig, load_image
from mmpeft.data.records import IMAGE_MARKER, Record
from mmpeft.reporting.report import ShownExample, draw_report

if TYPE_CHECKING:
    from mmpeft.models.vision import VisionEncoder

CELL, GAP = 224, 4
"""Pixels: the longer side of one image of several, and the white between them."""


def draw_samples(
    path: str, records: list[Record], encoder: "VisionEncoder | None", config: ImageConfig
) -> None:
    """Draws records into a PNG.

    Args:
        encoder: whose transform images go through; None shows them as they are.
        config: how images are decoded, the encoder's own.

    Raises:
        ImageError: an image cannot be read.
    """
    seen = f"as {encoder.config.name} sees them" if encoder else "as they are in the files"
    shown = [_shown(record, encoder, config) for record in records]
    draw_report(path, None, shown, f"{len(records)} random conversations, images {seen}", {})


def _shown(record: Record, encoder: "VisionEncoder | None", config: ImageConfig) -> ShownExample:
    images = [load_image(image, config) for image in record["images"]]
    if encoder is not None:
        from mmpeft.tools.encoder_sight import as_seen

        images = [part for image in images for part in as_seen(encoder, image)]
    question, answer = record["turns"][0]
    more = len(record["turns"]) - 1
    text = question.replace(IMAGE_MARKER, "").strip() or "(no text)"
    told = f"{text} (+{more} turns)" if more else text
    return ShownExample(_beside_each_other(images), told, None, answer or "")


def _beside_each_other(images: list[Image.Image]) -> Image.Image | None:
    """One image of several, in rows; a single one is itself."""
    if len(images) < 2:
        return images[0] if images else None
    columns = math.ceil(math.sqrt(len(images)))
    rows, step = math.ceil(len(images) / columns), CELL + GAP
    sheet = Image.new("RGB", (columns * step - GAP, rows * step - GAP), "white")
    for number, image in enumerate(images):
        image.thumbnail((CELL, CELL))
        sheet.paste(image, (number % columns * step, number // columns * step))
    return sheet
