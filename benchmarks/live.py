"""The live engine on the embedded model: what reuse saves, what finetunes cost, and what a thousand of them cost.

Every request writes the same number of tokens. One JSON line per case, with medians.

    python benchmarks/live.py
"""

import io
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from threading import Thread
from typing import Any

import torch
from jsonargparse import auto_cli
from PIL import Image
from timing import alternate, report

from mmpeft.adapters import AdapterConfig, BottleneckConfig, DoraConfig, IA3Config, LoraConfig
from mmpeft.adapters.peft_format import save_adapter
from mmpeft.data.features import FeatureCache
from mmpeft.data.template import Template
from mmpeft.inference.engine import Engine
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.requests import Request
from mmpeft.inference.sampling import Sampling
from mmpeft.inference.self_check import check_language_model
from mmpeft.inference.tickets import OverloadedError
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.vision_config import VisionConfig

METHODS: list[AdapterConfig] = [
    LoraConfig(rank=16),
    IA3Config(),
    DoraConfig(rank=16),
    BottleneckConfig(width=16),
]
WEIGHTS = "embedded/efficientnet-lite0/model.safetensors"
WORDS = ["red", "green", "blue", "what", "where", "is", "the", "a", "cat"]
ROWS, TOKENS = 32, 64


def live(only: str = "", repeats: int = 3, image_size: int = 224) -> None:
    """Times the cases.

    Args:
        only: the cases that have this in their names: image, mixed, overload, thousand.
        repeats: rounds over what is timed.
        image_size: pixels of the encoder's side.
    """
    torch.manual_seed(0)
    model = build_model(LanguageConfig(), VisionConfig(weights=WEIGHTS, image_size=image_size)).eval()
    check_language_model(model)  # how it is read
    encoder, tokenizer = model.vision_encoder, load_tokenizer(LanguageConfig().name)
    engine = Engine(model, Template(tokenizer, encoder.num_tokens), FeatureCache(None, encoder))
    for case in (image, mixed, overload, thousand):
        if only in case.__name__:
            case(engine, repeats)


def image(engine: Engine, repeats: int) -> None:
    """Ten questions about one image beside one, and the first token of a question about an image that was seen."""
    draw = random.Random(0)

    def seconds(live: LiveEngine, questions: Sequence[Request]) -> tuple[float, float]:
        started = time.monotonic()
        tickets = [live.submit(question) for question in questions]
        for ticket in tickets:
            assert ticket.result().error is None
        return max(t.ended or 0 for t in tickets) - started, (tickets[0].first_token or 0) - started

    one, ten, cold, warm = [], [], [], []
    with LiveEngine(engine) as live:
        for turn in range(repeats + 1):
            first, second = picture(draw), picture(draw)
            whole, soon = seconds(live, [about(first, 0)])
            _, again = seconds(live, [about(first, 1)])
            many, _ = seconds(live, [about(second, number) for number in range(10)])
            if turn:
                for own, value in ((one, whole), (ten, many), (cold, soon), (warm, again)):
                    own.append(value)
    median = {
        name: statistics.median(own)
        for name, own in {"one": one, "ten": ten, "cold": cold, "warm": warm}.items()
    }
    report(
        case="image",
        image_tokens=engine.template.image_tokens,
        one_question_ms=round(1000 * median["one"]),
        ten_questions_ms=round(1000 * median["ten"]),
        ten_by_one=round(median["ten"] / median["one"], 2),
        first_token_cold_ms=round(1000 * median["cold"]),
        first_token_kept_ms=round(1000 * median["warm"]),
        kept_by_cold=round(median["warm"] / median["cold"], 2),
    )


def mixed(engine: Engine, repeats: int) -> None:
    """32 text requests at once, of the base and of eight finetunes of four methods."""
    for number in range(8):
        add(engine, f"finetune{number}", METHODS[number % len(METHODS)])
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=24)) for _ in range(ROWS)]

    def answer(live: LiveEngine, names: Sequence[str | None]) -> None:
        for ticket in [live.submit(text(*asked)) for asked in zip(texts, names, strict=True)]:
            assert ticket.result().error is None

    with LiveEngine(engine, LiveSettings(prefix_bytes=0)) as live:
        cases = {
            "base": lambda: answer(live, [None] * ROWS),
            "mixed": lambda: answer(live, [f"finetune{row % 8}" for row in range(ROWS)]),
        }
        seconds = alternate(cases, repeats)
    report(
        case="mixed",
        base_tokens_per_second=round(ROWS * TOKENS / seconds["base"], 1),
        mixed_tokens_per_second=round(ROWS * TOKENS / seconds["mixed"], 1),
        mixed_by_base=round(seconds["mixed"] / seconds["base"], 3),
    )
    for number in range(8):
        engine.model.bank.remove(f"finetune{number}")


def thousand(engine: Engine, repeats: int) -> None:
    """The step of a batch of T-Few finetunes when 8 are loaded and when 1,000 are, and what loading one takes."""
    add(engine, "saved", IA3Config())
    loads: list[float] = []
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder, LiveEngine(engine, LiveSettings(prefix_bytes=0)) as live:
        save_adapter(engine.model.bank, "saved", folder, "embedded")

        def step(names: Sequence[str]) -> float:
            steps, started = live.statistics()["steps"], time.monotonic()
            for ticket in [live.submit(text("why?", name, 24)) for name in names]:
                ticket.result()
            return (time.monotonic() - started) / (live.statistics()["steps"] - steps)

        for stage in (8, 1000):
            while len(live.names()) < stage:
                started = time.monotonic()
                live.load(f"tfew{len(live.names())}", folder)
                loads.append(time.monotonic() - started)
            names = [live.names()[row * stage // ROWS] for row in range(ROWS)]
            found[stage] = statistics.median([step(names) for _ in range(2 * repeats + 1)][1:])
    report(
        case="thousand",
        load_ms_median=round(1000 * statistics.median(loads), 1),
        load_ms_worst=round(1000 * max(loads), 1),
        step_ms_of_8=round(1000 * found[8], 2),
        step_ms_of_1000=round(1000 * found[1000], 2),
        ratio=round(found[1000] / found[8], 3),
    )


def overload(engine: Engine, repeats: int) -> None:
    """What those wait that were taken in, with as many clients as rows and with ten times as many."""

    def p99(live: LiveEngine, clients: int) -> float:
        waited: list[float] = []
        ends = time.monotonic() + 10 * repeats

        def client(number: int) -> None:
            while time.monotonic() < ends:
                try:
                    ticket = live.submit(text(f"what is at place {number}?", None, 16))
                except OverloadedError as error:
                    time.sleep(min(error.retry_after, 1))
                else:
                    assert ticket.result().error is None
                    waited.append((ticket.ended or 0) - ticket.submitted)

        threads = [Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statistics.quantiles(waited, n=100)[-1]

    with LiveEngine(engine, LiveSettings(max_rows=ROWS)) as live:
        p99(live, ROWS)
        usual, much = p99(live, ROWS), p99(live, 10 * ROWS)
    report(
        case="overload",
        p99_ms=round(1000 * usual),
        p99_of_ten_times_ms=round(1000 * much),
        ratio=round(much / usual, 2),
    )


def add(engine: Engine, name: str, config: AdapterConfig) -> None:
    bank, generator = engine.model.bank, torch.Generator().manual_seed(0)
    bank.add(name, config)
    for _, stack, slot in bank.places(name):
        noise = {
            key: 0.01 * torch.randn(t.shape, generator=generator) for key, t in stack.tensors(slot).items()
        }
        stack.fill(slot, {key: own + noise[key].to(own) for key, own in stack.tensors(slot).items()})


def text(question: str, name: str | None, tokens: int = TOKENS) -> Request:
    return Request(record(question, []), name, sampling=Sampling(tokens))


def about(picture: bytes, number: int) -> Request:
    return Request(record(f"<image>what is at place {number}?", [picture]), sampling=Sampling(8))


def record(question: str, images: list[Any]) -> Any:
    return {"id": "", "images": images, "turns": [(question, None)], "task": None, "where": "the question"}


def picture(draw: random.Random) -> bytes:
    """Noise, which no other has."""
    file = io.BytesIO()
    Image.frombytes("RGB", (256, 256), draw.randbytes(256 * 256 * 3)).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    auto_cli(live)
