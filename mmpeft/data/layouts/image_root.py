"""The folder of the images: names -> absolute paths inside of it."""

import os
from pathlib import Path

from mmpeft.data.layouts.values import as_text, short
from mmpeft.data.readers import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Tried behind a name without ending."""


class ImageRoot:
    """Turns image names into absolute paths and refuses those that lead out of one folder.

    Every name and every folder is resolved once: 40,000 rows in a few folders cost one `lstat` per name.
    """

    def __init__(self, root: Path) -> None:
        self.folder = os.path.realpath(root)
        self._inside = os.path.join(self.folder, "")
        self._folders: dict[str, str] = {}
        self._paths: dict[str, str] = {}

    def resolve(self, name: str) -> str:
        if name not in self._paths:
            self._paths[name] = self._resolve(as_text(name, "image name"))
        return self._paths[name]

    def find(self, name: str) -> str | None:
        """The one image file of a name that may lack its ending; None where there is none.

        Raises:
            DataError: there are several.
        """
        path = os.path.join(self.folder, name)
        if os.path.isfile(path):
            return name
        spelt = (ending for lower in ENDINGS for ending in (lower, lower.upper()))
        found = [name + ending for ending in spelt if os.path.isfile(path + ending)]
        if len({os.path.realpath(os.path.join(self.folder, own)) for own in found}) > 1:
            raise DataError(f"the image {name!r} may be any of {found}; write the whole name")
        return found[0] if found else None

    def _resolve(self, name: str) -> str:
        if not name.strip() or "\0" in name or name.startswith(("http://", "https://", "data:")):
            raise DataError(f"found the image {short(name)}; wanted a local path; download URLs first")
        name = name.removeprefix("file://")
        folder, base = os.path.split(os.path.join(self.folder, self._as_it_is(name)))
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._folders[folder], base)
        if base in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(self._inside):
            raise DataError(
                f"image {name!r} leads to {path}, outside the image root {self.folder}; "
                "move the file inside, or pass the folder that holds all images as image_root"
            )
        return path

    def _as_it_is(self, name: str) -> str:
        """With the ending, or the slashes, that the file has and the name lacks."""
        if "\\" in name and not os.path.exists(os.path.join(self.folder, name)):
            name = name.replace("\\", "/")
        return name if os.path.splitext(name)[1] else self.find(name) or name
