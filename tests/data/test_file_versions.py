"""What was seen of a file is not taken for another in its place, though size and time of change are the same."""

import os

import pytest
from PIL import Image

from mmpeft.data.image_tokens import TokensByShape
from mmpeft.data.images import ImageConfig, image_key
from mmpeft.files import file_version


class Pixels:
    """A tiling under which an image of width x height has 100 x width + height tokens."""

    identity = "pixels"

    def num_tokens(self, size):
        return 100 * size[0] + size[1]


@pytest.fixture
def twins(tmp_path):
    """Two images of one size in bytes and one time, of 8 x 4 and of 4 x 8 pixels."""
    paths = [tmp_path / name for name in ("a.bmp", "b.bmp")]
    for path, size in zip(paths, ((8, 4), (4, 8)), strict=True):
        Image.new("RGB", size, "red").save(path)
        os.utime(path, (1e9, 1e9))
    assert paths[0].stat().st_size == paths[1].stat().st_size
    return [str(path) for path in paths]


def change_places(twins, how):
    first, second = twins
    if how == "mv":
        os.rename(first, f"{first}~")
        os.rename(second, first)
        os.rename(f"{first}~", second)
        return
    contents = []
    for path in twins:
        with open(path, "rb") as file:
            contents.append(file.read())
    for path, content in zip(twins, reversed(contents), strict=True):
        with open(path, "wb") as file:  # of the same inode
            file.write(content)
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("how", ["mv", "cp -p"])
@pytest.mark.parametrize("seen", ["version", "key of a frame", "tokens"])
def test_files_that_change_places_are_told_apart(twins, how, seen):
    tokens = TokensByShape(Pixels(), ImageConfig())  # pyright: ignore[reportArgumentType] a tiling in what is asked
    see = {
        "version": file_version,
        "key of a frame": lambda path: image_key(f"{path}#frame=0"),
        "tokens": tokens,
    }[seen]
    before = [see(path) for path in twins]
    assert before == [see(path) for path in twins]
    change_places(twins, how)
    after = [see(path) for path in twins]
    assert all(now != was for now, was in zip(after, before, strict=True))
    assert seen == "version" or after == before[::-1]
