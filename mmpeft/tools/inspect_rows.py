"""What a batch looks like to the model, token by token, for `mmpeft inspect`."""

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from mmpeft.data.image_tokens import image_tokens
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.loader import JointLoader, PackedLoader
from mmpeft.data.packing import PREFIX, PackedRow
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Template
from mmpeft.errors import RefusedError, require_positive
from mmpeft.models.language import load_tokenizer
from mmpeft.models.vision import make_encoder
from mmpeft.reporting.tables import make_table
from mmpeft.training.batches import make_loader
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.finetune import Split
from mmpeft.training.module import VisionLanguageModule


def print_rows(module: VisionLanguageModule, data: VisionLanguageData, split: Split, rows: int) -> None:
    """Prints packed rows of a split's first batch. Needs the tokenizer and the encoder's shape, no weights."""
    require_positive("--rows", rows)
    data.read("fit", module.finetunes)
    tokenizer = load_tokenizer(module.language.name)
    encoder = make_encoder(module.vision, load_weights=False)
    template = Template(tokenizer, image_tokens(encoder), data.template, data.packing.max_length)
    seed = data.seed if split == "train" else None
    owners = dict.fromkeys(module.finetunes)
    no_features: Any = None  # rows are looked at before they become a batch
    skipped = Notes() if split == "train" and data.skips_late else None
    loader = make_loader(
        module.finetunes, split, template, no_features, data.packing, owners, seed, skipped=skipped
    )
    if loader is None:
        raise RefusedError(f"the config has no data.{split}: set it to a data file or folder")
    own = loader.loaders if isinstance(loader, JointLoader) else {"": loader}
    for name, each in own.items():
        _print_loader(f"{split} of {name}" if name else split, each, tokenizer, rows)


def _print_loader(name: str, loader: PackedLoader, tokenizer: Any, rows: int) -> None:
    console = Console()
    for number, row in enumerate(loader.packed_rows(0)[:rows]):
        console.print(_table(number, row, tokenizer))
    counts = loader.counts
    conversations, carrying, total = (
        int(counts[name].sum()) for name in ("conversations", "carrying", "tokens")
    )
    console.print(
        f"{name}: {len(loader.examples):,} examples, {conversations:,} conversations in {len(loader):,} batches; "
        f"{carrying:,} of {total:,} tokens carry loss, at least one in every conversation"
    )


def _table(number: int, row: PackedRow, tokenizer) -> Table:
    columns = {"segment": "right", "position": "right", "reads": "left", "must predict": "left"}
    table = make_table(f"row {number}: {len(row.ids)} tokens, {len(row.images)} images", **columns)
    places = list(zip(row.segments, row.positions, row.ids, row.targets, strict=True))
    for is_image, run in groupby(places, key=lambda place: place[2] == IMAGE_TOKEN):
        run = list(run)
        if is_image:
            segment, position, *_ = run[0]
            table.add_row(
                _segment(segment), f"{position}-{run[-1][1]}", f"[magenta]{len(run)} image features[/]", ""
            )
            continue
        for segment, position, token, target in run:
            wanted = "" if target == IGNORE_INDEX else f"[bold green]{_shown(tokenizer, target)}[/]"
            table.add_row(_segment(segment), str(position), _shown(tokenizer, token), wanted)
    return table


def _segment(segment: int) -> str:
    return "prefix" if segment == PREFIX else str(segment)


def _shown(tokenizer, token: int) -> str:
    return repr(tokenizer.decode([token]))[1:-1].replace("[", "\\[")
