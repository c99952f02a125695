"""Which linears of a language model a data set is most sensitive to. Reads weights and data, writes nothing."""

from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.console import Console

from mmpeft.adapters import LoraConfig
from mmpeft.adapters.sensitivity import top_sites
from mmpeft.data.encoding import encode_images
from mmpeft.data.examples import Examples
from mmpeft.data.image_tokens import image_tokens
from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.loader import PackedLoader
from mmpeft.data.plan import PackingConfig
from mmpeft.data.sources import load_records, require_images
from mmpeft.data.template import Template
from mmpeft.errors import require_positive
from mmpeft.inference.self_check import check_language_model
from mmpeft.models.language import LanguageConfig, load_language_model, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import VisionConfig, make_encoder
from mmpeft.paths import VISION_WEIGHTS, resolve
from mmpeft.reporting.tables import make_table
from mmpeft.training.target_choice import linear_costs, rank_linears

CONVERSATIONS = 8
"""Conversations per batch."""
SHOWN = 40
"""Rows of the printed table; the rest is summed up in one line."""

RANK = 16
"""LoRA's rank where a budget is spent."""


def rank_sites(
    name: str, data: str, batches: int, image_root: str | None = None, columns: Columns | None = None
) -> tuple[dict[str, float], MultimodalModel]:
    """The sensitivity of every linear of the decoder layers on a data file, and the model.

    Images go through the embedded encoder and an untrained projector, so such a ranking is about the questions and
    answers rather than about seeing.

    Raises:
        RefusedError: fewer than one batch, or see `sensitivity`.
    """
    require_positive("batches", batches)
    columns, notes = columns or Columns(), Notes()
    records = load_records(resolve(data), columns, image_root=image_root, each_caption=True, notes=notes)
    columns.check_used(notes, data)
    notes.tell(data)
    require_images(records, data)
    has_images = any(record["images"] for record in records)
    if has_images:
        print("images: by the embedded encoder and an untrained projector, so the ranking is about the text")
    language_model: Any = load_language_model(LanguageConfig(name))
    encoder = make_encoder(
        VisionConfig(weights=VISION_WEIGHTS, image_size=96, fit="squash") if has_images else None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = Projector(encoder.dim, language_model.get_input_embeddings().weight.shape[1])
    model = MultimodalModel(encoder, projector.requires_grad_(False), language_model)
    check_language_model(model)
    template = Template(load_tokenizer(name), image_tokens(encoder))
    examples = Examples(records, template, ranks=False, what=data)
    packing = PackingConfig(batch_size=CONVERSATIONS)
    loader = PackedLoader(examples, partial(encode_images, encoder), packing, adapter=None, seed=0)
    return rank_linears(model, islice(loader, batches)), model


def print_ranking(
    name: str,
    data: str,
    batches: int,
    budget: int | None,
    image_root: str | None = None,
    columns: Columns | None = None,
) -> None:
    """Prints the linears from the most to the least sensitive, and those that a budget pays for."""
    scores, model = rank_sites(name, data, batches, image_root, columns)
    total = sum(scores.values()) or 1.0
    heads = {
        "#": "right",
        "linear": "left",
        "sensitivity": "right",
        "share": "right",
        f"LoRA r={RANK}": "right",
    }
    table = make_table(f"mean of sum |w dL/dw| over up to {batches} batches of {data}", **heads)
    everywhere = LoraConfig(rank=RANK, target_modules="all-linear")
    costs = linear_costs(model, everywhere)
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    for number, path in enumerate(ranked[:SHOWN], start=1):
        share = f"{scores[path] / total:.2%}"
        table.add_row(str(number), path, f"{scores[path]:.4g}", share, f"{costs[path]:,}")
    console = Console()
    console.print(table)
    if rest := ranked[SHOWN:]:
        console.print(
            f"and {len(rest)} more with {sum(scores[path] for path in rest) / total:.1%} of the whole"
        )
    console.print("first-order Taylor expansion of the loss, after Molchanov et al. 2019")
    if budget is not None:
        best = top_sites(scores, costs, budget)
        spent = sum(costs[path] for path in best)
        console.print(f"{len(best)} linears for {spent:,} of {budget:,} parameters, LoRA of rank {RANK}:")
        console.print(f"target_modules: [{', '.join(best)}]", markup=False, highlight=False, soft_wrap=True)
