"""What an answer costs: a finetune that reads the question alone, and k-shot prompting of the same frozen base.

    python scripts/compare_prompting.py --run runs/tfew --data test.jsonl --train train.jsonl --shots 1 4 16

Prompting puts k examples of every class, with their images and right answers, before the question as earlier turns of
the conversation. Everybody picks the likeliest of a question's choices, over the same held-out questions. The table
has accuracy, the operations of an answer (of matrix products and convolutions, counted while the model answers, the
prompt once for all choices) and its time. "examples kept" reads the keys and values of the examples from memory: what
prompting costs where its examples never change.

Source: Liu et al. 2022 (T-Few), section 4.2, who compare with few-shot prompting of another, much larger model.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmpeft
from mmpeft.data.features import encode_images
from mmpeft.data.loader import PackingConfig
from mmpeft.data.records import Record
from mmpeft.data.sampling import sample_shots
from mmpeft.data.sources import DataError, load_records, require_images
from mmpeft.data.template import ChoiceSet, Template
from mmpeft.experiments.flops import Operations, count_operations
from mmpeft.experiments.prompting import FewShotPrompt
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.paths import resolve
from mmpeft.runs.files import load_run
from mmpeft.training.datamodule import VisionLanguageData

GIGA = 1e9
STEPS_COUNTED = 8
"""Training batches whose mean stands for all."""


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
) -> dict[str, Any]:
    """Measures, prints the table and writes the figures.

    Args:
        run: directory that `mmpeft fit` wrote; prompting uses its base, encoder and shared projector.
        data: held-out questions with choices; so many of them are drawn, the same ones for every row.
        train: where the examples of prompts are drawn from; every class needs as many as the largest k.
        shots: examples of every class in a prompt, two rows of the table for each.
        questions: most questions asked.
        seeds: draws of the examples and of their order; prompting's figures are means over them.
        adapter: the finetune; the run's first by default.
        image_root: folder that image names are relative to; the data file's by default.
        max_length: longest context in tokens; by default the language model's window. What is longer is not answered.
        counted: questions of which operations and time are taken, the same ones for every row.
        output: file to write the figures to, as JSON.

    Returns:
        What the file holds: "rows", the "adapter_share" of an answer's operations, "vision_gflop" of an image,
        "training" and more.

    Raises:
        ValueError: a run without that adapter, or with a quantised base.
        DataError: data that cannot be used.
    """
    vlm = mmpeft.load(run)
    name = chosen_adapter(run, vlm, adapter)
    asked, pool = (read(path, image_root, vlm.manifest.default_task) for path in (data, train))
    asked = random.Random("questions").sample(asked, min(questions, len(asked)))
    window = max_length or window_of(vlm.model, vlm.template.max_length)
    template = copy(vlm.template)
    template.max_length = window
    rows = measure("finetune", [FewShotPrompt(vlm.model, template, adapter=name)], asked, counted)
    with_adapter = operations(FewShotPrompt(vlm.model, template, adapter=name), asked[0])
    training = training_cost(run, vlm.model, vlm.template, name)
    base = vlm.model = load_run(run, vlm.model.device, with_adapters=False)[0].eval()
    rows += measure("base", [FewShotPrompt(base, template)], asked, counted)
    for k in shots:
        draws = [FewShotPrompt(base, template, demonstrations(pool, k, seed)) for seed in range(seeds)]
        rows += measure(f"base, {k} shots", draws, asked, counted)
    for row in rows:
        row["times"] = row["gflop"] / rows[0]["gflop"] if "gflop" in row else None
    without = operations(FewShotPrompt(base, template), asked[0])
    image = encoding_of(base, asked[0]["images"][:1])
    result = {
        "run": run,
        "questions": len(asked),
        "draws": seeds,
        "window": window,
        "rows": rows,
        "adapter_share": (with_adapter - without).total / without.total,
        "vision_gflop": image.products / GIGA,
        "training": training,
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    return result


def chosen_adapter(run: str, vlm: mmpeft.VisionLanguageModel, adapter: str | None) -> str:
    """The finetune to compare with; a run that cannot be compared is refused."""
    if held := vlm.manifest.language.get("quantization"):
        raise ValueError(
            f"{run} holds its base in {held}, whose products are not all PyTorch's own and would not be counted; "
            "give a run on the dense base"
        )
    if not vlm.adapters or adapter not in (None, *vlm.adapters):
        raise ValueError(f"{run} has no adapter{f' {adapter!r}' if adapter else ''}; it has {vlm.adapters}")
    return adapter or vlm.adapters[0]


def read(path: str, image_root: str | None, task: str | None) -> list[Record]:
    """Records with choices whose images are there."""
    records = load_records(resolve(path), image_root=image_root, task=task)
    require_images(records, path)
    for record in records:
        if "choices" not in record:
            raise DataError(
                f"{record['where']}: {record['id']!r} has no choices to rank; add them to the row"
            )
    return records


def window_of(model: MultimodalModel, otherwise: int) -> int:
    """Tokens that the language model can read; ``otherwise`` where its config does not tell."""
    config = model.language_model.config
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min((size for size in named if size), default=otherwise)


def demonstrations(pool: Sequence[Record], shots: int, seed: int) -> list[Record]:
    """``shots`` examples of every class, drawn and shuffled by ``seed``."""
    examples = sample_shots(list(pool), shots, seed)
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
        right = [int(answer(draw, q, bool(draw.turns)).argmax()) == q.right for q in own]
        accuracies.append(statistics.mean(right))
        costs[""].append(cost(draw, own[:counted], False))
        if draw.turns:
            costs[", kept"].append(cost(draw, own[:counted], True))
    tokens = statistics.mean(prompt_tokens(q) for own in encoded for q in own)
    shared = {"accuracy": statistics.mean(accuracies), "accuracies": accuracies, "tokens": tokens}
    return [
        {"method": method + kept} | shared | {key: statistics.mean(c[key] for c in own) for key in own[0]}
        for kept, own in costs.items()
        if own
    ]


def answer(prompt: FewShotPrompt, question: ChoiceSet, kept: bool) -> Tensor:
    """(choices,) scores, the images encoded now: all, or the question's own where the examples are kept."""
    if kept:
        return prompt.kept_scores(question, prompt.features(question.images[len(prompt.images) :]))
    return prompt.scores(question, prompt.features(question.images))


def cost(prompt: FewShotPrompt, questions: Sequence[ChoiceSet], kept: bool) -> dict[str, float]:
    """GFLOP of an answer, mean over the questions, and its milliseconds, their median."""
    products, seconds = [], []
    for question in questions:
        products.append(count_operations(lambda q=question: answer(prompt, q, kept)).products)
        started = time.perf_counter()
        answer(prompt, question, kept)
        seconds.append(time.perf_counter() - started)
    return {"gflop": statistics.mean(products) / GIGA, "ms": 1000 * statistics.median(seconds)}


def operations(prompt: FewShotPrompt, record: Record) -> Operations:
    """Of one answer, encoder included."""
    question = prompt.encode(record)
    return count_operations(lambda: answer(prompt, question, False))


def encoding_of(model: MultimodalModel, images: Sequence[str | bytes]) -> Operations:
    """Of the vision encoder; none without images."""
    return count_operations(lambda: encode_images(model.vision_encoder, images)) if images else Operations()


def prompt_tokens(question: ChoiceSet) -> int:
    """Tokens that the model reads before a choice."""
    targets = question.conversations[0].targets
    return next(place for place, target in enumerate(targets, start=1) if target >= 0)


def training_cost(run: str, model: MultimodalModel, template: Template, adapter: str) -> dict[str, Any]:
    """GFLOP of the finetune's training: forward and backward of its batches, and the encoder once over each image.
    Validation is no part of it. {"note": why} where the run's config does not tell."""
    try:
        settings = yaml.safe_load((Path(run) / "config.yaml").read_text())
        trainer, own = settings["trainer"], settings["model"]
        if own.get("adapters"):
            return {"note": f"{run} is a joint run, of which one finetune cannot be told apart"}
        packing = PackingConfig(**settings["data"]["packing"])
        data = VisionLanguageData(**settings["data"] | {"packing": packing})
        data.setup("fit")
    except (ValueError, OSError, TypeError, KeyError) as error:
        return {"note": f"{run}/config.yaml: {error}"}
    data.connect(
        template.tokenizer,
        template.image_tokens,
        lambda images: encode_images(model.vision_encoder, images),
        adapter,
        {"": any(own.get("choice_losses", {}).values())},
    )
    batches = (trainer["max_steps"] or -1) * trainer["accumulate_grad_batches"]
    if batches < 0:
        batches = (trainer["max_epochs"] or 0) * len(data.train_dataloader())
    if not batches:
        return {"note": f"{run}/config.yaml has neither trainer.max_steps nor trainer.max_epochs"}
    images = {image for record in data.records["train"] for image in record["images"]}
    vision = encoding_of(model, list(images)[:1])
    model.projector.requires_grad_(own["train_projector"])
    model.train()  # gradient checkpointing, where it is on, computes the forward twice

    def train(batch: Any) -> None:
        model.token_losses(batch.to(model.device)).nll.sum().backward()

    some = [
        count_operations(lambda batch=batch: train(batch)) for batch in data.some_batches("", STEPS_COUNTED)
    ]
    model.eval().zero_grad()
    each = statistics.mean(batch.products for batch in some) / GIGA
    total = batches * each + len(images) * vision.products / GIGA
    return {"gflop": total, "batches": batches, "gflop_of_a_batch": each, "images": len(images)}


def show(result: dict[str, Any]) -> None:
    """Prints the table, and training beside it."""
    rows, training = result["rows"], result["training"]
    title = f"{result['questions']} questions, {result['draws']} draws; GFLOP and ms of one answer"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("", "tokens", "accuracy", "GFLOP", "times", "ms"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if "note" in row:
            table.add_row(row["method"], f"> {result['window']}", "too long")
            continue
        figures = (f"{row[key]:.0f}" if row[key] >= 100 else f"{row[key]:.3g}" for key in ("gflop", "times"))
        table.add_row(
            row["method"], f"{row['tokens']:.0f}", spread(row["accuracies"]), *figures, f"{row['ms']:.0f}"
        )
    Console().print(table)
    print(
        f"The vision encoder takes {result['vision_gflop']:.3f} GFLOP of that per image of the prompt, which a"
    )
    print(f"cache of features saves. The adapter adds {100 * result['adapter_share']:.3f} % to an answer.")
    for row in rows:
        if "note" in row:
            print(f"{row['method']}: {row['note']}")
    if "note" in training:
        print(f"Training was not counted: {training['note']}")
        return
    print(
        f"Training took {training['gflop']:,.0f} GFLOP: {training['batches']} batches of "
        f"{training['gflop_of_a_batch']:,.1f} and {training['images']} images. It has paid for itself"
    )
    for row in rows[2:]:
        if row["times"] and row["times"] > 1:
            answers = training["gflop"] / (row["gflop"] - rows[0]["gflop"])
            print(f"  after {answers:,.0f} answers of: {row['method']}")


def spread(accuracies: Sequence[float]) -> str:
    """The mean, and the lowest and highest of several draws."""
    mean = f"{statistics.mean(accuracies):.3f}"
    return f"{mean} ({min(accuracies):.2f}-{max(accuracies):.2f})" if len(accuracies) > 1 else mean


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of the description."""


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_function_arguments(compare_prompting, skip={"shots"}, as_group=False)
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[1, 4, 16], help="examples of every class in a prompt"
    )
    try:
        compare_prompting(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
