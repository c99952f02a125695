"""`mmpeft ask --server`: a served run answers as the run itself, and what goes wrong there is told in a line."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.serving.client import Server, media_type
from tests.serving.conftest import QUESTION, running


@pytest.mark.parametrize("ending", ["$(touch pwned)", 'p"g', "\\n", " png", "`id`", "ünï", "heic;x"])
def test_a_name_says_nothing_but_a_type(ending):
    """It is anybody's, and stands in JSON, a URL, and a shell's here-document."""
    assert media_type(Path(f"photo.{ending}")) == "image/png"
    assert media_type(Path("photo.HEIC")) == "image/heic"


@pytest.fixture
def fake():
    """A server that answers every request with a status, headers and the lines of a body; what it was sent."""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        status, headers_sent, body = 200, {}, b""

        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            sent.append((self.path, dict(self.headers), json.loads(content or b"{}")))
            self.send_response(self.status)
            for name, value in self.headers_sent.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(self.body)

        do_GET = do_POST  # noqa: N815 http.server's name

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()

    def answering(body=b"", status=200, **headers):
        Handler.status, Handler.headers_sent = status, headers
        Handler.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Server(f"http://127.0.0.1:{server.server_port}", "sk-secret-of-mine"), sent

    yield answering
    server.shutdown()
    server.server_close()


def asked(served, *words):
    main(["ask", QUESTION, "--server", served.address, *words])


@pytest.mark.parametrize("model", ["default", "ia3-a", "base"])
def test_the_answer_is_the_runs(served, alone, pictures, capsys, model):
    for image in (pictures[0], None):
        asked(
            served, "--adapter", model, "--max_new_tokens", "6", *(["--image", str(image)] if image else [])
        )
        answer = alone.ask(image, QUESTION, model, max_new_tokens=6, answer_by="generate")
        assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.parametrize("question", [QUESTION, "is <image> like <image>?"])
def test_several_images_stand_where_the_runs_do(served, alone, pictures, capsys, question):
    words = [word for image in pictures[:2] for word in ("--image", str(image))]
    main(["ask", question, "--server", served.address, *words, "--max_new_tokens", "6"])
    answer = alone.ask(tuple(pictures[:2]), question, max_new_tokens=6, answer_by="generate")
    assert capsys.readouterr().out == f"{answer}\n"
    with pytest.raises(SystemExit, match="the question has 1 <image> but 2 images were given"):
        main(["ask", "<image>what?", "--server", served.address, *words])


def test_choices_are_ranked(served, alone, pictures, capsys):
    choices = ["red", "green", "blue"]
    asked(served, "--choices", ",".join(choices), "--image", str(pictures[0]), "--adapter", "lora-a")
    ranking = alone.rank(pictures[0], QUESTION, choices, "lora-a")
    assert capsys.readouterr().out == f"{ranking[0][0]}\n"
    got = Server(f"{served.address}/v1/").rank(QUESTION, pictures[0], "lora-a", choices)
    assert [choice for choice, _ in got] == [choice for choice, _ in ranking]
    assert [score for _, score in got] == pytest.approx([score for _, score in ranking], abs=1e-5)


def test_the_first_finetune_is_asked_by_default(served):
    assert Server(served.address).choose(None) == "default"
    assert Server(served.address).models()[-1] == "base"


def test_pieces_come_as_they_are_written(served, pictures):
    pieces = list(Server(served.address).write(QUESTION, pictures[1], "lora-a", 12))
    assert len(pieces) > 1
    assert "".join(pieces) == served.text(QUESTION, pictures[1], model="lora-a", max_tokens=12)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--adapter", "nobody"], "the server answers 404, The model 'nobody' does not exist"),
        (["--adapter", "default", "--max_new_tokens", "5000"], "answers 400, .* at most 1024"),
        (["--answer_by", "rank"], "--answer_by rank needs --choices"),
        (["--choices", "red,blue", "--answer_by", "generate"], "leave one of them out"),
        (["--image", "gone.png"], "the image 'gone.png' does not exist"),
        (["--run", "runs/mine"], "both say whom to ask"),
    ],
)
def test_what_cannot_be_asked_is_told(served, words, told):
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        asked(served, *words)


def test_a_key_is_sent_and_its_lack_told(tiny_run, tmp_path):
    from mmpeft.serving.keys import read_keys

    file = tmp_path / "keys.yaml"
    file.write_text("tenants:\n  alice: {key: sk-alice-77c2e0aa11, finetunes: [base]}\n")
    with running(tiny_run, keys=read_keys(str(file))) as served:
        assert Server(served.address, "sk-alice-77c2e0aa11").models() == ["base"]
        with pytest.raises(RefusedError, match=r"answers 401, .*; --api_key gives one"):
            Server(served.address).models()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("127.0.0.1:8000", "wanted its address, such as http://127.0.0.1:8000"),
        ("file:///etc/passwd", "wanted its address"),
        ("http://127.0.0.1:9", "cannot be reached"),
    ],
)
def test_an_address_without_server_is_told(url, told):
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        main(["ask", "what?", "--server", url])


def test_a_key_without_server_is_refused():
    with pytest.raises(SystemExit, match="--api_key is a server's"):
        main(["ask", "what?", "--api_key", "sk"])


def chunk(content=None, finish=None):
    event = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def test_other_servers_are_read(fake):
    """Comments, chunks without choices, and no [DONE], as servers send them."""
    body = (
        b": keep-alive\n\n"
        + chunk("")
        + chunk("re")
        + b'data: {"choices": []}\n\n'
        + chunk("d")
        + chunk(finish="stop")
    )
    server, sent = fake(body)
    assert "".join(server.write("what?", None, "m", 5)) == "red"
    path, headers, asked = sent[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret-of-mine"
    assert asked == {
        "model": "m",
        "messages": [{"role": "user", "content": "what?"}],
        "stream": True,
        "temperature": 0,
        "max_completion_tokens": 5,
    }


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (chunk("re"), "broke off in the middle of its answer"),
        (chunk("re") + b'data: {"error": {"message": "out of time"}}\n\n', "ended its answer: out of time"),
        (chunk("re") + b"data: what\n\n", "answers no JSON object"),
    ],
)
def test_an_answer_that_does_not_end_is_told_after_its_text(fake, body, told):
    server, _ = fake(body)
    answer = server.write("what?", None, "m")
    assert next(answer) == "re"
    with pytest.raises(RefusedError, match=told):
        next(answer)


def test_errors_of_other_servers_are_told(fake):
    for body, told in (
        ({"error": "busy"}, "429, busy; ask again later"),
        (b"<html>no</html>", "429, <html>no</html>"),
    ):
        server, _ = fake(body, 429)
        with pytest.raises(RefusedError, match=told):
            server.models()
    for body in ([], {"data": "m"}, {"data": []}, b"<html>"):
        with pytest.raises(RefusedError, match=r"lists no model|answers no JSON object"):
            fake(body)[0].models()
    with pytest.raises(RefusedError, match="answers otherwise than `mmpeft serve`"):
        fake({"data": [{}]})[0].rank("what?", None, "m", ["a", "b"])


def test_a_key_is_not_taken_to_where_a_server_redirects(fake):
    server, sent = fake(status=302, Location="http://127.0.0.1:9/v1/models")
    with pytest.raises(
        RefusedError, match=r"redirects to http://127\.0\.0\.1:9/v1/models; name that address"
    ):
        server.models()
    assert len(sent) == 1
    assert "sk-secret" not in repr(server)
