"""What Lightning itself refuses of the settings, told as what mmpeft refuses is: in one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmpeft.errors import RefusedError, refusal_in


@contextmanager
def refusals_of_lightning(settings: str = "trainer") -> Iterator[None]:
    """Inside, what Lightning says against settings is a `RefusedError`. It has no class of its own for that: a
    `ValueError` that its own code raises is one, any other is a fault.

    Args:
        settings: section of the config that is meant.
    """
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        if refused := refusal_in(error):  # a setting of several types makes another error of it
            raise refused from None
        if not isinstance(error, MisconfigurationException) and not _raised_by_lightning(error):
            raise
        raise RefusedError(f"{settings}: {str(error).strip()}") from error


def _raised_by_lightning(error: BaseException) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").startswith("lightning.")
