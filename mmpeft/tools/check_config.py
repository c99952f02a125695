"""The data of a fit's config, checked as the fit will read it."""

from collections.abc import Iterable, Iterator

from mmpeft.data.image_tokens import image_tokens
from mmpeft.data.images import ImageConfig
from mmpeft.data.preferred import Sides
from mmpeft.data.sources import Reading
from mmpeft.errors import RefusedError
from mmpeft.models.vision import VisionEncoder, make_encoder
from mmpeft.paths import resolve
from mmpeft.tools.check_data import check_data
from mmpeft.tools.encoder_facts import print_facts
from mmpeft.tools.token_survey import TokenSurvey
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.finetune import Finetune, Split

SPLITS: tuple[Split, ...] = ("train", "val", "test", "predict")


def check_config(config: str, files: list[str], decode: bool, fix: str | None, pictures: str | None) -> None:
    """Prints what the data sets of a config hold.

    Args:
        config: its file.
        files: data to check in place of the config's own, read by its settings; of a file that the config does not
            name, as training data.
        decode: whether images are decoded.
        fix: see `check_data`.
        pictures: see `check_data`.

    Raises:
        RefusedError: the config is not right, or names no data.
        DataError: something is wrong with the data; the message lists it.
    """
    cli = VisionLanguageCLI.parse(["--config", config])
    module, data, finetunes = cli.model, cli.datamodule, cli.model.finetunes.values()
    readings = list(_readings(data, finetunes, files))
    if not readings:
        raise RefusedError(f"{config} names no data: set data.train, or name files beside --config")
    encoder = make_encoder(module.vision, load_weights=False)
    encoders = [encoder] if isinstance(encoder, VisionEncoder) else []
    print_facts(encoders, decode)
    tokens = TokenSurvey(
        *(module.language.name, data.template, data.packing.max_length, image_tokens(encoder)),
        ranks=_looked_at(finetunes),
    )
    image = ImageConfig() if module.vision is None else module.vision.image
    check_data(readings, data.columns, decode, image, encoders, tokens, fix, pictures)


def _looked_at(finetunes: Iterable[Finetune]) -> bool | Sides:
    """What all finetunes that learn from preferences need of every row; else whether any looks at choices."""
    every = [own.learns_from_choices for own in finetunes]
    sides = [own for own in every if isinstance(own, str)]
    return ("pairs" if "pairs" in sides else "labels") if sides and len(sides) == len(every) else any(every)


def _readings(data: VisionLanguageData, finetunes: Iterable[Finetune], files: list[str]) -> Iterator[Reading]:
    """Of every file once in each way that a split reads it."""
    named = {(path, split): None for split in SPLITS for path in data.paths[split]}
    named |= {
        (path, split): None for own in finetunes for split in SPLITS for path in own.paths.get(split, [])
    }
    if files:
        known = {path for path, _ in named}
        named = {each: None for each in named if each[0] in files}
        named |= {(path, "train"): None for path in files if path not in known}
    judged = any(own.learns_from_labels for own in finetunes)
    ways = {
        (path, split != "predict", split == "train", judged and split in ("train", "val")): None
        for path, split in named
    }
    for path, require_answers, each_caption, labelled in ways:
        yield Reading(
            *(str(resolve(path)), data.columns, data.image_root, data.task),
            require_answers=require_answers,
            each_caption=each_caption,
            labelled=labelled,
        )
