"""Names of image files: what looks like one, and files that a name means but does not spell: by back slashes of
Windows, without an ending, or by the number of a COCO image."""

import os
import re
from collections import defaultdict

from mmpeft.data.images import ENDINGS, image_file
from mmpeft.errors import RefusedError

LONGEST_NAME = 1024
"""Letters; a longer text is not the name of a file."""

NUMBERED = re.compile(r"(?:COCO_[A-Za-z]+\d{4}_)?0*(\d+)")
"""A file's name before its ending -> the number of its image, as COCO and VQA v2 write it."""

ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")


def is_image_name(value: object) -> bool:
    """Whether a value looks like the name of an image file, or of one of its frames."""
    return (
        isinstance(value, str) and len(value) < LONGEST_NAME and image_file(value).lower().endswith(ENDINGS)
    )


class ImageNames:
    """Files of folders by their names without ending, and by their numbers. A folder is listed once."""

    def __init__(self) -> None:
        self._by_stem: dict[str, dict[str, list[str]]] = {}
        self._by_number: dict[str, dict[str, list[str]]] = {}

    def find(self, path: str) -> str | None:
        """The path of the only file that is meant by one that is not there, if there is one.

        Raises:
            RefusedError: several files may be meant.
        """
        for tried in dict.fromkeys((path, path.replace("\\", "/"))):
            if os.path.isfile(tried):
                return tried
            folder, name = os.path.split(tried)
            if ENDING.search(name):
                continue
            self._list(folder)
            found = self._by_stem[folder].get(name) or []
            if not found and name.isascii() and name.isdigit():
                found = self._by_number[folder].get(name.lstrip("0") or "0") or []
            if len(found) > 1:
                raise RefusedError(
                    f"{name!r} may be any of {sorted(found)[:5]} in {folder}; write the name in full"
                )
            if found:
                return os.path.join(folder, found[0])
        return None

    def _list(self, folder: str) -> None:
        if folder in self._by_stem:
            return
        stems, numbers = defaultdict(list), defaultdict(list)
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            stem, _, ending = name.rpartition(".")
            if stem and ending.lower() not in ("txt", "json", "xml"):
                stems[stem].append(name)
                if number := NUMBERED.fullmatch(stem):
                    numbers[number[1]].append(name)
        self._by_stem[folder], self._by_number[folder] = stems, numbers
