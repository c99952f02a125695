"""Commands that ask a run: `mmpeft explain` one question, `mmpeft caption` many images at once, and
`mmpeft join-captions` for what its jobs wrote apart."""

import sys
from pathlib import Path
from typing import Literal

from mmpeft.errors import RefusedError
from mmpeft.runs.layout import RUN


def explain(
    *,
    image: list[str],
    question: str,
    run: str = RUN,
    adapter: str | None = None,
    answer: str | None = None,
    output: str = "explanation.png",
) -> None:
    """Draws which patches of an image an answer rests on, checked by deletion, and what the finetune changed.

    Beside the PNG lies the same as JSON.

    Args:
        image: the image's file; several for a question about all of them.
        question: the question.
        run: directory that `mmpeft fit` wrote.
        adapter: a finetune of the run, or "base" for the frozen model; the run's first by default.
        answer: the answer to be explained; by default the finetune's own.
        output: .png file.
    """
    from mmpeft.data.images import load_image
    from mmpeft.data.records import check_question
    from mmpeft.runs.manifest import read_manifest

    check_question(question, "the question")
    path = png_file(output)
    manifest = read_manifest(run)
    for each in image:
        load_image(each, manifest.image_config)
    manifest.finetune(adapter)

    from mmpeft.inference.vlm import load  # seconds of libraries, for what is not refused

    explanation = load(run).explain(tuple(image), question, adapter, answer)
    explanation.save(path)
    print(explanation.answer)
    for method in explanation.heat_maps:
        print(explanation.told(method), file=sys.stderr)
    for reason in explanation.refused.values():
        print(reason, file=sys.stderr)
    print(f"written: {path} and {path.with_suffix('.json')}", file=sys.stderr)


def png_file(output: str) -> Path:
    """Raises:
    RefusedError: its name says that it is another kind of file.
    """
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise RefusedError(f"--output is {output!r}; wanted a .png file, beside which the JSON lies")
    return path


def caption(
    inputs: list[str],
    run: str = RUN,
    output: str = "captions.jsonl",
    format: Literal["jsonl", "parquet"] | None = None,
    adapter: list[str] | None = None,
    question: list[str] | None = None,
    captions: bool = False,
    choices: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    threads: int = 1,
    workers: int | None = None,
    shard: str | None = None,
    engine: Literal["local", "ray"] = "local",
    overwrite: bool = False,
    strict: bool = False,
    frames: int | None = None,
    fps: float | None = None,
) -> None:
    """Captions every image and video of folders, tables and tars; run it again to go on where it stopped.

    One row per image or video, in a fixed order; with several finetunes or questions one for each:

        {"image": "2024/cat.jpg", "caption": "a cat on a sofa", "adapter": "default", "log_probability": -3.1415}
        {"image": "2024/cut.jpg", "error": "'2024/cut.jpg': cannot be decoded (...)"}
        {"video": "2024/dog.mp4", "caption": "a dog on grass", "adapter": "default", "log_probability": -2.7183}

    A run without finetunes, which trained the projector alone, writes rows without "adapter".

    Args:
        inputs: folders of images, globs in quotes, images, tars, and tables (.csv, .jsonl, .parquet) whose rows name or
            hold them.
        run: directory that `mmpeft fit` wrote.
        output: .jsonl or .parquet file, or a new folder for one; its shards lie beside it in <output>.shards.
        format: of the file in a folder; jsonl by default.
        adapter: finetunes of the run, or "base" for the frozen model; the run's first by default.
        question: questions to answer about every image, each in quotes, in place of captions.
        captions: write captions too, where there are questions.
        choices: answers to rank instead of writing, such as red,green,blue.
        max_new_tokens: longest answer in tokens; by default the longest that the run was trained on, and at least 64.
        batch_size: images answered together.
        threads: cores of each worker, where there is no GPU.
        workers: processes that work at once; by default one for each GPU, or one for each core as memory allows.
        shard: this job's part of many, such as 2/8 for the second of eight; the last to end joins all.
        engine: local, or ray for a cluster; needs the extra [ray].
        overwrite: start again instead of going on.
        strict: exit with code 1 if an image has an error.
        frames: how many frames of each video, evenly spaced, are shown in one prompt; by default 8, and 0 leaves
            videos out. They need the extra [video].
        fps: frames of each second instead; with frames at most so many.
    """
    from mmpeft.data.choices import read_choices
    from mmpeft.inference import captioning

    given = None if choices is None else read_choices(choices)
    how = adapter, question, captions, given, max_new_tokens, batch_size, threads, frames, fps
    task = captioning.Task(*how)
    errors = captioning.caption(inputs, run, output, task, format, workers, shard, engine, overwrite)
    if strict and errors:
        sys.exit(1)


def join_captions(
    folders: list[str], output: str = "captions.jsonl", format: Literal["jsonl", "parquet"] | None = None
) -> None:
    """Joins what `mmpeft caption --shard` wrote on machines without a common disk.

    Args:
        folders: the --output of every job.
        output: .jsonl or .parquet file, or a new folder for one.
        format: of the file in a folder; jsonl by default.
    """
    from mmpeft.inference import captioning

    captioning.join(folders, output, format)
