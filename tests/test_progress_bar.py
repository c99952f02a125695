"""A bar where somebody watches; a log file gets lines."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from mmpeft.progress_bar import in_words, progress_bar


@pytest.fixture
def seconds(monkeypatch):
    """A clock that a test moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("mmpeft.progress_bar.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_gets_a_line_every_ten_seconds_and_the_end(seconds, capsys):
    with progress_bar("encoding images", "image", 2000, 1000) as update:
        for _ in range(10):
            seconds.now += 4
            update(100)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "encoding images: 1,300 of 2,000 images, 25.0 images/s, 28 s left",
        "encoding images: 1,600 of 2,000 images, 25.0 images/s, 16 s left",
        "encoding images: 1,900 of 2,000 images, 25.0 images/s, 4 s left",
        "encoding images: 2,000 of 2,000 images, 25.0 images/s",
    ]


def test_lengths_of_time():
    assert [in_words(own) for own in (4, 89, 90, 5000, 11_100)] == [
        "4 s",
        "89 s",
        "2 min",
        "83 min",
        "3 h 5 min",
    ]


def test_what_is_done_in_a_moment_is_not_told_to_a_log(seconds, capsys):
    with progress_bar("encoding images", "image", 3) as update:
        update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("encoding images", "image", 4, 2) as update:
        update(2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "encoding images: 100%" in shown
    assert " 4/4 " in shown
