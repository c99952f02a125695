"""The experiments' commands. A function's signature is its command line, its docstring the help."""

from mmpeft.experiments.methods import METHODS


def few_shot(
    configs: list[str],
    shots: int = 16,
    seeds: int = 5,
    max_steps: int | None = None,
    output: str = "runs/few_shot",
) -> None:
    """Trains on a few examples of every class, once per seed, and prints median and interquartile range.

    All seeds of a config train side by side on one base, each as it would alone. Rows with `choices` are answered
    by ranking them; the classes are those choices.

    Args:
        configs: YAML files of `mmpeft fit`, such as [configs/tfew.yaml,configs/few_shot_lora.yaml].
        shots: training examples of every class.
        seeds: how often, each time with other examples.
        max_steps: in place of the configs' own.
        output: folder for the runs.
    """
    from mmpeft.experiments.few_shot import print_few_shot

    print_few_shot(configs, shots, range(seeds), output, max_steps)


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


def compare_methods(
    steps: int = 150,
    output: str = "runs/compare_methods",
    methods: str = ",".join(METHODS),
    config: str = "configs/easy_vqa/instruct_lora.yaml",
    limit_test: int = 1000,
    start_from: str | None = None,
    again: bool = False,
) -> None:
    """Trains, tests and times eight methods under one budget, and writes one table and one picture.

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
    from mmpeft.experiments import compare_methods as experiment

    experiment.compare_methods(steps, output, methods, config, limit_test, start_from, again)


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
        max_length: longest context in tokens; by default the language model's window. What is longer is not answered.
        counted: questions of which operations and time are taken, the same ones for every row.
        output: file to write the figures to, as JSON.
    """
    from mmpeft.experiments import compare_prompting as experiment

    experiment.compare_prompting(
        run, data, train, shots, questions, seeds, adapter, image_root, max_length, counted, output
    )
