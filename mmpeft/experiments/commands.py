"""The commands of experiments that need a model at hand, whose libraries come in only where they run.

A function's signature is its command line, its docstring the help.
"""


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
