"""A step: from batches to the gradients that the optimiser takes, finetune by finetune."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mmpeft.data.batch import Batch
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.training.finetune import Finetune
from mmpeft.training.pieces import Pieces
from mmpeft.training.processes import Reduced
from mmpeft.training.reduction import reduce_step
from mmpeft.training.references import Beside, References
from mmpeft.training.sharding import Sharded
from mmpeft.training.start import Started
from mmpeft.training.step_losses import Logged, StepLosses
from mmpeft.transfer import to_host


class Step:
    """Forward, backward, reduction and clipping.

    Args:
        model: with all that trains.
        finetunes: of the run.
        losses: of the same.
        references: of the same.
        processes: of the run, where there are several.
    """

    def __init__(
        self,
        model: MultimodalModel,
        finetunes: Mapping[str, Finetune],
        losses: StepLosses,
        references: References,
        processes: Reduced | None,
    ):
        self.model, self.finetunes, self.losses, self.processes = model, finetunes, losses, processes
        self.references, self._points = references, {}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._pieces = Pieces(self._begin, self._trained, isinstance(processes, Sharded))
        self.backward = self._pieces.backward

    def forward(self, batch: Batch) -> Tensor:
        """As of `Pieces`; what is of the whole batch is found out before."""
        self._points = self.references.points(batch)
        return self._pieces.forward(batch)

    def validate(self, batch: Batch) -> None:
        """Keeps what `StepLosses.validate` does."""
        self.losses.validate(batch, self.model.token_losses(batch), self.references.beside(batch))

    def take_gradients(self, accumulated: int) -> None:
        """Of all processes, after a backward of so many batches."""
        if self.processes is not None:
            names = list(self.finetunes)
            self.losses.sums = reduce_step(self.processes, self.losses.sums, names, self._trained)
        self.losses.take_gradients(accumulated)

    def clip(self, max_norm: float | None) -> tuple[list[Logged], list[str]]:
        """Clips each finetune by its own norm; one whose norm is not finite sits the step out.

        Here alone the host waits for the device in a step: whether a finetune takes the step decides about its
        schedule and its optimiser. The losses of the step come with the norms.

        Returns:
            The curves of the step, and what is to be told of it.
        """
        stepped = ((name, self.finetunes[name].parameters) for name in self.losses.stepped)
        parameters = {name: own for name, own in stepped if own is not None}
        norms = [
            Logged("gradient_norm", name, norm, 1)
            for name, own in parameters.items()
            if (norm := own.norm()) is not None
        ]
        waiting = [*self.losses.logged(), *norms]
        values = to_host([each.value for each in waiting])
        told: list[str] = []
        for each, norm in zip(norms, values[len(values) - len(norms) :], strict=True):
            own = parameters[each.finetune]
            own.clip(max_norm, norm)
            told += [trouble] if (trouble := own.trouble(norm)) else []
        return [each._replace(value=value) for each, value in zip(waiting, values, strict=True)], told

    def _begin(self, batch: Batch) -> tuple[Tensor, Callable[[], None]]:
        beside = Beside(self.references.losses(batch), self._points)  # before there is what needs a gradient
        loss, sums = self.losses.train(batch, self.model.token_losses(batch), beside)
        return loss, lambda: self.losses.sums.add(sums)


def make_step(
    model: MultimodalModel,
    finetunes: Mapping[str, Finetune],
    adapters: Mapping[str, str | None],
    started: Started,
    start_from: str | None,
    strategy: Any,
) -> Step:
    """The step of a run.

    Args:
        model: with all that trains, as it begins.
        finetunes: of the run.
        adapters: finetune -> the adapter of its rows; None is the base.
        started: what the model was built as.
        start_from: the run that it is to begin from.
        strategy: Lightning's.
    """
    processes = strategy if isinstance(strategy, Reduced) else None
    losses = StepLosses(finetunes, adapters, processes.sum_of_numbers if processes else list)
    began_as = None if started.has_trained and start_from else started.began_as
    references = References(model, finetunes, adapters, began_as, started.has_trained, processes)
    return Step(model, finetunes, losses, references, processes)
