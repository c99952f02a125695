"""The prompt template: record -> token ids and labels, in one of three layouts.

::

    minigpt   [INST] <Img>features</Img> [task] instruction [/INST] answer</s>
    chat      what the model's own chat template writes, with the features in the user's turn
    plain     features answer</s>

One function serves training and inference, so the two cannot differ by a space. Only answers (and the end token that
follows each) carry loss.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat
from typing import Any, Literal

from mmpeft.data.chat import Chat
from mmpeft.data.formats import DataError
from mmpeft.data.image_tokens import ImageTokens
from mmpeft.data.images import ImageError
from mmpeft.data.minigpt import MiniGPT, Plain
from mmpeft.data.records import Record, place_of
from mmpeft.data.spans import IMAGE_TOKEN as IMAGE_TOKEN
from mmpeft.data.spans import Layout, Span
from mmpeft.errors import RefusedError

IGNORE_INDEX = -100
"""Target of a position that carries no loss."""
NONE_RIGHT = -1
LayoutName = Literal["minigpt", "chat", "plain"]
LAYOUTS: dict[LayoutName, type[Layout]] = {"minigpt": MiniGPT, "chat": Chat, "plain": Plain}
STYLES: dict[str, LayoutName] = {"instruct": "minigpt", "plain": "plain"}
"""What layouts were called as long as there were two."""


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
    image_tokens: list[int] | None = None
    """Of each image; None where all have as many."""

    @property
    def conversations(self) -> list["Encoded"]:
        return [self]

    def images_in(self, stop: int) -> int:
        """How many images lie within the first ``stop`` positions; none ends behind them."""
        tokens = self.ids[:stop].count(IMAGE_TOKEN)
        if self.image_tokens is None:
            return tokens // (self.ids.count(IMAGE_TOKEN) // len(self.images)) if self.images else 0
        return bisect_right(list(accumulate(self.image_tokens)), tokens)


@dataclass
class ChoiceSet:
    """One question with the answers it may have, each as the model would read it."""

    conversations: list[Encoded]
    """The same prompt followed by every choice, in the record's order."""
    right: int | None
    """Which of them is right, `NONE_RIGHT` where none is; None where nobody says."""

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
        image_tokens: features per image after pooling, or what tells those of one.
        layout: by its name, or one made already for this tokenizer.
        max_length: longest conversation in tokens. A longer one is cut inside an answer, or loses whole turns when
            their answer would not begin; one that would lose its first answer is refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_tokens: ImageTokens,
        layout: LayoutName | Layout = "minigpt",
        max_length: int = 1024,
    ):
        self.layout = layout if isinstance(layout, Layout) else LAYOUTS[layout](tokenizer)
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.max_length = max_length

    @property
    def settings(self) -> dict[str, Any]:
        """What a run must remember to read the same; `layout_of` reads it."""
        name = next(name for name, kind in LAYOUTS.items() if kind is type(self.layout))
        return {"layout": name, "max_length": self.max_length, **self.layout.settings}

    def encode(self, record: Record) -> Encoded:
        """A training example. Each position's target is the token after it; the last token is no input.

        Raises:
            DataError: no answer would carry loss.
        """
        spans = self.spans(record)
        tokens, loss = _flatten(spans)
        kept = min(len(tokens), self.max_length + 1)
        while kept and not loss[kept - 1]:  # a question without its answer teaches nothing
            kept -= 1
        targets = [t if on else IGNORE_INDEX for t, on in zip(tokens[1:kept], loss[1:kept], strict=True)]
        if targets.count(IGNORE_INDEX) == len(targets):
            raise DataError(
                f"{place_of(record)}: no token would carry loss: its first answer starts beyond "
                f"max_length = {self.max_length} of {len(tokens)} tokens, or it has none; raise max_length"
            )
        ids = tokens[: kept - 1]
        encoded = Encoded(ids, targets, record["images"], record.get("task"), kept < len(tokens))
        return self._with_images(encoded, spans)

    def encode_prompt(self, record: Record) -> Encoded:
        """What the model reads before it answers the record's last turn; that turn's answer is not looked at."""
        *earlier, (question, _) = record["turns"]
        spans = self.spans({**record, "turns": [*earlier, (question, None)]})
        tokens, _ = _flatten(spans)
        if len(tokens) > self.max_length:
            raise DataError(
                f"{place_of(record)}: the prompt has {len(tokens)} tokens, more than "
                f"max_length = {self.max_length}; shorten it or raise max_length"
            )
        encoded = Encoded(tokens, [IGNORE_INDEX] * len(tokens), record["images"], record.get("task"))
        return self._with_images(encoded, spans)

    def encode_answer(self, prompt: Encoded, answer: str, ends: bool = True) -> Encoded:
        """``prompt`` followed by a given answer, whose tokens are the targets; with its end unless it was cut."""
        own = self.layout.answer(answer)
        tokens = [*own, *(self.layout.end if ends or not own else ())]
        ids = [*prompt.ids, *tokens[:-1]]
        return replace(prompt, ids=ids, targets=[*prompt.targets[:-1], *tokens])

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
        """The whole conversation, run by run; an answer of None ends it (the model is to write it).

        Raises:
            DataError: an image cannot be read whose shape decides how many tokens it has.
        """
        tokens = self._tokens_of_images(record)
        return [
            Span(s.kind, s.ids * next(tokens)) if s.kind == "image" else s for s in self.layout.spans(record)
        ]

    def _tokens_of_images(self, record: Record) -> Iterator[int]:
        if isinstance(self.image_tokens, int):
            return repeat(self.image_tokens)
        try:
            return iter([self.image_tokens(image) for image in record["images"]])
        except ImageError as error:
            raise DataError(f"{place_of(record)}: {error}") from error

    def _with_images(self, encoded: Encoded, spans: list[Span]) -> Encoded:
        """With those of a record's images that lie in it."""
        if not isinstance(self.image_tokens, int):
            encoded.image_tokens = [len(span.ids) for span in spans if span.kind == "image"]
            num = encoded.images_in(len(encoded.ids))
            encoded.image_tokens = encoded.image_tokens[:num]
        else:
            num = encoded.ids.count(IMAGE_TOKEN) // self.image_tokens
        encoded.images = encoded.images[:num]
        return encoded


def current_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`Template.settings` of a run, as runs of before wrote them too: these spelled every marker."""
    if "style" not in settings:
        return settings
    layout = STYLES[settings["style"]]
    return {"layout": layout, "max_length": settings["max_length"], "control_markers": False}


def layout_of(tokenizer: Any, settings: dict[str, Any], where: str) -> Layout:
    """The layout of a run, from its `Template.settings`.

    Raises:
        RefusedError: the settings are damaged, or the tokenizer's chat template is another one now.
    """
    told = current_settings(settings)
    if told.get("layout") not in LAYOUTS or not isinstance(told.get("max_length"), int):
        raise RefusedError(
            f"{where} has the template {told}; wanted a layout of {', '.join(LAYOUTS)} and a max_length"
        )
    layout = LAYOUTS[told["layout"]](tokenizer, told.get("control_markers", True))
    if any(layout.settings[key] != told.get(key) for key in layout.settings):
        raise RefusedError(
            f"{where} was trained with another chat template than the tokenizer has now; put the old one back"
        )
    return layout


def _flatten(spans: list[Span]) -> tuple[list[int], list[bool]]:
    tokens = [token for span in spans for token in span.ids]
    return tokens, [loss for span in spans for loss in [span.has_loss] * len(span.ids)]
