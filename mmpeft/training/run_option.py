"""The option ``--run DIR``: the config and the directory that it stands for."""

from pathlib import Path

from mmpeft.errors import RefusedError
from mmpeft.options import command_line
from mmpeft.runs.files import HERE
from mmpeft.runs.layout import CONFIG
from mmpeft.runs.manifest import MANIFEST, no_run, read_manifest


def of_run(arguments: list[str]) -> list[str]:
    """``--run DIR`` with the config and the directory that it stands for before it; what else is given goes over them.

    Raises:
        RefusedError: there are several, or a config beside it, or it has none.
    """
    given = [n for n, word in enumerate(arguments) if word == "--run" or word.startswith("--run=")]
    if not given:
        return arguments
    if len(given) > 1:
        raise RefusedError(
            f"--run is given {len(given)} times; a command is about one run: name each in its own"
        )
    where, separate = given[0], arguments[given[0]] == "--run"
    run = "".join(arguments[where + 1 : where + 2]) if separate else arguments[where].removeprefix("--run=")
    rest = arguments[:where] + arguments[where + 1 + separate :]
    if not run or any(word in ("-c", "--config") or word.startswith("--config=") for word in rest):
        raise RefusedError("--run wants a run directory, whose own config.yaml is used: leave --config out")
    config = Path(run) / CONFIG
    if not config.is_file():
        why = _instead(run) if (Path(run) / MANIFEST).exists() else no_run(run)
        raise RefusedError(f"--run: {run} has no {CONFIG}; {why}")
    command = rest[:1] if rest and not rest[0].startswith("-") else []
    own = ["--config", str(config), f"--trainer.default_root_dir={run}", f"--run={run}"]
    return [*command, *own, *rest[len(command) :]]


def check_run(run: Path, directory: Path, configs: list[str]) -> None:
    """Raises:
    RefusedError: it stands in a config, where it would mean nothing, or beside another directory.
    """
    if str(run / CONFIG) not in configs:
        raise RefusedError(
            f"run: {run} stands in a config; it is an option of the command line, --run, in place of --config"
        )
    if directory.resolve() != run.resolve():
        raise RefusedError(
            f"--run is {run}, but trainer.default_root_dir is {directory}: a run is gone on with or asked where it "
            f"lies. To train into another directory with its settings, give --config {run / CONFIG} in place of --run"
        )


def _instead(run: str) -> str:
    """What to do with a model that was merged or combined: it can be asked as it is, but not fitted or tested."""
    ask = f"ask it with `{command_line('ask', '--run', run)}`"
    if read_manifest(run).language["name"] != HERE:
        return f"what was combined, or lost that file, has no data and settings to test with: {ask}"
    base = ("--model.language.name", run, "--model.start_from", run, "--model.adapter", "null")
    where = ("--trainer.default_root_dir", f"{run}-test")
    return (
        f"a merged model has no data and settings of its own: {ask}, or test it with those of the run RUN that it was "
        f"merged from: `{command_line('test', '--config', f'RUN/{CONFIG}', '--untrained', *base, *where)}`"
    )
