"""The board: a conversation as HTML, the answers of a turn side by side, choices as bars. Whatever was typed or written
stays text."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from mmpeft.demo.asked import Answer, Turn
from mmpeft.metrics.calibration import softmax

SHOWN_CHOICES, SHOWN_FACTS = 8, 12
"""More are behind a click."""
TEMPLATE = str.maketrans({character: f"&#{ord(character)};" for character in "{}$`\\@"})
"""What gradio's own templates would read."""


def text(value: object) -> str:
    """Any text, as HTML that shows it."""
    return html.escape(str(value)).translate(TEMPLATE)


def board(turns: Sequence[Turn]) -> str:
    """All turns, the newest first."""
    return "".join(_turn(number, turn) for number, turn in reversed([*enumerate(turns, 1)]))


def facts_table(facts: Mapping[str, str]) -> str:
    """Names and values, a row each."""
    rows = [
        f"<tr><td>{text(name.replace('_', ' '))}</td><td>{text(value)}</td></tr>"
        for name, value in facts.items()
    ]
    tables = [f"<table>{''.join(own)}</table>" for own in (rows[:SHOWN_FACTS], rows[SHOWN_FACTS:]) if own]
    return tables[0] + "".join(_behind(len(rows) - SHOWN_FACTS, own) for own in tables[1:])


def stored(answer: Answer) -> dict[str, Any]:
    """An answer as API clients get it."""
    return {name: value for name, value in vars(answer).items() if name != "done"}


def _turn(number: int, turn: Turn) -> str:
    truth = "" if turn.truth is None else f'<span class="truth">truth: {text(turn.truth)}</span>'
    cards = "".join(map(_card, turn.answers))
    asked = (
        f'<div class="asked"><span class="number">{number}</span><b>{text(turn.question)}</b>{truth}</div>'
    )
    return f'<section class="turn">{asked}<div class="cards">{cards}</div></section>'


def _card(answer: Answer) -> str:
    state = "done" if answer.done else "writing"
    head = f"<header><b>{text(answer.finetune)}</b><span>{answer.seconds:.2f} s</span></header>"
    body = f'<p class="text">{text(answer.text)}</p>'
    if answer.error is not None:
        state, body = "refused", body + f'<p class="error">{text(answer.error)}</p>'
    remarks = "".join(f'<p class="remark">{text(remark)}</p>' for remark in answer.remarks)
    maps = _maps(answer)
    return f'<article class="card {state}">{head}{body}{_bars(answer.ranking)}{maps}{remarks}</article>'


def _maps(answer: Answer) -> str:
    if not answer.heat_maps:
        return ""
    figures = [
        f'<figure><img alt="heat map" src="{own}"><figcaption>{text(title)}</figcaption></figure>'
        for own, title in zip(answer.heat_maps, answer.heat_map_titles, strict=True)
    ]
    return f'<div class="maps">{"".join(figures)}</div>'


def _bars(ranking: Sequence[tuple[str, float]]) -> str:
    """Shares of the choices: the softmax of their scores, which is what calibration measures."""
    if not ranking:
        return ""
    shares = softmax([score for _, score in ranking])
    bars = [_bar(choice, score, share) for (choice, score), share in zip(ranking, shares, strict=True)]
    rest = bars[SHOWN_CHOICES:]
    more = _behind(len(rest), "".join(rest)) if rest else ""
    return f'<div class="bars">{"".join(bars[:SHOWN_CHOICES])}{more}</div>'


def _bar(choice: str, score: float, share: float) -> str:
    return (
        f'<div class="bar" title="score {score:.4f}: mean log-probability of its tokens">'
        f'<span class="choice">{text(choice)}</span>'
        f'<span class="track"><i style="width:{share:.1%}"></i></span><span class="share">{share:.1%}</span></div>'
    )


def _behind(number: int, content: str) -> str:
    return f"<details><summary>{number} more</summary>{content}</details>"
