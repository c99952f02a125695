"""Code that the demo's page gives to copy: it runs, and asks what the page asked."""

import json
import os
import shutil
import subprocess

import pytest

import mmpeft
from mmpeft.demo.snippets import Question, curl_of, python_of_run, python_of_server
from tests.serving.conftest import running

QUESTION = "what color is it?"
HARD = "is $HOME `id` \\n \"it\" 'red'? $(id) ${x} \\\\ é END"
HISTORY = [(QUESTION, "red"), (HARD, HARD)]


@pytest.fixture(scope="module")
def vlm(tiny_run):
    return mmpeft.load(str(tiny_run), "cpu")


@pytest.fixture
def here(tiny_data, tmp_path, monkeypatch):
    """A folder with two pictures, one of a hard name."""
    for name, source in (("it's a $(red) one.png", "red0.png"), ("blue.png", "blue0.png")):
        shutil.copy(tiny_data / "images" / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return ["it's a $(red) one.png", "blue.png"]


def run(code: str, capsys) -> str:
    exec(compile(code, "copied", "exec"), {"mmpeft": mmpeft})
    return capsys.readouterr().out


def questions_about(images) -> list[Question]:
    return [
        Question(images[:1], QUESTION, "default", [], []),
        Question(images, HARD, "base", [], []),
        Question(images, "is <image> as <image>?", "base", [], []),
        Question([], HARD, "default", ["red", "it's $blue"], []),
        Question(images[:1], "sure?", "default", [], HISTORY),
    ]


def test_python_asks_the_run_the_same(tiny_run, vlm, here, capsys):
    for own in questions_about(here):
        image = tuple(own.images) or None
        expected = vlm.ask(image, own.text, own.model, choices=own.choices or None, history=own.history)
        assert run(python_of_run(str(tiny_run), [own]), capsys) == f"{expected}\n"


def test_those_who_were_asked_the_same_are_asked_in_one_batch(tiny_run, vlm, here, capsys):
    both = [Question(here[:1], QUESTION, name, [], []) for name in ("default", "base")]
    code = python_of_run(str(tiny_run), both)
    assert code.count("vlm.ask(") == 1
    assert run(code, capsys) == f"{vlm.ask(here[0], QUESTION, ['default', 'base'])}\n"
    both[1].choices = ["red", "blue"]
    assert python_of_run(str(tiny_run), both).count("vlm.ask(") == 2


def shell(code: str, curl: str, tmp_path) -> str:
    """What a shell prints in which ``curl`` is this script."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "curl").write_text(f"#!/bin/sh\n{curl}\n")
    (tmp_path / "bin" / "curl").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
    )
    return done.stdout


def test_curl_and_python_ask_a_server_the_same(tiny_run, vlm, here, tmp_path, capsys):
    with running(tiny_run) as served:
        for own in questions_about(here):
            image = tuple(own.images) or None
            how = {"choices": own.choices} if own.choices else {"answer_by": "generate"}
            expected = vlm.ask(image, own.text, own.model, history=own.history, **how)
            code = curl_of(own, served.address)
            body = json.loads(shell(code, "cat", tmp_path))
            answer = served.client.post(shell(code, 'echo "$1"', tmp_path).strip(), json=body)
            assert answer.status_code == 200, answer.text
            if own.choices:
                best = max(answer.json()["data"], key=lambda each: each["score"])["choice"]
            else:
                best = answer.json()["choices"][0]["message"]["content"]
            assert best == expected
            assert run(python_of_server(served.address, [own]), capsys) == f"{expected}\n"


def test_a_key_is_named_and_not_told(tmp_path):
    code = curl_of(Question([], QUESTION, "default", [], []), has_key=True)
    assert '-H "Authorization: Bearer $MMPEFT_API_KEY"' in code


def test_what_a_server_would_ask_otherwise_is_no_command():
    code = curl_of(Question([], "Describe this image.", "default", [], [], task="caption"))
    assert code.startswith("# ")
    assert "\n" not in code
