"""A sweep of eight settings of LoRA on a Llama-shaped model of 1.2B in bf16, against eight separate runs.

It is that of the case `sweep`. The rows are random letters, each of them a token, and as long as those of the other GPU
cases, of an image and a question about it.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.cases.sweep import Row, sweep_race
from benchmarks.gpu import llama, size_here
from benchmarks.race import Race

STEPS, BATCH_SIZE, QUESTION, ANSWER = 32, 8, 256, 48
"""Steps of a setting that stays, rows of a step of each setting, and tokens of a row, whose answer carries loss."""
TINY = 8, 1, 8, 4
"""The same, to see that it runs: the fewest steps that eight settings can be halved in."""
VALIDATED = 4
"""Batches of a validation."""


def gpu_sweep(tiny: bool = False) -> Iterator[Race]:
    """Four learning rates by two ranks.

    Args:
        tiny: small shapes, to see on any machine that it runs.
    """
    size = size_here("1.2B", tiny)
    steps, batch_size, question, answer = TINY if tiny else (STEPS, BATCH_SIZE, QUESTION, ANSWER)
    rows = random_rows(batch_size * (steps + VALIDATED), question, answer)
    trained = batch_size * steps
    splits = {"train": rows[:trained], "val": rows[trained:]}
    with TemporaryDirectory() as folder:
        model = Path(folder, "model")
        llama(size).save_pretrained(model)
        tokenizer_of_letters().save_pretrained(model)
        yield sweep_race(Path(folder), str(model), splits, steps, batch_size)


def random_rows(number: int, question: int, answer: int) -> list[Row]:
    """So many, of so many letters."""
    draw = random.Random(0)
    lengths = {"question": question, "answer": answer}
    return [
        {key: "".join(draw.choices(ascii_lowercase, k=length)) for key, length in lengths.items()}
        for _ in range(number)
    ]


def tokenizer_of_letters() -> PreTrainedTokenizerFast:
    """Reads any text, byte by byte: what a model without a tokenizer of its own can be asked in."""
    end = "</s>"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), end]
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
