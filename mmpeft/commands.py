"""Our own commands, beside those of the rooms runs/, tools/ and experiments/.

A function's signature is its command line, its docstring the help. The libraries come in only where a command needs
them, so that `mmpeft --help` stays instant.
"""

import sys
from argparse import ArgumentParser, RawTextHelpFormatter
from typing import TYPE_CHECKING, Literal

from mmpeft.errors import RefusedError, require_positive
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.options import TellsBriefly
from mmpeft.paths import resolve
from mmpeft.runs.layout import RUN, WHAT_WAS_WANTED
from mmpeft.serving.limits import Limits

if TYPE_CHECKING:
    from mmpeft.serving.client import Server


class _Parser(TellsBriefly, ArgumentParser):
    """Of the command that parses its own arguments."""


def configs(action: Literal["list", "copy"], folder: str = "configs") -> None:
    """Lists the configs that come with mmpeft, or copies them to where you can change them.

    Args:
        action: list, or copy; what is there already is kept.
        folder: to copy into.
    """
    from mmpeft.config_files import copy_configs, list_configs

    if action == "list":
        for name, purpose in list_configs():
            print(f"{name:<38} {purpose}")
        return
    print(f"{len(copy_configs(folder))} configs copied into {folder}; what was there already is kept")


def fit(arguments: list[str]) -> None:
    """Trains; --print_config shows every setting, --model.learning_rate=... changes one."""
    _lightning("fit", arguments)


def validate(arguments: list[str]) -> None:
    """Measures loss and exact match on data.val."""
    _lightning("validate", arguments)


def test(arguments: list[str]) -> None:
    """Answers data.test; writes predictions.jsonl, metrics.json and a fresh report."""
    _lightning("test", arguments)


def predict(arguments: list[str]) -> None:
    """Answers data.predict, whose rows need no answers."""
    _lightning("predict", arguments)


def _lightning(command: str, arguments: list[str]) -> None:
    from mmpeft.training.cli import VisionLanguageCLI

    VisionLanguageCLI.run([command, *arguments])


def ask(
    question: str,
    run: str = RUN,
    image: list[str] | str | None = None,
    video: list[str] | str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    adapter: str | None = None,
    max_new_tokens: int | None = None,
    choices: str | None = None,
    answer_by: Literal["auto", "generate", "rank"] = "auto",
    server: str | None = None,
    api_key: str | None = None,
) -> None:
    """Asks a finetuned model about images or videos and prints the answer, alone on stdout.

    Args:
        question: the question.
        run: directory that `mmpeft fit` wrote.
        image: an image's file, as often as there are images; without one the question is about text alone. `<image>`
            says where in the question each stands, else they come first.
        video: a video's file, whose frames are images, each with its time; before the images, or where `<video>`
            stands. Needs the extra [video].
        frames: how many frames of each video, evenly spaced; by default 8.
        fps: frames of a second instead; with frames at most so many.
        adapter: a finetune of the run, or "base" for the frozen model; the run's first by default.
        max_new_tokens: longest answer in tokens; by default the longest that the run was trained on, and at least 64.
        choices: answers to pick the best of, such as red,green,blue; by default those that the finetune's training data
            listed for such a question.
        answer_by: auto picks where there are choices and writes elsewhere; generate always writes; rank always picks.
        server: address of `mmpeft serve`, or of another server of OpenAI's API, to ask instead of loading a run; it
            picks among given choices only.
        api_key: the server's, where it wants one.
    """
    from mmpeft.data.choices import check_choices, read_choices
    from mmpeft.data.images import load_image
    from mmpeft.data.records import check_question
    from mmpeft.data.video import Video, check_rate
    from mmpeft.runs.manifest import read_manifest
    from mmpeft.serving.client import named_server

    check_question(question, "the question")
    given = None if choices is None else read_choices(choices)
    if given is not None:
        check_choices(given, "--choices")
    require_positive("--max_new_tokens", max_new_tokens)
    require_positive("--frames", frames)
    check_rate(fps)
    images, videos = _listed(image), [Video(own, frames, fps) for own in _listed(video)]
    if not videos and (frames, fps) != (None, None):
        raise RefusedError(
            "--frames and --fps are of a --video, and none is named: leave them out, or name it"
        )
    if (served := named_server(server, api_key, run)) is not None:
        if videos:
            raise RefusedError("--server is sent images alone; a --video is asked about with --run")
        return _ask_server(served, question, images, adapter, max_new_tokens, given, answer_by)
    manifest = read_manifest(run)
    for own in (*images, *(name for each in videos for name in each.names)):
        load_image(own, manifest.image_config)
    manifest.finetune(adapter)

    from mmpeft.inference.reply import reply  # seconds of libraries, for what is not refused
    from mmpeft.inference.sampling import Sampling
    from mmpeft.inference.vlm import load

    sampling = None if max_new_tokens is None else Sampling(max_new_tokens)
    about = (*videos, *images) or None
    answer = reply(load(run), about, question, adapter, None, given, answer_by, sampling, "--")
    print(answer.text)
    for remark in answer.remarks:
        print(remark, file=sys.stderr)


def _listed(given: list[str] | str | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else given


def _ask_server(
    server: "Server",
    question: str,
    image: list[str],
    adapter: str | None,
    max_new_tokens: int | None,
    choices: list[str] | None,
    answer_by: str,
) -> None:
    if choices is None and answer_by == "rank":
        raise RefusedError(
            "--answer_by rank needs --choices: a server tells none that a finetune was trained on"
        )
    if choices is not None and answer_by == "generate":
        raise RefusedError('choices are for ranking, but answer_by is "generate": leave one of them out')
    model = server.choose(adapter)
    if choices is not None:
        return print(server.rank(question, image, model, choices)[0][0])
    wrote = False
    for piece in server.write(question, image, model, max_new_tokens):
        print(piece, end="", flush=True)
        wrote = wrote or bool(piece.strip())
    print()
    if not wrote:
        print(f"{model} ended its answer at once: it wrote nothing", file=sys.stderr)


def serve(
    run: str = RUN,
    adapters: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 it is frozen
    engine: LiveSettings = LiveSettings(),  # noqa: B008 it is frozen
) -> None:
    """Serves a run and its finetunes over HTTP, as OpenAI's API: all in one batch, until SIGTERM.

    Needs the extra [serve]: pip install 'mmpeft[serve]'.

    Args:
        run: directory that `mmpeft fit` wrote.
        adapters: more finetunes on the same base: folders in PEFT's format, or runs.
        host: address to listen at; one that others reach needs keys.
        port: port to listen at; 0 takes one that is free, which is printed.
        keys: YAML file of the admin's key and the tenants' with their finetunes; without one everybody may ask.
        limits: what one request may cost.
        engine: how much is answered together, and waits.
    """
    try:
        from mmpeft.serving.server import serve_run
    except ImportError as error:
        raise RefusedError(
            f"{error.name} is missing, which serving needs: pip install 'mmpeft[serve]'"
        ) from None
    serve_run(run, adapters or [], host, port, keys, limits, engine)


def inspect(arguments: list[str]) -> None:
    """Prints packed rows of a run token by token: segments, image features, and which tokens carry loss.

    No weights are loaded. A conversation without any token that carries loss is an error that names it.
    Takes the same --config and overrides as `mmpeft fit`.
    """
    parser = _Parser("mmpeft inspect", description=inspect.__doc__, formatter_class=RawTextHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", help="the run's YAML")
    where.add_argument("--run", help="a run directory, whose own config.yaml is taken")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="which data")
    parser.add_argument("--rows", type=int, default=1, help="how many packed rows of the first batch")
    own, overrides = parser.parse_beside(arguments, WHAT_WAS_WANTED)

    from mmpeft.tools.inspect_rows import print_rows
    from mmpeft.training.cli import VisionLanguageCLI

    where = ["--run", own.run] if own.run is not None else ["--config", own.config]
    cli = VisionLanguageCLI.parse([*where, *overrides])
    print_rows(cli.model, cli.datamodule, own.split, own.rows)


def sites(
    model: str,
    data: str | None = None,
    batches: int = 8,
    budget: int | None = None,
    image_root: str | None = None,
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
) -> None:
    """Prints which linears of a language model adapters would touch, and how many parameters each method trains.

    Reads the model's config alone. With data it loads the weights too and ranks the linears by how sensitive the
    loss is to them.

    Args:
        model: hub id, local folder, or embedded/smollm2-135m-instruct.
        data: data file or folder to rank the linears on, as in the configs' data.train.
        batches: how many batches of 8 conversations the ranking averages.
        budget: with data, also name the linears that so many LoRA parameters are best spent on.
        image_root: as the configs' data.image_root, folder that image paths start from.
        columns: as data.columns, such as "{image: img_name, answer: response}".
        ignore: as data.ignore, columns to leave out.
    """
    if data is None:
        if budget is not None:
            raise RefusedError("--budget chooses among ranked linears; give --data to rank them on")
        if image_root or columns or ignore:
            raise RefusedError("--image_root, --columns and --ignore say how --data is read; name that too")
        from mmpeft.tools.targets_table import print_sites

        return print_sites(model)
    from mmpeft.data.layouts.columns import Columns
    from mmpeft.tools.targets_ranking import print_ranking

    print_ranking(model, data, batches, budget, image_root, Columns(columns or {}, ignore or []))


def adapter(file: str, base: str | None = None) -> None:
    """Prints what an adapter file in PEFT's format would change where in a language model, or why it does not fit.

    Loads both, and compares the base's answer to a few fixed tokens with and without the adapter.

    Args:
        file: folder with adapter_config.json.
        base: hub id or local folder; by default what the file names as its base.
    """
    from mmpeft.tools.adapter_table import print_adapter

    print_adapter(resolve(file), base)
