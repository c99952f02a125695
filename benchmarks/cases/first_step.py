"""What data of real size takes until the first batch is there, at a first and at a second start.

Generated conversations in LLaVA's layout, of 576 image tokens and some 300 of text, in two turns; 64 small images; an
encoder that gives zeros. All else is what a fit does before its first step: read and check the records, cache features,
count tokens, hash what is learnt, plan the epoch, make a batch. Each start is a process of its own.
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
from PIL import Image

from benchmarks.race import Race
from mmpeft.data.encoding import FEATURE_DTYPE
from mmpeft.data.features import FeatureCache
from mmpeft.data.images import ImageConfig
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
    image_config, num_tokens, dim, feature_dtype = ImageConfig(), IMAGE_TOKENS, 8, FEATURE_DTYPE

    def transform(self, image: Any) -> torch.Tensor:
        return torch.zeros(1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), IMAGE_TOKENS, self.dim)


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
    """Everything up to the first batch, and until when each part took, as a line of JSON."""
    until = {part: round(time.perf_counter() - _BEGUN, 2) for part in _parts(path)}
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(each.ru_utime + each.ru_stime for each in (own, children))
    print(
        json.dumps(
            {"until": until, "cpu": cpu, "clock": until["first_batch"], "peak_mb": own.ru_maxrss / 1024}
        )
    )


def _parts(path: str) -> Iterator[str]:
    yield "imports"
    data = VisionLanguageData(train=path)
    finetune = Finetune("own", None, Settings())
    data.read("fit", {"own": finetune})
    yield "records"
    records = finetune.records["train"]
    features = FeatureCache(data.cache.path, Zeros())
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


def first_step(rows: list[int] = [100_000], words: int = 80) -> Iterator[Race]:  # noqa: B006 never written to
    """A first and a second start.

    Args:
        rows: of each race.
        words: most in an answer.
    """
    units = {"cpu": "s of the processor", "clock": "s", "peak_mb": "MB"}
    for count in rows:
        with tempfile.TemporaryDirectory() as folder:
            own_home = Path(folder) / "home"
            own_home.mkdir()
            (own_home / "embedded").symlink_to(home() / "embedded")
            path = write_rows(Path(folder), count, words)
            starts = {name: start(path, own_home) for name in ("first start", "second start")}
            for key, unit in units.items():
                runs = {name: lambda own=own, key=key: own[key] for name, own in starts.items()}
                facts = {"until": {name: own["until"] for name, own in starts.items()}}
                yield Race(f"{count:,} rows", runs, unit=unit, measured=True, repeats=0, facts=facts)


def start(path: Path, own_home: Path) -> dict[str, Any]:
    """What a process says that makes the first batch."""
    environment = os.environ | {"MMPEFT_HOME": str(own_home)}
    command = [sys.executable, "-m", "benchmarks.cases.first_step", str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


_BEGUN = time.perf_counter()
if __name__ == "__main__":
    run_start(sys.argv[1])
