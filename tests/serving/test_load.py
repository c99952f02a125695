"""Many clients, and bad ones: each gets its own answer, and none harms the others."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress

import httpx
import pytest

from mmpeft.inference.live_settings import LiveSettings
from mmpeft.serving.limits import Limits
from tests.serving.conftest import METHODS, QUESTION, error_of, image_part, running

LIMITS = Limits(
    body_mb=0.5,
    images=3,
    new_tokens=400,
    image_pixels=10_000,
    header_seconds=1,
    body_seconds=1,
    request_seconds=8,
    send_seconds=1,
)


@pytest.fixture(scope="module")
def strict(tiny_run):
    """A server of narrow limits: one row, and four places to wait."""
    with running(tiny_run, LIMITS, engine=LiveSettings(max_rows=1, max_waiting=4)) as server:
        yield server


def until(condition, seconds: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def statistics(served) -> dict[str, float]:
    return served.service.live.statistics()


def is_idle(served) -> bool:
    numbers = statistics(served)
    return not numbers["waiting"] and not numbers["running"]


def connect(served) -> socket.socket:
    url = httpx.URL(served.address)
    return socket.create_connection((url.host, url.port), timeout=20)


def raw(body: dict, length: int | None = None) -> bytes:
    """The bytes of a request, whose header may say another length."""
    data = json.dumps(body).encode()
    length = len(data) if length is None else length
    lines = ["Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + data


LONG = 400


def long_question(stream: bool = True, tokens: int = LONG) -> dict:
    """One whose answer the tiny model never ends by itself."""
    messages = [{"role": "user", "content": "name a color"}]
    return {"model": "base", "messages": messages, "max_tokens": tokens, "stream": stream}


def test_a_long_answer_is_long(strict):
    """What the tests of clients that vanish stand on."""
    usage = strict.client.post("/v1/chat/completions", json=long_question(False)).json()["usage"]
    assert usage["completion_tokens"] == LONG


def test_32_clients_over_8_finetunes_get_what_each_gets_alone(served, alone, pictures):
    names = [*METHODS, "base", "default"]
    asked = [(pictures[n % 5] if n % 3 else None, names[n % len(names)], n) for n in range(64)]
    wanted = {
        (image, name): alone.ask(image, QUESTION, name, 6, answer_by="generate") for image, name, _ in asked
    }

    def ask(item):
        image, name, number = item
        if number % 2:
            return served.text(QUESTION, image, model=name)
        answer = served.chat(QUESTION, image, model=name, stream=True)
        pieces = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and "[DONE]" not in line]
        return "".join(c["delta"].get("content", "") for piece in pieces for c in piece["choices"])

    with ThreadPoolExecutor(32) as clients:
        found = list(clients.map(ask, asked))
    assert found == [wanted[image, name] for image, name, _ in asked]
    assert len(set(found)) > 8


def test_overload_is_told_and_what_was_taken_in_is_answered(strict):
    alone = strict.client.post("/v1/chat/completions", json=long_question(False, 30))
    wanted = alone.json()["choices"][0]["message"]["content"]

    def ask(_):
        with httpx.Client(base_url=strict.address, timeout=60) as client:
            return client.post("/v1/chat/completions", json=long_question(False, 30))

    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(ask, range(50)))
    admitted = [answer for answer in answers if answer.status_code == 200]
    told = [answer for answer in answers if answer.status_code == 429]
    assert len(admitted) + len(told) == 50
    assert admitted
    assert told
    assert {answer.json()["choices"][0]["message"]["content"] for answer in admitted} == {wanted}
    for answer in told:
        assert int(answer.headers["Retry-After"]) >= 1
        assert error_of(answer)["type"] == "rate_limit_error"
    assert until(lambda: is_idle(strict))
    assert strict.client.post("/v1/chat/completions", json=long_question(False, 3)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_row(strict, stream):
    before = statistics(strict)["tokens"]
    client = connect(strict)
    client.sendall(raw(long_question(stream)))
    assert until(lambda: statistics(strict)["running"] == 1)
    if stream:
        client.recv(500)
    client.close()
    assert until(lambda: is_idle(strict))
    assert statistics(strict)["tokens"] - before < LONG
    assert 'status="499"' in strict.client.get("/metrics").text


def test_a_client_that_waits_and_vanishes_frees_its_place(strict):
    before = statistics(strict)["tokens"]
    first = connect(strict)
    first.sendall(raw(long_question()))
    assert until(lambda: statistics(strict)["running"] == 1)
    waiting = [connect(strict) for _ in range(2)]
    for each in waiting:
        each.sendall(raw(long_question(False)))
    assert until(lambda: statistics(strict)["waiting"] == 2)
    for each in waiting:
        each.close()
    assert until(lambda: statistics(strict)["waiting"] == 0)
    first.close()
    assert until(lambda: is_idle(strict))
    assert statistics(strict)["tokens"] - before < 2 * LONG


def test_a_slow_reader_never_holds_the_batch_up(strict):
    """It reads nothing; its row goes on to its end, and others are answered meanwhile."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    url = httpx.URL(strict.address)
    slow.connect((url.host, url.port))
    slow.sendall(raw(long_question() | {"logprobs": True, "top_logprobs": 20}))
    assert until(lambda: statistics(strict)["running"] == 1)
    assert until(lambda: is_idle(strict))
    assert strict.text(max_tokens=3) is not None
    slow.close()


def test_a_reader_that_reads_no_more_loses_its_stream_and_its_answers():
    from mmpeft.serving.stream import EventStream

    given_up, sent = [], []

    async def events():
        yield "one"
        yield "two"

    async def receive():
        await asyncio.Event().wait()

    async def send(event):
        sent.append(event)
        if event.get("body"):
            await asyncio.Event().wait()  # its buffers are full

    async def run():
        stack = AsyncExitStack()
        stack.callback(given_up.append, True)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(EventStream(events(), stack, 0.05)(scope, receive, send), 20)

    asyncio.run(run())
    assert given_up == [True]
    assert [event.get("body") for event in sent] == [None, b"data: one\n\n"]


def closed_within(client: socket.socket, seconds: float) -> bool:
    """Whether the server closes a connection."""
    client.settimeout(seconds)
    try:
        while client.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_a_silent_client_is_let_go(strict):
    with connect(strict) as client:
        assert closed_within(client, 10)


def test_headers_that_trickle_are_not_waited_for(strict):
    with connect(strict) as client:
        start = time.monotonic()
        for byte in b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100:
            try:
                client.sendall(bytes([byte]))
            except ConnectionError:
                break
            time.sleep(0.05)
        assert time.monotonic() - start < 5.5
        assert closed_within(client, 5)


def test_a_body_that_trickles_is_told_408(strict):
    with connect(strict) as client:
        client.sendall(raw(long_question())[:-10])
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_body_is_bounded_by_what_it_says_and_by_what_comes(strict):
    large = {"model": "base", "messages": [{"role": "user", "content": "x" * 600_000}]}
    answer = strict.client.post("/v1/chat/completions", json=large)
    assert answer.status_code == 413
    error_of(answer)
    chunks = (b"x" * 10_000 for _ in range(100))  # no Content-Length
    with suppress(httpx.WriteError):  # it closed the connection while more came
        assert strict.client.post("/v1/chat/completions", content=chunks).status_code == 413
    with connect(strict) as client:
        client.sendall(raw({}, 99_999_999_999))
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_pixels_and_images_are_bounded(strict, pictures):
    from tests.serving.test_chat_requests import png

    for parts, param in (
        ([image_part(png(101, 100))], "messages[0].content[0].image_url.url"),
        ([image_part(pictures[0])] * 4, "messages[0].content[3]"),
    ):
        answer = strict.client.post(
            "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": parts}]}
        )
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param


def test_an_answer_that_takes_too_long_is_told(tiny_run):
    with running(tiny_run, Limits(request_seconds=0.05, new_tokens=400)) as served:
        answer = served.client.post("/v1/chat/completions", json=long_question(False))
        assert answer.status_code == 504
        assert error_of(answer)["code"] == "timeout"
        assert until(lambda: is_idle(served))


def test_what_is_waited_for_before_the_engine_counts_too(tiny_run, pictures, monkeypatch):
    with running(tiny_run, Limits(request_seconds=0.2)) as served:
        monkeypatch.setattr(served.service.images, "prepare", lambda _: time.sleep(1))
        answer = served.chat(QUESTION, pictures[0])
        assert answer.status_code == 504
        assert error_of(answer)["code"] == "timeout"


def test_what_never_has_a_place_is_not_told_to_come_again(strict):
    """One row and four places to wait, of which a finetune may have half: three answers, and no fourth."""
    assert strict.chat(n=3).status_code == 200
    answer = strict.chat(n=4)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "n"
    questions = {str(n): {"type": "noul", "instructions": f"is it {n}?"} for n in range(5)}
    body = {"model": "base", "state": "a", "questions": questions}
    assert len(strict.client.post("/v1/systemone", json=body).json()["answers"]) == 5


def test_long_texts_and_lists_are_refused_before_anything_is_made_of_them(served, monkeypatch):
    def unexpected(*_):
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(served.service.template, "encode_prompt", unexpected)
    long, asked = "x" * 100_001, [{"role": "user", "content": QUESTION}]
    question = {"type": "noul", "instructions": "is it?"}
    for path, body, param in (
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "system", "content": long}, *asked]}, "messages"),
        ("chat/completions", {"messages": asked * 1001}, "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1001}]},
            None,
        ),
        ("score", {"messages": asked, "choices": ["a", long]}, "messages"),
        ("systemone", {"state": long, "questions": {"a": question}}, "state"),
        ("systemone", {"state": ["a"], "questions": {"a": question | {"instructions": long}}}, "questions.a"),
        ("systemone", {"state": ["a"], "questions": {str(n): question for n in range(1001)}}, "questions"),
    ):
        answer = served.client.post(f"/v1/{path}", json={"model": "base"} | body)
        assert answer.status_code == 400, path
        assert error_of(answer)["param"] == (param or "messages[0].content")


def test_a_finetune_full_of_nan_fails_alone(served, alone, poison):
    """Its request is the server's failure, its neighbours are answered as ever; sampled or not."""
    bank = served.service.vlm.model.bank
    name = next(name for name in bank.names if name.startswith("beside-b"))
    kept = {key: tensor.clone() for key, tensor in bank.tensors(name).items()}
    wanted = alone.ask(None, QUESTION, "ia3-a", 6, answer_by="generate")
    poison(bank, name)
    try:
        for temperature in (0, 1):
            with ThreadPoolExecutor(4) as clients:
                bad = [
                    clients.submit(served.chat, model="beside-b", temperature=temperature) for _ in range(2)
                ]
                good = [clients.submit(served.text, model="ia3-a") for _ in range(2)]
            assert {answer.result().status_code for answer in bad} == {500}
            assert {error_of(answer.result())["code"] for answer in bad} == {"model_failed"}
            assert {answer.result() for answer in good} == {wanted}
    finally:
        bank.fill(name, kept)
    assert served.text(model="beside-b") == alone.ask(None, QUESTION, "beside-b", 6, answer_by="generate")


def test_a_step_that_fails_fails_its_requests_and_no_others(served, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault")

    with monkeypatch.context() as patched:
        patched.setattr(served.service.vlm.model, "logits", fail)
        answer = served.chat()
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "model_failed"
        assert served.client.get("/health").status_code == 503
    assert served.client.get("/health").status_code == 200, "though nobody has asked since"
    assert served.text() is not None
    assert threading.active_count() < 100
