"""Lists of images: what inputs stand for, in one order, wherever they lie, each once."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmpeft.data.image_lists import find_images, left_out
from mmpeft.errors import RefusedError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """``photos/`` of three images, one deeper, and a text; ``more.tar`` of one; ``rows.jsonl`` of two."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "deep/0.png", "notes.png")):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "photos" / name)
    Path("photos/notes.png").rename("photos/notes.TXT")
    with tarfile.open("more.tar", "w") as tar:
        for name in ("b.png", "notes.TXT", "deep"):
            tar.add(f"photos/{name}", f"inside/{name}")
    rows = [{"id": 3, "image": "photos/b.png"}, {"image": "photos/a.jpg"}, {"id": 4, "image": "photos/b.png"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "names", "left"),
    [
        (["photos"], ["a.jpg", "b.png", "deep/0.png"], {".txt": 1}),
        (
            ["./photos/", "more.tar"],
            [
                "photos/a.jpg",
                "photos/b.png",
                "photos/deep/0.png",
                "more.tar/inside/b.png",
                "more.tar/inside/deep/0.png",
            ],
            {".txt": 2},
        ),
        (["more.tar"], ["inside/b.png", "inside/deep/0.png"], {".txt": 1}),
        (["rows.jsonl"], ["photos/b.png", "photos/a.jpg"], {}),
        (["rows.jsonl", "photos/deep"], ["photos/deep/0.png", "photos/b.png", "photos/a.jpg"], {}),
        (["photos/*.png"], ["photos/b.png"], {}),
        (["photos/*"], ["photos/a.jpg", "photos/b.png", "photos/deep/0.png"], {".txt": 1}),
        (["**/*.png"], ["photos/b.png", "photos/deep/0.png"], {}),
        (["*.tar"], ["more.tar/inside/b.png", "more.tar/inside/deep/0.png"], {".txt": 1}),
        (["photos/b.png", "photos/a.jpg"], ["photos/a.jpg", "photos/b.png"], {}),
    ],
)
def test_what_inputs_stand_for(inputs, names, left, here):
    found = find_images(inputs)
    assert (list(found.names), dict(found.left)) == (names, left)
    assert [listed.name for listed in found] == names
    assert find_images(inputs[::-1]).hash() == found.hash()
    for listed in found:
        content = listed.read()
        content = Path(content).read_bytes() if isinstance(content, str) else content
        where = (
            here
            / "photos"
            / listed.name.removeprefix("more.tar/").removeprefix("inside/").removeprefix("photos/")
        )
        assert content == where.read_bytes()
        assert listed.version() is not None


@pytest.mark.parametrize("given", ["photos/*", "photos/**"])
def test_a_glob_does_not_mean_what_is_made_of_its_images(given, here):
    """Else a command that is given again would find other images."""
    images = find_images([given], "photos/captions.jsonl")
    (here / "photos" / "captions.jsonl.shards").mkdir()
    for name in ("captions.jsonl", "captions.jsonl.lock", "captions.jsonl.shards/000000.jsonl"):
        (here / "photos" / name).write_text('{"image": "b.png", "caption": "a square"}\n')
    again = find_images([given], "photos/captions.jsonl")
    assert (again.hash(), again.left) == (images.hash(), images.left)
    (here / "photos" / "captions.jsonl2").touch()
    assert find_images([given], "photos/captions.jsonl").left != images.left


def test_a_copy_has_the_same_hash_and_another_list_has_not(here, monkeypatch):
    hashes = [find_images([own]).hash() for own in ("photos", "more.tar", "rows.jsonl")]
    shutil.copytree(here, here.parent / "copy")
    monkeypatch.chdir(here.parent / "copy")
    assert [find_images([own]).hash() for own in ("photos", "more.tar", "rows.jsonl")] == hashes
    Path("photos/b.png").rename("photos/c.png")
    assert find_images(["photos"]).hash() != hashes[0]
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace('"id": 3', '"id": 5'))
    assert find_images(["rows.jsonl"]).hash() != hashes[2]


def test_a_row_of_a_table_without_its_image_says_why_and_one_that_repeats_it_is_counted(here):
    with open("rows.jsonl", "a") as file:
        file.write('{"id": 9, "caption": "of nothing"}\n{"id": 10, "image": "../outside.png"}\n')
    found = find_images(["rows.jsonl"])
    assert [listed.id for listed in found] == ["3", None, "9", "10"]
    assert found.repeated == 1
    for number, message in (
        (2, r"rows\.jsonl:4: found no images among the keys"),
        (3, "outside the image root"),
    ):
        assert found[number].version() is None
        with pytest.raises(RefusedError, match=message):
            found[number].read()


def test_what_cannot_be_listed(here):
    Path("cut.tar").write_bytes(Path("more.tar").read_bytes()[:700])
    with tarfile.open("more.tar") as tar:
        second = tar.getmembers()[1].offset
    Path("short.tar").write_bytes(Path("more.tar").read_bytes()[:second])
    Path("bare.jsonl").write_text('{"id": 1}\n')
    Path("torn.jsonl").write_text('{"image": "photos/b.png"}\n{"image": "pho')
    (here / "empty").mkdir()
    for inputs, message in [
        ([], "no input is named"),
        (["gone"], "gone is no folder and no file"),
        (["gone*.png"], r"no file is called like gone\*\.png"),
        (["empty"], "empty holds no images"),
        (["photos/notes.TXT"], "notes.TXT"),
        (["cut.tar"], r"cut\.tar is no plain tar, or is cut or damaged"),
        (
            ["short.tar"],
            r"short\.tar is no plain tar, or is cut or damaged \(no member and no end mark follows",
        ),
        (["bare.jsonl"], r"no row of bare\.jsonl has an image.*found no images"),
        (["torn.jsonl"], r"torn\.jsonl:2: "),
        (["photos", "photos/b.png"], r"the image 'photos/b\.png' is given twice"),
    ]:
        with pytest.raises(RefusedError, match=message):
            find_images(inputs)


def test_a_file_that_changed_has_another_version(here):
    listed = find_images(["photos"])[0]
    before = listed.version()
    Path("photos/a.jpg").write_bytes(b"other")
    assert listed.version() != before
    Path("photos/a.jpg").unlink()
    assert listed.version() is None


def test_what_is_left_out_in_words():
    told = left_out({".txt": 2, "": 1})
    assert told == "3 other files were left out: 2 .txt, 1 without an ending"
    assert left_out({".txt": 1}) == "1 other file was left out: 1 .txt"
