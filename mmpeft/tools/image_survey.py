"""The images of data sets, each looked at once: missing, undecodable, formats and sizes."""

import os
from collections import Counter

from mmpeft.data.hash_set import HashSet
from mmpeft.data.images import ImageConfig, ImageError, ImageWorker, image_file
from mmpeft.data.images.formats import format_of
from mmpeft.data.images.source import read_head
from mmpeft.data.records import Record, place_of
from mmpeft.data.sources import missing_image


class ImageSurvey:
    """A context manager, as decoding has a process of its own.

    Args:
        decode: whether images are decoded; else only their files are looked at.
        config: how they are decoded.
    """

    def __init__(self, decode: bool, config: ImageConfig):
        self._worker = ImageWorker() if decode else None
        self._config = config
        self._seen = HashSet()
        self.bad: dict[str | int, str] = {}
        """Image, of bytes their hash -> what is wrong with it."""
        self.told: list[str] = []
        """The same with the place of the first row that has it."""
        self.named = 0
        self.formats: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        """(width, height) in pixels of what was decoded -> images."""

    def __enter__(self) -> "ImageSurvey":
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.__exit__(*error)

    @property
    def distinct(self) -> int:
        return len(self._seen)

    def look(self, record: Record) -> None:
        """Looks at the images of a record that no earlier one had."""
        for image in record["images"]:
            self.named += 1
            if not self._seen.add(hash(image)):
                continue
            if problem := self._problem(image):
                self.bad[_key(image)] = problem
                self.told.append(f"{place_of(record)}: {problem}")

    def problems(self, record: Record) -> list[str]:
        """What is wrong with the images of a record that was looked at."""
        return [self.bad[key] for image in record["images"] if (key := _key(image)) in self.bad]

    def _problem(self, image: str | bytes) -> str | None:
        if self._worker is None:
            self.formats[_ending(image)] += 1
            return missing_image(image)
        try:
            self.sizes[self._worker.load(image, self._config).size] += 1
        except ImageError as error:
            return str(error)
        self.formats[format_of(read_head(image if isinstance(image, bytes) else image_file(image)))] += 1
        return None


def _key(image: str | bytes) -> str | int:
    return image if isinstance(image, str) else hash(image)


def _ending(image: str | bytes) -> str:
    if isinstance(image, bytes):
        return format_of(read_head(image))
    name = image_file(image).lower()
    return (
        next((ending for ending in (".nii.gz",) if name.endswith(ending)), os.path.splitext(name)[1])
        or "none"
    )
