"""Building what a run starts from: the frozen parts, and finetunes as adapters of an earlier run or fresh ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from mmpeft.adapters import AdapterBank, AdapterConfig, PromptConfig, PTuningConfig
from mmpeft.adapters.entry import MethodPart
from mmpeft.data.spans import Layout
from mmpeft.data.template import LAYOUTS, LayoutName, current_settings, layout_of
from mmpeft.errors import RefusedError
from mmpeft.inference.self_check import ensure_checked
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig, load_tokenizer
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.vision import VisionConfig
from mmpeft.runs.files import BASE, LeftOut, load_trained, tell_left_out
from mmpeft.runs.identity import check_identity, describe
from mmpeft.runs.manifest import MANIFEST, Manifest, read_manifest
from mmpeft.training.finetune import Finetune
from mmpeft.training.references import reference_of
from mmpeft.training.sharding import Sharded, check_finetunes
from mmpeft.training.target_choice import choose_sites, has_budget

NO_VALIDATION = ": for no validation set trainer.limit_val_batches to 0"
DIVIDED_BY = {
    **{"accumulate_grad_batches": ""},
    **{"val_check_interval": NO_VALIDATION, "check_val_every_n_epoch": NO_VALIDATION},
}
"""Setting of the trainer that may not be 0 -> what to set instead."""
COMPARED_BY_SITES = {"target_modules", "feedforward_modules", "layers"}
"""Fields of adapter configs that a file writes otherwise than the user did."""


def check_settings(
    trainer: Any, finetunes: Mapping[str, Finetune], train_projector: bool, stage: str
) -> None:
    """Raises:
    RefusedError: settings that cannot be together.
    """
    if stage == "fit" and not (train_projector or any(own.adapter for own in finetunes.values())):
        raise RefusedError("nothing would train: give an adapter, or set train_projector to true")
    if len(finetunes) > 1 and trainer.accumulate_grad_batches > 1:
        raise RefusedError(
            "a joint run takes one batch of each finetune a step; set accumulate_grad_batches to 1"
        )
    check_finetunes(trainer, finetunes)
    if str(trainer.precision).endswith("-mixed"):
        raise RefusedError(
            f"trainer.precision is {trainer.precision}, which rounds anew in every operator and scales gradients; what "
            "trains is in float32 here and the base in a dtype of its own: set model.language.dtype (bfloat16, "
            "float32), and trainer.precision to 32-true, its default"
        )
    if stage == "fit":
        _check_numbers(trainer)


def _check_numbers(trainer: Any) -> None:
    """Of Lightning's settings, those that it takes although they mean nothing: a negative norm trains uphill."""
    for name, instead in DIVIDED_BY.items():
        value = getattr(trainer, name, None)  # a val_check_interval in time is not there
        if isinstance(value, int | float) and not value > 0:
            raise RefusedError(f"trainer.{name} is {value}; it must be above 0{instead}")
    norm = trainer.gradient_clip_val
    if norm is not None and not norm >= 0:
        raise RefusedError(
            f"trainer.gradient_clip_val is {norm:g}; it is a norm of at least 0, which does not clip"
        )
    if (algorithm := trainer.gradient_clip_algorithm) not in (None, "norm"):
        raise RefusedError(
            f"trainer.gradient_clip_algorithm is {algorithm.value!r}; each finetune is clipped by "
            "its own norm: set it to norm, or to null"
        )


def check_length(model: MultimodalModel, max_length: int) -> None:
    """Raises:
    RefusedError: rows may be longer than the language model has positions.
    """
    limit = model.reader.position_limit
    if limit is not None and max_length > limit.count:
        raise RefusedError(
            f"data.packing.max_length is {max_length}, but the language model {limit.why}: set data.packing.max_length "
            f"to {limit.count} or less"
        )


def run_to_begin_from(trainer: Any, start_from: str | None) -> tuple[str | None, bool]:
    """The run directory, and whether it is this very one: outside of fit, a run's own results are meant."""
    directory = Path(trainer.default_root_dir)
    own = trainer.state.fn != "fit" and (directory / MANIFEST).exists()
    return (str(directory), True) if own else (start_from, False)


@dataclass
class Started:
    """The model of a run before fresh adapters are added, and what it belongs to."""

    model: MultimodalModel
    tokenizer: Any
    layout: Layout
    identity: dict[str, Any]
    """Hashes of the frozen parts."""
    self_check: dict[str, Any]
    """How the language model is read, as `ensure_checked` found out."""
    manifest: Manifest | None = None
    """Of the run that it goes on from, or answers for."""
    began_as: dict[str, str] = field(default_factory=dict)
    """Finetune -> the adapter of an earlier run that it begins as."""
    has_trained: bool = False
    """Whether these are the finetunes of a run that has ended, which no longer says what they began as."""


def build_start(
    language: LanguageConfig,
    vision: VisionConfig | None,
    finetunes: Mapping[str, Finetune],
    device: torch.device,
    seed: int,
    template: LayoutName,
    source: str | None,
    start_adapter: str | None,
    own_run: bool,
    left_out: LeftOut | None = None,
    sharded: Sharded | None = None,
) -> Started:
    """Frozen parts, projectors, and the adapters that an earlier run has.

    Args:
        language: the language model.
        vision: the encoder; None is text alone.
        finetunes: of several each gets a projector of its own.
        device: of the model.
        seed: start of fresh projectors.
        template: layout of the conversations.
        source: run to go on from.
        start_adapter: see `earlier_adapters`.
        own_run: whether ``source`` is the run of these very finetunes.
        left_out: takes the finetunes whose files cannot be used; None refuses the run for one of them.
        sharded: the processes that hold the language model together; None holds all of it here.

    Raises:
        RefusedError: the earlier run is of another base, or lacks an adapter.
    """
    if source is not None and not own_run:
        _check_source(source)
    earlier = None if source is None else read_manifest(source)
    if earlier is not None and own_run:
        language = earlier.located_language(language)
        vision = earlier.located_vision(vision) if vision else None
    tokenizer = load_tokenizer(language.name)
    layout = _layout(tokenizer, template, source if own_run else None)
    names = list(finetunes)
    slots = {name: slot for slot, name in enumerate(names, start=1)} if len(names) > 1 else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(language, vision, device, slots, sharded.place if sharded else None)
    if sharded is not None:
        sharded.idle = model.idle
    identity = describe(language, model, tokenizer)
    if earlier is not None:
        check_identity(earlier, identity, str(source), vision)
    checked = ensure_checked(model, language, earlier.self_check if earlier else {})
    started = Started(model, tokenizer, layout, identity, checked, earlier)
    if source is not None and earlier is not None:
        wanted = {name: finetune.adapter for name, finetune in finetunes.items()}
        there = earlier.adapters
        sources = earlier_adapters(wanted, there, source, None if own_run else start_adapter, own_run)
        started.began_as, started.has_trained = ({} if own_run else sources), own_run
        shared = BASE if slots else sources.get(names[0], names[0])
        load_trained(source, model, sources, shared, left_out)
        tell_left_out(source, left_out or {}, model.bank.names)
    for finetune in finetunes.values():
        if finetune.settings.kind.has_reference and not own_run:
            reference_of(finetune, started.began_as)  # refused before images are encoded
    return started


def _layout(tokenizer: Any, template: LayoutName, own_run: str | None) -> Layout:
    """The layout that a config wants; a run that is asked again reads as it was trained."""
    if own_run is None:
        return LAYOUTS[template](tokenizer)
    settings = current_settings(read_manifest(own_run).template)
    if settings["layout"] != template:
        raise RefusedError(
            f"{own_run} was trained with the template {settings['layout']}, but data.template is {template}: leave it "
            "as it was"
        )
    return layout_of(tokenizer, settings, own_run)


def _check_source(source: str) -> None:
    """Before anything is loaded."""
    try:
        read_manifest(source)
    except RefusedError as error:
        raise RefusedError(
            f"model.start_from: {error}. Run that stage first, or set model.start_from to null to begin from nothing"
        ) from None


def earlier_adapters(
    wanted: Mapping[str, AdapterConfig | None],
    there: Sequence[str],
    source: str,
    start_adapter: str | None,
    own_run: bool,
) -> dict[str, str]:
    """Finetune -> the adapter of an earlier run that it begins as.

    Args:
        wanted: finetune -> its method; None trains the projector alone.
        there: the adapters of the run ``source``.
        start_adapter: of these, what finetunes begin as that have none of their own name there.
        own_run: whether it is the run of these very finetunes, so that none may lack.

    Raises:
        RefusedError: the run lacks an adapter.
    """
    missing = [name for name, config in wanted.items() if config and name not in there]
    if missing and own_run:
        raise RefusedError(
            f"{source} has no adapter {missing[0]!r}, which this config names; it has "
            f"{', '.join(there) or 'none'}: use the config that the run was made with"
        )
    if start_adapter is None:
        return {name: name for name in wanted if name in there}
    if start_adapter not in there:
        raise RefusedError(f"{source} has no adapter {start_adapter!r}; it has {', '.join(there) or 'none'}")
    return {name: name if name in there else start_adapter for name in wanted}


def add_adapters(
    model: MultimodalModel,
    finetunes: Mapping[str, Finetune],
    seed: int,
    some_batches: Callable[[str, int], Sequence[Any]],
    source: str,
    answering: bool,
) -> None:
    """Checks the adapters that were loaded and adds those that were not.

    Args:
        model: holds the loaded ones already.
        finetunes: all of the run.
        seed: start of the fresh ones that have none of their own.
        some_batches: (finetune, number) -> training data, for methods that choose their places by it.
        source: where the loaded ones come from, for the error.
        answering: whether nothing is to be trained.

    Raises:
        RefusedError: a loaded adapter is not what is wanted.
    """
    bank, wanted = model.bank, {name: finetune.adapter for name, finetune in finetunes.items()}
    loaded = {name: config for name, config in wanted.items() if config and name in bank}
    for name, config in loaded.items():
        _check_loaded(bank, name, config, source, answering)
        bank.restrict(name, config)  # files do not tell which features "auto" left alone
    new = {  # all places are chosen while the model is still the base
        name: choose_sites(config, model, lambda number, name=name: some_batches(name, number))
        for name, config in wanted.items()
        if config and name not in loaded
    }
    for part in (part for config in new.values() for part in bank.plan(config)):
        part.config.check_fits([bank.features(path, part.config) for path in part.sites])
    for name, config in new.items():
        own = finetunes[name].seed
        bank.add(name, config, seed if own is None else own)
    for parameter in bank.parameters():
        # with adapter: null, a loaded one serves but stays as it is
        parameter.requires_grad_(any(config is not None for config in wanted.values()))


def _check_loaded(bank: AdapterBank, name: str, wanted: AdapterConfig, source: str, answering: bool) -> None:
    """A config that differs from the adapter it goes on from would be ignored without a word."""
    loaded = bank.entry(name)
    pairs = list(zip_longest(wanted.parts(), loaded.parts))
    if not all(part and config and _fits(bank, config, part, answering) for config, part in pairs):
        raise RefusedError(
            f"adapter {name!r} of {source} is {loaded.config}, but this run wants "
            f"{wanted}; use the same settings to go on with it, or another name to begin a new one (P-tuning's "
            "network is not stored: go on with a PromptConfig)"
        )


def _fits(bank: AdapterBank, wanted: AdapterConfig, loaded: MethodPart, answering: bool) -> bool:
    if isinstance(wanted, PTuningConfig) and answering:
        # files hold what the network made, not the network
        wanted = PromptConfig(wanted.num_virtual_tokens)
    settings = vars(wanted).keys() - COMPARED_BY_SITES - {"start"}
    same = type(wanted) is type(loaded.config) and all(
        getattr(wanted, field) == getattr(loaded.config, field) for field in settings
    )
    # chosen under a budget, the places depend on the data that it began with
    if has_budget(wanted):
        return same
    places = {(path, wanted.place(path)) for path in bank.sites(wanted)}
    return same and places == {(path, loaded.config.place(path)) for path in loaded.sites}
