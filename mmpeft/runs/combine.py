"""Combines (merges) several finetunes of a run into one, as a run of its own that `mmpeft ask` takes."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mmpeft.adapters.bank import AdapterBank
from mmpeft.adapters.combine import combine, federated_average
from mmpeft.data.choices import KnownChoices
from mmpeft.errors import RefusedError
from mmpeft.files import whole_folder
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.runs.files import load_run, require_empty, save_run
from mmpeft.runs.manifest import Manifest, read_manifest, require_adapters

FEDERATED = "federated"
"""The mean of clients that trained one config apart, beside `adapters.combine`'s methods."""


def combine_run(
    run: str | Path,
    adapters: Sequence[str] | None = None,
    name: str = "combined",
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    projector_of: str | None = None,
    output: str | Path | None = None,
) -> Path:
    """Combines finetunes of a run and writes a run directory with the result and the projector it goes with.

    The arguments are those of `mmpeft combine`.

    Returns:
        The directory written.

    Raises:
        RefusedError: no such finetune, a folder that is not empty, finetunes of different projectors, or what
            `combine` and `load_run` refuse. Nothing is written then.
    """
    directory = Path(output) if output is not None else Path(run) / "combined" / name
    require_empty(directory)
    require_adapters(run, read_manifest(run))
    model, _, manifest = load_run(run)
    chosen = model.bank.names if adapters is None else [*adapters]
    if len(set(chosen)) < max(2, len(chosen)):
        raise RefusedError(f"found {chosen} to combine; wanted two or more finetunes of {run}, each once")
    projector = _shared_projector(model, chosen, projector_of)
    if method == FEDERATED:
        _add_average(model.bank, chosen, name, weights)
    else:
        combine(model.bank, chosen, name, method, weights, density, rank)
    _keep_only(model, name, projector)
    shares = "" if weights is None else f", weighted {', '.join(f'{weight:g}' for weight in weights)}"
    manifest.facts = {"combined": f"{method} of {', '.join(chosen)}{shares}, from {run}"}
    manifest.metrics = {}
    manifest.choices = {name: own} if (own := _shared_choices(manifest, chosen)) else {}
    manifest.without_images = [name] if {*chosen} <= {*manifest.without_images} else []
    with whole_folder(directory, sum(own.nbytes for own in model.bank.parameters())) as unfinished:
        save_run(unfinished, manifest, model)
    return directory


def _shared_projector(
    model: MultimodalModel, chosen: Sequence[str], projector_of: str | None
) -> dict[str, torch.Tensor]:
    """The projector of all these finetunes, or of the one that is named.

    Raises:
        UnknownNameError: no such finetune.
        RefusedError: they read images through different ones and none is named, or one that is not among them.
    """
    for name in chosen:
        model.bank.entry(name)
    own = {name: model.projector.tensors(model.projector_slots.get(name, 0)) for name in chosen}
    if projector_of is not None:
        if projector_of not in own:
            raise RefusedError(f"--projector_of is {projector_of!r}; wanted one of {', '.join(own)}")
        return own[projector_of]
    first, *others = own
    differ = [
        name for name in others if any(not torch.equal(own[name][key], own[first][key]) for key in own[first])
    ]
    if differ:
        raise RefusedError(
            f"{first} and {', '.join(differ)} were trained with different projectors, of which the combination can "
            "read images through one alone: name its finetune with --projector_of"
        )
    return own[first]


def _shared_choices(manifest: Manifest, chosen: Sequence[str]) -> KnownChoices:
    """Of every task that one of these finetunes learnt by choosing, the choices that all who did agree on."""
    known = [manifest.choices[name] for name in chosen if name in manifest.choices]
    tasks = {task: [own[task] for own in known if task in own] for own in known for task in own}
    return {task: own[0] if all(other == own[0] for other in own) else {} for task, own in tasks.items()}


def _add_average(
    bank: AdapterBank, clients: Sequence[str], name: str, num_examples: Sequence[float] | None
) -> None:
    """Adds the clients' mean to the bank; by default all count alike."""
    config = bank.entry(clients[0]).config
    for client in clients[1:]:
        if (other := bank.entry(client).config) != config:
            raise RefusedError(
                f"{FEDERATED} averages finetunes of one config; {clients[0]} has {config}, {client} has {other}"
            )
    counts = [1] * len(clients) if num_examples is None else num_examples
    state = federated_average([bank.tensors(client) for client in clients], counts)
    bank.add(name, config)
    bank.fill(name, state)


def _keep_only(model: MultimodalModel, name: str, projector: dict[str, torch.Tensor]) -> None:
    """Leaves one finetune, and its projector as the one of the base too."""
    for other in model.bank.names:
        if other != name:
            model.bank.remove(other)
    model.projector.fill({key: tensor.clone() for key, tensor in projector.items()})
    model.projector_slots = {}
