"""Two checkouts side by side: the same small runs by each, then what of losses, finetunes and answers differs.

Every run is a command that a user would type, on the embedded base. Run both halves on one machine:

    python -m benchmarks.regression run ../before /tmp/before && python -m benchmarks.regression run . /tmp/after
    python -m benchmarks.regression compare /tmp/before /tmp/after
"""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import auto_cli
from safetensors.torch import load_file
from torch import Tensor

SHORT = ["--trainer.limit_val_batches=4", "--trainer.enable_progress_bar=false"]
INSTRUCT = ["--data.packing.max_conversations=16", "--data.packing.batch_size=24"]
RUNS = {
    "caption": ("easy_vqa/caption", 60, 40),
    "instruct_lora": ("easy_vqa/instruct_lora", 60, 200),
    "joint": ("easy_vqa/joint", 16, 60),
    "tfew": ("tfew", 20, 100),
    "text_lora": ("text/lora", 12, 40),
}
"""Run -> (config, steps, held-out rows to answer)."""
OWN_PROJECTORS = "adapters/*/projector.safetensors"
QUESTIONS = """
import json, mmpeft
from mmpeft.{rows} import load_records
from mmpeft.{names} import resolve
records = load_records(resolve("embedded/easy-vqa/test.jsonl"))[:48:3]
images = [record["images"][0] for record in records]
asked = [record["turns"][-1][0].replace("<image>", "") for record in records]
vlm = mmpeft.load("runs/instruct_lora")
told = {{
    "ask": vlm.ask(images, asked),
    "base": vlm.ask(images[:4], asked[:4], adapter="base", max_new_tokens=16),
    "caption": vlm.caption(images[:8], max_new_tokens=16),
    "rank": vlm.rank(images, asked, choices=["yes", "no", "red", "blue", "circle", "rectangle"]),
}}
print(json.dumps(told))
"""


def run(checkout: str, output: str) -> None:
    """Trains, tests and asks.

    Args:
        checkout: folder of the project; its package and configs are used.
        output: folder for the runs; what is there is not made again.
    """
    source, folder = Path(checkout).resolve(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(source / "configs")
    for name, (config, steps, limit) in RUNS.items():
        words = ["--config", f"configs/{config}.yaml", *(INSTRUCT if name == "instruct_lora" else [])]
        fit = ["fit", *words, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", *SHORT]
        if not (folder / "runs" / name / "mmpeft.json").exists():
            _mmpeft(source, folder, fit)
        if name == "caption":
            continue
        if not _predictions(folder / "runs" / name).exists():
            test = ["test", *words, f"--data.limit={limit}", "--trainer.enable_progress_bar=false"]
            _mmpeft(source, folder, test)
    moved = (source / "mmpeft" / "paths.py").exists()
    code = QUESTIONS.format(rows="data.sources", names="paths" if moved else "embedded")
    (folder / "asked.json").write_text(_python(source, folder, ["-c", code]).splitlines()[-1])


def compare(before: str, after: str) -> None:
    """Prints what differs, run by run.

    Args:
        before: output of `run` with one checkout.
        after: the same with the other.
    """
    for name in RUNS:
        one, two = Path(before, "runs", name), Path(after, "runs", name)
        losses = [_differences(old, new) for old, new in zip(_curves(one), _curves(two), strict=True)]
        print(f"{name}: largest difference of a logged number {max(losses, default=0.0):.3g}")
        old, new = dict(_tensors(one)), dict(_tensors(two))
        same = sum(old[key].equal(new[key]) for key in old.keys() & new.keys())
        print(
            f"  {same} of {len(old)} tensors equal to the bit; keys only in one: {len(old.keys() ^ new.keys())}"
        )
        if _predictions(one).exists():
            pairs = list(zip(_lines(_predictions(one)), _lines(_predictions(two)), strict=True))
            begun = sum(a["answer"] == b["answer"][: len(a["answer"])] for a, b in pairs)
            equal = sum(a["answer"] == b["answer"] for a, b in pairs)
            print(f"  {equal} of {len(pairs)} answers equal, {begun} equal as far as the first goes")
    old, new = (json.loads(Path(folder, "asked.json").read_text()) for folder in (before, after))
    for kind in ("ask", "base", "caption"):
        print(
            f"{kind}: {sum(a == b for a, b in zip(old[kind], new[kind], strict=True))} of {len(old[kind])} equal"
        )
    scores = [(dict(a), dict(b)) for a, b in zip(old["rank"], new["rank"], strict=True)]
    print(f"rank: largest difference of a score {max(abs(a[c] - b[c]) for a, b in scores for c in a):.3g}")


def _predictions(run_directory: Path) -> Path:
    """Of a limited test; once those lay in the run directory itself."""
    limited = sorted(run_directory.glob("tests/*/predictions.jsonl"))
    return limited[0] if limited else run_directory / "predictions.jsonl"


def _mmpeft(source: Path, folder: Path, words: list[str]) -> None:
    started = time.time()
    _python(source, folder, ["-c", "from mmpeft.cli import main; main()", *words])
    print(f"{' '.join(words[:3])}: {time.time() - started:.0f} s", flush=True)


def _python(source: Path, folder: Path, words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(words[2:])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def _curves(run_directory: Path) -> Iterator[dict[str, str]]:
    with (run_directory / "metrics.csv").open() as file:
        yield from csv.DictReader(file)


def _differences(old: dict[str, str], new: dict[str, str]) -> float:
    shared = [name for name in old if old[name] and new.get(name)]
    return max((abs(float(old[name]) - float(new[name])) for name in shared), default=0.0)


def _tensors(run_directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a run trained; a projector's under its finetune's name, in whichever format."""
    for file in sorted(run_directory.glob("adapters/**/adapter_model.safetensors")):
        for key, tensor in load_file(file).items():
            yield f"{file.parent.name}.{key}", tensor
    if not (run_directory / "projector.safetensors").exists() and not list(
        run_directory.glob(OWN_PROJECTORS)
    ):
        return
    for name in [folder.name for folder in sorted(run_directory.glob("adapters/*"))] or ["base"]:
        for key in ("weight", "bias"):
            yield f"{name}.projector.{key}", _projector(run_directory, name)[key]


def _projector(run_directory: Path, name: str) -> dict[str, Tensor]:
    """A finetune's, in whichever format of a run."""
    own = run_directory / "adapters" / name / "projector.safetensors"
    tensors = load_file(own if own.exists() else run_directory / "projector.safetensors")
    prefix = next((f"{who}." for who in (name, "base") if f"{who}.weight" in tensors), "")
    return {key: tensors[f"{prefix}{key}"] for key in ("weight", "bias")}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    auto_cli([run, compare])
