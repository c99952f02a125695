"""The manifest, ``mmpeft.json``: what a run belongs to, in plain data."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpeft.data.choices import KnownChoices, choices_of
from mmpeft.data.images import ImageConfig
from mmpeft.data.records import Record
from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.files import write_json
from mmpeft.models.vision_config import VisionConfig
from mmpeft.names import RESERVED_NAME, unknown_finetune
from mmpeft.options import command_line
from mmpeft.runs.layout import CONFIG
from mmpeft.runs.layout import MANIFEST as MANIFEST
from mmpeft.typed_json import as_dataclass

if TYPE_CHECKING:
    from mmpeft.models.language import LanguageConfig

LEAST_NEW_TOKENS = 64
NEW_IN_FORMAT_2 = (
    "projectors",
    "answer_tokens",
    "adapter_files",
    "choices",
    "without_images",
    "self_check",
    "places",
)
FORMAT = 2
"""Format 1 kept all projectors in one file beside the adapters; it is read, never written."""


@dataclass
class Manifest:
    """The content of ``mmpeft.json``."""

    language: dict[str, Any]
    """`LanguageConfig` as it was trained with."""
    vision: dict[str, Any] | None
    """`VisionConfig` as it was trained with; None for text alone."""
    template: dict[str, Any]
    """`Template.settings`: layout, longest conversation, and what else decides how it reads."""
    identity: dict[str, Any]
    """Hashes of the base's config and weights, the encoder's weights and transform, and the tokenizer."""
    adapters: list[str] = field(default_factory=list)
    adapter_files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Finetune -> file of its adapter -> sha256; runs of before there was this have none."""
    projectors: dict[str, str] = field(default_factory=dict)
    """Finetune, or "base" for rows without one -> hash of the projector that its images go through."""
    projector: str = ""
    """In format 1, the hash of all projectors together."""
    base: str = ""
    """Hash of every byte of the frozen base as it was in memory when the training ended."""
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    """What was trained and what it took, in words."""
    instructions: dict[str, str | None] = field(default_factory=dict)
    """The tasks it was trained on, the most frequent first, with the instruction where a task has just one."""
    answer_tokens: int = 0
    """Tokens of the longest answer that it was trained on."""
    choices: dict[str, KnownChoices] = field(default_factory=dict)
    """Finetune, or "base" where the projector alone was trained -> the choices that its data listed."""
    without_images: list[str] = field(default_factory=list)
    """Finetunes, or "base", that were trained on questions without an image too."""
    self_check: dict[str, Any] = field(default_factory=dict)
    """How the base must be read for its numbers to be its own, and under which versions that was found out."""
    places: dict[str, str] = field(default_factory=dict)
    """"language" and "vision" -> where their files lay, for those that were named by a relative path."""
    format: int = FORMAT

    @property
    def vision_config(self) -> VisionConfig | None:
        if self.vision is None:
            return None
        return self.located_vision(as_dataclass(VisionConfig, self.vision, f"{MANIFEST}, vision"))

    def located_language(self, config: "LanguageConfig") -> "LanguageConfig":
        """The config of the run's language model, with the folder where it is found; any other as it is."""
        return replace(config, name=self._located("language", config.name, self.language.get("name")))

    def located_vision(self, config: VisionConfig) -> VisionConfig:
        """The config of the run's encoder, with the file where its weights are found; any other as it is."""
        own = self.vision.get("weights") if self.vision else None
        return replace(config, weights=self._located("vision", config.weights, own))

    def _located(self, part: str, name: Any, own: str | None) -> Any:
        """Seen from the working directory, or where it lay in the training: a run may be asked from any folder.

        Raises:
            MissingFileError: neither; a hub must not be asked for a model that is called like a folder.
        """
        place = self.places.get(part)
        if name != own or place is None or Path(name).exists():
            return name
        if Path(place).exists():
            return place
        raise MissingFileError(
            f"the run's {part} model {name!r} is neither in {Path.cwd()} nor at {place}, where it was trained with it; "
            f"put it back, or write its place into {MANIFEST}"
        )

    @property
    def image_config(self) -> ImageConfig:
        """How the run reads image files."""
        return ImageConfig() if (config := self.vision_config) is None else config.image

    @property
    def default_task(self) -> str | None:
        """The identifier of the task that the run saw most; None where its data had no identifiers."""
        return next(iter(self.instructions), None) or None

    def finetune(self, name: str | None) -> str:
        """The finetune that is asked for, or "base"; of None the run's first.

        Raises:
            UnknownNameError: an unknown one.
        """
        known = [*self.adapters, RESERVED_NAME]
        if name is not None and name not in known:
            raise unknown_finetune(name, known)
        return name or known[0]

    def choices_of(self, adapter: str | None, record: Record) -> list[str] | None:
        """What a finetune's (None: the base's) training data listed for a question, as `data.choices` tells it."""
        return choices_of(self.choices.get(adapter or RESERVED_NAME, {}), record)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that an answer may have where nobody says otherwise: as many as the longest that was learnt."""
        return max(LEAST_NEW_TOKENS, self.answer_tokens)


def places_of(language: "LanguageConfig", vision: "VisionConfig | None") -> dict[str, str]:
    """What `Manifest.places` says of a base that is being trained on."""
    named = {"language": language.name, "vision": vision.weights if vision else None}
    return {
        part: str(Path(name).absolute())
        for part, name in named.items()
        if name is not None and not Path(name).is_absolute() and Path(name).exists()
    }


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Writes ``mmpeft.json``; one of format 1 stays one, whose files lie as they did."""
    content = asdict(manifest)
    if manifest.format == 1:
        content = {key: value for key, value in content.items() if key not in NEW_IN_FORMAT_2}
    write_json(Path(directory) / MANIFEST, content)


def require_adapters(directory: str | Path, manifest: Manifest) -> None:
    """Raises:
    RefusedError: there are no finetunes, as in a merged folder.
    """
    if not manifest.adapters:
        raise RefusedError(
            f"{directory} has no adapters: its language model is the base, and there is nothing to merge or combine"
        )


def choose_adapter(directory: str | Path, manifest: Manifest, name: str | None) -> str:
    """The finetune of this name; of None the run's first.

    Raises:
        RefusedError: there is none.
    """
    require_adapters(directory, manifest)
    if name is not None and name not in manifest.adapters:
        raise RefusedError(f"{directory} has no adapter {name!r}; it has {', '.join(manifest.adapters)}")
    return name or manifest.adapters[0]


def no_run(directory: str | Path) -> str:
    """Why a directory without manifest is none that can be asked, and what to do."""
    if (Path(directory) / CONFIG).exists():
        return (
            f"the fit of {directory} has not ended: it has no {MANIFEST} yet. Go on with "
            f"`{command_line('fit', '--run', directory, '--resume')}`"
        )
    return (
        f"{directory} is no run of mmpeft: it has no {MANIFEST}. Train it with `mmpeft fit` (`make quickstart` makes "
        "runs/quickstart), or name the directory of one"
    )


def read_manifest(directory: str | Path) -> Manifest:
    """Raises:
    RefusedError: not a run directory, or one of a newer format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise RefusedError(no_run(directory))
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RefusedError(f"{path} is damaged ({error}); write it again with `mmpeft fit`") from None
    if isinstance(content, dict) and content.get("format") not in range(1, FORMAT + 1):
        raise RefusedError(
            f"{path} has format {content.get('format')!r}; this version reads formats 1 to {FORMAT}"
        )
    return as_dataclass(Manifest, content, str(path))
