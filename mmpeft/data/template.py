"""The prompt template: record -> token ids and labels. The only place that knows ``[INST]``.

``[INST] <Img>features</Img> [task] instruction [/INST] answer</s>``, further turns appended in the same form. One
function serves training and inference, so the two cannot differ by a space. Only answers (and the end token that
follows each) carry loss.

Source: MiniGPT-v2, section 3 and its ``minigpt_v2.py``; the markers are ordinary text there, not added tokens.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mmpeft.data.readers import DataError
from mmpeft.data.records import IMAGE_MARKER, Record, place_of
from mmpeft.errors import RefusedError

IGNORE_INDEX = -100
"""Target of a position that carries no loss."""
IMAGE_TOKEN = -1
"""Stands in the ids for one image feature. No tokenizer can produce it, so no text can forge an image."""
MARKERS = re.compile(r"\[/?INST\]|</?Img>")


@dataclass
class Span:
    """A run of tokens of one kind, in the order in which the model reads them."""

    kind: Literal["begin", "marker", "image", "task", "instruction", "answer", "end"]
    ids: list[int]

    @property
    def has_loss(self) -> bool:
        return self.kind in ("answer", "end")


@dataclass
class Encoded:
    """One conversation as the model reads it."""

    ids: list[int]
    """Token ids, `IMAGE_TOKEN` at image features."""
    targets: list[int]
    """What each position must predict: the *next* token where that belongs to an answer, else `IGNORE_INDEX`."""
    images: list[Any] = field(default_factory=list)
    task: str | None = None
    truncated: bool = False

    @property
    def conversations(self) -> list["Encoded"]:
        return [self]


@dataclass
class ChoiceSet:
    """One question with the answers it may have, each as the model would read it."""

    conversations: list[Encoded]
    """The same prompt followed by every choice, in the record's order."""
    right: int | None
    """Which of them is right; None where nobody says."""

    @property
    def images(self) -> list[Any]:
        return self.conversations[0].images

    @property
    def task(self) -> str | None:
        return self.conversations[0].task

    truncated = False


Example = Encoded | ChoiceSet
"""What a row is made of: conversations, or one question with its choices."""


class Template:
    """Turns records into tokens for one tokenizer and one vision encoder.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        image_tokens: features per image after pooling.
        style: "instruct" as above; "plain" is ``features answer``, without instruction (LLaVA's first stage).
        max_length: longest conversation in tokens. A longer one is cut inside an answer, or loses whole turns when
            their answer would not begin; one that would lose its first answer is refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_tokens: int,
        style: Literal["instruct", "plain"] = "instruct",
        max_length: int = 1024,
    ):
        if tokenizer.eos_token_id is None:
            raise RefusedError(
                "the tokenizer has no end-of-sequence token, so answers could never end; set one"
            )
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.style = style
        self.max_length = max_length
        # SentencePiece tokenizers put a space before every piece by themselves; byte-level ones do not.
        self._space = "" if tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁") else " "
        self._begin = [] if tokenizer.bos_token_id is None else [Span("begin", [tokenizer.bos_token_id])]

    def encode(self, record: Record) -> Encoded:
        """A training example. Each position's target is the token after it; the last token is no input.

        Raises:
            DataError: no answer would carry loss.
        """
        tokens, loss = _flatten(self.spans(record))
        kept = min(len(tokens), self.max_length + 1)
        while kept and not loss[kept - 1]:  # a question without its answer teaches nothing
            kept -= 1
        targets = [t if on else IGNORE_INDEX for t, on in zip(tokens[1:kept], loss[1:kept], strict=True)]
        if all(target == IGNORE_INDEX for target in targets):
            raise DataError(
                f"{place_of(record)}: no token would carry loss: its first answer starts beyond "
                f"max_length = {self.max_length} of {len(tokens)} tokens, or it has none; raise max_length"
            )
        ids = tokens[: kept - 1]
        images = record["images"][: ids.count(IMAGE_TOKEN) // self.image_tokens]
        return Encoded(ids, targets, images, record.get("task"), truncated=kept < len(tokens))

    def encode_prompt(self, record: Record) -> Encoded:
        """What the model reads before it answers the record's last turn; that turn's answer is not looked at."""
        *earlier, (question, _) = record["turns"]
        tokens, _ = _flatten(self.spans({**record, "turns": [*earlier, (question, None)]}))
        if len(tokens) > self.max_length:
            raise DataError(
                f"{place_of(record)}: the prompt has {len(tokens)} tokens, more than "
                f"max_length = {self.max_length}; shorten it or raise max_length"
            )
        return Encoded(tokens, [IGNORE_INDEX] * len(tokens), record["images"], record.get("task"))

    def encode_answer(self, prompt: Encoded, answer: str) -> Encoded:
        """``prompt`` followed by a given answer, whose tokens are the targets."""
        tokens = [*self._text(answer), self.tokenizer.eos_token_id]
        ids = [*prompt.ids, *tokens[:-1]]
        return Encoded(ids, [*prompt.targets[:-1], *tokens], prompt.images, prompt.task)

    def encode_choices(self, record: Record) -> ChoiceSet:
        """The record's last question with each of its choices as the answer; earlier answers are context.

        Raises:
            DataError: there are no choices, or they do not fit into a row of max_length with their prompt.
        """
        choices = record.get("choices", [])
        if not choices:
            raise DataError(f"{place_of(record)} has no choices to rank; add them")
        prompt = self.encode_prompt(record)
        conversations = [self.encode_answer(prompt, choice) for choice in choices]
        shared = len(prompt.ids) - 1
        tokens = shared + sum(len(conversation.ids) - shared for conversation in conversations)
        if tokens > self.max_length:
            raise DataError(
                f"{place_of(record)} with its {len(conversations)} choices has {tokens} tokens, more "
                f"than max_length = {self.max_length}; raise max_length"
            )
        answer = record["turns"][-1][1]
        trimmed = [choice.strip() for choice in choices]
        return ChoiceSet(conversations, None if answer is None else trimmed.index(answer.strip()))

    def decode(self, ids: list[int]) -> str:
        """An answer's text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def spans(self, record: Record) -> list[Span]:
        """The whole conversation, run by run; an answer of None ends it (the model is to write it)."""
        spans: list[Span] = []
        for question, answer in record["turns"]:
            spans += self._begin
            spans += self._question(question, record.get("task"))
            if answer is None:
                break
            spans += [Span("answer", self._text(answer)), Span("end", [self.tokenizer.eos_token_id])]
        return spans

    def _question(self, question: str, task: str | None) -> list[Span]:
        if self.style == "plain":
            return [self._image() for _ in range(question.count(IMAGE_MARKER))]
        first, *others = question.split(IMAGE_MARKER)
        spans, opening = [], "[INST]"
        for text in [first, *(part for other in others for part in (IMAGE_MARKER, other))]:
            if text == IMAGE_MARKER:
                spans += [Span("marker", self._ids(self._after(opening, "<Img>"))), self._image()]
                opening = "</Img>"
            elif text.strip():
                spans.append(Span("marker", self._ids(opening)))
                if task:
                    spans.append(Span("task", self._ids(f"{self._space}[{task}]")))
                    task = None
                spans.append(Span("instruction", self._text(text)))
                opening = ""
        if task:  # nothing but images was asked
            spans += [Span("marker", self._ids(opening)), Span("task", self._ids(f"{self._space}[{task}]"))]
            opening = ""
        closing = self._ids(self._after(opening, "[/INST]"))
        return [span for span in [*spans, Span("marker", closing)] if span.ids]

    def _after(self, opening: str, marker: str) -> str:
        return f"{opening} {marker}" if opening else f"{self._space}{marker}"

    def _image(self) -> Span:
        return Span("image", [IMAGE_TOKEN] * self.image_tokens)

    def _text(self, text: str) -> list[int]:
        """A user's text: never a control token, and never a marker of this template.

        Markers are ordinary text, so their spelling in a question would otherwise give the same ids as ours;
        such a spelling is tokenised letter by letter, which reads the same and has other ids.
        """
        ids: list[int] = []
        start, text = 0, self._space + text.strip()
        for match in MARKERS.finditer(text):
            ids += self._ids(text[start : match.start()])
            ids += [token for letter in match.group() for token in self._ids(letter)]
            start = match.end()
        return ids + self._ids(text[start:])

    def _ids(self, text: str) -> list[int]:
        return (
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if text
            else []
        )


def _flatten(spans: list[Span]) -> tuple[list[int], list[bool]]:
    tokens = [token for span in spans for token in span.ids]
    return tokens, [span.has_loss for span in spans for _ in span.ids]
