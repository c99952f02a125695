"""Tries the smallest architecture of every timm module as an encoder, and writes docs/encoders.md.

It takes random weights: what is asked are shapes, the order of tokens and what is refused.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from jsonargparse import auto_cli
from timm.models import get_pretrained_cfg

from mmpeft.errors import RefusedError
from mmpeft.models.vision import VisionConfig, VisionEncoder, check_size
from mmpeft.reporting.tables import markdown_table
from mmpeft.tools.encoder_facts import encoder_facts, order_is_row_major, sees_borders

HEAD = (
    "timm module",
    "model",
    "own size",
    "tokens x dim",
    "is forward_features",
    "other size",
    "row by row",
    "odd size",
)
ABOUT = """# Encoders

One row for each module of timm {version}, by its smallest model with random weights. Made by
`python scripts/survey_encoders.py` in {minutes:.0f} minutes of processor time: {works} of {modules} modules
work at their own size, in {final} of them layer -1 is what timm's `forward_features` gives.

- *tokens x dim*: of layer -1 at the model's own size. *Other size*: 160 or 96 px.
- *is forward_features*: "no" is timm's design: a last convolution, norm or class attention follows the last level
  before the head, or `forward_features` has no grid. `mmpeft check DATA --encoder NAME` says it of any model.
- *row by row*: a bright patch changes most the token of its place, and the last row and column of pixels count, at
  the other size, or the first that fits in its place. "At layer 0": there; random weights mix all places by the last.
- *odd size*: 11 pixels less than its own. A size whose last rows no window would see is refused, never cut; the number
  of tokens stands where the model pads.

A refusal names sizes near the wanted one that fit. Some models take few: `crossvit` multiples of 120, `halonet` and
`efficientformer` (at its last stage) their own.

"""


@dataclass
class Row:
    """One module."""

    module: str
    model: str
    size: str = "-"
    own: str = "-"
    final: str = "-"
    other: str = "-"
    order: str = "-"
    odd: str = "-"

    @property
    def works(self) -> bool:
        return "x" in self.own


def smallest_model(module: str) -> str:
    """The model of a module with the fewest parameters, counted without memory."""
    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name])


def survey_module(module: str) -> Row:
    """The row of one module."""
    return survey(module, smallest_model(module))


def survey_all(processes: int = 2) -> list[Row]:
    """The rows of all modules, by several processes of one thread each; each is printed as it comes."""
    rows = []
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(survey_module, timm.list_modules()):
            print(*vars(row).values(), sep=" | ", flush=True)
            rows.append(row)
    return rows


def survey(module: str, model: str) -> Row:
    """Tries one model at three sizes, their shapes without memory, and runs it at a small one that fits."""
    row, own = Row(module, model), get_pretrained_cfg(model, allow_unregistered=True)
    side = own.input_size[-1] if own else 224
    row.size, row.own = str(side), _try(model, None)[0]
    small = 160 if side > 160 else 96
    told, fitting = _try(model, small)
    row.other = f"{small}: {told}"
    row.odd = f"{side - 11}: {_try(model, side - 11)[0]}"
    if fitting is not None:
        torch.manual_seed(0)
        encoder = VisionEncoder(VisionConfig(model, image_size=fitting), load_weights=False)
        _wake(encoder)
        row.final = "yes" if encoder_facts(encoder).is_final else "no"
        row.order = _order(encoder)
    return row


def _order(encoder: VisionEncoder) -> str:
    if not sees_borders(encoder):
        return "NO, a border is not seen"
    if order_is_row_major(encoder):
        return "yes"
    encoder.layer, encoder.norm = 0, False  # random weights may mix all places by the last level
    return "at layer 0" if order_is_row_major(encoder) else "NO"


@torch.no_grad()
def _wake(encoder: VisionEncoder) -> None:
    """Residual branches begin with a norm of zeros, and would pass nothing on."""
    for name, parameter in encoder.model.named_parameters():
        if name.endswith(("weight", "gamma")) and not parameter.any():
            parameter.fill_(1.0)


def _try(model: str, size: int | None) -> tuple[str, int | None]:
    """What comes of it, and the wanted size or the first that fits in its place."""
    config = VisionConfig(model, image_size=size)
    try:
        encoder = check_size(config)
    except RefusedError as error:
        fitting = str(error).partition("Sizes that fit: ")[2]
        first = fitting.split(",")[0]
        return f"refused, fits {fitting}" if fitting else f"refused: {error}", int(
            first
        ) if first.isdigit() else None
    except Exception as error:  # the survey tells of every fault
        return f"CRASH {type(error).__name__}: {str(error)[:60]}", None
    return f"{encoder.num_tokens}x{encoder.dim}", encoder.data_config["input_size"][-1]


def main(output: str = "docs/encoders.md", processes: int = 2) -> None:
    """Writes the table.

    Args:
        output: the Markdown file.
        processes: how many at a time.
    """
    rows = survey_all(processes)
    about = ABOUT.format(
        version=timm.__version__,
        minutes=sum(os.times()[:4]) / 60,
        modules=len(rows),
        works=sum(row.works for row in rows),
        final=sum(row.final == "yes" for row in rows),
    )
    Path(output).write_text(about + markdown_table(HEAD, [tuple(vars(row).values()) for row in rows]) + "\n")


if __name__ == "__main__":
    auto_cli(main)
