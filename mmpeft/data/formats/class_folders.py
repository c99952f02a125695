"""Folders of classes -> rows: what a folder is called is the class of the images in it, and the choices are the classes
of all splits of the set."""

from collections import defaultdict
from pathlib import Path

from mmpeft.data.formats.base import DataError, Rows
from mmpeft.data.formats.classes import image_of_class
from mmpeft.data.formats.folders import TEXT_ENDINGS, data_files, is_data
from mmpeft.data.formats.splits import split_in_name
from mmpeft.data.image_names import is_image_name

NO_CLASSES = (
    *("image", "images", "img", "imgs", "mask", "masks", "label", "labels", "annotations", "captions"),
    "depth",
)
"""Names of folders that say what kind of file lies in them, not of which class it is."""
MOST_NAMED = 5
"""Classes of a kind that a note names."""


class ClassFolders:
    """The class folders of a set.

    Args:
        folder: of one split, or of a set without splits.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._own = _class_folders(folder)
        self._by_split = {folder.name: self._own}
        if split := split_in_name(folder):
            beside = [file for file in data_files(folder.parent) if file.is_dir()]
            others = [file for file in beside if split_in_name(file) not in (None, split)]
            found = {file.name: _class_folders(file) for file in others}
            self._by_split |= {name: own for name, own in found.items() if not any(map(_no_class, own))}
        self.classes = sorted({name for own in self._by_split.values() for name in own})
        """Of all splits."""

    def __bool__(self) -> bool:
        """Whether the folder holds class folders and nothing else, of two classes or more that all have an image."""
        have_some = {
            name for own in self._by_split.values() for name, has_images in own.items() if has_images
        }
        return bool(self._own) and len(have_some) == len(self.classes) > 1

    @property
    def no_class(self) -> str | None:
        """A folder whose name is no class's."""
        return next(filter(_no_class, self._own), None)

    def rows(self) -> Rows:
        """An image of each class folder, with the folder's name for its class."""
        for name in self._own:
            for file in data_files(self.folder / name):
                place = f"{name}/{file.name}"
                if file.is_dir() or file.suffix.lower() in TEXT_ENDINGS:
                    kind = "a folder" if file.is_dir() else "a text"
                    yield place, DataError(f"{kind} among the images of a class; take it out")
                else:
                    yield place, image_of_class(place, name, self.classes)

    def told(self) -> tuple[str, ...]:
        """Which classes some splits lack; nothing where all have the same."""
        splits = {split: {*names} for split, names in self._by_split.items() if names}
        only: dict[str, list[str]] = defaultdict(list)
        for name in self.classes:
            having = [split for split in sorted(splits) if name in splits[split]]
            if len(having) < len(splits):
                only[" and ".join(having)].append(name)
        if not only:
            return ()
        parts = [f"in {having} alone: {_named(names)}" for having, names in sorted(only.items())]
        whole = f"the {len(self.classes):,} classes of all splits of {self.folder.parent}"
        return (f"the choices are {whole}, {'; '.join(parts)}",)


def _class_folders(folder: Path) -> dict[str, bool]:
    """Name -> whether it holds images, of what lies in a folder, where that is folders of images alone."""
    found = data_files(folder)
    held = {file.name: _holds_images(file) for file in found if file.is_dir()}
    of_images = len(held) == len(found) and None not in held.values() and any(held.values())
    return {name: bool(own) for name, own in held.items()} if of_images else {}


def _holds_images(folder: Path) -> bool | None:
    """False where nothing lies in a folder, None where only something else does. At the first image it is known."""
    empty = True
    for file in filter(is_data, folder.iterdir()):
        empty = False
        if is_image_name(file.name) and file.is_file():
            return True
    return False if empty else None


def _no_class(name: str) -> bool:
    return split_in_name(Path(name)) is not None or name.lower() in NO_CLASSES


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"
