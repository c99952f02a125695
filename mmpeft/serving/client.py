"""A client of OpenAI-compatible servers: asks one question, streamed or ranked. It needs Python's own HTTP alone."""

import base64
import json
import mimetypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from mmpeft.data.records import IMAGE_MARKER
from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.runs.layout import RUN

SECONDS = 600
"""Without a byte, after which a server is given up."""
LONGEST_BODY = 10_000
"""Characters that are read of an error's body."""
Images = str | Path | Sequence[str | Path] | None
"""Files of what one question is about: one, several, or none."""
History = Sequence[tuple[str, str]]
"""The earlier (question, answer) pairs of a conversation, to the first of which the images belong."""


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would take the key along, and a question without its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Server:
    """A server by its address, such as http://127.0.0.1:8000, with or without ``/v1``."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RefusedError(
                f"the server is {self.url!r}; wanted its address, such as http://127.0.0.1:8000 of `mmpeft serve`"
            )
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self._opener = build_opener(_NoRedirect)

    def models(self) -> list[str]:
        """The finetunes that may be asked, and after them the base."""
        listed = self._json("/v1/models").get("data")
        if not isinstance(listed, list) or not all(
            isinstance(own, dict) and isinstance(own.get("id"), str) for own in listed
        ):
            raise RefusedError(
                f"{self.url}/v1/models lists no models as OpenAI's API does; name another server"
            )
        if not listed:
            raise RefusedError(f"{self.url} lists no model that may be asked; its log or its keys say why")
        return [own["id"] for own in sorted(listed, key=lambda own: not own.get("parent"))]

    def choose(self, model: str | None) -> str:
        """The model of this name, which the server checks; of None the first that it lists."""
        return self.models()[0] if model is None else model

    def write(
        self,
        question: str,
        image: Images,
        model: str,
        max_new_tokens: int | None = None,
        history: History = (),
    ) -> Iterator[str]:
        """The answer, piece by piece, as the server writes it; greedy.

        Raises:
            RefusedError: the server refuses or fails, also in the middle of the answer, or cannot be reached.
        """
        body = _conversation(question, image, model, history) | {"stream": True, "temperature": 0}
        body |= {} if max_new_tokens is None else {"max_completion_tokens": max_new_tokens}
        ended = False
        with self._open("/v1/chat/completions", body) as answer:
            for line in answer:
                if not line.startswith(b"data:") or (event := line[5:].strip()) == b"[DONE]":
                    continue
                told = self._read(event)
                if "error" in told:
                    raise RefusedError(f"{self.url} ended its answer: {_message(told)}")
                for choice in told.get("choices") or ():
                    ended = ended or choice.get("finish_reason") is not None
                    if piece := (choice.get("delta") or {}).get("content"):
                        yield piece
        if not ended:
            raise RefusedError(f"{self.url} broke off in the middle of its answer; ask again, or see its log")

    def rank(
        self, question: str, image: Images, model: str, choices: Sequence[str], history: History = ()
    ) -> list[tuple[str, float]]:
        """Choices and scores, the best first, as `VisionLanguageModel.rank` gives them; of `mmpeft serve` alone."""
        body = _conversation(question, image, model, history) | {"choices": [*choices]}
        told = self._json("/v1/score", body)
        try:
            scores = [(str(own["choice"]), float(own["score"])) for own in told["data"]]
        except (KeyError, TypeError, ValueError):
            raise RefusedError(
                f"{self.url}/v1/score answers otherwise than `mmpeft serve` does; without choices it writes"
            ) from None
        return sorted(scores, key=lambda pair: -pair[1])

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._open(path, body) as answer:
            return self._read(answer.read())

    def _read(self, content: bytes) -> dict[str, Any]:
        try:
            told = json.loads(content)
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise RefusedError(
                f"{self.url} answers no JSON object, as OpenAI's API does, but {content[:80]!r}"
            )
        return told

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None) -> Iterator[Any]:
        headers = {"Content-Type": "application/json"}
        headers |= {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        content = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(Request(f"{self.url}{path}", content, headers), timeout=SECONDS) as answer:
                yield answer
        except HTTPError as error:
            raise RefusedError(f"{self.url}{path}: {_refusal(error)}") from None
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise RefusedError(
                f"{self.url} cannot be reached, or broke off ({reason}); is `mmpeft serve` running there?"
            ) from None


def named_server(url: str | None, api_key: str | None, run: str) -> Server | None:
    """The server that a command names in place of a run, if it does.

    Raises:
        RefusedError: both are named, a key without a server, or what is no address.
    """
    if url is None:
        if api_key is not None:
            raise RefusedError("--api_key is a server's, and there is no --server; leave it out, or name one")
        return None
    if run != RUN:
        raise RefusedError(f"--server {url} and --run {run} both say whom to ask; leave one of them out")
    return Server(url, api_key)


def _conversation(question: str, image: Images, model: str, history: History) -> dict[str, Any]:
    """The body: of one question, or of one with what was said before it."""
    first, *later = [*(text for turn in history for text in turn), question]
    body = _asked(first, image, model)
    roles = ("assistant", "user") * len(history)
    body["messages"] += [{"role": role, "content": text} for role, text in zip(roles, later, strict=True)]
    return body


def _asked(question: str, image: Images, model: str) -> dict[str, Any]:
    files = [] if image is None else [image] if isinstance(image, str | Path) else [*image]
    content = _parts(question, files) if files else question
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def _parts(question: str, files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Raises:
    RefusedError: there is not one marker for each of the files.
    """
    markers = question.count(IMAGE_MARKER)
    if markers and markers != len(files):
        raise RefusedError(f"the question has {markers} {IMAGE_MARKER} but {len(files)} images were given")
    urls = [{"type": "image_url", "image_url": {"url": _data_url(Path(file))}} for file in files]
    return [
        urls[part] if isinstance(part, int) else {"type": "text", "text": part}
        for part in in_order(question, len(files))
    ]


def in_order(text: str, images: int) -> list[str | int]:
    """A text and the numbers of its images: where ``<image>`` stands in it, or before it."""
    first, *others = text.split(IMAGE_MARKER)
    if not others:
        return [*range(images), text]
    pairs = zip_longest(range(images), others, fillvalue="")
    return [part for part in (first, *(own for pair in pairs for own in pair)) if part != ""]


def _data_url(image: Path) -> str:
    """The file as it is; servers look at the bytes, and want a type that begins with image."""
    if not image.is_file():
        raise MissingFileError(f"the image '{image}' does not exist")
    return f"data:{media_type(image)};base64,{base64.b64encode(image.read_bytes()).decode()}"


def media_type(image: Path) -> str:
    """Which type a server is told, by the file's name; it begins with image."""
    kind, ending = mimetypes.guess_type(image)[0] or "", image.suffix[1:].lower()
    # a name is anybody's: nothing of it may be read by JSON, a URL or a shell
    known = ending.isascii() and ending.isalnum()
    return kind if kind.startswith("image/") else f"image/{ending if known else 'png'}"


def _refusal(error: HTTPError) -> str:
    """The server's own words, and what to do where the status says."""
    if 300 <= error.code < 400:
        return f"the server redirects to {error.headers.get('Location')}; name that address"
    content = error.read(LONGEST_BODY)
    try:
        told = _message(json.loads(content))
    except ValueError:
        told = content.decode("utf-8", "replace").strip()[:300]
    hint = {401: "; --api_key gives one", 429: "; ask again later"}.get(error.code, "")
    return f"the server answers {error.code}, {told or error.reason}{hint}"


def _message(told: Any) -> str:
    """Of OpenAI's error body, or the whole body of another."""
    error = told.get("error", told) if isinstance(told, dict) else told
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
