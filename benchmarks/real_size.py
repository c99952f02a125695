"""What data of real size takes: seconds until the first batch is there, at a first and at a second start, and memory.

Generated conversations in LLaVA's layout, of 576 image tokens and some 300 of text, in two turns; 64 small images; an
encoder that gives zeros. All else is what a fit does before its first step: read and check the records, cache features,
count tokens, hash what is learnt, plan the epoch, make a batch. Each start is a process of its own::

    python benchmarks/real_size.py --rows '[100000, 665000]'
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from PIL import Image
from timing import report

from mmpeft.data.features import FeatureCache
from mmpeft.data.template import Template
from mmpeft.models.language import load_tokenizer
from mmpeft.paths import LANGUAGE_MODEL, home
from mmpeft.training.batches import make_loader
from mmpeft.training.checkpoint import hash_records
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.finetune import Finetune, Settings

IMAGE_TOKENS, IMAGES = 576, 64
MB = 2**20


class Zeros:
    """An encoder of 576 tokens."""

    fingerprint = {"name": "zeros"}  # noqa: RUF012

    def transform(self, image: Any) -> torch.Tensor:
        return torch.zeros(1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), IMAGE_TOKENS, 8)


def write_rows(folder: Path, rows: int, words_of_a_turn: int) -> Path:
    """A JSONL file of conversations, and their images."""
    rng, words = random.Random(0), [f"{a}{b}" for a in ("red", "sea", "tree", "house") for b in range(250)]
    for number in range(IMAGES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    path = folder / "train.jsonl"
    with path.open("w") as file:
        for number in range(rows):
            image, turns = f"{rng.randrange(IMAGES)}.png", []
            for turn in range(2):
                question = "<image>\n" * (turn == 0) + f"What is in place {rng.randrange(rows)}?"
                answer = " ".join(rng.choices(words, k=rng.randrange(words_of_a_turn)))
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {answer}."}]
            file.write(json.dumps({"id": f"{number:09d}", "image": image, "conversations": turns}) + "\n")
    return path


def run_start(path: str) -> None:
    """Everything up to the first batch, and what each part took, as a line of JSON."""
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for part in _parts(path):
        seconds[part] = round(time.perf_counter() - _BEGUN, 2)
        peaks[part] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(each.ru_utime + each.ru_stime for each in (own, children))
    print(json.dumps({"seconds": seconds, "cpu": round(cpu, 1), "peak_mb": peaks}))


def _parts(path: str) -> Iterator[str]:
    yield "imports"
    data = VisionLanguageData(train=path)
    finetune = Finetune("own", None, Settings())
    data.read("fit", {"own": finetune})
    yield "records"
    records = finetune.records["train"]
    features = FeatureCache(data.cache, Zeros())
    features.build(image for record in records[:IMAGES] for image in record["images"])
    yield "features"
    template = Template(load_tokenizer(LANGUAGE_MODEL), IMAGE_TOKENS, "chat")
    loader: Any = make_loader(
        {"own": finetune}, "train", template, features, data.packing, {"own": "own"}, data.seed
    )
    yield "counts"
    hash_records(records, features.key)
    yield "hash"
    batches = iter(loader)
    next(batches)
    yield "first_batch"


def real_size(
    rows: list[int] = [100_000],  # noqa: B006 never written to
    words: int = 80,
    start: str | None = None,
) -> None:
    """Measures a first and a second start.

    Args:
        rows: of each case.
        words: most in an answer.
        start: file to start from in this process, in place of all that.
    """
    if start is not None:
        return run_start(start)
    for count in rows:
        with tempfile.TemporaryDirectory() as folder:
            own_home = Path(folder) / "home"
            own_home.mkdir()
            (own_home / "embedded").symlink_to(home() / "embedded")
            path = write_rows(Path(folder), count, words)
            told: dict[str, Any] = {"rows": count, "file_mb": path.stat().st_size // MB}
            for name in ("first", "second"):
                told[name] = _start(path, own_home)
            told["store_mb"] = sum(f.stat().st_size for f in (own_home / "records").glob("*")) // MB
            report(**told)


def _start(path: Path, own_home: Path) -> dict[str, Any]:
    environment = os.environ | {"MMPEFT_HOME": str(own_home)}
    command = [sys.executable, __file__, "--start", str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


_BEGUN = time.perf_counter()
if __name__ == "__main__":
    auto_cli(real_size)
