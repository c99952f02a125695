"""Eight ways to finetune one base, under one budget: ``python scripts/compare_methods.py --steps 150``.

Full fine-tuning, LoRA, QLoRA, T-Few (IA3), prompt tuning, prefix tuning, BitFit and bottleneck adapters take the same
number of steps on the same batches in the same order. Each trains, answers the held-out questions and is timed in
processes of its own: `mmpeft fit`, `mmpeft test --forgetting`, `benchmarks/answering.py`. The output folder holds

    table.md results.json compare.png      the comparison
    lora/                                  the run, with method.yaml (its config), result.json and the logs

A killed comparison goes on where it was: a method with a result.json is not run again, one that failed is.
"""

import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

# This process starts all others, and on Linux a child's peak memory begins with its parent's: torch, transformers and
# matplotlib are kept out of it until the children are done.
MMPEFT = ("-c", "from mmpeft.cli import main; main()")
TIMING = str(Path(__file__).resolve().parents[1] / "benchmarks" / "answering.py")
RESULT, FIRST_STEPS = "result.json", 1
"""The file that is written last; steps at the beginning of a run whose time does not count."""


@dataclass(frozen=True)
class Method:
    """What of the config is one method's own."""

    title: str
    adapter: str
    """Config class of mmpeft.adapters."""
    learning_rate: float
    """Of AdamW, the adapter's; the projector has the config's in every method."""
    source: str
    """Where the learning rate comes from, and what the settings are."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the config class."""
    warmup: float | None = None
    """In place of the config's."""
    quantization: str | None = None
    """Of the base, in place of the config's."""


# T-Few's paper trains all its baselines with Adafactor, whose steps are relative to the size of what they change, and
# AdamW's are absolute: its rates stand here for comparison.
METHODS = {
    "full": Method(
        "full fine-tuning",
        "FullConfig",
        5e-5,
        "a quarter of what Schulman et al. 2025 (LoRA Without Regret) advise, a tenth of LoRA's, with which the first "
        "step without warm-up took the loss from 2.1 to 4.8; all linears of the blocks",
    ),
    "lora": Method(
        "LoRA",
        "LoraConfig",
        2e-3,
        "as configs/easy_vqa/instruct_lora.yaml (T-Few's LoRA: 3e-3); rank 16 on q and v",
        {"rank": 16, "alpha": 32},
    ),
    "qlora": Method(
        "QLoRA",
        "LoraConfig",
        2e-3,
        "as configs/easy_vqa/instruct_qlora.yaml; rank 16 on all linears over a base in 4-bit NormalFloat",
        {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        quantization="nf4",
    ),
    "tfew": Method(
        "T-Few (IA3)",
        "IA3Config",
        1e-2,
        "as configs/easy_vqa/instruct_tfew.yaml (T-Few: 3e-3 for 1,000 steps); with the right answer's loss alone",
        warmup=0.25,
    ),
    "prompt": Method(
        "prompt tuning",
        "PromptConfig",
        4e-2,
        "T-Few's relative 0.3, times the 0.136 that the embeddings it begins with have as root mean square; 20 tokens",
        {"num_virtual_tokens": 20},
    ),
    "prefix": Method(
        "prefix tuning",
        "PrefixConfig",
        1e-2,
        "T-Few's number taken as absolute, since a fresh prefix is near zero; 20 tokens, without a network",
        {"num_virtual_tokens": 20},
    ),
    "bitfit": Method(
        "BitFit",
        "BitFitConfig",
        3e-3,
        "ten times T-Few's BitFit, 3e-4, for few steps from biases of zero; all linears of the blocks",
    ),
    "bottleneck": Method(
        "bottleneck adapters",
        "BottleneckConfig",
        1e-3,
        "half of LoRA's, which like it begins as the base (T-Few's adapters: 3e-3); width 64 after each feed-forward",
        {"width": 64},
    ),
}


def compare_methods(
    steps: int = 150,
    output: str = "runs/compare_methods",
    methods: str = ",".join(METHODS),
    config: str = "configs/easy_vqa/instruct_lora.yaml",
    limit_test: int = 1000,
    start_from: str | None = None,
    again: bool = False,
) -> None:
    """Trains, tests and times every method under one budget and writes one table and one picture.

    Run it again to go on where it stopped. A method that fails becomes a row with the reason, and the others go on.

    Args:
        steps: optimiser steps of every method, at least 3.
        output: folder for the runs, table.md, results.json and compare.png.
        methods: which ones, with commas between, in the order of the table.
        config: YAML of `mmpeft fit` that gives all but method, learning rate, steps, validation and checkpoints.
        limit_test: how many held-out questions to answer, the first of the config's data.test.
        start_from: run of stage 1 that all methods start from; the config's by default.
        again: train those anew whose results are there.
    """
    chosen = list(dict.fromkeys(name.strip() for name in methods.split(",")))
    if unknown := [name for name in chosen if name not in METHODS]:
        raise ValueError(f"--methods has {unknown[0]!r}, which is none of {', '.join(METHODS)}")
    if steps < FIRST_STEPS + 2 or limit_test < 1:
        raise ValueError(
            f"got {steps} steps and {limit_test} questions; wanted at least {FIRST_STEPS + 2} and 1"
        )
    common = _common_settings(config, steps, start_from)
    wanted = {name: _wanted(name, common, Path(output, name), limit_test) for name in chosen}
    if not again:
        _check_earlier(output, wanted)
    rows = []
    for number, name in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {METHODS[name].title}", flush=True)
        rows.append(_row(name, Path(output, name), wanted[name], again))
    _write_comparison(
        Path(output), rows, _command(steps, output, methods, config, limit_test, start_from), steps
    )


def _write_comparison(output: Path, rows: Sequence[dict[str, Any]], command: str, steps: int) -> None:
    from scripts.comparison_table import draw_comparison, make_table

    finished = [row for row in rows if "error" not in row]
    questions = max((int(row["questions"]) for row in finished), default=0)
    budget = f"{steps} steps each, {questions:,} held-out questions"
    table = make_table(rows, command, budget)
    _write(output / "results.json", json.dumps({"command": command, "methods": rows}, indent=2) + "\n")
    _write(output / "table.md", table)
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
    return " ".join(["python scripts/compare_methods.py", *words])


# What every method is given


def _common_settings(config: str, steps: int, start_from: str | None) -> dict[str, Any]:
    """The config of all methods.

    Raises:
        ValueError: it has no data.test, or the run to start from is not there.
    """
    settings = yaml.safe_load(Path(config).read_text())
    model, data, trainer = settings["model"], settings["data"], settings["trainer"]
    for section, key in ((model, "adapters"), (trainer, "val_check_interval"), (trainer, "logger")):
        section.pop(key, None)
    if not data.get("test"):
        raise ValueError(
            f"{config} has no data.test; the methods are compared on held-out questions: add some"
        )
    if start_from:
        model["start_from"] = start_from
    if (start := model.get("start_from")) and not Path(start).is_dir():
        raise ValueError(
            f"start_from is {start!r}, and there is no such run: make it with `mmpeft fit --config "
            "configs/easy_vqa/caption.yaml`, or name another with --start_from"
        )
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": 0}}
    trainer |= {
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,  # between two steps there must be nothing else
        "log_every_n_steps": 1,
        "callbacks": [callback],  # nobody resumes these runs, and full fine-tuning's state is a gigabyte
    }
    return settings


def _wanted(name: str, common: Mapping[str, Any], folder: Path, limit_test: int) -> dict[str, Any]:
    """All that decides about a method's result: its config, and how many questions are answered."""
    method = METHODS[name]
    adapter = {"class_path": f"mmpeft.adapters.{method.adapter}", "init_args": dict(method.settings)}
    model = common["model"] | {
        "adapter": adapter,
        "adapter_name": name,
        "learning_rate": method.learning_rate,
    }
    if method.warmup is not None:
        model["warmup"] = method.warmup
    if method.quantization is not None:
        model["language"] = model.get("language", {}) | {"quantization": method.quantization}
    trainer = common["trainer"] | {"default_root_dir": str(folder)}
    return {"config": {**common, "model": model, "trainer": trainer}, "limit_test": limit_test}


def _check_earlier(output: str, wanted: Mapping[str, Any]) -> None:
    """One table has one budget.

    Raises:
        ValueError: a result of other settings is there; field by field, what differs.
    """
    for name, settings in wanted.items():
        path = Path(output, name, RESULT)
        if path.is_file() and (earlier := json.loads(path.read_text())["wanted"]) != settings:
            from mmpeft.hashing import differences

            lines = "\n".join(differences(earlier, settings, "made with"))
            raise ValueError(f"{path} has other settings; choose --again, or another --output\n{lines}")


# One method


def _row(name: str, folder: Path, wanted: Mapping[str, Any], again: bool) -> dict[str, Any]:
    """What is known of a method, from its file or by running it."""
    path, method = folder / RESULT, METHODS[name]
    if path.is_file() and not again:
        print(f"  is there: {path}", flush=True)
        return json.loads(path.read_text())["row"]
    path.unlink(missing_ok=True)
    row = {
        "method": name,
        "title": method.title,
        "learning_rate": method.learning_rate,
        "source": method.source,
    }
    try:
        row |= _figures(name, folder, wanted)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"  failed: {error}", flush=True)
        return row | {"error": str(error)}
    _write(path, json.dumps({"wanted": wanted, "row": row}, indent=2) + "\n")
    print(f"  accuracy {row['accuracy']:.3f}, {row['step_seconds']:.2f} s per step", flush=True)
    return row


def _figures(name: str, folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Trains, tests and times a method, and reads what that left.

    Raises:
        RuntimeError: one of the processes failed.
    """
    config, settings = folder / "method.yaml", wanted["config"]
    _write(config, yaml.safe_dump(settings, sort_keys=False))
    print(f"  trains; {folder}/fit.log says how far it is", flush=True)
    peak = run_process([*MMPEFT, "fit", "--config", str(config)], folder / "fit.log")
    print("  answers the held-out questions", flush=True)
    test = ["test", "--config", str(config), f"--data.limit={wanted['limit_test']}", "--forgetting"]
    run_process([*MMPEFT, *test], folder / "test.log")
    print("  times its answers", flush=True)
    run_process([TIMING, *_timing_words(str(folder), settings["data"])], folder / "answering.log")
    metrics, timed = json.loads((folder / "metrics.json").read_text()), _last_json(folder / "answering.log")
    files = [path for path in (folder / "adapters" / name).rglob("*") if path.is_file()]
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
        "answer_ms": timed["added_ms"],
        "base_answer_ms": timed["base_ms"],
        **{
            key: metrics[f"forgetting/{key}"] for key in ("perplexity_base", "perplexity", "same_token", "kl")
        },
        "machine": ", ".join(where),
    }


def _timing_words(run: str, data: Mapping[str, Any]) -> list[str]:
    test = data["test"] if isinstance(data["test"], str) else data["test"][0]
    words = {"run": run, "data": test, "task": data.get("task"), "image_root": data.get("image_root")}
    return [f"--{name}={word}" for name, word in words.items() if word]


def run_process(words: Sequence[str], log: Path) -> int:
    """Runs Python with these arguments and writes what it says into ``log``.

    Returns:
        The highest resident memory of the process, in bytes.

    Raises:
        RuntimeError: it failed; the message is what it said last.
    """
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode < 0:
        raise RuntimeError(
            f"killed by signal {-process.returncode} (9 is often too little memory); see {log}"
        )
    if process.returncode:
        raise RuntimeError(f"{_last_words(log.read_text())}; see {log}")
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def _last_words(text: str) -> str:
    """From the last error on, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    starts = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return " ".join(lines[starts[-1] if starts else -1 :]).removeprefix("error: ")


def _last_json(log: Path) -> dict[str, Any]:
    return json.loads([line for line in log.read_text().splitlines() if line.startswith("{")][-1])


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


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


if __name__ == "__main__":
    try:
        # jsonargparse's booleans want a value, its names underscores
        words = [f"{word}=true" if word == "--again" else word for word in sys.argv[1:]]
        names = {"--limit-test": "--limit_test", "--start-from": "--start_from"}
        auto_cli(compare_methods, args=[names.get(word, word) for word in words])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
