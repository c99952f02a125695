"""The report and the model card of a run, from what its directory holds."""

from dataclasses import asdict
from pathlib import Path

from mmpeft.files import read_json_lines, write_whole
from mmpeft.metrics.intervals import of_metric, told
from mmpeft.options import command_line
from mmpeft.reporting.card import model_card
from mmpeft.reporting.report import ShownExample, draw_report
from mmpeft.runs.layout import CARD, CONFIG, CURVES, PICTURES
from mmpeft.runs.manifest import read_manifest

SHOWN_METRICS, NUM_SCORES = ("exact_match", "vqa_accuracy", "anls", "perplexity", "cider"), 4
"""Metrics that the report names, and at most how many of them."""


def remove_pictures(directory: Path) -> None:
    """Those that an earlier test drew: they are not of these weights or answers."""
    for stem in PICTURES:
        for old in directory.glob(f"{stem}*.png"):
            old.unlink()


def write_report(directory: Path) -> None:
    """Draws the report anew, and writes the model card."""
    manifest = read_manifest(directory)
    rows = read_json_lines(directory / "examples" / "examples.jsonl")
    examples = [
        ShownExample(
            row["image"] and str(directory / "examples" / row["image"]),
            row["question"],
            row["truth"],
            row["answer"],
            whole=row.get("alone", True) and len(row.get("images", ())) < 2,
        )
        for row in rows
    ]
    facts = {**_scores(manifest.metrics), **manifest.facts}
    curves = directory / CURVES
    draw_report(
        directory / "report.png", curves if curves.exists() else None, examples, directory.name, facts
    )
    card = model_card(
        asdict(manifest),
        title=directory.name,
        metrics=manifest.metrics,
        facts=facts,
        examples=examples,
        command=command_line("fit", "--config", directory / CONFIG),
        pictures=[path.name for stem in PICTURES for path in sorted(directory.glob(f"{stem}*.png"))],
    )
    write_whole(directory / CARD, card)  # last of all: where it is, all is


def _scores(metrics: dict[str, float]) -> dict[str, str]:
    """The first metrics of a test, each with its 95 % interval: exact match, accuracy where classes were told apart."""
    shown = [name for name in metrics if name.split("/")[0] in SHOWN_METRICS][:NUM_SCORES]
    counts = {name: metrics[name.replace(name.split("/")[0], "questions", 1)] for name in shown}
    return {
        name.replace(
            "_", " "
        ): f"{metrics[name]:.4f}{told(of_metric(metrics, name))} on {int(counts[name]):,} questions"
        for name in shown
    }
