"""The folder of the images: names -> absolute paths inside of it."""

import os
from pathlib import Path

from mmpeft.data.formats import DataError
from mmpeft.data.image_names import ENDING, ImageNames
from mmpeft.data.images import image_file
from mmpeft.data.layouts.beside import Beside
from mmpeft.data.layouts.values import as_text, short
from mmpeft.errors import RefusedError

NAMES_KEPT = 50_000
"""Image names whose paths are remembered."""


class ImageRoot:
    """Turns image names into absolute paths and refuses those that lead out of one folder.

    Every folder is resolved once, and a name that comes again mostly too: 40,000 rows in a few folders cost one
    `lstat` per name.
    """

    def __init__(self, root: Path) -> None:
        self.folder = os.path.realpath(root)
        self._inside = os.path.join(self.folder, "")
        self._folders: dict[str, str] = {}
        self._paths: dict[str, str] = {}
        self.beside = Beside()
        self._names = ImageNames()

    def resolve(self, name: str) -> str:
        if name not in self._paths:
            if len(self._paths) >= NAMES_KEPT:
                self._paths.clear()
            self._paths[name] = self._resolve(as_text(name, "image name"))
        return self._paths[name]

    def find(self, name: str) -> str | None:
        """The one image file of a name that may be spelt in another way; None where there is none.

        Raises:
            DataError: there are several.
        """
        path = os.path.join(self.folder, name)
        self.beside.looked_into(os.path.dirname(path.replace("\\", "/")))
        if os.path.isfile(path):
            return name
        try:
            found = self._names.find(path)
        except RefusedError as error:
            raise DataError(str(error)) from None
        if found is None:
            self.beside.is_open()
        return found

    def _resolve(self, name: str) -> str:
        if not name.strip() or "\0" in name or name.startswith(("http://", "https://", "data:")):
            raise DataError(f"found the image {short(name)}; wanted a local path; download URLs first")
        name = name.removeprefix("file://")
        if not os.path.lexists(image_file(os.path.join(self.folder, name))):
            name = self.find(name) or name
        named = os.path.join(self.folder, name)
        file = image_file(named)
        folder, base = os.path.split(file)
        if not ENDING.search(base):  # once it has one, this name means another file
            self.beside.looked_into(folder)
        if folder not in self._folders:
            self._folders[folder] = self._real(folder)
        path = os.path.join(self._folders[folder], base)
        if base in ("", ".", "..") or os.path.islink(path):
            path = self._real(path)
        if not path.startswith(self._inside):
            raise DataError(
                f"image {name!r} leads to {path}, outside the image root {self.folder}; "
                "move the file inside, or pass the folder that holds all images as image_root"
            )
        return path + named[len(file) :]  # the frame that is meant

    def _real(self, path: str) -> str:
        real = os.path.realpath(path)
        self.beside.leads(path, real)
        return real
