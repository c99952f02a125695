"""`mmpeft check`: data sets are read row by row, every image is decoded, and all that is wrong is told."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tqdm import tqdm

from mmpeft.data.formats import DataError
from mmpeft.data.images.config import ImageConfig
from mmpeft.data.images.decode import DEFAULT
from mmpeft.data.layouts.columns import Columns, UnknownKeysError
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.problems import MAX_LISTED, Problems
from mmpeft.data.records import ImageRoot, Record
from mmpeft.data.sources import Read, Reading, repeated_id
from mmpeft.tools.clean_part import CleanPart
from mmpeft.tools.data_facts import DataFacts, Sampled, facts_table
from mmpeft.tools.image_survey import ImageSurvey
from mmpeft.tools.mapping_proposal import propose_mapping

if TYPE_CHECKING:
    from mmpeft.models.vision import VisionEncoder
    from mmpeft.tools.token_survey import TokenSurvey

SECONDS_WITHOUT_A_BAR = 2
NUM_SAMPLES, NUM_READ = 12, 3
"""Rows of the picture, and those that are shown as the model reads them."""


@dataclass
class Checked:
    """One data set, and what was found in it."""

    reading: Reading
    images: ImageSurvey
    facts: DataFacts = field(default_factory=DataFacts)
    notes: Notes = field(default_factory=Notes)
    problems: Problems = field(default_factory=Problems)
    unknown: Counter[str] = field(default_factory=Counter)
    """Keys that are not understood -> rows."""
    misread: list[dict[str, Any]] = field(default_factory=list)
    """The first rows that were refused."""

    @property
    def name(self) -> str:
        return self.reading.path

    def rows(self, notes: Notes, what: str) -> Iterator[Read]:
        rows = self.reading.rows(ImageRoot(self.reading.root), notes)
        return iter(
            tqdm(
                rows,
                f"{what} {self.name}",
                unit=" rows",
                delay=SECONDS_WITHOUT_A_BAR,
                leave=False,
                unit_scale=True,
            )
        )

    def refuse_row(self, number: int, row: Any, error: DataError) -> None:
        self.problems.add(number, str(error))
        if isinstance(error, UnknownKeysError):
            self.unknown.update(error.keys)
        if isinstance(row, dict) and len(self.misread) < MAX_LISTED:
            self.misread.append(row)

    def faults(self) -> list[str]:
        """All that must be mended."""
        missing = self.reading.columns.missing(self.notes.mapped)
        hint = f" (no row has {missing}, which data.columns maps)" if missing else ""
        images = "\n".join(
            [f"{self.name}: {len(self.images.told)} images cannot be used:", *self.images.told]
        )
        empty = f"{self.name} holds no rows; wanted at least one sample"
        return [
            *([self.problems.told(self.name, hint)] if self.problems.count else []),
            *([images] if self.images.told else []),
            *([empty] if not self.facts.rows else []),
        ]


def check_data(
    readings: list[Reading],
    columns: Columns,
    decode: bool = True,
    config: ImageConfig = DEFAULT,
    encoders: "list[VisionEncoder] | None" = None,
    tokens: "TokenSurvey | None" = None,
    fix: str | None = None,
    pictures: str | None = None,
) -> list[Checked]:
    """Prints what the data sets hold, and returns it.

    Args:
        readings: the data sets.
        columns: by which they are read.
        decode: whether images are decoded.
        config: how they are, the encoders' own.
        encoders: to tell what they cut off.
        tokens: to tell how long conversations are.
        fix: JSONL file to write what is good to.
        pictures: PNG file to draw samples into.

    Raises:
        DataError: something is wrong; the message lists it.
    """
    clean = CleanPart(Path(fix), [own.root for own in readings], list(columns.ignored)) if fix else None
    sample, faults, notes, found = Sampled(NUM_SAMPLES), [], Notes(), []
    console = Console()
    with clean.open() if clean else nullcontext() as writer:
        for reading in readings:
            with ImageSurvey(decode, config) as images:
                checked = Checked(reading, images)
                _look(checked, tokens, sample)
            if writer or checked.facts.ids_used_twice:
                _judge(checked, tokens, writer)
            _tell(checked, console, encoders or [], tokens)
            found.append(checked)
            faults += checked.faults()
            notes.add(checked.notes)
    _show(sample.records, console, encoders or [], tokens, pictures, config)
    for line in clean.lines() if clean else []:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if faults:
        raise DataError("\n".join(faults))
    columns.check_used(notes, ", ".join(own.path for own in readings))
    return found


def _look(checked: Checked, tokens: "TokenSurvey | None", sample: Sampled) -> None:
    """Counts every row; its images are looked at."""
    facts, images = checked.facts, checked.images
    if tokens:
        tokens.start()
    for number, (_, row, records) in enumerate(checked.rows(checked.notes, "checking"), 1):
        facts.rows = number
        if isinstance(records, DataError):
            checked.refuse_row(number, row, records)
            continue
        for record in records:
            facts.add(record)
            images.look(record)
            bad = bool(images.bad) and images.problems(record)
            told = tokens.add(record) if tokens and not bad else None
            if told:
                checked.problems.add(number, told)
            elif not bad:
                sample.add(record)


def _judge(checked: Checked, tokens: "TokenSurvey | None", writer: CleanPart | None) -> None:
    """Reads all rows once more, to tell which id was used before, and to part the good from the others."""
    twice, firsts = checked.facts.ids_used_twice, {}
    for number, (where, row, records) in enumerate(checked.rows(Notes(), "sorting"), 1):
        if isinstance(records, DataError):
            reasons, records = [str(records)], []
        else:
            reasons = []
            for record in records:
                if (
                    hash(record["id"]) in twice
                    and (first := firsts.setdefault(record["id"], record["where"])) != (record["where"])
                ):
                    reasons.append(repeated_id(record, first))
                    checked.problems.add(number, reasons[-1])
                bad = checked.images.problems(record)
                reasons += bad or filter(None, [tokens.problem(record)] if tokens else [])
        if writer:
            writer.add(row, where, records, "; ".join(reasons))


def _tell(
    checked: Checked, console: Console, encoders: "list[VisionEncoder]", tokens: "TokenSurvey | None"
) -> None:
    """Prints the table of a data set, what was set aside, and what is to be thought about."""
    name, facts = checked.name, checked.facts
    console.print(facts_table(facts, checked.images, name, tokens.lines() if tokens else []))
    lines = [f"{name}: {line}" for line in checked.notes.lines()]
    if checked.unknown:
        told = ", ".join(f"{key} ({count:,})" for key, count in checked.unknown.most_common())
        lines.append(f"{name}: keys that are not understood: {told}")
    warnings = [f"{name}: {told}" for told in _warnings(checked, encoders, tokens)]
    lines += [*(tokens.histogram() if tokens else []), *(f"warning: {told}" for told in warnings)]
    reading = checked.reading
    lines += propose_mapping(checked.misread, reading.columns, reading.task, ImageRoot(reading.root), name)
    if not checked.faults():
        end = f"{len(warnings)} warning(s), no fault" if warnings else "nothing to object to"
        lines.append(
            f"{name}: {facts.conversations:,} conversations about {checked.images.distinct:,} images; {end}"
        )
    for line in lines:
        print(line)


def _warnings(checked: Checked, encoders: "list[VisionEncoder]", tokens: "TokenSurvey | None") -> list[str]:
    told = tokens.warnings() if tokens else []
    if encoders:
        from mmpeft.tools.encoder_sight import cut_warning

        told += [found for encoder in encoders if (found := cut_warning(encoder, checked.images.sizes))]
    return told


def _show(
    records: list[Record],
    console: Console,
    encoders: "list[VisionEncoder]",
    tokens: "TokenSurvey | None",
    pictures: str | None,
    config: ImageConfig,
) -> None:
    """Some conversations as the model reads them, and a picture of them."""
    if tokens:
        for record in records[:NUM_READ]:
            console.print(tokens.shown(record), soft_wrap=True)
    if pictures and records:
        from mmpeft.tools.sample_picture import draw_samples

        draw_samples(pictures, records, encoders[0] if encoders else None, config)
        print(f"{pictures}: {len(records)} random conversations that are good")
