"""Real servers on loopback: uvicorn in a thread, the tiny run, and eight finetunes of four methods on disk."""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING

import httpx
import pytest

import mmpeft
from mmpeft.adapters import AdapterConfig, BitFitConfig, BottleneckConfig, IA3Config, LoraConfig
from mmpeft.adapters.peft_format import save_adapter
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings

if TYPE_CHECKING:
    from mmpeft.serving.keys import Keys
    from mmpeft.serving.limits import Limits
    from mmpeft.serving.service import Service

QUESTION = "what color is it?"
METHODS: dict[str, AdapterConfig] = {
    "lora-a": LoraConfig(rank=4, target_modules=["q_proj", "v_proj"]),
    "lora-b": LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]),
    "ia3-a": IA3Config(),
    "ia3-b": IA3Config(),
    "bias-a": BitFitConfig(),
    "bias-b": BitFitConfig(),
    "beside-a": BottleneckConfig(width=4),
    "beside-b": BottleneckConfig(width=6),
}


@dataclass
class Served:
    """A server that is running."""

    address: str
    service: "Service"
    client: httpx.Client

    def chat(self, question=QUESTION, image: Path | None = None, model="default", **fields) -> httpx.Response:
        """One chat completion of few tokens."""
        messages = [{"role": "user", "content": content(question, image)}]
        body = {"model": model, "messages": messages, "max_tokens": 6} | fields
        return self.client.post("/v1/chat/completions", json=body)

    def text(self, *asked, **fields) -> str:
        """Its answer."""
        answer = self.chat(*asked, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]


def data_url(image: Path | bytes) -> str:
    data = image if isinstance(image, bytes) else image.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_part(image: Path | bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def content(question: str, *images: Path | None):
    """The content of a user's message."""
    parts = [image_part(image) for image in images if image is not None]
    return [*parts, {"type": "text", "text": question}] if parts else question


def error_of(answer: httpx.Response) -> dict:
    """OpenAI's error body, which must be whole."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@contextmanager
def running(
    run: Path, limits: "Limits | None" = None, keys: "Keys | None" = None, engine: LiveSettings | None = None
) -> Iterator[Served]:
    """A server of a run; stopped as SIGTERM stops one."""
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from mmpeft.serving.keys import Keys
    from mmpeft.serving.limits import Limits
    from mmpeft.serving.server import make_server
    from mmpeft.serving.service import Service

    vlm = mmpeft.load(str(run), device="cpu")
    with LiveEngine(vlm.engine, engine or LiveSettings()) as live:
        service = Service(vlm, live, limits or Limits(), keys or Keys())
        ready: Queue[str] = Queue()
        server = make_server(service, "127.0.0.1", 0, ready.put)
        thread = Thread(target=server.run, daemon=True)
        thread.start()
        address = ready.get(timeout=60)
        try:
            with httpx.Client(base_url=address, timeout=120) as client:
                yield Served(address, service, client)
        finally:
            server.should_exit = True
            thread.join(60)
            service.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def make_folders(tiny_run, randomise) -> Callable[[Path, dict[str, AdapterConfig]], dict[str, Path]]:
    """Writes finetunes that change much as folders in PEFT's format; by name."""

    def make(folder: Path, configs: dict[str, AdapterConfig], change: bool = True) -> dict[str, Path]:
        bank = mmpeft.load(str(tiny_run), device="cpu").model.bank
        for name, config in configs.items():
            bank.add(name, config)
            if change:
                randomise(bank, name)
            save_adapter(bank, name, folder / name, "tiny")
        return {name: folder / name for name in configs}

    return make


@pytest.fixture(scope="session")
def folders(make_folders, tmp_path_factory) -> dict[str, Path]:
    """`METHODS` on disk."""
    return make_folders(tmp_path_factory.mktemp("finetunes"), METHODS)


@pytest.fixture(scope="package")
def served(tiny_run, folders) -> Iterator[Served]:
    """A server of the tiny run and all finetunes, without keys."""
    with running(tiny_run) as server:
        for name, folder in folders.items():
            server.service.live.load(name, folder)
        yield server


@pytest.fixture(scope="package")
def alone(tiny_run, folders):
    """The same finetunes in a model of their own, asked without a server: what answers must equal."""
    from mmpeft.adapters.peft_format import load_adapter

    vlm = mmpeft.load(str(tiny_run), device="cpu")
    for name, folder in folders.items():
        load_adapter(vlm.model.bank, name, folder)
    return vlm


@pytest.fixture(scope="session")
def pictures(tiny_data) -> list[Path]:
    """The tiny data's images."""
    return sorted((tiny_data / "images").glob("*.png"))
