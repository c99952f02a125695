"""Pages of the tiny run that are open, and gradio's client, which asks them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(source: Any) -> Iterator[str]:
    """The address of a source's page."""
    from mmpeft.demo.page import LAUNCH, build

    blocks = build(source)
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LAUNCH)
    try:
        yield url
    finally:
        blocks.close()


def asking(*images: Path, **changes: Any) -> tuple[Any, ...]:
    """What `/answer` takes."""
    from gradio_client import handle_file

    asked = {
        "task": "Question",
        "question": "what color is it?",
        "finetunes": ["default"],
        "choices": "",
        "remember": False,
        "heat_map": False,
        "frames": 8,
    }
    kinds = ["video" if image.suffix == ".mp4" else "image" for image in images]
    files = [
        {kind: handle_file(str(image)), "caption": None} for kind, image in zip(kinds, images, strict=True)
    ]
    return files, *(asked | changes).values()


@pytest.fixture(scope="module")
def source(tiny_run) -> Iterator[Any]:
    from mmpeft.demo.of_runs import OfRuns

    with OfRuns([tiny_run], "cpu") as runs:
        yield runs


@pytest.fixture(scope="module")
def address(source) -> Iterator[str]:
    with opened(source) as url:
        yield url


@pytest.fixture
def page(address) -> Any:
    """A client of the page, which has asked nothing yet."""
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture
def ask(page) -> Callable[..., list[dict[str, Any]]]:
    """Asks the page; the answers of all finetunes."""
    return lambda *images, **changes: page.predict(*asking(*images, **changes), api_name="/answer")[0]


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A video of a second, from dark to light."""
    pytest.importorskip("av")
    from tests.data.layouts.writing import clip

    path = tmp_path_factory.mktemp("videos") / "my clip.mp4"
    path.write_bytes(clip())
    return path


@pytest.fixture(scope="session")
def red(tiny_data) -> Path:
    return tiny_data / "images" / "red0.png"


@pytest.fixture(scope="session")
def blue(tiny_data) -> Path:
    return tiny_data / "images" / "blue0.png"
