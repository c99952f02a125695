"""`mmpeft cache`: what it lists, that it finds every flipped bit, and what it deletes."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from mmpeft.cli import main
from mmpeft.data import features
from mmpeft.data.features import FeatureCache
from tests.data.counting_encoder import CountingEncoder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Features of two encoders in the mmpeft home; the first's are in two shards."""
    monkeypatch.setenv("MMPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(features, "SHARD_IMAGES", 2)
    images = [str(tmp_path / f"{number}.png") for number in range(4)]
    for number, path in enumerate(images):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    for layer, some in ((0, images), (1, images[:1])):
        FeatureCache(tmp_path / "home" / "features", CountingEncoder(layer)).build(some)
    return FeatureCache(tmp_path / "home" / "features", CountingEncoder(stop_after=0)), images


def test_list(cache, capsys):
    main(["cache", "list"])
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.split()[0] == cache[0].directory.name
    assert first.endswith("4 images  counting layer 0 float16")
    assert second.endswith("1 images  counting layer 1 float16")
    assert last.endswith("of features of 2 encoders")


@pytest.mark.parametrize("place", [0, 100, -1], ids=["length", "header", "last byte"])
def test_verify_finds_a_flipped_bit_that_a_start_does_not_see(cache, capsys, place):
    own, images = cache
    main(["cache", "verify"])
    assert "3 shards are whole, 0 were damaged" in capsys.readouterr().out
    victim = sorted(own.directory.glob("*.safetensors"))[1]
    before, content = os.stat(victim), bytearray(victim.read_bytes())
    content[place] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SystemExit) as ended:
        main(["cache", "verify", "--encoder", own.directory.name[:6]])
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert f"{victim} is damaged" in told
    assert "1 shards are whole, 1 were damaged" in told
    encoder = CountingEncoder()
    assert FeatureCache(own.directory.parent, encoder).build(images) == encoder.encoded == 2
    main(["cache", "verify"])
    assert "3 shards are whole, 0 were damaged" in capsys.readouterr().out


def test_clear_deletes_one_encoder_or_all(cache, capsys, tmp_path):
    own, images = cache
    earlier, theirs = (
        tmp_path / "home" / "features" / "0123456789abcdef",
        tmp_path / "home" / "features" / "theirs",
    )
    for folder in (earlier, theirs):
        folder.mkdir()
        for name in ("index.json", "encoder.json", "a.safetensors"):
            (folder / name).write_text("{}")
    (earlier / "encoder.json").unlink()
    (earlier / "notes.txt").write_text("somebody else's")
    main(["cache", "list"])
    assert "of an earlier version" in capsys.readouterr().out
    main(["cache", "clear", "--encoder", own.directory.name])
    assert not own.directory.exists()
    assert len(list((tmp_path / "home" / "features").glob("*/*.safetensors"))) == 3
    main(["cache", "clear"])
    assert sorted((tmp_path / "home" / "features").iterdir()) == [earlier, theirs]
    assert len(list(theirs.iterdir())) == 3
    assert [path.name for path in earlier.iterdir()] == ["notes.txt"]
    encoder = CountingEncoder()
    assert FeatureCache(tmp_path / "home" / "features", encoder).build(images) == encoder.encoded == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "zz"], "--encoder zz: 0 folders begin so; wanted one of"),
        (["--encoder", ""], "2 folders begin so"),
        (["--folder", "gone"], "there is no folder gone"),
    ],
)
def test_what_it_cannot_find_is_refused(cache, words, message):
    with pytest.raises(SystemExit, match=message):
        main(["cache", "clear", *words])
    assert cache[0].directory.exists()


@pytest.mark.parametrize("words", [["--help"], ["list"], ["verify"]])
def test_no_torch_is_needed(cache, words):
    code = f"""
import sys
from mmpeft.cli import main
try:
    main({["cache", *words]!r})
finally:
    print({{"torch", "transformers", "timm", "safetensors"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout
    if words == ["--help"]:
        assert "mmpeft cache verify" in done.stdout
