"""Samples -> one `Record` each, whatever layout they came in (`layouts/`): what makes a conversation is checked here.

`<image>` markers: the questions of a record hold exactly one per image, in the order of `images`; template
code replaces them by image spans. A row without markers gets them in front of its first question. Questions
lose outer whitespace, also that between their text and markers at either end ("<image>\\nWhat?" becomes
"<image>What?"). A record's only marker moves from the end of its question to the front. Answers are kept as
they are.
"""

from collections import Counter
from typing import Any, NotRequired, TypedDict

from mmpeft.data.formats import DataError
from mmpeft.data.hash_set import HashSet
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.image_root import ImageRoot as ImageRoot
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.layouts.questions import CAPTION_INSTRUCTION as CAPTION_INSTRUCTION
from mmpeft.data.layouts.samples import RowReader, Sample
from mmpeft.data.layouts.tags import IMAGE_MARKER as IMAGE_MARKER
from mmpeft.data.layouts.tags import Turn
from mmpeft.data.layouts.values import as_text
from mmpeft.errors import RefusedError

CAPTION_TASK = "caption"
"""The task of rows whose answer describes the image."""


class Record(TypedDict):
    """One sample, whatever format it came from."""

    id: str
    """Of this record alone."""
    images: list[str | bytes]
    """Absolute paths inside the image root, or encoded bytes (parquet)."""
    turns: list[tuple[str, str | None]]
    """(question, answer); only the last answer can be None, and only for prediction."""
    task: str | None
    times: NotRequired[list[float | None]]
    """When each image is shown, in seconds from the beginning of its video, if one of them is a frame of one."""
    system: NotRequired[str]
    """What stands before the whole conversation, if the row says something."""
    choices: NotRequired[list[str]]
    """The allowed answers to the last question, if the row lists them: two or more, the right one among them."""
    references: NotRequired[list[str]]
    """All right answers to the last question, if the row lists several people's; the first is the turn's."""
    lists_captions: NotRequired[bool]
    """Whether the references are captions that the row lists, of which training would learn each."""
    desirable: NotRequired[bool]
    """Whether people found the answer good, where the row says so and that is asked for."""
    where: str
    """File and line (parquet: row), e.g. "train.jsonl:12"."""


def is_caption(record: Record) -> bool:
    """Whether the answer describes the image: by its task, or by what caption rows ask who name no instruction."""
    question = record["turns"][-1][0].replace(IMAGE_MARKER, "").strip()
    return record["task"] == CAPTION_TASK or question == CAPTION_INSTRUCTION


def place_of(record: Record) -> str:
    """What an error calls a record."""
    return f"{record['where']} (id {record['id']!r})" if record["id"] else record["where"]


def said_beside(record: Record) -> list[Any]:
    """What is read or learnt from beside turns, task and images, of a record that has it."""
    told: Any = record
    return [told[key] for key in ("system", "times", "desirable") if key in told]


def times_of_images(record: Record) -> list[float | None]:
    """When each image is shown; None of one that is no frame of a video."""
    return record.get("times") or [None] * len(record["images"])


def check_question(question: str, where: str) -> None:
    """Raises:
    RefusedError: nothing is asked; a marker of an image alone is a question.
    """
    if not question.strip():
        raise RefusedError(f'{where} is empty; write one, such as "what is in the picture?"')


class RecordReader:
    """Rows of one data set -> records.

    Args:
        root: of the images.
        task: of the rows that have none.
        require_answers: whether the last question must have an answer.
        columns: the user's own mapping.
        notes: is told what was left aside.
        each_caption: whether each of several captions of a row is a record of its own, as they are learnt.
        labelled: whether labels of answers are kept, those of wrong ones too, instead of refusing these.
    """

    def __init__(
        self,
        root: ImageRoot,
        task: str | None = None,
        require_answers: bool = True,
        columns: Columns | None = None,
        notes: Notes | None = None,
        each_caption: bool = False,
        labelled: bool = False,
    ):
        self.task, self.require_answers, self.labelled = task, require_answers, labelled
        known, told = columns or Columns(), notes or Notes()
        self._rows = RowReader(root, known, require_answers, each_caption, told, labelled)
        self._met = HashSet()
        self._times: dict[int, int] = {}
        """Of ids that came again."""

    def read(self, row: Any, made_id: str, where: str) -> list[Record]:
        """The records of a row: mostly one, several of a packed row or of several captions.

        Args:
            made_id: its id, if it has none.
            where: file and line.

        Raises:
            DataError: The row is not a valid sample, or is itself the `DataError` of a row that could not be read.
        """
        samples = list(self._rows.read(row))
        if len(samples) == 1:
            return [self._record(samples[0], made_id, where)]
        return [
            self._record(sample, f"{made_id}-{number}", f"{where}, part {number}")
            for number, sample in enumerate(samples, 1)
        ]

    def _record(self, sample: Sample, made_id: str, where: str) -> Record:
        turns = _pairs(sample.turns, self.require_answers)
        record = Record(
            id=_id(made_id if sample.id is None else sample.id),
            images=sample.images,
            turns=place_markers(turns, len(sample.images)),
            task=self.task if sample.task is None else as_text(sample.task, "task"),
            where=where,
        )
        if sample.times is not None:
            record["times"] = sample.times
        answer = turns[-1][1]
        if sample.choices is not None:
            record["choices"] = _checked(sample.choices, answer)
        if sample.references and answer is not None:
            record["references"] = sample.references
            if sample.are_captions:
                record["lists_captions"] = True
        if self.labelled and sample.desirable is not None:
            record["desirable"] = sample.desirable
        if sample.system:
            if IMAGE_MARKER in sample.system:
                raise DataError(f"the system turn holds {IMAGE_MARKER}; images stand in questions")
            record["system"] = sample.system
        if sample.id_of_image:
            record["id"] = self._counted(record["id"])
        return record

    def _counted(self, name: str) -> str:
        """An id that may repeat, as one of an image does, counted on: ``7``, ``7#2``, ``7#3`` in the order of the data.
        Hashes are kept, since a million ids as text are large."""
        own = hash(name)
        if self._met.add(own):
            return name
        times = self._times[own] = self._times.get(own, 1) + 1
        return f"{name}#{times}"


def _pairs(turns: list[Turn], require_answers: bool) -> list[tuple[str, str | None]]:
    for number, (role, text) in enumerate(turns, 1):
        wanted = "user" if number % 2 else "assistant"
        if role != wanted:
            raise DataError(f"turn {number} is from the {role}; wanted the {wanted} (in turns, user first)")
        if role == "assistant" and (IMAGE_MARKER in text or not text.strip()):
            fault = f"holds {IMAGE_MARKER}" if IMAGE_MARKER in text else "is empty or only whitespace"
            raise DataError(f"turn {number}, an answer, {fault}; correct it or drop the row")
    if not turns:
        raise DataError("nothing is asked: the conversation has no turn but the system's; drop the row")
    texts: list = [text for _, text in turns]
    if len(texts) % 2:
        if require_answers:
            raise DataError("the last question has no answer; add it (only prediction takes rows without)")
        texts.append(None)
    return list(zip(texts[::2], texts[1::2], strict=True))


def place_markers(turns: list[tuple[str, str | None]], num_images: int) -> list[tuple[str, str | None]]:
    """The turns with one marker per image, as told at the top of this module."""
    found = sum(question.count(IMAGE_MARKER) for question, _ in turns)
    if found == 0:
        turns = [(IMAGE_MARKER * num_images + turns[0][0].strip(), turns[0][1]), *turns[1:]]
    elif found != num_images:
        raise DataError(
            f"found {found} {IMAGE_MARKER} for {num_images} image(s); wanted one {IMAGE_MARKER} each, or none"
        )
    placed = [(_tidy(question, found == 1), answer) for question, answer in turns]
    if not all(question for question, _ in placed):
        raise DataError("a question is empty; write one or drop the row")
    return placed


def _tidy(question: str, single: bool) -> str:
    if single and question.startswith(IMAGE_MARKER):
        return IMAGE_MARKER + question[len(IMAGE_MARKER) :].strip()
    parts = question.split(IMAGE_MARKER)
    filled = [number for number, part in enumerate(parts) if part.strip()]
    if not filled:
        return IMAGE_MARKER * (len(parts) - 1)
    front, back = filled[0], len(parts) - 1 - filled[-1]
    text = IMAGE_MARKER.join(parts[filled[0] : filled[-1] + 1]).strip()
    return (
        IMAGE_MARKER * (front + back) + text if single else IMAGE_MARKER * front + text + IMAGE_MARKER * back
    )


def _id(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else as_text(value, "id")
    if not text.strip():
        raise DataError("the id is empty; write one, or leave the key out")
    return text


def _checked(choices: list[str], answer: str | None) -> list[str]:
    """The choices as they are; compared without outer whitespace."""
    trimmed = [choice.strip() for choice in choices]
    if len(choices) < 2:
        raise DataError(f"choices are {choices}; wanted two or more, or leave the key out")
    if "" in trimmed:
        raise DataError(f"choice {trimmed.index('') + 1} of {choices} is empty; write it or drop it")
    if twice := [choice for choice, count in Counter(trimmed).items() if count > 1]:
        raise DataError(f"the choice {twice[0]!r} is given twice in {choices}; drop one of them")
    if answer is not None and answer.strip() not in trimmed:
        raise DataError(f"the answer {answer!r} is not among the choices {choices}; add it or correct one")
    return choices
