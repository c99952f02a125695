"""A sweep of settings is one joint run: all train side by side on one base, the weak ones leave early."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmpeft.errors import RefusedError
from mmpeft.experiments.steps import Settings, files_of, fit_once
from mmpeft.experiments.sweep_plan import Plan, make_plan, read_value
from mmpeft.files import write_json, write_whole
from mmpeft.options import command_line
from mmpeft.runs.layout import CURVES
from mmpeft.training.halving_rule import CURVE, check_steps, halving_steps, standings

BEST = "best.yaml"


def sweep(
    config: str,
    words: Sequence[str],
    listed: str | None = None,
    seeds: int = 1,
    keep: float = 0.5,
    at: str | None = None,
    output: str = "runs/sweep",
    command: str = "",
    print_config: bool = False,
) -> None:
    """Trains the settings, and writes table, picture and the best one's config.

    Args:
        config, words, listed, seeds: as of `make_plan`.
        keep, at: as of `SuccessiveHalving`, ``at`` as YAML.
        output: folder for the run and the results.
        command: what this is told to be.
        print_config: print the config of the joint run in place of all this.

    Raises:
        RefusedError: what cannot be compared; a folder with another sweep, ended or not; no setting that trained.
    """
    plan = make_plan(config, words, listed, seeds)
    steps = None if at is None else read_value(at, "--at")
    if not 0 < keep < 1 or not (steps is None or _are_steps(steps)):
        raise RefusedError(
            f"--keep is {keep} and --at is {at}; wanted a share above 0 and below 1, and a list of steps, as [50,100]"
        )
    last = plan.base["trainer"].get("max_steps")
    if isinstance(last, int) and last > 0:  # of epochs the steps are known with the data
        check_steps(halving_steps(len(plan.settings), keep, last) if steps is None else steps, last)
    run = Path(output, "joint")
    joint = plan.joint(str(run), keep, steps)
    if print_config:
        return print(as_yaml(joint))
    made_from = files_of(plan.base, plan.train_files)
    fit_once(joint, made_from, config=Path(output, "joint.yaml"), keep_begun=True)
    rows = standing_rows(plan, run)
    _write(Path(output), plan, rows, command)


def _are_steps(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each > 0 for each in value)


def standing_rows(plan: Plan, run: Path) -> list[dict[str, Any]]:
    """What is known of every setting, the best first: "setting", "values", "steps" that it trained, "val_loss" there,
    and of each of its finetunes "finetunes" and "val_losses"."""
    from mmpeft.reporting.report import read_curves

    curves = read_curves(run / CURVES)
    return [
        {
            "setting": setting,
            "values": plan.settings[setting],
            "steps": steps,
            "val_loss": loss,
            "finetunes": plan.finetunes[setting],
            "val_losses": [curves[f"{CURVE}/{name}"][-1][1] for name in plan.finetunes[setting]],
        }
        for setting, steps, loss in standings(curves, plan.finetunes)
    ]


def _write(output: Path, plan: Plan, rows: Sequence[dict[str, Any]], command: str) -> None:
    """Raises:
    RefusedError: the loss of the best setting is not finite.
    """
    from rich.console import Console

    from mmpeft.experiments.sweep_table import draw, make_table, markdown

    write_json(output / "sweep.json", {"command": command, "settings": _finite(rows)})
    write_whole(output / "table.md", markdown(rows, command))
    draw(output / "sweep.png", output / "joint" / CURVES, rows)
    Console().print(make_table(rows))
    best = rows[0]
    if best["val_loss"] == float("inf"):
        raise RefusedError(
            f"no setting of {output} has a finite validation loss, {best['setting']} neither: try lower learning rates"
        )
    alone = plan.alone(best["setting"])
    alone["trainer"] |= {"default_root_dir": str(output / "best")}
    comment = f"# {command_line('fit', '--config', output / BEST)}\n# The best of `{command}`.\n"
    write_whole(output / BEST, comment + as_yaml(alone))
    print(f"best: {best['setting']}; its config is {output / BEST}, and its finetune is trained:")
    print(command_line("ask", "--run", output / "joint", "--adapter", best["finetunes"][0], "QUESTION"))


def _finite(value: Any) -> Any:
    """As JSON can have it, which knows neither infinity nor nan: None in their place."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_yaml(settings: Settings) -> str:
    """As configs are written."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
