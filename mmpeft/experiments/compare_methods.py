"""Eight ways to finetune one base, under one budget: `mmpeft compare-methods --steps 150`.

Full fine-tuning, LoRA, QLoRA, T-Few (IA3), prompt tuning, prefix tuning, BitFit and bottleneck adapters take the same
number of steps on the same batches in the same order. Each trains, answers the held-out questions and is timed in
processes of its own: `mmpeft fit`, `mmpeft test --forgetting`, `python -m benchmarks answering`. The output folder:

    table.md results.json compare.png      the comparison
    lora/                                  the run, with method.yaml (its config), result.json and the logs
    lora_plus/                             of a preset: method.yaml is what `mmpeft fit --preset lora_plus` is put over

A method with a result.json is not run again; one that failed is, from the step that failed.
"""

import itertools
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpeft.config_files import presets
from mmpeft.errors import RefusedError
from mmpeft.experiments import steps as step
from mmpeft.experiments.methods import METHODS, common_settings, find_method, method_settings
from mmpeft.files import read_json, write_json, write_whole
from mmpeft.hashing import differences

# This process starts all others and measures their memory (see steps.py): torch, transformers and matplotlib are kept
# out of it until the children are done.
CHECKOUT = Path(__file__).resolve().parents[2]
TIMING = (
    "-c",
    f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); from benchmarks.__main__ import main; main(sys.argv[1:])",
)
"""Arguments of Python that start `python -m benchmarks`, from any folder."""
RESULT, FIRST_STEPS = "result.json", 1
"""The file that is written last; steps at the beginning of a run whose time does not count."""
ALL_PRESETS = "presets"
"""Among methods: every preset."""


def compare_methods(
    steps: int = 150,
    output: str = "runs/compare_methods",
    methods: str = ",".join(METHODS),
    config: str = "configs/easy_vqa/instruct_lora.yaml",
    limit_test: int = 1000,
    start_from: str | None = None,
    again: bool = False,
) -> None:
    """Trains, tests and times eight methods, or presets, under one budget, and writes one table and one picture.

    Run it again to go on where it stopped. A method that fails becomes a row with the reason, and the others go on.

    Args:
        steps: optimiser steps of every method, at least 3.
        output: folder for the runs, table.md, results.json and compare.png.
        methods: which ones, with commas between, in the order of the table; beside those of the default also presets,
            by the names in `mmpeft configs list`, or "presets" for all of them.
        config: YAML of `mmpeft fit` that gives all but method, learning rate, steps, validation and checkpoints.
        limit_test: how many held-out questions to answer, the first of the config's data.test.
        start_from: run of stage 1 that all methods start from; the config's by default.
        again: train those anew whose results are there.

    Raises:
        RefusedError: an unknown method, a preset that sets more than a method, too few steps, a config that does not
            fit, or results of another budget.
    """
    chosen = _chosen(methods)
    if steps < FIRST_STEPS + 2 or limit_test < 1:
        raise RefusedError(
            f"got {steps} steps and {limit_test} questions; wanted at least {FIRST_STEPS + 2} and 1"
        )
    if not (CHECKOUT / "benchmarks" / "__main__.py").is_file():
        raise RefusedError(
            f"answers are timed by the benchmarks of a checkout, and {CHECKOUT} has none; run it from one"
        )
    common = common_settings(config, steps, start_from)
    wanted = {name: method_settings(name, common, Path(output, name), limit_test) for name in chosen}
    if not again:
        _check_earlier(output, wanted)
    rows = []
    for number, name in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {find_method(name).title}", flush=True)
        rows.append(_row(name, Path(output, name), wanted[name], again))
    _write_comparison(
        Path(output), rows, _command(steps, output, methods, config, limit_test, start_from), steps
    )


def _chosen(methods: str) -> list[str]:
    given = [name.strip() for name in methods.split(",")]
    return list(
        dict.fromkeys(own for name in given for own in (presets() if name == ALL_PRESETS else [name]))
    )


def _write_comparison(output: Path, rows: Sequence[dict[str, Any]], command: str, steps: int) -> None:
    from mmpeft.experiments.compare_methods_table import draw_comparison, make_table

    finished = [row for row in rows if "error" not in row]
    questions = max((int(row["questions"]) for row in finished), default=0)
    budget = f"{steps} steps each, {questions:,} held-out questions"
    table = make_table(rows, command, budget)
    write_json(output / "results.json", {"command": command, "methods": rows})
    write_whole(output / "table.md", table)
    if finished:
        draw_comparison(output / "compare.png", finished)
    print(
        f"\n{table}\n{len(finished)} of {len(rows)} methods; table.md, results.json, compare.png are in {output}"
    )


def _command(
    steps: int, output: str, methods: str, config: str, limit_test: int, start_from: str | None
) -> str:
    given = {"steps": steps, "output": output, "methods": methods, "config": config, "limit_test": limit_test}
    given |= {"start_from": start_from} if start_from else {}
    words = (f"--{name} {shlex.quote(str(value))}" for name, value in given.items())
    return " ".join(["mmpeft compare-methods", *words])


def _check_earlier(output: str, wanted: Mapping[str, Any]) -> None:
    """One table has one budget.

    Raises:
        RefusedError: a result of other settings is there; field by field, what differs.
    """
    for name, settings in wanted.items():
        path = Path(output, name, RESULT)
        if path.is_file() and (earlier := read_json(path)["wanted"]) != settings:
            lines = "\n".join(differences(earlier, settings, "made with"))
            raise RefusedError(f"{path} has other settings; choose --again, or another --output\n{lines}")


# One method


def _row(name: str, folder: Path, wanted: Mapping[str, Any], again: bool) -> dict[str, Any]:
    """What is known of a method, from its file or by running it."""
    path, method = folder / RESULT, find_method(name)
    if path.is_file() and not again:
        print(f"  is there: {path}", flush=True)
        return read_json(path)["row"]
    path.unlink(missing_ok=True)
    row = {
        "method": name,
        "title": method.title,
        "learning_rate": method.learning_rate,
        "source": method.source,
    }
    try:
        row |= _figures(name, folder, wanted, again)
    except (step.ChildError, RefusedError, OSError) as error:
        print(f"  failed: {error}", flush=True)
        return row | {"error": str(error)}
    write_json(path, {"wanted": wanted, "row": row})
    print(f"  accuracy {row['accuracy']:.3f}, {row['step_seconds']:.2f} s per step", flush=True)
    return row


def _figures(name: str, folder: Path, wanted: Mapping[str, Any], again: bool) -> dict[str, Any]:
    """Trains, tests and times a method, and reads what that left.

    Raises:
        ChildError: one of the processes failed.
    """
    peak = _train_and_test(folder, wanted, again)
    print("  times its answers", flush=True)
    log = folder / "answering.log"
    step.run_process([*TIMING, "answering", *_timing_words(str(folder), wanted["config"]["data"])], log)
    metrics = step.read_metrics(folder)
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    timed = rows[-1]
    ms = {row["run"]: 1000 * row["median"] / row["answers"] for row in rows}
    files = list((folder / "adapters" / name).rglob("adapter_*"))  # without the projector, which all train
    trained = sum(count_numbers(path) for path in files if path.suffix == ".safetensors")
    where = [timed["cpu"], f"{timed['threads']} threads", timed["gpu"] or "no GPU"]
    return {
        "accuracy": metrics["exact_match"],
        "questions": metrics["questions"],
        "trained": trained,
        "share": trained / timed["language_model"],
        "files_mb": sum(path.stat().st_size for path in files) / 1e6,
        "peak_gb": peak / 1e9,
        "step_seconds": step_seconds(folder / "tensorboard"),
        "answer_ms": ms["finetune"] - ms["base"],
        "base_answer_ms": ms["base"],
        **_forgetting(metrics, "forgetting"),
        **({"of_images": of_images} if (of_images := _forgetting(metrics, "forgetting_of_images")) else {}),
        "machine": ", ".join(where),
    }


def _forgetting(metrics: Mapping[str, float], measured: str) -> dict[str, float]:
    """Its figures without what was measured before their names; none where it was not."""
    return {
        key.removeprefix(f"{measured}/"): value
        for key, value in metrics.items()
        if key.startswith(f"{measured}/")
    }


def _train_and_test(folder: Path, wanted: Mapping[str, Any], again: bool) -> int:
    """The peak memory of the process that trained, in bytes."""
    settings, limit = wanted["config"], wanted["limit_test"]
    preset = {"preset": wanted["preset"]} if "preset" in wanted else {}
    over = ["--preset", settings["model"]["adapter_name"]] if preset else []

    def child(log: str) -> step.Run:
        run = step.in_child(folder / log)
        return lambda words: run([*words, *over])

    def fit(again: bool) -> step.Fitted:
        return step.fit_once(settings, preset, folder / "method.yaml", child("fit.log"), again)

    print(f"  trains; {folder}/fit.log says how far it is", flush=True)
    fitted = fit(again)
    if fitted.peak_bytes is None:  # it was trained by something that did not measure it
        fitted = fit(again=True)
    step.evaluate_once(
        step.merged(settings, {"data": {"limit": limit}}),
        {"settings": settings, "limit_test": limit, **preset},
        config=folder / "test.yaml",
        run=child("test.log"),
        options=["--forgetting"],
        again=again or fitted.ran,
        title="  answers the held-out questions",
    )
    assert fitted.peak_bytes is not None, "a child's peak memory is always known"
    return fitted.peak_bytes


def _timing_words(run: str, data: Mapping[str, Any]) -> list[str]:
    test = data["test"] if isinstance(data["test"], str) else data["test"][0]
    words = {"run": run, "data": test} | {
        name: data.get(name) for name in ("task", "image_root", "columns", "ignore")
    }
    told = {name: word if isinstance(word, str) else json.dumps(word) for name, word in words.items() if word}
    return [f"--{name}={word}" for name, word in told.items()]


def count_numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def step_seconds(directory: Path) -> float:
    """Median seconds from one training step to the next, by the clock in TensorBoard's newest file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(directory.glob("events.*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(newest), size_guidance={"scalars": 0}).Reload().Scalars("train_loss")
    times = [event.wall_time for event in events][FIRST_STEPS - 1 :]
    return statistics.median(after - before for before, after in itertools.pairwise(times))
