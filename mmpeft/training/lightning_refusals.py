"""What Lightning itself refuses of the settings, told as what mmpeft refuses is: in one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmpeft.errors import RefusedError, refusal_in

OF_THE_MACHINE = ("lightning.fabric.plugins.environments.", "lightning.fabric.accelerators.")
OF_CURVES = ("lightning.pytorch.callbacks.early_stopping",)
"""Where a curve is missed that a callback is to watch."""


@contextmanager
def refusals_of_lightning(settings: str = "trainer") -> Iterator[None]:
    """Inside, what Lightning says against settings is a `RefusedError`. It has no class of its own for that: a
    `ValueError` that its own code raises is one, and any error about cluster and devices, or about a curve that is not
    there; any other is a fault.

    Args:
        settings: section of the config that is meant.
    """
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        if refused := refusal_in(error):  # a setting of several types makes another error of it
            raise refused from None
        if not isinstance(error, MisconfigurationException) and not _raised_in(error, "lightning."):
            raise
        raise _told(settings, error) from error
    except (TypeError, RuntimeError) as error:
        if not _raised_in(error, OF_THE_MACHINE + OF_CURVES):
            raise
        raise _told(settings, error) from error


def _told(settings: str, error: Exception) -> RefusedError:
    return RefusedError(f"{settings}: {str(error).strip()}")


def _raised_in(error: BaseException, module: str | tuple[str, ...]) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").startswith(module)
