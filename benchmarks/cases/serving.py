"""`mmpeft serve` beside llama.cpp's server and peft: 32 text requests of 64 tokens at once, on the embedded model.

Servers are asked over loopback, all requests at the same time; llama.cpp serves the bare base in bf16 (package
xllamacpp). peft switches from finetune to finetune, and lets `generate` answer the requests of each as one batch.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import torch

from benchmarks.cases.decoding import generated
from benchmarks.cases.live import ROWS, TOKENS, WORDS, endless
from benchmarks.models import METHODS, base, fill, names, peft_of
from benchmarks.race import Race, Run
from mmpeft.data.template import Encoded, Template
from mmpeft.inference.self_check import check_language_model
from mmpeft.inference.vlm import VisionLanguageModel
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.runs.manifest import Manifest
from mmpeft.serving.keys import Keys
from mmpeft.serving.limits import Limits
from mmpeft.serving.server import make_server
from mmpeft.serving.service import Service
from tests.runs.llama_cpp import write_base

FINETUNES = names(8)
LLAMA_CPP, PEFT = "llama.cpp, base", "peft, finetune by finetune"


def serving() -> Iterator[Race]:
    """Requests over HTTP."""
    rows, tokens = ROWS, TOKENS
    draw = random.Random(0)
    questions = [" ".join(draw.choices(WORDS, k=24)) for _ in range(rows)]
    vlm = served_model()
    prompts = [encoded(vlm.template, question) for question in questions]
    with ours(vlm) as address, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.gguf"
        write_base(path, base(), vlm.template.tokenizer, "llama", in_bf16=True)
        server = llama_cpp(path, rows)  # ends with the process
        runs: dict[str, Run] = {
            "mmpeft serve, eight LoRA": asked(address, chats(questions, FINETUNES, tokens), tokens),
            "mmpeft serve, base": asked(address, chats(questions, ["base"], tokens), tokens),
            LLAMA_CPP: asked(server.listening_address, completions(prompts, tokens), tokens),
            PEFT: by_peft(prompts, tokens),
        }
        title = f"{rows} requests of {tokens} tokens at once"
        yield Race(title, runs, (LLAMA_CPP, PEFT), "tokens/s", amount=rows * tokens)


def served_model() -> VisionLanguageModel:
    """The embedded language model, with eight LoRA finetunes."""
    model = build_model(LanguageConfig(), None).eval()
    check_language_model(model)  # how it is read
    for name in FINETUNES:
        model.bank.add(name, METHODS["LoRA q,v"][0])
    fill(model.bank, FINETUNES)
    template = Template(load_tokenizer(LanguageConfig().name), 1)
    return VisionLanguageModel(model, template, Manifest(asdict(LanguageConfig()), None, {}, {}))


@contextmanager
def ours(vlm: VisionLanguageModel) -> Iterator[str]:
    """The address of a server of it."""
    with endless(vlm.engine) as live:
        service, ready = Service(vlm, live, Limits(), Keys()), Queue[str]()
        server = make_server(service, "127.0.0.1", 0, ready.put)
        thread = Thread(target=server.run, daemon=True)
        thread.start()
        yield ready.get(timeout=60)
        server.should_exit = True
        thread.join()
        service.close()


def llama_cpp(path: Path, rows: int) -> Any:
    """llama.cpp's server with a row for every request, and as many threads as torch has."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.verbosity = rows, 256 * rows, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def encoded(template: Template, question: str) -> Encoded:
    """A question's prompt."""
    record: Any = {"id": "", "images": [], "turns": [(question, None)], "task": None, "where": "the question"}
    return template.encode_prompt(record)


def chats(questions: Sequence[str], models: Sequence[str], tokens: int) -> list[tuple[str, Any]]:
    """Path and body of requests to OpenAI's API; the models take turns."""
    path, how = "/v1/chat/completions", {"max_tokens": tokens}
    asked = ([{"role": "user", "content": question}] for question in questions)
    return [
        (path, {"model": models[n % len(models)], "messages": messages} | how)
        for n, messages in enumerate(asked)
    ]


def completions(prompts: Sequence[Encoded], tokens: int) -> list[tuple[str, Any]]:
    """The same to llama.cpp's own."""
    how = {"n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
    return [("/completion", {"prompt": prompt.ids} | how) for prompt in prompts]


def asked(address: str, requests: Sequence[tuple[str, Any]], tokens: int) -> Callable[[], None]:
    """Sends all at the same time, and waits for all answers, each of so many tokens."""

    def one(request: tuple[str, Any]) -> None:
        path, body = request
        head = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}{path}", json.dumps(body).encode(), head)) as answer:
            told = json.load(answer)
        written = told["usage"]["completion_tokens"] if "usage" in told else told["tokens_predicted"]
        assert written == tokens, f"an answer of {written} tokens"

    def run() -> None:
        with ThreadPoolExecutor(len(requests)) as clients:
            list(clients.map(one, requests))

    return run


def by_peft(prompts: Sequence[Encoded], tokens: int) -> Callable[[], None]:
    """Finetune after finetune, each its own prompts."""
    model: Any = peft_of(METHODS["LoRA q,v"][1], len(FINETUNES)).eval()
    count = len(FINETUNES)
    groups = [generated(model, list(prompts[number::count]), tokens) for number in range(count)]

    def run() -> None:
        for name, answer in zip(FINETUNES, groups, strict=True):
            model.set_adapter(name)
            answer()

    return run
