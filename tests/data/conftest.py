"""Images for the tests of the feature cache."""

import pytest
from PIL import Image


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (number, 10 * number, 255 - number)).save(path)
    return [str(path) for path in paths]
