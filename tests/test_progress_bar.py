"""A bar where somebody watches; a log file gets lines."""

import io
import sys
from types import SimpleNamespace

import pytest

from mmpeft.progress_bar import progress_bar


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
        f"encoding images: {done} of 2,000 images" for done in ("1,300", "1,600", "1,900", "2,000")
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
    assert "encoding images: 100%" in terminal.getvalue()
    assert " 4/4 " in terminal.getvalue()
