"""The steps of experiments: `mmpeft fit` and `mmpeft test`, each run once, resumed, or refused.

A step writes the YAML of its settings and, beside it under the same name, a JSON record of what it was made from.
Started again, what is done with the same settings is skipped, and a fit that was cut off is resumed from its last
checkpoint (`mmpeft test` resumes by itself). A fit that is done with other settings is refused field by field.

torch is imported only where a step needs it: on Linux a child's peak memory begins with its parent's, so that a
process that measures children must be small.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmpeft.errors import RefusedError
from mmpeft.files import read_json, read_json_lines, write_json, write_whole
from mmpeft.hashing import differences, hash_file, hash_json
from mmpeft.options import MMPEFT
from mmpeft.paths import resolve
from mmpeft.runs.layout import CHECKPOINTS, LAST, MANIFEST
from mmpeft.training.config_file import check_config_files

Settings = dict[str, Any]
"""The content of a YAML for `mmpeft --config`."""
Run = Callable[[list[str]], int | None]
"""Runs `mmpeft` with these words and returns its peak memory in bytes, where that is known."""
KEEP_FEATURES = ("--data.cache.build=always",)
"""The other steps train on the same images."""
PEAK = "peak_bytes"
SECTIONS = ("model", "data", "trainer")
"""Of a config that is trained as a step."""


class ChildError(RuntimeError):
    """A child process failed; the message is what it said last, and where the rest is."""


@dataclass
class Fitted:
    """What is known of a fit."""

    ran: bool
    """Whether it ran now, or was done before."""
    peak_bytes: int | None
    """Peak memory of the process that trained, where that was measured."""


def fit_once(
    settings: Settings,
    made_from: Mapping[str, Any] | None = None,
    config: Path | None = None,
    run: Run | None = None,
    again: bool = False,
    keep_begun: bool = False,
) -> Fitted:
    """Trains into ``trainer.default_root_dir``, unless that was done.

    Args:
        made_from: what else decides about the outcome, as plain data, such as the weights that it starts from.
        config: file for the settings; DIRECTORY.yaml by default.
        run: `run_here` by default, or `in_child`.
        again: train anew also what is done.
        keep_begun: refuse other settings also where a fit was cut off, in place of putting aside what it left.

    Raises:
        RefusedError: it was done with other settings, or made from something else; or another process is at it.
    """
    from mmpeft.runs.occupancy import held, put_aside

    directory, config = _places(settings, config)
    record, checkpoint = config.with_suffix(".json"), directory / CHECKPOINTS / LAST
    wanted = {"settings": settings, **(made_from or {})}
    known = read_json(record)
    peak = known.pop(PEAK, None)
    lines = differences(known, _plain(wanted))
    done, begun = (directory / MANIFEST).exists(), checkpoint.exists()
    if (done or (begun and keep_begun)) and not again:
        if lines:
            raise RefusedError(
                f"{directory} was {'trained' if done else 'begun'} otherwise than is wanted now:\n"
                + "\n".join(lines)
                + "\n"
                "Delete it to train it again, or name another --output"
            )
        if done:
            print(f"{directory}: trained already", flush=True)
            return Fitted(False, peak)
    resumed = begun and not lines and not again
    with held(directory):  # what another process is at stays as it is
        if not resumed:  # nothing may resume later from what other settings left
            put_aside(directory)
            checkpoint.unlink(missing_ok=True)
        write_json(record, wanted)
    resume = ["--ckpt_path", str(checkpoint)] if resumed else []
    peak = (run or run_here)(["fit", "--config", _write_config(config, settings), *resume])
    if peak is not None:
        write_json(record, wanted | {PEAK: peak})
    return Fitted(True, peak)


def evaluate_once(
    settings: Settings,
    made_from: Mapping[str, Any],
    config: Path | None = None,
    run: Run | None = None,
    options: Sequence[str] = (),
    again: bool = False,
    title: str = "",
) -> None:
    """Answers data.test into ``trainer.default_root_dir``, unless that was done for the same model and questions.

    Args:
        made_from: all that decides about the answers, as plain data.
        config, run, again: as in `fit_once`.
        options: further ones of `mmpeft test`.
        title: printed where there is something to do.
    """
    directory, config = _places(settings, config)
    record = config.with_suffix(".json")
    if not again and (directory / "metrics.json").exists() and read_json(record) == _plain(made_from):
        return
    if title:
        print(title, flush=True)
    record.unlink(missing_ok=True)
    where = ["--output", str(directory), *([] if (directory / MANIFEST).exists() else ["--untrained"])]
    (run or run_here)(["test", "--config", _write_config(config, settings), *where, *options])
    write_json(record, made_from)  # last: a killed test has none


def read_metrics(directory: str | Path) -> dict[str, Any]:
    """The figures of the last `mmpeft test` there."""
    return json.loads(Path(directory, "metrics.json").read_text())


def read_answers(directory: str | Path) -> list[str]:
    """What the last `mmpeft test` there answered, in the order of the data."""
    return [row["answer"] for row in read_json_lines(Path(directory, "predictions.jsonl"))]


# What decides about an outcome


def weights_of(run: str | Path | None) -> str | None:
    """Identity of what a run trained; not of its metrics and facts, which a later test changes. None for no run.

    Raises:
        RefusedError: it is no run.
    """
    if not run:
        return None
    from mmpeft.runs.files import PROJECTOR, adapter_folder
    from mmpeft.runs.manifest import read_manifest

    manifest = read_manifest(run)
    files = [path for name in manifest.adapters for path in sorted(adapter_folder(run, name).rglob("*.*"))]
    found = [content(path) for path in (Path(run, PROJECTOR), *files)]
    return hash_json([manifest.identity, manifest.adapters, *found])


def content(path: str | Path) -> str | None:
    """Identity of a file's content; a folder has none."""
    return hash_file(path)[:32] if Path(path).is_file() else None


def files_of(settings: Settings, more: Sequence[str] = ()) -> dict[str, Any]:
    """The run that a fit starts from, and its data files.

    Args:
        more: data files beside those of the section ``data:``.
    """
    listed = [settings["data"].get(split) or [] for split in ("train", "val", "test")]
    paths = [path for given in listed for path in ([given] if isinstance(given, str) else given)]
    files = {path: content(resolve(path)) for path in [*paths, *more]}
    return {"start": weights_of(settings["model"].get("start_from")), "files": files}


def read_settings(config: str | Path) -> Settings:
    """The settings of a config of `mmpeft fit`, of which a section that it leaves out is empty.

    Raises:
        RefusedError: it cannot be read, or a section is no settings.
    """
    check_config_files(["--config", str(config)])
    settings = yaml.safe_load(Path(config).read_bytes())
    sections = {section: settings.get(section) or {} for section in SECTIONS}
    for section, own in sections.items():
        if not isinstance(own, dict):
            raise RefusedError(f"{config} has {section}: {own!r:.80}; wanted settings below it")
    return {**settings, **sections}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """Nested settings with changes put over them."""
    result = dict(settings)
    for key, new in changes.items():
        old = settings.get(key)
        result[key] = merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return result


# How a step runs


def run_here(words: Sequence[str]) -> None:
    """Runs `mmpeft fit` or `mmpeft test` in this process."""
    from mmpeft.training.cli import VisionLanguageCLI

    VisionLanguageCLI.run(_keeping_features(words))


def in_child(log: Path) -> Run:
    """Runs `mmpeft` as a process of its own, which writes what it says into ``log``."""
    return lambda words: run_process([*MMPEFT, *_keeping_features(words)], log)


def _keeping_features(words: Sequence[str]) -> list[str]:
    return [*words, *(KEEP_FEATURES if words[0] == "fit" else ())]


def run_process(words: Sequence[str], log: Path) -> int:
    """Runs Python with these arguments and writes what it says into ``log``.

    Returns:
        The highest resident memory of the process, in bytes.

    Raises:
        ChildError: it failed.
    """
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode < 0:
        raise ChildError(f"killed by signal {-process.returncode} (9 is often too little memory); see {log}")
    if process.returncode:
        raise ChildError(f"{_last_words(log.read_text())}; see {log}")
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def _last_words(text: str) -> str:
    """From the last error on, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    starts = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return " ".join(lines[starts[-1] if starts else -1 :]).removeprefix("error: ")


def _write_config(path: Path, settings: Settings) -> str:
    write_whole(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return str(path)


def _places(settings: Settings, config: Path | None) -> tuple[Path, Path]:
    directory = settings["trainer"]["default_root_dir"]
    return Path(directory), config or Path(f"{directory}.yaml")


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value))
