"""Videos as images: evenly spaced frames by name, each exactly the frame that decoding from the beginning gives."""

import contextlib

import numpy as np
import pytest

from mmpeft.data.images import ImageConfig, ImageError, image_key, load_image
from mmpeft.data.video import sample_frames, times_of
from mmpeft.errors import RefusedError

av = pytest.importorskip("av")
KINDS = {
    "mp4": "h264",
    "mov": "mpeg4",
    "mkv": "h264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "ts": "h264",
    "mpg": "mpeg2video",
}


def write(path, count=40, codec="h264", size=(64, 48)):
    """Each frame its own noise in coarse blocks, key frames every twelve."""
    rng = np.random.default_rng(5)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", 12
        for _ in range(count):
            blocks = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(blocks.repeat(8, 0).repeat(8, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def frames(path):
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("ending", KINDS)
def test_every_frame_is_the_one_of_that_number(ending, tmp_path):
    path = write(tmp_path / f"clip.{ending}", codec=KINDS[ending])
    truth = frames(path)
    names = sample_frames(path, 1000)
    assert names == [f"{path}#frame={number}" for number in range(40)]
    for name, frame in zip(reversed(names), reversed(truth), strict=True):
        np.testing.assert_array_equal(np.asarray(load_image(name)), frame, err_msg=name)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 39, 40, 41])
def test_frames_are_evenly_spaced_as_numpy_spaces_them(count, tmp_path):
    path = write(tmp_path / "clip.mp4")
    wanted = [19] if count == 1 else np.linspace(0, 39, min(count, 40)).astype(int).tolist()
    assert [int(name.rpartition("=")[2]) for name in sample_frames(path, count)] == wanted


@pytest.mark.parametrize("ending", KINDS)
def test_the_time_of_a_frame_is_when_it_is_shown_after_the_first(ending, tmp_path):
    path = write(tmp_path / f"clip.{ending}", codec=KINDS[ending])
    times = times_of(sample_frames(path, 1000))
    np.testing.assert_allclose(np.asarray(times, float), np.arange(40) / 25, atol=1e-3)
    assert times_of(["a.png", f"{path}#frame=25", b"png", f"{path}#frame=99"]) == [
        None,
        pytest.approx(1, abs=1e-3),
        None,
        None,
    ]


def test_what_is_no_frame_of_a_video_has_no_time(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    assert times_of([str(tmp_path / "scan.dcm#frame=1"), str(tmp_path / "gone.mp4#frame=1"), "a.png"]) is None


@pytest.mark.parametrize("fps", [0.5, 2, 3, 7.5, 25, 100])
def test_frames_of_a_rate_are_those_shown_at_its_ticks(fps, tmp_path):
    path = write(tmp_path / "clip.mp4")
    ticks = np.arange(0, 40 / 25 - 1e-9, 1 / fps)
    wanted = sorted({int(np.floor(25 * tick + 1e-6)) for tick in ticks})
    assert [int(name.rpartition("=")[2]) for name in sample_frames(path, fps=fps)] == wanted
    of_seven = [int(name.rpartition("=")[2]) for name in sample_frames(path, 7, fps)]
    assert of_seven == [wanted[i] for i in np.linspace(0, len(wanted) - 1, min(7, len(wanted))).astype(int)]


@pytest.mark.parametrize("fps", [0, -1, float("inf"), float("nan")])
def test_a_rate_is_above_zero(fps, tmp_path):
    with pytest.raises(RefusedError, match=f"fps is {fps}; wanted frames of a second"):
        sample_frames(write(tmp_path / "clip.mp4", 2), fps=fps)


def test_a_video_that_was_filmed_upright_is_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    write(path, 3)
    before = np.asarray(load_image(f"{path}#frame=1"))
    unit, turned = (np.array(m, ">i4").tobytes() for m in (
        [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], [0, 0x10000, 0, -0x10000, 0, 0, 0x300000, 0, 0x40000000]
    ))  # fmt: skip
    data = bytearray(path.read_bytes())
    start = data.index(unit, data.index(b"tkhd"))
    data[start : start + 36] = turned
    path.write_bytes(data)
    np.testing.assert_array_equal(np.asarray(load_image(f"{path}#frame=1")), np.rot90(before, -1))


def test_a_frame_has_a_key_of_its_own_and_the_limits_hold(tmp_path):
    path = write(tmp_path / "clip.mp4")
    assert len({image_key(name) for name in sample_frames(path, 5)}) == 5
    with pytest.raises(ImageError, match=r"clip\.mp4#frame=1': 64 x 48 pixels"):
        load_image(f"{path}#frame=1", ImageConfig(max_pixels=64 * 48 - 1))
    assert load_image(f"{path}#frame=1", ImageConfig(max_bytes=1)).size == (64, 48), "it is not read whole"


def test_what_is_no_usable_video_is_refused(tmp_path):
    path = write(tmp_path / "clip.mp4")
    with pytest.raises(ImageError, match=r"name a frame, such as clip\.mp4#frame=12"):
        load_image(path)
    with pytest.raises(ImageError, match="frame 40 was asked for; there are 40 frames, 0 to 39"):
        load_image(f"{path}#frame=40")
    for n in (0, "8", 2.5, True):
        with pytest.raises(ImageError, match=f"{n!r} frames were asked for; wanted how many, a whole number"):
            sample_frames(path, n)
    with pytest.raises(RefusedError, match="fps is '1'; wanted frames of a second"):
        sample_frames(path, fps="1")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:900])
    (tmp_path / "no.mp4").write_text("text")
    for name, message in [
        ("cut.mp4", "cannot be read"),
        ("no.mp4", "no video that is known"),
        ("none.mp4", "not exist"),
    ]:
        with pytest.raises(ImageError, match=f"(?s){name}.*{message}"):
            sample_frames(tmp_path / name, 4)
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ImageError, match="sound without pictures"):
        sample_frames(tmp_path / "sound.mkv", 4)


@pytest.mark.parametrize("at", [0.4, 0.5, 0.7])
def test_a_frame_of_a_damaged_video_is_the_true_one_or_refused(at, tmp_path):
    """As far as a decoder can tell: wrong bits that spell a valid frame are one."""
    path = tmp_path / "clip.avi"
    truth = frames(write(path, codec="mpeg4"))
    data = bytearray(path.read_bytes())
    start = int(at * len(data))
    data[start : start + 300] = bytes(300)
    path.write_bytes(data)
    good = 0
    for number, frame in enumerate(truth):
        with contextlib.suppress(ImageError):
            np.testing.assert_array_equal(np.asarray(load_image(f"{path}#frame={number}")), frame)
            good += 1
    assert 0 < good < 40
