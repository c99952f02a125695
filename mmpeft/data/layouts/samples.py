"""Rows -> samples: the layout is recognised by its keys, and every key must have been understood in the end."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mmpeft.data.formats import DataError
from mmpeft.data.image_names import is_image_name
from mmpeft.data.layouts.answers import (
    most_frequent,
    one_of,
    read_answer,
    read_people,
    refuse_several_right,
    starting_with,
)
from mmpeft.data.layouts.bookkeeping import take_bookkeeping
from mmpeft.data.layouts.choices import Choices, take_choices, take_right_choice
from mmpeft.data.layouts.columns import Columns, UnknownKeysError
from mmpeft.data.layouts.conversations import read_turns, split_system
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.image_root import ImageRoot
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.layouts.pictures import read_images, take_images
from mmpeft.data.layouts.preferences import take_label, take_preferred
from mmpeft.data.layouts.published import as_published, take_published
from mmpeft.data.layouts.questions import SHAPES, asks, lists_captions, take_turns
from mmpeft.data.layouts.several import each_question
from mmpeft.data.layouts.tags import Turn, read_tags, refuse_tags
from mmpeft.data.layouts.values import as_text, from_json, is_empty, short
from mmpeft.data.layouts.videos import place_videos, take_times, take_videos
from mmpeft.data.video import VIDEO_MARKER


@dataclass
class Sample:
    """What a row means; whether that makes a conversation is for `records.py` to say."""

    turns: list[Turn]
    """As written, the system's not among them."""
    images: list[str | bytes]
    """Absolute paths, or encoded bytes."""
    times: list[float | None] | None = None
    """When each is shown, in seconds, where one of them is a frame of a video."""
    system: str | None = None
    choices: list[str] | None = None
    references: list[str] = field(default_factory=list)
    """All right answers to the last question, where several people's are listed."""
    are_captions: bool = False
    """Whether these are the captions that the row lists in the place of one."""
    desirable: bool | None = None
    """KTO's label of the answer."""
    task: Any = None
    id: Any = None
    id_of_image: bool = False
    """Whether other rows may have the same id, since it is an image's or a conversation's."""


class RowReader:
    """Reads rows of one data set.

    Args:
        root: resolves image names.
        columns: the user's own mapping.
        required: whether the last question must have an answer.
        each_caption: whether each of several captions of a row is a sample of its own; else they are references of one.
        notes: is told what was left aside.
        labelled: whether an answer that is labelled as a wrong one is learnt from.
    """

    def __init__(
        self,
        root: ImageRoot,
        columns: Columns,
        required: bool,
        each_caption: bool,
        notes: Notes,
        labelled: bool = False,
    ):
        self.root, self.columns, self.required, self.notes = root, columns, required, notes
        self.each_caption, self.labelled = each_caption, labelled
        self._left_out = frozenset((*columns.ignored, *columns.mapping.values()))
        self._as_text = {key for key in columns.ignored if key.startswith(("<", "[", "!["))}

    def read(self, row: Any) -> Iterator[Sample]:
        """The samples of a row: one, or several of a packed row (Qwen-VL: a list of rows), of several questions or
        captions.

        Raises:
            DataError: the row is not understood, or not all of it.
        """
        if isinstance(row, DataError):
            raise row
        if isinstance(row, list) and row and all(isinstance(own, dict) for own in row):
            turns = all("role" in own or "from" in own for own in row)
            for own in [{"conversations": row}] if turns else row:
                yield from self._each_caption(self._sample(own))
            return
        if not isinstance(row, dict):
            raise DataError(f"found a {type(row).__name__}; wanted an object: {SHAPES}")
        rows = each_question(row, self._left_out)
        for own in rows:
            sample = self._sample(own)
            sample.id_of_image |= len(rows) > 1
            yield from self._each_caption(sample)

    def _each_caption(self, sample: Sample) -> list[Sample]:
        """A sample, or in its place one for each of its captions."""
        if not sample.are_captions:
            return [sample]
        self.notes.captioned += 1
        self.notes.captions += len(sample.references)
        if not self.each_caption:
            return [sample]
        said = [[*sample.turns[:-1], ("assistant", text)] for text in sample.references]
        return [replace(sample, turns=turns, references=[], id_of_image=True) for turns in said]

    def _sample(self, row: dict[str, Any]) -> Sample:
        fields = Fields(as_published(self.columns.apply(row, self.notes)), row)
        aside, captions = take_published(fields), lists_captions(fields)
        videos = take_videos(fields, self.root, self.notes) if fields.has("video") else []
        images, named = take_images(fields, self.root)
        asked = asks(fields)
        turns, inline, choices, references, label = self._answered(fields, bool(images or videos), asked)
        left_alone = {*self._as_text, VIDEO_MARKER} if videos else self._as_text
        refuse_tags(choices or (), "the choices", left_alone)
        refuse_tags(references, "the answers", left_alone)
        turns, tagged = read_tags(turns, bool(images), inline, left_alone)
        parts = [image for image in inline if image is not None]
        if sum(map(bool, (images, parts, tagged))) > 1:
            places = [*named, *["messages"] * bool(parts), *["<img>"] * bool(tagged)]
            raise DataError(f"images are given more than once, under {places}; keep one of them")
        if parts or tagged:
            images = read_images([*parts, *tagged], self.root)
        if videos:
            turns, images = place_videos(turns, images, videos, VIDEO_MARKER not in self._as_text)
        system, turns = self._system(fields, turns)
        several = captions and len(references) > 1
        times = take_times(images, self.root)
        sample = Sample(
            turns, images, times, system, choices, references, several, label, fields.take("task")
        )
        self._identify(fields, sample)
        aside += take_bookkeeping(fields, bool(images), asked)
        if aside:
            self.notes.set_aside.update(aside)
        if left := fields.left:
            if fields.of("tools"):
                raise DataError(f"found {fields.of('tools')[0]!r}: tools are not read; drop the row")
            raise UnknownKeysError(left, fields.row, None if sample.images else self.root.folder)
        return sample

    def _answered(
        self, fields: Fields, has_image: bool, asked: bool
    ) -> tuple[list[Turn], list, list[str] | None, list[str], bool | None]:
        """The turns with the row's answer, the images inside of messages, the choices, the references and the label."""
        inline: list = []
        choices = take_choices(fields)
        turns = take_turns(fields, has_image, inline)
        label = take_label(fields, turns, self.labelled)
        turns, wrong = take_preferred(fields, turns, inline)
        if wrong and choices is not None:
            raise DataError("found choices beside a rejected answer; keep one of them")
        if label is False and (wrong or choices is not None):
            raise DataError("found an answer that is labelled as a wrong one beside others; keep one of them")
        references: list[str] = []
        if turns and turns[-1][0] == "user":
            turns, references = self._take_answer(fields, turns, inline, choices, asked)
        elif turns and fields.has("answers"):
            references = read_people(fields.take("answers"), "answers", self.notes, self.required)
        if references and turns[-1][0] == "assistant":
            references = starting_with(turns[-1][1], references)
        texts = [turns[-1][1], *wrong] if wrong else None if choices is None else choices.texts
        return turns, inline, texts, references, label

    def _take_answer(
        self, fields: Fields, turns: list[Turn], inline: list, choices: Choices | None, asked: bool
    ) -> tuple[list[Turn], list[str]]:
        """The turns with the answer that stands under a key of its own, if it does; and what several people said."""
        answer: str | None = None
        references: list[str] = []
        meanings = ("answer", "label") if asked else ("answer", "label", "caption", "text")
        if meaning := next((own for own in meanings if fields.has(own)), None):
            key = str(fields.key(meaning))
            value = fields.take(meaning)
            if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
                return [*turns, *read_turns(value, key, inline)], []  # TRL's completion
            if meaning == "label" and choices is None and _is_nameless(value, asked):
                mend = "name it as that (data.columns: {answer: KEY})" if asked else "a question beside it"
                raise DataError(
                    f"{key} is {short(value)}, a number without its name; write the class in words, or, where the "
                    f"number is meant, {mend.replace('KEY', key)}"
                )
            if meaning in ("caption", "text") and isinstance(several := from_json(value), list):
                value = several
            if isinstance(value, list) and meaning in ("caption", "text"):
                references = read_people(value, key, self.notes, self.required)
            else:
                answer = read_answer(one_of(value, key), key, choices)
        if fields.has("answers"):
            value = fields.take("answers")
            if choices is not None:
                refuse_several_right(value, choices)
            references = read_people(value, "answers", self.notes, self.required)
        answer = take_right_choice(fields, choices, answer)
        answer = most_frequent(references) if answer is None and references else answer
        return ([*turns, ("assistant", answer)] if answer is not None else turns), references

    def _system(self, fields: Fields, turns: list[Turn]) -> tuple[str | None, list[Turn]]:
        key = fields.key("system")
        given = fields.take("system") if key else None
        own = None if is_empty(given) else as_text(given, str(key))
        refuse_tags([own] if own else (), f"the words under {key!r}", self._as_text)
        inside, turns = split_system(turns)
        if own and inside and own != inside:
            raise DataError(f"found a system turn and {key!r} with another text; keep one of them")
        return own or inside, turns

    def _identify(self, fields: Fields, sample: Sample) -> None:
        conversation = "conversations" in fields.keys.meant
        if fields.has("id"):
            sample.id = fields.take("id")
            if not sample.images and is_image_name(sample.id):
                raise DataError(
                    f"the id {sample.id!r} names an image, and the row has none; say so (data.columns: {{image: id}})"
                )
            sample.id_of_image = conversation or any(
                _names(str(sample.id), image) for image in sample.images if isinstance(image, str)
            )
            return
        keys = [key for key in fields.of("question id") if isinstance(fields.row[key], int | str)]
        if keys:
            sample.id, sample.id_of_image = fields.take_key(keys[0]), True


def _is_nameless(label: Any, asked: bool) -> bool:
    """Whether a class is a number, which in a table is a text; what is asked may be a number."""
    return not isinstance(label, str | list) or (
        not asked and isinstance(label, str) and label.strip().isdigit()
    )


def _names(id: str, image: str) -> bool:
    """Whether an id is an image's, such as 441147 of ``COCO_train2014_441147.jpg``."""
    stem = os.path.splitext(os.path.basename(image))[0]
    return id in (stem, os.path.basename(image)) or (len(id) > 3 and id in stem)
