"""easy-VQA: images of one coloured shape, questions and answers about them, and captions that follow from these."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

from mmpeft.samples.rows import conversation, write_rows
from mmpeft.samples.sample import PrepareError

COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
NUM_TRAIN_IMAGES = 3800
"""Images of the train split before this number train; the 200 after it are held out for validation curves."""


def build_easy_vqa(wheel: ZipFile, folder: Path) -> None:
    """Write the images as files and the questions as LLaVA-style JSON lines."""
    _write_images(wheel, folder)
    counts = []
    for split, source, images in (
        ("train", "train", range(NUM_TRAIN_IMAGES)),
        ("val", "train", range(NUM_TRAIN_IMAGES, 4000)),
        ("test", "test", range(1000)),
    ):
        asked: dict[int, list[tuple[str, str]]] = {image: [] for image in images}
        for question, answer, image in json.loads(wheel.read(f"easy_vqa/data/{source}/questions.json")):
            if image in images:
                asked[image].append((question, answer))
        questions = [(image, *pair) for image, pairs in asked.items() for pair in pairs]
        _write_rows(folder / f"{split}.jsonl", "vqa", split, source, questions)
        captions = [(image, derive_caption(pairs)) for image, pairs in asked.items()]
        told = [(image, "Describe this image in a few words.", text) for image, text in captions if text]
        _write_rows(folder / f"captions_{split}.jsonl", "caption", f"{split}-caption", source, told)
        counts.append(
            f"{split}: {len(images)} images, {len(questions)} questions, {len(told)} captions "
            f"({len(images) - len(told)} images without: the questions leave shape or colour open)"
        )
        print(f"  {counts[-1]}")
    (folder / "README.txt").write_text(
        "easy-VQA by Victor Zhou (MIT licence, PACKAGE-LICENSE.txt): 64x64 images of one coloured shape.\n"
        f"val is train images {NUM_TRAIN_IMAGES} to 3999, held out of train; test is the published test.\n"
        "Captions are not part of easy-VQA: mmpeft derived them from each image's questions and answers.\n\n"
        + "\n".join(counts)
        + "\n"
    )


def _write_images(wheel: ZipFile, folder: Path) -> None:
    from rich.progress import track

    pattern = re.compile(r"easy_vqa/data/(train|test)/images/(\d+\.png)")
    found = [match for name in wheel.namelist() if (match := pattern.fullmatch(name))]
    for split in ("train", "test"):
        (folder / "images" / split).mkdir(parents=True)
    for match in track(found, description="  images", transient=True):
        (folder / "images" / match[1] / match[2]).write_bytes(wheel.read(match[0]))


def _write_rows(
    path: Path, task: str, prefix: str, source: str, rows: Iterable[tuple[int, str, str]]
) -> None:
    """One JSON line for each (image number, what the user says, what the model shall say)."""
    write_rows(
        path,
        (
            conversation(f"{prefix}-{number:06d}", task, user, model, image=f"images/{source}/{image}.png")
            for number, (image, user, model) in enumerate(rows)
        ),
    )


def derive_caption(pairs: Iterable[tuple[str, str]]) -> str | None:
    """What an image's questions and answers say it shows ("a blue triangle"); None where they leave it open.

    An image holds one shape of one colour. Each pair narrows what it can be: an answer names it ("what color
    is the shape?"), a question may presuppose it ("what is the blue shape?"), yes and no keep or drop a word.
    """
    colors, shapes = set(COLORS), set(SHAPES)
    for question, answer in pairs:
        words = re.findall(r"[a-z]+", question)
        named = {word for word in words if word in COLORS | SHAPES}
        holds = True
        if answer in ("yes", "no"):
            holds = (answer == "yes") != bool({"no", "not"} & set(words))
        else:
            named.add(answer)
        for known in (colors, shapes):
            if mentioned := named & (COLORS if known is colors else SHAPES):
                known.intersection_update(mentioned) if holds else known.difference_update(mentioned)
    if not colors or not shapes:
        raise PrepareError("the questions of one image contradict each other")
    return f"a {colors.pop()} {shapes.pop()}" if len(colors) == len(shapes) == 1 else None
