"""What an answer costs: a finetune that reads the question alone, and k-shot prompting of the same frozen base.

    mmpeft compare-prompting --run runs/tfew --data test.jsonl --train train.jsonl --shots 1 4 16

The table has accuracy, the operations of an answer (of matrix products and convolutions, counted while the model
answers, the prompt once for all choices) and its time. "kept" reads the keys and values of the examples from memory:
what prompting costs where its examples never change.

Source: Liu et al. 2022 (T-Few), section 4.2, who compare with few-shot prompting of another, much larger model.
"""

import random
import statistics
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from mmpeft.data.layouts.columns import Columns
from mmpeft.data.layouts.notes import Notes
from mmpeft.data.packing import first_target
from mmpeft.data.records import Record
from mmpeft.data.sampling import sample_shots
from mmpeft.data.sources import DataError, load_records, require_images
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.experiments.flops import Operations
from mmpeft.experiments.prompting import FewShotPrompt
from mmpeft.experiments.prompting_cost import (
    GIGA,
    answer,
    cost,
    encoding_of,
    operations,
    training_cost,
)
from mmpeft.experiments.prompting_table import show
from mmpeft.files import write_json
from mmpeft.inference.vlm import VisionLanguageModel, load, load_base
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.paths import resolve


def compare_prompting(
    run: str,
    data: str,
    train: str,
    shots: Sequence[int] = (1, 4, 16),
    questions: int = 200,
    seeds: int = 3,
    adapter: str | None = None,
    image_root: str | None = None,
    max_length: int | None = None,
    counted: int = 3,
    output: str = "prompting.json",
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Measures, prints the table and writes the figures; `experiments.commands` explains the arguments.

    Returns:
        What the file holds: "rows", the "adapter_share" of operations, "vision_gflop" of an image, "training", ...

    Raises:
        RefusedError: a run without that adapter or with a quantised base, or data that cannot be used.
    """
    vlm = load(run)
    name = chosen_adapter(run, vlm, adapter)
    notes, columns = Notes(), columns or Columns()
    asked, pool = (
        read(path, image_root, vlm.manifest.default_task, columns, notes) for path in (data, train)
    )
    columns.check_used(notes, f"{data} and {train}")
    notes.tell(f"{data} and {train}")
    asked = random.Random("questions").sample(asked, min(questions, len(asked)))
    template = copy(vlm.template)
    template.max_length = max_length or window_of(vlm.model, vlm.template.max_length)
    rows, with_adapter = _finetune_rows(vlm.model, template, name, asked, counted)
    training = training_cost(run, vlm.model, vlm.template, name)
    base = vlm.model = load_base(run, vlm.model.device)
    rows += measure("base", [FewShotPrompt(base, template)], asked, counted)
    for k in shots:
        draws = [FewShotPrompt(base, template, demonstrations(pool, k, seed)) for seed in range(seeds)]
        rows += measure(f"base, {k} shots", draws, asked, counted)
    for row in rows:
        row["times"] = row["gflop"] / rows[0]["gflop"] if "gflop" in row else None
    without = operations(FewShotPrompt(base, template), asked[0])
    result = {
        "run": run,
        "questions": len(asked),
        "draws": seeds,
        "window": template.max_length,
        "rows": rows,
        "adapter_share": (with_adapter - without).total / without.total,
        "vision_gflop": encoding_of(base, asked[0]["images"][:1]).products / GIGA,
        "training": training,
    }
    write_json(Path(output), result)
    show(result)
    return result


def _finetune_rows(
    model: MultimodalModel, template: Template, adapter: str, asked: Sequence[Record], counted: int
) -> tuple[list[dict[str, Any]], Operations]:
    """The finetune's row, and the operations of its first answer."""
    prompt = FewShotPrompt(model, template, adapter=adapter)
    return measure("finetune", [prompt], asked, counted), operations(prompt, asked[0])


def chosen_adapter(run: str, vlm: VisionLanguageModel, adapter: str | None) -> str:
    """The finetune to compare with; a run that cannot be compared is refused."""
    if held := vlm.manifest.language.get("quantization"):
        raise RefusedError(
            f"{run} holds its base in {held}, whose products are not all PyTorch's own and would not be counted; "
            "give a run on the dense base"
        )
    if not vlm.adapters or adapter not in (None, *vlm.adapters):
        raise RefusedError(f"{run} has no adapter{f' {adapter!r}' if adapter else ''}; it has {vlm.adapters}")
    return adapter or vlm.adapters[0]


def read(
    path: str,
    image_root: str | None,
    task: str | None,
    columns: Columns | None = None,
    notes: Notes | None = None,
) -> Sequence[Record]:
    """Records with choices whose images are there."""
    records = load_records(resolve(path), columns, image_root=image_root, task=task, notes=notes)
    require_images(records, path)
    for record in records:
        if "choices" not in record:
            raise DataError(
                f"{record['where']}: {record['id']!r} has no choices to rank; add them to the row"
            )
    return records


def window_of(model: MultimodalModel, otherwise: int) -> int:
    """Tokens that the language model can read; ``otherwise`` where its config does not tell."""
    return getattr(model.reader.config, "max_position_embeddings", None) or otherwise


def demonstrations(pool: Sequence[Record], shots: int, seed: int) -> list[Record]:
    """``shots`` examples of every class, drawn and shuffled by ``seed``."""
    examples = sample_shots(pool, shots, seed)
    random.Random(f"order {seed}").shuffle(examples)
    return examples


def measure(
    method: str, draws: Sequence[FewShotPrompt], records: Sequence[Record], counted: int
) -> list[dict[str, Any]]:
    """The rows of one method, means over the draws: as it is and, where there are examples, with them kept."""
    try:
        encoded = [[draw.encode(record) for record in records] for draw in draws]
    except DataError as error:
        return [{"method": method, "note": str(error)}]
    accuracies, costs = [], {"": [], ", kept": []}
    for draw, own in zip(draws, encoded, strict=True):
        if draw.turns:
            draw.keep_examples(own[0].task, draw.features(draw.images))
        picked = [int(answer(draw, record, bool(draw.turns)).argmax()) for record in records]
        accuracies.append(statistics.mean(p == q.right for p, q in zip(picked, own, strict=True)))
        costs[""].append(cost(draw, records[:counted], False))
        if draw.turns:
            costs[", kept"].append(cost(draw, records[:counted], True))
    tokens = 1 + statistics.mean(first_target(q.conversations[0]) for own in encoded for q in own)
    shared = {"accuracy": statistics.mean(accuracies), "accuracies": accuracies, "tokens": tokens}
    return [
        {"method": method + kept} | shared | {key: statistics.mean(c[key] for c in own) for key in own[0]}
        for kept, own in costs.items()
        if own
    ]
