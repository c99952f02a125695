"""The live engine on the embedded model: what reuse saves, what finetunes cost, a thousand of them, and overload.

Every request writes the same number of tokens.
"""

import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from threading import Thread
from typing import Any

import torch
from PIL import Image

from benchmarks.models import fill
from benchmarks.race import Race
from benchmarks.recipe import embedded_vision
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

KINDS: list[AdapterConfig] = [
    LoraConfig(rank=16),
    IA3Config(),
    DoraConfig(rank=16),
    BottleneckConfig(width=16),
]
WORDS = ["red", "green", "blue", "what", "where", "is", "the", "a", "cat"]
ROWS, TOKENS = 32, 64
SECONDS = 20
"""Of one turn under load."""


def live(image_size: int = 224) -> Iterator[Race]:
    """Requests that come and go.

    Args:
        image_size: pixels of the encoder's side.
    """
    engine = engine_of(embedded_vision(image_size))
    yield from images(engine)
    yield from mixed(engine)
    yield from adding(engine)
    yield from overload(engine)
    yield from thousand(engine)


def engine_of(vision: VisionConfig | None) -> Engine:
    """The embedded model's, with a projector of random weights."""
    torch.manual_seed(0)
    model = build_model(LanguageConfig(), vision).eval()
    check_language_model(model)  # how it is read
    encoder = model.vision_encoder
    template = Template(load_tokenizer(LanguageConfig().name), encoder.num_tokens)
    return Engine(model, template, FeatureCache(None, encoder))


def images(engine: Engine) -> Iterator[Race]:
    """Ten questions about one image beside one, and the first token about an image that was seen."""
    draw = random.Random(0)

    def ask(live: LiveEngine, image: bytes, numbers: Sequence[int]) -> tuple[float, float]:
        """Seconds until the last answer, and until the first token."""
        started = time.monotonic()
        tickets = [live.submit(about(image, number)) for number in numbers]
        for ticket in tickets:
            assert ticket.result().error is None
        return max(t.ended or 0 for t in tickets) - started, (tickets[0].first_token or 0) - started

    with LiveEngine(engine) as live:
        seen = picture(draw)
        ask(live, seen, [0])
        questions = iter(range(1, 10**6))
        one, cold = "one question", "first token, an image not seen"
        whole = {
            one: lambda: ask(live, picture(draw), [0])[0],
            "ten questions": lambda: ask(live, picture(draw), range(10))[0],
        }
        soon = {
            cold: lambda: ask(live, picture(draw), [0])[1],
            "first token, an image seen": lambda: ask(live, seen, [next(questions)])[1],
        }
        facts = {"image_tokens": engine.template.image_tokens}
        yield Race("questions about an image", whole, (one,), measured=True, facts=facts)
        yield Race("first token", soon, (cold,), measured=True, facts=facts)


def mixed(engine: Engine) -> Iterator[Race]:
    """32 text requests at once, of the base alone, and where eight finetunes of four methods are loaded."""
    bank = engine.model.bank
    own = [f"finetune{number}" for number in range(8)]
    for number, name in enumerate(own):
        bank.add(name, KINDS[number % len(KINDS)])
    fill(bank, own, 0)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=24)) for _ in range(ROWS)]

    def answer(live: LiveEngine, names: Sequence[str | None]) -> Callable[[], None]:
        def run() -> None:
            for ticket in [live.submit(text(*asked)) for asked in zip(texts, names, strict=True)]:
                assert ticket.result().error is None

        return run

    bare = engine_of(None)
    with endless(bare) as alone, endless(engine) as live:
        runs = {
            "base": answer(alone, [None] * ROWS),
            "base, beside eight finetunes of four methods": answer(live, [None] * ROWS),
            "eight finetunes of four methods": answer(live, [own[row % 8] for row in range(ROWS)]),
        }
        title = f"{ROWS} requests of {TOKENS} tokens at once"
        yield Race(title, runs, ("base",), "tokens/s", ROWS * TOKENS, repeats=3)
    for name in own:
        bank.remove(name)


def adding(engine: Engine) -> Iterator[Race]:
    """The longest that one of 32 answers waits for a token, in steps, when a finetune is added in the middle."""
    configs: dict[str, AdapterConfig] = {
        "a LoRA is added": LoraConfig(rank=16),
        "a T-Few is added": IA3Config(),
    }
    with tempfile.TemporaryDirectory() as folder, endless(engine) as live:
        for title, config in configs.items():
            saved(engine, config, f"{folder}/{title}")

        def longest(title: str | None) -> float:
            told: list[list[float]] = [[] for _ in range(ROWS)]  # when each had its pieces, and its end

            def tell(own: list[float], _: Any) -> None:
                own.append(time.monotonic())

            tickets = [
                live.submit(text(f"what is at {row}?", None), on_event=partial(tell, own))
                for row, own in enumerate(told)
            ]
            while min(map(len, told)) < 8:
                time.sleep(0.001)
            if title is not None:
                live.load("added", f"{folder}/{title}")
            for ticket in tickets:
                assert ticket.result().error is None
            if title is not None:
                live.unload("added")
            gaps = [[after - before for before, after in pairwise(own[7:-1])] for own in told]
            return max(map(max, gaps)) / statistics.median(gap for own in gaps for gap in own)

        runs = {"nobody comes": lambda: longest(None)}
        runs |= {title: partial(longest, title) for title in configs}
        yield Race("longest wait for a token", runs, ("nobody comes",), "steps", measured=True)


def overload(engine: Engine) -> Iterator[Race]:
    """What those wait that were taken in, with as many clients as rows and with ten times as many, of eight T-Few
    finetunes."""
    bank, own = engine.model.bank, [f"finetune{number}" for number in range(8)]
    for name in own:
        bank.add(name, IA3Config())
    fill(bank, own, 0)

    def p99(live: LiveEngine, clients: int) -> float:
        waited: list[float] = []
        ends = time.monotonic() + SECONDS

        def client(number: int) -> None:
            while time.monotonic() < ends:
                try:
                    ticket = live.submit(text(f"what is at place {number}?", own[number % 8], 16))
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

    with endless(engine) as live:
        usual = f"{ROWS} clients"
        runs = {usual: lambda: p99(live, ROWS), f"{10 * ROWS} clients": lambda: p99(live, 10 * ROWS)}
        yield Race("99 of 100 admitted requests wait at most", runs, (usual,), measured=True, repeats=2)
    for name in own:
        bank.remove(name)


def thousand(engine: Engine) -> Iterator[Race]:
    """The step of a batch of T-Few finetunes beside 8 that are loaded and beside 1,000, and what loading one takes."""
    stages = {f"{count:,} T-Few finetunes loaded": count for count in (8, 1000)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        saved(engine, IA3Config(), folder)
        lives: dict[str, LiveEngine] = {}
        load_ms: dict[str, float] = {}
        for title, count in stages.items():
            live = stack.enter_context(endless(engine_of(None)))
            lives[title] = live
            loads: list[float] = []
            for number in range(count):
                started = time.monotonic()
                live.load(f"tfew{number}", folder)
                loads.append(time.monotonic() - started)
            load_ms[title] = round(1000 * statistics.median(loads), 1)

        def step(live: LiveEngine) -> float:
            names = [live.names()[row * len(live.names()) // ROWS] for row in range(ROWS)]
            steps, started = live.statistics()["steps"], time.monotonic()
            for ticket in [live.submit(text("why?", name, 24)) for name in names]:
                ticket.result()
            return (time.monotonic() - started) / (live.statistics()["steps"] - steps)

        runs = {title: partial(step, live) for title, live in lives.items()}
        told = lambda title, _: {"load_ms": load_ms[title]}  # noqa: E731
        yield Race(f"a step of {ROWS} rows", runs, (next(iter(runs)),), measured=True, told=told)


@contextmanager
def endless(engine: Engine) -> Iterator[LiveEngine]:
    """A live engine that keeps no prompts, and whose answers end at their length alone."""
    with LiveEngine(engine, LiveSettings(max_rows=ROWS, prefix_bytes=0)) as live:
        live._rows.decoder.end_ids.clear()
        yield live


def saved(engine: Engine, config: AdapterConfig, folder: str) -> None:
    """Writes a finetune of random tensors in PEFT's format."""
    bank = engine.model.bank
    bank.add("saved", config)
    fill(bank, ["saved"], 0)
    save_adapter(bank, "saved", folder, "embedded")
    bank.remove("saved")


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
