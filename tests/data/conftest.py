"""Folders with images for the tests of data."""

import pytest
from PIL import Image

from tests.data.row_files import png


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (number, 10 * number, 255 - number)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png("blue"))
    return tmp_path
