"""Conversations as tokens of a language model: how long they are, what is cut, and what the model will read."""

from collections import Counter

from rich.text import Text

from mmpeft.data.formats import DataError
from mmpeft.data.image_tokens import ImageTokens
from mmpeft.data.preferred import Sides, check_sides
from mmpeft.data.records import Record, place_of
from mmpeft.data.template import LayoutName, Template
from mmpeft.models.language import load_tokenizer, positions_of
from mmpeft.tools.data_facts import spread

BARS, WIDTH = 10, 32
"""Lines of the histogram, and the characters of its longest bar."""


class TokenSurvey:
    """Counts the tokens of conversations, image features included; needs the model's tokenizer and config alone.

    They are counted as the plan of a training counts them: a question that has choices is a row with all of them.

    Args:
        language: hub id or local folder.
        layout: data.template.
        max_length: data.packing.max_length.
        image_tokens: features per image, or what tells those of one.
        ranks: whether a training learns from wrong choices, too; else a question with choices is one with its answer.
            `Sides` are what every row must have.

    Raises:
        RefusedError: no such model, or its tokenizer does not fit the template.
    """

    def __init__(
        self,
        language: str,
        layout: LayoutName,
        max_length: int,
        image_tokens: ImageTokens,
        ranks: bool | Sides = True,
    ):
        self.template = Template(load_tokenizer(language), image_tokens, layout, max_length)
        self.language, self.positions = language, positions_of(language)
        self.ranks: bool | Sides = ranks
        self.start()

    def start(self) -> None:
        """Counts from zero, for another data set."""
        self.lengths: Counter[int] = Counter()
        self.ranked = self.cut = self.beyond = 0

    def add(self, record: Record) -> str | None:
        """Counts a conversation, whose images can be read; what is wrong where none of its answers can be learnt."""
        try:
            length, last = self.length(record)
        except DataError as error:  # of an image whose shape decides its tokens
            return str(error)
        self.lengths[length] += 1
        self.ranked += bool(self.ranks) and "choices" in record
        self.beyond += self.positions is not None and last > self.positions
        if length <= self.template.max_length:
            return None
        problem = self.problem(record, length)
        self.cut += problem is None
        return problem

    def length(self, record: Record) -> tuple[int, int]:
        """Tokens that the model reads of a whole conversation, which are all but the last of each answer, and how many
        positions they take: choices stand beside each other, at the same ones.

        Raises:
            DataError: an image or what a training needs is not there.
        """
        if not isinstance(self.ranks, bool):
            check_sides(record, self.ranks)
        *earlier, (question, answer) = record["turns"]
        spans = self.template.spans({**record, "turns": [*earlier, (question, None)]})
        prompt = sum(len(span.ids) for span in spans) - 1
        layout = self.template.layout
        said = record["choices"] if self.ranks and "choices" in record else [answer or ""]
        answers = [len(layout.answer(own)) + len(layout.end) for own in said]
        return prompt + sum(answers), prompt + max(answers)

    def problem(self, record: Record, length: int | None = None) -> str | None:
        """Why a conversation cannot be learnt, if so."""
        try:
            if (self.length(record)[0] if length is None else length) <= self.template.max_length:
                return None
            ranked = self.ranks and "choices" in record
            (self.template.encode_choices if ranked else self.template.encode)(record)
        except DataError as error:
            return str(error)
        return None

    def lines(self) -> list[tuple[str, str]]:
        """Of the table."""
        beyond = (
            [(f"beyond the model's {self.positions:,} positions", f"{self.beyond:,}")]
            if self.positions
            else []
        )
        tokens = self.template.image_tokens
        each = f"{tokens:,} an image" if isinstance(tokens, int) else "an image's by its shape"
        return [
            (f"tokens, {each}", spread(self.lengths)),
            *([("of them with all choices in one row", f"{self.ranked:,}")] if self.ranked else []),
            (f"cut at max_length {self.template.max_length:,}", f"{self.cut:,}"),
            *beyond,
        ]

    def warnings(self) -> list[str]:
        """What training would do to conversations that are too long."""
        told = []
        if self.cut:
            told.append(
                f"{self.cut:,} conversations are longer than max_length {self.template.max_length:,} and would be cut; "
                "raise data.packing.max_length"
            )
        if self.beyond:
            told.append(
                f"{self.beyond:,} conversations are longer than the {self.positions:,} positions of {self.language}; "
                f"keep data.packing.max_length at {self.positions:,} or below, or take another model"
            )
        return told

    def histogram(self) -> list[str]:
        """Lengths in bins of equal width, a line each."""
        if not self.lengths:
            return []
        first, last = min(self.lengths), max(self.lengths)
        width = max(1, -(-(last + 1 - first) // BARS))
        bins: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bins[(length - first) // width] += count
        most, digits = max(bins.values()), len(f"{last:,}")
        return [
            f"{first + number * width:>{digits},} to {first + (number + 1) * width - 1:>{digits},} tokens "
            f"{'█' * -(-WIDTH * bins[number] // most):<{WIDTH}} {bins[number]:,}"
            for number in range(max(bins) + 1)
        ]

    def shown(self, record: Record) -> Text:
        """A conversation as the model reads it; what carries loss is bold."""
        text = Text(f"{place_of(record)}: ", style="dim")
        for span in self.template.spans(record):
            if span.kind == "image":
                text.append(f"<{len(span.ids)} image features>", "magenta")
            else:
                text.append(
                    self.template.tokenizer.decode(span.ids), "bold green" if span.has_loss else "default"
                )
        return text
