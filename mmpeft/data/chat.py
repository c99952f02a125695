"""The chat layout: a model's own chat template around images and text, for instruct models that know it.

The template is rendered once with words of ours in place of questions and answers, and cut there::

    <|im_start|>user\\n  QUESTION  <|im_end|>\\n<|im_start|>assistant\\n  ANSWER  <|im_end|>\\n
    `------ own text ------´       `----------------- own text ---------------´         `- own text

Its own text has control tokens; the user's text that takes the places has none. An image stands in the user's turn on a
line of its own, the time of a video's frame on the line before. What the template writes before an answer is the
prompt, and its first control token after it the end. A system turn stands where the template puts it, in place of what
the template says by itself.

Source: transformers, ``apply_chat_template``; LLaVA for the line of the image.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from mmpeft.data.formats import DataError
from mmpeft.data.records import IMAGE_MARKER
from mmpeft.data.spans import IMAGE_TOKEN, Layout, Span, times_said
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json

CLOCK = (
    "{% macro strftime_now(form) %}{{ form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{% endmacro %}{{ '' }}"
)
"""The date that templates such as Llama 3.1's write: theirs where no clock is known, and the same in training and ever
after."""
BRACKETED = re.compile(r"[<\[]+[^\s<>\[\]]+[>\]]+")
"""Of a template's ordinary text, what marks something, such as Llama 2's ``<<SYS>>``."""
PROBE = ("What is it?", "It is red.")
SYSTEM = "Be brief."


class OwnText(NamedTuple):
    """What a template writes in one place."""

    before: str
    """Ordinary text, before the first control token."""
    ids: list[int]
    """From its first control token on."""
    spaces: str
    """At its end; they belong to the text that follows, since tokenizers join them with its first word."""


class Chat(Layout):
    """The layout of the tokenizer's own chat template.

    Raises:
        RefusedError: it has none, or one that does not write what it is given.
    """

    def __init__(self, tokenizer: Any, control_markers: bool = True):
        super().__init__(tokenizer)
        self._name = f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'}"
        if not tokenizer.chat_template:
            raise RefusedError(
                "data.template is chat, but the tokenizer has no chat template: it is not of an instruct model; "
                "set data.template to minigpt"
            )
        self.own_texts, self.goes_on = cache(self._own_texts), cache(self._goes_on)
        opening, answering, closing = self._rendered(1)
        bracketed = BRACKETED.findall(opening + answering + closing)
        own = [text for text in bracketed if self.pieces.control(text) is None]
        self._markers = re.compile("|".join(map(re.escape, own))) if own else None
        self.end = self._end(self.own_texts(1)[-1], closing)
        self._check_pieces()
        self.check_system = cache(self._check_system)

    @property
    def settings(self) -> dict[str, Any]:
        return {"chat_template": hash_json(self._rendered(1))}

    def spans(self, record: Any) -> list[Span]:
        self._check_turns(record)
        return self._spans(record)

    def answer(self, text: str) -> list[int]:
        return self._answer(self.own_texts(1)[1], text)

    def _spans(self, record: Any) -> list[Span]:
        turns, task, system = record["turns"], record.get("task"), record.get("system")
        own, times = self.own_texts(len(turns), bool(system)), times_said(record)
        spans = [Span("begin", [*self.pieces.begin(own[0].before), *own[0].ids])]
        if system:
            head, *own = own
            spans.append(Span("system", self._answer(head, system)))
            spans.append(Span("marker", self._closing(own[0])))
        for number, (question, answer) in enumerate(turns):
            opening, answering, closing = own[2 * number : 2 * number + 3]
            spans += self._question(opening, question, task, times)
            read = self.pieces.section if spans[-1].kind == "image" else self.pieces.within
            spans.append(Span("marker", [*read(answering.before), *answering.ids]))
            if answer is None:
                break
            spans += [Span("answer", self._answer(answering, answer)), Span("end", self.end)]
            if number + 1 < len(turns):
                spans.append(Span("marker", self._closing(closing)[len(self.end) :]))
        return [span for span in spans if span.ids]

    def _question(
        self, opening: OwnText, question: str, task: str | None, times: Iterator[str]
    ) -> list[Span]:
        first, *others = (text.strip() for text in question.split(IMAGE_MARKER))
        texts = [first, *others]
        asked = next((n for n, text in enumerate(texts) if text), len(others))
        spans: list[Span] = []
        lead, section = opening.spaces, self._ends_in_control(opening)
        for number, text in enumerate(texts):
            if number:
                spans.append(Span("image", [IMAGE_TOKEN]))
                lead, section = "\n", True
            words = [("task", f"[{task}]")] if task and number == asked else []
            words += [("instruction", text)] if text else []
            words += [("time", time)] if number < len(others) and (time := next(times)) else []
            for kind, word in words:
                spans.append(Span(kind, self.pieces.text(lead + word, self._markers, section)))  # pyright: ignore
                lead, section = " ", False
            if number < len(others):  # an image follows
                between = "\n" if words or number else lead
                spans.append(Span("marker", self.pieces.text(between, section=section)))
        return spans

    def _answer(self, answering: OwnText, text: str) -> list[int]:
        """A text that stands in a place of its own."""
        words = answering.spaces + text.strip()
        return self.pieces.text(words, self._markers, self._ends_in_control(answering))

    def _ends_in_control(self, own: OwnText) -> bool:
        return own.ids[-1:] != [] and own.ids[-1] in self.pieces.controls

    # -- what the template writes ----------------------------------------------------------------------------

    def _rendered(self, turns: int, system: bool = False) -> list[str]:
        """The template's own text before, between and after questions and answers of so many turns, and before these
        also a system turn."""
        messages = _messages(turns, "system" if system else None)
        places = [message["content"] for message in messages]
        text = self._render(messages)
        if [text.count(place) for place in places] != [1] * len(places):
            lost = [m["role"] for m in messages if text.count(m["content"]) != 1]
            raise RefusedError(
                f"{self._name} does not write what the {lost[0]} says once and as it is; set data.template to minigpt"
            )
        own = re.split("|".join(places), text)
        if re.findall("|".join(places), text) != places:
            raise RefusedError(f"{self._name} writes turns in another order; set data.template to minigpt")
        return own

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            source = self.tokenizer.get_chat_template()
            source = CLOCK + source if "strftime_now" in source else source
            return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=source)
        except Exception as error:  # a template is a program of the model's
            raise RefusedError(
                f"{self._name} refuses a conversation of {len(messages)} messages: {error}; "
                "set data.template to minigpt"
            ) from error

    def _own_texts(self, turns: int, system: bool = False) -> list[OwnText]:
        return [self._own_text(text) for text in self._rendered(turns, system)]

    def _own_text(self, text: str) -> OwnText:
        words = text.rstrip(" ")
        return OwnText(*self.pieces.template(words), text[len(words) :])

    def _end(self, closing: OwnText, text: str) -> list[int]:
        if not closing.ids:
            raise RefusedError(
                f"{self._name} ends an answer with {text!r}, which is no control token, so that text could end it too; "
                "set data.template to minigpt"
            )
        return [*self.pieces.within(closing.before), closing.ids[0]]

    # -- what must hold --------------------------------------------------------------------------------------

    def _check_turns(self, record: Any) -> None:
        """Every turn must be asked as it is written once it has passed: its answer is learnt there."""
        turns, system = len(record["turns"]), bool(record.get("system"))
        try:
            if system:
                self.check_system()
        except RefusedError as error:
            raise DataError(
                f"{record.get('where', 'a conversation')}: {record.get('id', '')!r} has a system turn, but {error}"
            ) from error
        if not all(self.goes_on(number, system) for number in range(2, turns + 1)):
            raise DataError(
                f"{record.get('where', 'a conversation')}: {record.get('id', '')!r} has {turns} turns, but "
                f"{self._name} writes an answer otherwise once another turn follows, so that it would be learnt as it "
                "is never asked: take records of one turn, or set data.template to minigpt"
            )

    def _goes_on(self, turns: int, system: bool) -> bool:
        """Whether so many turns begin with one fewer, and end the same."""
        whole, earlier = self.own_texts(turns, system), self.own_texts(turns - 1, system)
        return (
            whole[: len(earlier) - 1] == earlier[:-1]
            and self._closing(whole[-3])[: len(self.end)] == self.end
            and whole[-2] == self.own_texts(1)[1]
        )

    def _closing(self, own: OwnText) -> list[int]:
        return [*self.pieces.within(own.before), *own.ids]

    def _check_system(self) -> None:
        """A template that knows users and assistants alone may write a system turn as if one of them spoke."""
        written = self._render(_messages(1, "system"))
        for role in ("user", "assistant"):
            try:
                other = self._render(_messages(1, role))
            except RefusedError:
                continue  # it wants them in turns
            if other == written:
                raise RefusedError(f"{self._name} writes it as the {role}'s; set data.template to minigpt")
        self._check_pieces(SYSTEM)

    def _check_pieces(self, system: str | None = None) -> None:
        """The ids must be those of the text that the template writes, read as a whole."""
        said = [("system", system)] if system else []
        said += zip(("user", "assistant"), PROBE, strict=True)
        text = self._render([{"role": role, "content": content} for role, content in said])
        whole = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        own = {"turns": [PROBE]} | ({"system": system} if system else {})
        ids = [token for span in self._spans(own) for token in span.ids]
        if whole[: len(ids)] != ids:
            raise RefusedError(
                f"{self._name} and the tokenizer make other tokens of a conversation than of its pieces, between which "
                "images and answers are to stand; set data.template to minigpt"
            )


def _messages(turns: int, first: str | None = None) -> list[dict[str, str]]:
    """A conversation of words that stand for texts; before it one turn of another role."""
    said = [(first, "systemplace")] if first else []
    said += [
        (role, f"{kind}{number}place")
        for number in range(turns)
        for role, kind in (("user", "question"), ("assistant", "answer"))
    ]
    return [{"role": role, "content": content} for role, content in said]
