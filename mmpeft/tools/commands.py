"""The commands that look and change nothing: the check of data sets, the feature cache, two tests compared; the other
tools' are in `mmpeft.commands`."""

import inspect
import sys
from typing import TYPE_CHECKING, Any, Literal

from mmpeft.errors import RefusedError
from mmpeft.paths import resolve

if TYPE_CHECKING:
    from mmpeft.data.images.config import ImageConfig


def cache(
    action: Literal["list", "verify", "clear"], folder: str | None = None, encoder: str | None = None
) -> None:
    """Lists, checks or deletes the features of images that fits have kept on disk.

    A fit writes the features of images that it will see again, once per encoder, and says before how many GB; fits,
    tests, `mmpeft ask`, captions and the demo read them. `data.cache.max_gb` limits them, `data.cache.build=never`
    writes none. What is deleted is encoded again when it is needed.

        mmpeft cache list
        mmpeft cache verify
        mmpeft cache clear --encoder 3f0c

    Args:
        action: list what each encoder's features take; verify reads every byte, deletes shards that are not as they
            were written, and ends with code 1 if there were any; clear deletes.
        folder: the cache's, as in the configs' data.cache; by default that of the mmpeft home.
        encoder: of one encoder alone: its folder's name in the list, or how it begins.
    """
    from mmpeft.tools.cache_folders import clear_cache, list_cache, verify_cache

    if action == "list":
        list_cache(folder, encoder)
    elif action == "clear":
        clear_cache(folder, encoder)
    elif verify_cache(folder, encoder):
        sys.exit(1)


def check(
    data: list[str],
    config: str | None = None,
    image_root: str | None = None,
    task: str | None = None,
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
    decode: bool = True,
    language: str | None = None,
    template: Literal["minigpt", "chat", "plain"] = "minigpt",
    max_length: int = 1024,
    encoder: list[str] | None = None,
    layer: int = -1,
    image_size: int | None = None,
    fit: Literal["crop", "pad", "squash", "tile"] = "crop",
    max_tiles: int | None = None,
    image: "ImageConfig | None" = None,
    fix: str | None = None,
    pictures: str | None = None,
) -> None:
    """Reads data files and decodes every image of them, and lists everything that is wrong.

    Ends with code 1 if anything is. Where keys of rows are not understood, it says under which --columns they would be.

        mmpeft check train.jsonl val.jsonl
        mmpeft check --config configs/mine/questions.yaml
        mmpeft check train.jsonl --language embedded/smollm2-135m-instruct --encoder tf_efficientnet_lite0
        mmpeft check train.jsonl --fix clean.jsonl --pictures samples.png
        mmpeft check scans.jsonl --image.scale window:40:400 --image.max_pixels 170000000

    Args:
        data: data files or folders, as in the configs' data.train; with --config by default those that it names.
        config: the YAML of a fit, which then says all that the options below say of how data and images are read, up to
            fix and pictures.
        image_root: folder that image paths start from; by default the data file's.
        task: identifier for rows that have none.
        columns: as data.columns, such as "{image: img_name, answer: response}".
        ignore: as data.ignore, columns to leave out.
        decode: false looks at the images' files without decoding them.
        language: a language model (its tokenizer and config alone) to count tokens with, and to show three rows as it
            will read them.
        template: as the configs' data.template.
        max_length: as the configs' data.packing.max_length.
        encoder: timm models to try too, without their weights: their tokens, whether the layer is the last before their
            head, and what of the images they cut off.
        layer: of the encoder, as in the configs' model.vision.layer.
        image_size: of the encoder, as in the configs' model.vision.image_size.
        fit: of the encoder, as in the configs' model.vision.fit; under tile an image's tokens depend on its shape.
        max_tiles: of the encoder, as in the configs' model.vision.max_tiles.
        image: how image files become pixels, as in the configs' model.vision.image.
        fix: a new JSONL file for what is good; what is not is written to NAME.quarantine.jsonl with the reasons.
        pictures: a PNG file for 12 random rows as the model sees them.
    """
    if config is not None:
        _refuse_beside_config(
            *({"image_root": image_root, "task": task, "columns": columns, "ignore": ignore},),
            *({"language": language, "template": template, "max_length": max_length, "encoder": encoder},),
            *(
                {
                    "layer": layer,
                    "image_size": image_size,
                    "fit": fit,
                    "max_tiles": max_tiles,
                    "image": image,
                },
            ),
        )
        from mmpeft.tools.check_config import check_config

        return check_config(config, data, decode, fix, pictures)
    if not data:
        raise RefusedError(
            "no data is named: mmpeft check FILE_OR_FOLDER..., or --config FIT.yaml for that of a fit"
        )
    _refuse_settings_of_nothing(encoder, (layer, image_size, fit, max_tiles), language, template, max_length)
    if image and not (decode or encoder or pictures):
        raise RefusedError(
            "--image says how images are decoded, and --decode false decodes none; leave one out"
        )

    from mmpeft.data.images.config import ImageConfig
    from mmpeft.data.layouts.columns import Columns
    from mmpeft.data.sources import Reading
    from mmpeft.tools.check_data import check_data

    image = image or ImageConfig()
    how = {"layer": layer, "image_size": image_size, "fit": fit, "max_tiles": max_tiles, "image": image}
    encoders = _made_encoders(encoder, how, decode) if encoder else []
    tokens = None
    if language:
        from mmpeft.data.image_tokens import image_tokens
        from mmpeft.tools.token_survey import TokenSurvey

        tokens = TokenSurvey(language, template, max_length, image_tokens(encoders[0]) if encoders else 1)
        if not encoders:
            print("an image is counted as 1 token; --encoder NAME counts its features")
    own = Columns(columns or {}, ignore or [])
    readings = [Reading(str(resolve(source)), own, image_root, task) for source in data]
    check_data(readings, own, decode, image, encoders, tokens, fix, pictures)


def _refuse_beside_config(*given: dict[str, Any]) -> None:
    """Raises:
    RefusedError: a setting of the config is given as an option, too.
    """
    parameters = inspect.signature(check).parameters
    both = [name for own in given for name, value in own.items() if value != parameters[name].default]
    if both:
        raise RefusedError(
            f"--config says how data is read, and {', '.join(f'--{name}' for name in both)} too: leave one of them out"
        )


def _refuse_settings_of_nothing(
    encoder: list[str] | None,
    of_encoder: tuple[int, int | None, str, int | None],
    language: str | None,
    template: str,
    max_length: int,
) -> None:
    """Raises:
    RefusedError: a setting of what is not named, or a count of what is named twice.
    """
    if not encoder and of_encoder != (-1, None, "crop", None):
        raise RefusedError(
            "--layer, --image_size, --fit and --max_tiles are of an encoder, and none is named; add --encoder NAME"
        )
    if not language and (template, max_length) != ("minigpt", 1024):
        raise RefusedError(
            "--template and --max_length need a tokenizer, and none is named; add --language MODEL"
        )
    if language and encoder and len(encoder) > 1:
        raise RefusedError(
            f"--language counts the tokens of one encoder, and {len(encoder)} are named; name one"
        )


def _made_encoders(names: list[str], how: dict[str, Any], decode: bool) -> list[Any]:
    """`VisionEncoder`s without weights; what is to know of each is printed. The annotation does not name them, as the
    parser imports what this file names, and torch with it."""
    from mmpeft.models.vision import VisionConfig, VisionEncoder
    from mmpeft.tools.encoder_facts import print_facts

    encoders = [VisionEncoder(VisionConfig(name, **how), load_weights=False) for name in names]
    print_facts(encoders, decode)
    return encoders


def compare(
    run_a: str,
    run_b: str,
    adapter_a: str | None = None,
    adapter_b: str | None = None,
    metrics: list[str] | None = None,
    output: str | None = None,
) -> None:
    """Compares two tests of the same questions: is B better than A, by how much, and would more questions tell?

    Tells of every metric that scores single answers both means, their difference with a 95 % interval, a paired test
    (McNemar's exact one, or sign flips; questions about one image count as one), and how many questions would show
    such a difference with a power of 80 %. Tests of other questions are refused, with those that differ.

        mmpeft compare runs/lora runs/tfew

    Args:
        run_a: folder that `mmpeft test` wrote its results into: a run directory, or one of its tests/.
        run_b: the same of the other.
        adapter_a: which finetune, where several were tested.
        adapter_b: the same of the other.
        metrics: by name, as [exact_match,anls]; by default those that fit.
        output: file to write the figures to, as JSON.
    """
    from pathlib import Path

    from mmpeft.evaluation.compare_runs import compare_tests, read_test
    from mmpeft.evaluation.compare_table import as_data, print_comparison
    from mmpeft.files import write_json

    compared = compare_tests(read_test(run_a, adapter_a), read_test(run_b, adapter_b), metrics)
    print_comparison(compared)
    if output is not None:
        write_json(Path(output), as_data(compared))


def init(
    *,
    data: str | None = None,
    base: str | None = None,
    goal: Literal["answer", "keep", "few", "caption"] | None = None,
    output: str = "config.yaml",
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
    image_root: str | None = None,
    start_from: str | None = None,
    encoder: str | None = None,
    trial: bool = True,
) -> None:
    """Writes a config from three answers: your data, the language model, and what for.

    Looks at all rows as `mmpeft check` does, chooses rank, learning rate, batch and packing, tries four steps, and says
    how much memory and how many minutes the fit will take here. What is not given is asked for.

        mmpeft init --data data/train.jsonl --goal answer --output mine.yaml

    Args:
        data: training data, as data.train; val and test beside it are found by their names.
        base: language model: hub id, local folder, or embedded/smollm2-135m-instruct.
        goal: answer learns as well as can be (LoRA); keep forgets least (LoRA on the attention); few is for a few
            examples with choices (T-Few); caption trains the projector alone, stage 1.
        output: the config.
        columns: as data.columns, such as "{image: img_name, answer: response}".
        ignore: as data.ignore, columns to leave out.
        image_root: as data.image_root, folder that image paths start from.
        start_from: run of stage 1 to begin from.
        encoder: timm model, which is fetched; by default the embedded one.
        trial: false tries no steps, and says neither memory nor time.
    """
    from mmpeft.data.layouts.columns import Columns
    from mmpeft.tools import begin

    own = Columns(columns or {}, ignore or [])
    begin.init(data, base, goal, output, own, image_root, start_from, encoder, trial)
