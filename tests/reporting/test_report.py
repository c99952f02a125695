"""The picture is drawn from whatever a run has: all, little, nothing, or damaged files."""

import warnings

import pytest
from matplotlib import rcParams
from PIL import Image, ImageStat

from mmpeft.reporting.report import WIDTH, ShownExample, _fit, draw_report, read_curves

FACTS = {"exact match": "0.981 on 500 questions", "time": "5.1 min"}
CSV = "step,epoch,train_loss,val_loss,val_exact_match\n" + "".join(
    f"{step},0,{3 / (1 + step)},,\n{step},0,,{2 / (1 + step)},{min(1, step / 50)}\n"
    for step in range(0, 100, 10)
)


@pytest.fixture
def make_examples(tmp_path):
    def make(number: int, size=(64, 64)) -> list[ShownExample]:
        path = tmp_path / f"{size}.png"
        Image.new("RGB", size, (200, 30, 60)).save(path)
        answers = ["red" if n % 3 else "blue" for n in range(number)]
        return [
            ShownExample(str(path), f"what color is number {n}?", "red", a) for n, a in enumerate(answers)
        ]

    return make


@pytest.fixture
def draw(tmp_path):
    """Draws a report, with the text of a metrics.csv or None; returns the picture. Warnings are errors."""

    def run(csv=None, examples=(), title="a run", facts=FACTS) -> Image.Image:
        curves = None if csv is None else tmp_path / "metrics.csv"
        if curves:
            curves.write_text(csv, encoding="utf-8", newline="")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_report(tmp_path / "report.png", curves, examples, title, facts)
        return Image.open(tmp_path / "report.png")

    return run


def has_ink(image: Image.Image) -> bool:
    return max(ImageStat.Stat(image.convert("L")).var) > 50


def colors(image: Image.Image) -> set:
    return {color for _, color in image.convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("number", [1, 4, 6, 7, 12, 13])
def test_the_whole_report(draw, make_examples, number):
    image = draw(CSV, make_examples(number))
    assert image.width == WIDTH
    assert 700 < image.height < 1300
    assert has_ink(image)
    assert (200, 30, 60) in colors(image)  # drawn pixel for pixel
    assert {(0, 121, 90), (194, 74, 0)} <= colors(image) or number == 1


@pytest.mark.parametrize(
    "csv",
    [
        None,
        "",
        "step,epoch\n",
        "step,train_loss\n0,1.5\n",
        "step,train_loss\n0,0\n",
        "train_loss\n3\n2\n1\n",
        "step,val_loss\n0,1\n9,0.01\n",
        "step,val_exact_match\n5,0.25\n",
        "step,val_exact_match\n5,nan\n",
        "step,train_loss,val_loss\n0,nan,\n1,inf,\n2,,nan\n",
        "step,train_loss\n0,-1e9\n1,1e300\n",
    ],
)
def test_little_to_draw(draw, make_examples, csv):
    assert has_ink(draw(csv, make_examples(2)))
    assert has_ink(draw(csv, [], facts={}))


def test_every_kind_of_text(draw, make_examples):
    hostile = "$x_{$ \\frac **b** <i> \x00 \n\t \ud800 🙂 什么 " + "W" * 300 + " word" * 2000
    image = make_examples(1, (1000, 3))[0].image
    examples = [
        ShownExample(image, hostile, hostile, hostile),
        ShownExample(None, hostile, None, hostile),
        ShownExample(None, "", "", ""),
    ]
    picture = draw(CSV, examples, title=hostile, facts={hostile: hostile, "": ""})
    assert picture.height < 1400


def test_neither_style_nor_warnings_leak(draw, make_examples):
    before = dict(rcParams)
    draw(CSV, make_examples(1))
    assert dict(rcParams) == before


def test_curves_are_sparse_sorted_and_the_later_row_counts(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train_loss,val_loss\n5,0,2.0,\n0,0,3.0,\n5,1,,1.5\n5,1,1.0,\n")
    curves = read_curves(path)
    assert curves["train_loss"] == [(0, 3.0), (5, 1.0)]
    assert curves["val_loss"] == [(5, 1.5)]


def test_bad_cells_are_skipped_with_line_and_column(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,train_loss\n0,3\n1,much\n\xff\xfe,2\n3,1,7,8\ninf,2\n4,0.5\n")
    with pytest.warns(UserWarning, match=r"4 bad cells.*line 3, step '1', train_loss 'much'"):
        curves = read_curves(path)
    assert curves == {"train_loss": [(0, 3.0), (3, 1.0), (4, 0.5)]}


def test_small_images_keep_sharp_pixels_and_large_ones_their_shape():
    checker = Image.new("L", (2, 2))
    checker.putdata([0, 255, 255, 0])
    assert set(_fit(checker, 100, 80).tobytes()) == {0, 255}
    assert _fit(checker, 100, 80).size == (80, 80)
    assert _fit(Image.new("RGB", (4000, 3000)), 200, 180).size == (200, 150)
    assert _fit(Image.new("RGB", (5000, 1)), 200, 180).size == (200, 1)


def test_the_verdict_needs_a_truth():
    verdicts = [ShownExample(None, "q", truth, "red").right for truth in ("red", "Red", None)]
    assert verdicts == [True, False, None]
