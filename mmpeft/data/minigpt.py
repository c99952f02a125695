"""MiniGPT-v2's layout of a conversation, and LLaVA's plain one. The only place that knows ``[INST]``.

``[INST] <Img>features</Img> [task] instruction [/INST] answer</s>``, further turns appended in the same form. The
markers are ordinary text, as in MiniGPT-v2, unless the tokenizer knows them as control tokens, as Mistral's do
``[INST]``: then they are these, without a space before them. A system turn is text before the first instruction:
``[INST] system <Img>features</Img> instruction [/INST]``. The time of a video's frame is text before it:
``[INST] <0.0 seconds> <Img>features</Img> <0.5 seconds> <Img>features</Img> instruction [/INST]``.

Source: MiniGPT-v2, section 3 and its ``minigpt_v2.py``; LLaVA, section 4.2 (the first stage).
"""

import re
from collections.abc import Iterator
from typing import Any

from mmpeft.data.records import IMAGE_MARKER
from mmpeft.data.spans import IMAGE_TOKEN, Layout, Span, times_said

MARKERS = re.compile(r"\[/?INST\]|</?Img>")
NAMES = ("[INST]", "[/INST]", "<Img>", "</Img>")


class MiniGPT(Layout):
    """Instructions about images."""

    def __init__(self, tokenizer: Any, control_markers: bool = True):
        super().__init__(tokenizer)
        known = {name: self.pieces.control(name) for name in NAMES} if control_markers else {}
        self.controls = {name: number for name, number in known.items() if number is not None}
        """Marker -> the control token that it is."""
        spelled = "|".join(re.escape(name) for name in self.controls)
        self._split = re.compile(f" ?({spelled})") if spelled else None
        self._begin = [] if tokenizer.bos_token_id is None else [Span("begin", [tokenizer.bos_token_id])]

    @property
    def settings(self) -> dict[str, Any]:
        return {"control_markers": bool(self.controls)}

    def spans(self, record: Any) -> list[Span]:
        spans: list[Span] = []
        times = times_said(record)
        for number, (question, answer) in enumerate(record["turns"]):
            spans += self._begin
            system = None if number else record.get("system")
            spans += self._question(question, record.get("task"), system, times)
            if answer is None:
                break
            spans += [Span("answer", self.answer(answer)), Span("end", self.end)]
        return spans

    def answer(self, text: str) -> list[int]:
        return self._text(text, "[/INST]" in self.controls)

    def _question(
        self, question: str, task: str | None, system: str | None, times: Iterator[str]
    ) -> list[Span]:
        first, *others = question.split(IMAGE_MARKER)
        spans: list[Span] = []
        opening, begins = "[INST]", True
        if system:
            spans.append(Span("marker", self._markers(opening, begins)))
            spans.append(Span("system", self._text(system, self._follows_control(spans))))
            opening, begins = "", False
        for text in [first, *(part for other in others for part in (IMAGE_MARKER, other))]:
            if text == IMAGE_MARKER:
                if time := next(times):
                    spans.append(Span("marker", self._markers(opening, begins)))
                    spans.append(Span("time", self._text(time, self._follows_control(spans))))
                    opening, begins = "", False
                marker = Span("marker", self._markers(f"{opening} <Img>", begins))
                spans += [marker, Span("image", [IMAGE_TOKEN])]
                opening, begins = "</Img>", True
            elif text.strip():
                spans.append(Span("marker", self._markers(opening, begins)))
                if task:
                    spans.append(Span("task", self._after(spans, f" [{task}]")))
                    task = None
                spans.append(Span("instruction", self._text(text, self._follows_control(spans))))
                opening, begins = "", False
        if task:  # nothing but images was asked
            spans.append(Span("marker", self._markers(opening, begins)))
            spans.append(Span("task", self._after(spans, f" [{task}]")))
            opening, begins = "", False
        spans.append(Span("marker", self._markers(f"{opening} [/INST]", begins)))
        return [span for span in spans if span.ids]

    def _markers(self, text: str, begins: bool) -> list[int]:
        """The layout's own text."""
        ids: list[int] = []
        for place, part in enumerate(self._split.split(text) if self._split else [text]):
            if place % 2:
                ids.append(self.controls[part])
            elif part:
                read = self.pieces.section if place else self.pieces.begin if begins else self.pieces.within
                ids += read(part)
        return ids

    def _follows_control(self, spans: list[Span]) -> bool:
        last = spans[-1]
        return last.kind == "marker" and last.ids[-1:] != [] and last.ids[-1] in self.controls.values()

    def _after(self, spans: list[Span], text: str) -> list[int]:
        return (self.pieces.section if self._follows_control(spans) else self.pieces.within)(text)

    def _text(self, text: str, after_control: bool) -> list[int]:
        """A user's text: never a control token, and never a marker of this layout."""
        return self.pieces.text(f" {text.strip()}", MARKERS, after_control)


class Plain(MiniGPT):
    """Features, then the answer: LLaVA's first stage, without what is asked or said before it, times included."""

    def __init__(self, tokenizer: Any, control_markers: bool = True):
        super().__init__(tokenizer, control_markers=False)

    def _question(
        self, question: str, task: str | None, system: str | None, times: Iterator[str]
    ) -> list[Span]:
        return [Span("image", [IMAGE_TOKEN]) for _ in range(question.count(IMAGE_MARKER))]
