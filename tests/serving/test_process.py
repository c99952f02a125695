"""`mmpeft serve` as a process: what docs/serving.md says, SIGTERM, kill -9, and what is refused before it listens."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from mmpeft.cli import main
from tests.serving.conftest import content

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

PAPER = Path("docs/serving.md").read_text()
SHELL = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAPER, re.S)
    for line in block.splitlines()
    if line.strip()
]


@contextmanager
def serving(run: Path, *options: str):
    """The process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from mmpeft.cli import main; main()", "serve", "--run", str(run), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert process.stderr is not None
    try:
        told = []
        for line in process.stderr:
            told.append(line)
            if found := re.search(r"serving at (\S+)/v1", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("".join(told))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def long_question(stream: bool) -> dict:
    messages = [{"role": "user", "content": "name a color"}]
    how = {"temperature": 2.0, "seed": 5, "max_tokens": 300, "stream": stream}
    return {"model": "base", "messages": messages} | how


def test_sigterm_takes_no_more_in_answers_what_is_under_way_and_ends_with_0(tiny_run):
    with serving(tiny_run, "--port", "0") as (process, address):
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=long_question(True), timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{address}/health")
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(30) == 0


def test_what_does_not_end_in_time_is_cancelled(tiny_run):
    with serving(tiny_run, "--port", "0", "--limits.drain_seconds", "1") as (process, address):
        url = httpx.URL(address)
        idle = socket.create_connection((url.host, url.port))
        body = b'{"model": "base", "messages": [], "max_tokens": 1}'
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        idle.sendall(head)  # and no body
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        idle.close()


@pytest.mark.slow
def test_killed_and_started_again_at_the_same_port_it_answers_the_same(tiny_run):
    answers = []
    port = "0"
    for _ in range(2):
        with serving(tiny_run, "--port", port) as (process, address):
            port = str(httpx.URL(address).port)
            body = long_question(False) | {"max_tokens": 8}
            answers.append(
                httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()["choices"]
            )
            process.kill()
            assert process.wait(10) == -signal.SIGKILL
    assert answers[0] == answers[1]


def processes() -> dict[int, int]:
    """Those that run -> who has started them."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent, *_ = path.read_text().rsplit(")", 1)[1].split()
            if state != "Z":  # nobody may have asked how it ended
                found[int(path.parent.name)] = int(parent)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for in /proc")
def test_killed_it_leaves_no_process_behind(tiny_run, tmp_path):
    unseen = tmp_path / "unseen.png"
    Image.new("RGB", (9, 7), (1, 2, 3)).save(unseen)
    with serving(tiny_run, "--port", "0") as (process, address):
        message = {"role": "user", "content": content("what?", unseen)}
        body = {"model": "base", "messages": [message], "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).status_code == 200
        started = {number for number, parent in processes().items() if parent == process.pid}
        assert started, "images are decoded in processes of their own"
        process.kill()
        process.wait(10)
        end = time.monotonic() + 10
        while running := started & processes().keys():
            assert time.monotonic() < end, f"{running} go on"
            time.sleep(0.05)


def test_more_finetunes_are_named_by_their_folders(tiny_run, folders):
    with serving(tiny_run, "--port", "0", "--adapters", str(folders["ia3-a"]), str(folders["lora-b"])) as (
        _,
        address,
    ):
        listed = httpx.get(f"{address}/v1/models").json()["data"]
        assert [own["id"] for own in listed] == ["base", "default", "ia3-a", "lora-b"]


def test_what_the_paper_says_runs(tiny_run, pictures, tmp_path):
    """The commands to a server as they stand there, with its port; tests/test_readme.py runs the others."""
    (serve, *others) = SHELL
    commands = [command for command in others if not command.startswith(("mmpeft ", "python "))]
    assert shlex.split(serve)[:2] == ["mmpeft", "serve"]
    assert sum(command.startswith("curl ") for command in commands) >= 5
    (tmp_path / "a.png").write_bytes(pictures[0].read_bytes())
    with serving(tiny_run, "--port", "0") as (_, address):
        for command in commands:
            command = command.replace("http://127.0.0.1:8000", address).replace("curl ", "curl -sS --fail ")
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True, text=True
            )
            assert "error" not in done.stdout
            assert done.stdout.startswith('{"') == ("curl" in command)


REFUSED = [
    (["--host", "0.0.0.0"], "open to others, and there are no keys"),
    (["--keys", "gone.yaml"], "no such file of keys"),
    (["--adapters", "nowhere"], "no adapter_config.json is there"),
    (["--limits.images", "0"], "limits.images is 0; it must be above 0"),
    (["--limits.imagse", "1"], "limits.imagse"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[case[0][0] for case in REFUSED])
def test_what_cannot_be_served_is_refused_before_it_listens(tiny_run, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--run", str(tiny_run), "--port", "0", *options])
    assert ended.value.code not in (0, None)
    assert message in f"{ended.value.code}{capsys.readouterr().err}"


def test_two_finetunes_of_one_name_are_refused(tiny_run):
    with pytest.raises(SystemExit, match="there is a finetune 'default' already"):
        main(["serve", "--run", str(tiny_run), "--port", "0", "--adapters", str(tiny_run)])
