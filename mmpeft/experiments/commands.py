"""The commands of experiments that need a model at hand, whose libraries come in only where they run.

A function's signature is its command line, its docstring the help.
"""

from argparse import ArgumentParser, RawTextHelpFormatter

from mmpeft.errors import RefusedError
from mmpeft.options import TellsBriefly, command_line
from mmpeft.runs.layout import WHAT_WAS_WANTED


class _Parser(TellsBriefly, ArgumentParser):
    """Of the command that parses its own arguments."""


def sweep(arguments: list[str]) -> None:
    """Trains several settings side by side on one base, and writes the best one's config.

    Every list is a dimension of a grid; any other setting is for all, as in `mmpeft fit`:

        mmpeft sweep --config C.yaml --model.learning_rate [1e-4,3e-4,1e-3,3e-3] --model.adapter.rank [4,16]

    All settings are finetunes of one run, each as it would be alone. The weaker half by validation loss leaves early,
    again and again. OUTPUT has best.yaml for `mmpeft fit --config`, table.md, sweep.json, sweep.png, and joint/, the
    run, whose finetunes are there already. Started again, it goes on where it stopped.
    """
    parser = _Parser("mmpeft sweep", description=sweep.__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument(
        *("--config",),
        required=True,
        action="append",
        help="YAML of `mmpeft fit`, with one adapter and data.val",
    )
    parser.add_argument(
        "--settings", help="list of settings in place of a grid, '[{model.learning_rate: 1e-3}, ...]'"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="train each setting so often; its loss is the mean"
    )
    parser.add_argument(
        "--keep", type=float, default=0.5, help="share of the settings that goes on at each halving"
    )
    parser.add_argument(
        "--at", help="halve after these steps, as [50,100]; [] halves never; by default till one is left"
    )
    parser.add_argument("--output", default="runs/sweep", help="folder for the run and the results")
    parser.add_argument(
        "--print_config", action="store_true", help="print the config of the joint run, and end"
    )
    own, words = parser.parse_beside(arguments, WHAT_WAS_WANTED)
    if len(own.config) > 1:
        raise RefusedError(
            f"--config is given {len(own.config)} times, {' and '.join(own.config)}; a sweep is of one: write what "
            "the others hold into it, or give it as options, such as --trainer.max_steps 200"
        )

    from mmpeft.experiments import sweep as experiment

    command = command_line("sweep", *arguments)
    experiment.sweep(
        *(own.config[0], words, own.settings, own.seeds, own.keep, own.at, own.output),
        *(command, own.print_config),
    )


def continual(
    plan: str, output: str | None = None, max_steps: int | None = None, limit: int | None = None
) -> None:
    """Trains finetunes in phases, and measures what each left of the ones before.

    Answers every data set before the first phase and after each, and prints a table (after which phase, asked of which
    finetune, how much of which data set is right) and what was forgotten; OUTPUT holds both with a picture. Started
    again, it goes on where it stopped. A plan names phases, each an `mmpeft fit`, and data sets:

        output: runs/facts
        phases:
          learn: {config: configs/continual/facts_learn.yaml}
          same: {config: configs/continual/facts_update.yaml, after: learn}  # goes on with learn's finetune
          new:                                                              # a finetune of its own beside it
            config: configs/continual/facts_update.yaml
            after: learn
            settings: {model: {adapter_name: update}}
        measure:
          unchanged: {test: embedded/facts/unchanged.jsonl, learnt_in: learn}
          ask_new: {test: embedded/facts/ask_new.jsonl}

    Args:
        plan: YAML file such as configs/continual/facts.yaml or configs/continual/languages.yaml.
        output: folder in place of the plan's own.
        max_steps: of every phase, in place of the configs' own; for a quick look, with an --output of its own.
        limit: ask at most so many questions of every data set.
    """
    from mmpeft.experiments import continual as experiment

    experiment.continual(plan, output, max_steps, limit)


def compare_prompting(
    *,
    run: str,
    data: str,
    train: str,
    shots: list[int] = [1, 4, 16],  # noqa: B006  # of a command line, made anew each time
    questions: int = 200,
    seeds: int = 3,
    adapter: str | None = None,
    image_root: str | None = None,
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
    max_length: int | None = None,
    counted: int = 3,
    output: str = "prompting.json",
) -> None:
    """Compares a finetune with k-shot prompting of its frozen base: accuracy, operations and time of an answer.

    Prompting puts k examples of every class, with their images and right answers, before the question as earlier turns
    of the conversation. Everybody picks the likeliest of a question's choices, over the same held-out questions.

    Args:
        run: directory that `mmpeft fit` wrote; prompting uses its base, encoder and shared projector.
        data: held-out questions with choices; so many of them are drawn, the same ones for every row.
        train: where the examples of prompts are drawn from; every class needs as many as the largest k.
        shots: examples of every class in a prompt, two rows of the table for each.
        questions: most questions asked.
        seeds: draws of the examples and of their order; prompting's figures are means over them.
        adapter: the finetune; the run's first by default.
        image_root: folder that image names are relative to; the data file's by default.
        columns: as data.columns, of both files, such as "{image: img_name, answer: response}".
        ignore: as data.ignore, columns to leave out.
        max_length: longest context in tokens; by default the language model's window. What is longer is not answered.
        counted: questions of which operations and time are taken, the same ones for every row.
        output: file to write the figures to, as JSON.
    """
    from mmpeft.data.layouts.columns import Columns
    from mmpeft.experiments import compare_prompting as experiment

    given = Columns(columns or {}, ignore or [])
    experiment.compare_prompting(
        run, data, train, shots, questions, seeds, adapter, image_root, max_length, counted, output, given
    )
