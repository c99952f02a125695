"""Our own commands. A function's signature is its command line, its docstring the help."""

from argparse import ArgumentParser, RawTextHelpFormatter
from typing import Literal

from mmpeft.errors import RefusedError
from mmpeft.paths import resolve
from mmpeft.samples import prepare

__all__ = ["ask", "check", "few_shot", "merge", "prepare", "sites"]


def ask(
    question: str,
    run: str = "runs/quickstart",
    image: str | None = None,
    adapter: str | None = None,
    max_new_tokens: int = 32,
) -> None:
    """Asks a finetuned model about an image and prints the answer.

    Args:
        question: the question.
        run: directory that `mmpeft fit` wrote.
        image: the image's file; without one the question is about text alone.
        adapter: a finetune of the run, or "base" for the frozen model; the run's first by default.
        max_new_tokens: longest answer.
    """
    from mmpeft.inference.vlm import load

    print(load(run).ask(image, question, adapter, max_new_tokens))


def inspect(arguments: list[str]) -> None:
    """Prints packed rows of a run token by token: segments, image features, and which tokens carry loss.

    No weights are loaded. A conversation without any token that carries loss is an error that names it.
    Takes the same --config and overrides as `mmpeft fit`.
    """
    parser = ArgumentParser(
        "mmpeft inspect", description=inspect.__doc__, formatter_class=RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the run's YAML")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="which data")
    parser.add_argument("--rows", type=int, default=1, help="how many packed rows of the first batch")
    own, overrides = parser.parse_known_args(arguments)

    from mmpeft.tools.inspect_rows import print_rows
    from mmpeft.training.cli import VisionLanguageCLI

    cli = VisionLanguageCLI.parse(["--config", own.config, *overrides])
    print_rows(cli.model, cli.datamodule, own.split, own.rows)


def check(data: str, image_root: str | None = None, task: str | None = None) -> None:
    """Reads a data file and decodes every image of it, and lists everything that is wrong.

    Args:
        data: data file or folder, as in the configs' data.train.
        image_root: folder that image paths start from; by default the data file's.
        task: identifier for rows that have none.
    """
    from mmpeft.data.sources import DataError, check_images, load_records

    records = load_records(resolve(data), image_root=image_root, task=task)
    problems = check_images(records, decode=True)
    if problems:
        raise DataError(f"{len(problems)} images cannot be used:\n" + "\n".join(problems))
    images = {image for record in records for image in record["images"]}
    print(f"{data}: {len(records):,} conversations about {len(images):,} images; nothing to object to")


def sites(model: str, data: str | None = None, batches: int = 8, budget: int | None = None) -> None:
    """Prints which linears of a language model adapters would touch, and how many parameters each method trains.

    Reads the model's config alone. With data it loads the weights too and ranks the linears by how sensitive the
    loss is to them.

    Args:
        model: hub id, local folder, or embedded/smollm2-135m-instruct.
        data: data file or folder to rank the linears on, as in the configs' data.train.
        batches: how many batches of 8 conversations the ranking averages.
        budget: with data, also name the linears that so many LoRA parameters are best spent on.
    """
    if data is None:
        if budget is not None:
            raise RefusedError("--budget chooses among ranked linears; give --data to rank them on")
        from mmpeft.tools.targets_table import print_sites

        return print_sites(model)
    from mmpeft.tools.targets_ranking import print_ranking

    print_ranking(model, data, batches, budget)


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


def merge(
    run: str,
    adapter: str | None = None,
    output: str | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
) -> None:
    """Folds a finetune into its base and writes a plain transformers model, with the projector beside it.

    Args:
        run: directory that `mmpeft fit` wrote.
        adapter: a finetune of the run; the run's first by default.
        output: new or empty folder; RUN/merged/ADAPTER by default.
        quantization: keep the base in 4 or 8 bits; exact for IA3, refused for LoRA. Dense by default.
    """
    from mmpeft.runs.merge import merge_run

    merged = merge_run(run, adapter, output, quantization)
    print(
        f"merged {merged.adapter!r} into {merged.directory}: on a fixed prompt no logit differs by more than "
        f"{merged.difference:.2g} from the adapted model's, which differ from the base's by up to {merged.change:.2g}"
    )
