"""An image that cannot be used, told with the row that names it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mmpeft.data.images import ImageError, ImageLike
from mmpeft.data.records import Record, place_of


class UnusableImageError(ImageError):
    """What is wrong with an image, and which it is."""

    def __init__(self, image: ImageLike, told: str):
        super().__init__(told)
        self.image = image


@contextmanager
def naming_its_row(records: Iterable[Record]) -> Iterator[None]:
    """Inside, images of records are used.

    Raises:
        ImageError: one cannot be; the message begins with the first row that has it.
    """
    try:
        yield
    except UnusableImageError as error:
        places = (place_of(record) for record in records if error.image in record["images"])
        raise ImageError(f"{next(places, 'no row')}: {error}") from error
