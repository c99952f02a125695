"""The reduction of a step: gradients, losses and counts of all processes added up, in one all-reduce on the devices.

What is only counted, and which tensors have a gradient at all, lies in main memory and is added up there before: no
process waits for its device, and all take the same decisions from the same numbers.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpeft.training.objectives import Sum
from mmpeft.training.processes import Reduced
from mmpeft.training.step_losses import SUMMED, StepSums


def reduce_step(
    processes: Reduced, sums: StepSums, finetunes: Sequence[str], parameters: Sequence[nn.Parameter]
) -> StepSums:
    """Gives the parameters the gradients of all processes, and returns their sums. A parameter that has a gradient
    nowhere is left without; otherwise processes without one have zeros.

    Args:
        processes: of the run.
        sums: of this process's rows.
        finetunes: of the run, in the same order everywhere.
        parameters: all that train, likewise.
    """
    keys = [(name, term) for name in finetunes for term in SUMMED]
    counts = [
        *(int(name in sums.tokens) for name in finetunes),
        *(sums.tokens[name] for name in finetunes),
        *(sums.with_images[name] for name in finetunes),
        *(sums.terms[key].count if key in sums.terms else 0 for key in keys),
        *(int(key in sums.terms) for key in keys),
        *(int(parameter.grad is not None) for parameter in parameters),
        sums.conversations,
    ]
    there, tokens, images, of_terms, has_term, graded, (conversations,) = _cut(
        processes.sum_on_host(counts),
        [*3 * [len(finetunes)], *2 * [len(keys)], len(parameters), 1],
    )
    moved = [parameter for parameter, any_grad in zip(parameters, graded, strict=True) if any_grad]
    known = [key for key, any_term in zip(keys, has_term, strict=True) if any_term]
    totals = _sum_on_devices(processes, [sums.terms.get(key) for key in known], moved)
    numbers = dict(zip(keys, of_terms, strict=True))
    return StepSums(
        Counter({name: number for name, number, own in zip(finetunes, tokens, there, strict=True) if own}),
        Counter(dict(zip(finetunes, images, strict=True))),
        {key: Sum(total, numbers[key]) for key, total in zip(known, totals, strict=True)},
        conversations,
    )


def _sum_on_devices(
    processes: Reduced, terms: Sequence[Sum | None], parameters: Sequence[nn.Parameter]
) -> Sequence[Tensor]:
    """One flat buffer of float32, of which the gradients are views afterwards. Returns the sums of the terms."""
    device = processes.root_device
    totals = [torch.zeros(1, device=device) if own is None else own.total.reshape(1).float() for own in terms]
    gradients = [
        torch.zeros(parameter.numel(), device=device) if parameter.grad is None else parameter.grad.flatten()
        for parameter in parameters
    ]
    flat = torch.cat([*totals, *(gradient.float() for gradient in gradients)])
    del gradients
    for parameter in parameters:
        parameter.grad = None
    processes.sum(flat)
    rest = flat[len(totals) :]
    pieces = rest.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    return flat[: len(totals)].unbind()


def _cut(values: list[int], sizes: Sequence[int]) -> list[list[int]]:
    rest, pieces = values, []
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces
