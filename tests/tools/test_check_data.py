"""mmpeft check: what it counts, what it warns of, which mapping it proposes, and the clean part that it writes."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from mmpeft.cli import main
from mmpeft.data.sources import load_records
from tests.data.layouts import writing
from tests.data.layouts.rows import said
from tests.tiny import write_jsonl

ROW = {"image": "a.png", "question": "what?", "answer": "red"}


@pytest.fixture
def folder(tmp_path):
    """Two small images and a panorama."""
    for name, size in {"a.png": (32, 24), "b.png": (40, 30), "wide.png": (3000, 200)}.items():
        Image.new("RGB", size, "red").save(tmp_path / name)
    return tmp_path


def ended(words):
    """The message with which a check ends that finds faults."""
    with pytest.raises(SystemExit) as error:
        main(["check", *map(str, words)])
    return str(error.value.code)


def table(out):
    """Of what was printed: line of the table -> value."""
    lines = re.findall(r"^│ (.*?) +│ +(.*?) │$", out, re.M)
    return dict(lines)


def test_rows_images_answers_and_sizes_are_counted(folder, capsys):
    rows = [
        ROW,
        ROW,
        {**ROW, "image": "b.png", "answer": "a reddish brown"},
        {"question": "1?", "answer": "2"},
    ]
    main(["check", str(write_jsonl(folder / "a.jsonl", rows))])
    out = capsys.readouterr().out
    assert table(out) == {
        "rows": "4",
        "conversations, questions in them": "4, 4",
        "conversations without an image": "1",
        "conversations that say what another says": "1",
        "characters of an answer": "1 to 15, median 3",
        "images named, different names": "3, 2",
        "images that cannot be used": "0",
        "formats": "PNG 2",
        "width in pixels": "32 to 40, median 32",
        "height in pixels": "24 to 30, median 24",
    }
    assert "4 conversations about 2 images; nothing to object to" in out


def test_several_sources_are_all_looked_at_and_all_faults_are_told(folder, capsys):
    first = write_jsonl(folder / "a.jsonl", [ROW, {**ROW, "image": "gone.png"}, {**ROW, "image": "cut.png"}])
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:200])
    second = write_jsonl(folder / "b.jsonl", [{**ROW, "id": "x"}, {**ROW, "id": "x"}, {"image": "a.png"}])
    third = write_jsonl(folder / "c.jsonl", [ROW])
    told = ended([first, second, third])
    assert re.search(
        r"a\.jsonl: 2 images cannot be used:\na\.jsonl:2 .*gone\.png.*\na\.jsonl:3 .*cut\.png", told
    )
    assert "b.jsonl: 2 problem(s)\n  b.jsonl:2 (id 'x'): the id is also used at b.jsonl:1" in told
    assert "\n  b.jsonl:3: " in told
    assert "c.jsonl" not in told
    assert f"{third}: 1 conversations about 1 images; nothing to object to" in capsys.readouterr().out


def test_without_decoding_files_alone_are_looked_at(folder, capsys):
    (folder / "text.png").write_text("no image")
    data = write_jsonl(folder / "a.jsonl", [ROW, {**ROW, "image": "text.png"}])
    assert "no image of a known format" in ended([data])
    main(["check", str(data), "--decode", "false"])
    assert "nothing to object to" in capsys.readouterr().out
    assert "gone.png' is missing" in ended(
        [write_jsonl(folder / "a.jsonl", [ROW, {**ROW, "image": "gone.png"}]), "--decode=false"]
    )


def test_the_mapping_that_is_proposed_reads_the_rows(folder, capsys):
    rows = [
        {"photo": "a.png", "query": "what?", "answr": f"red {number}", "zzz": number} for number in range(3)
    ]
    data = write_jsonl(folder / "a.jsonl", rows)
    ended([data])
    out = capsys.readouterr().out
    words = shlex.split(next(line for line in out.splitlines() if line.startswith("  mmpeft check")))[2:]
    assert words == [
        str(data),
        "--columns",
        "{question: query, answer: answr, image: photo}",
        "--ignore",
        "zzz",
    ]
    main(["check", *words])
    out = capsys.readouterr().out
    assert "3 conversations about 1 images; nothing to object to" in out
    assert "zzz (3)" in out


def test_keys_that_are_not_understood_are_counted(folder, capsys):
    ended([write_jsonl(folder / "a.jsonl", [ROW, {**ROW, "nte": 1}, {**ROW, "nte": 2, "zzz": 1}])])
    out = capsys.readouterr().out
    assert "keys that are not understood: nte (2), zzz (1)" in out


def test_tokens_are_those_of_the_template(folder, tiny_base, capsys):
    from mmpeft.data.template import Template
    from mmpeft.models.language import load_tokenizer

    rows = [ROW, {**ROW, "question": "why " * 40}, {**ROW, "answer": "red " * 50}]
    data = write_jsonl(folder / "a.jsonl", rows)
    language = str(tiny_base / "language")
    template = Template(load_tokenizer(language), 100, "minigpt", 10_000)
    lengths = sorted(len(template.encode(record).ids) for record in load_records(data))
    words = [str(data), "--language", language, "--encoder", "test_vit"]
    main(["check", *words])
    out = capsys.readouterr().out
    assert table(out)["tokens, 100 an image"] == f"{lengths[0]} to {lengths[2]:,}, median {lengths[1]}"
    assert table(out)["cut at max_length 1,024"] == "0"
    assert sum(map(int, re.findall(r"tokens █* +(\d+)$", out, re.M))) == 3
    shown = re.findall(r"\[INST\] <Img><100 image features></Img> (.*?) ?\[/INST\] ?(\w+)", out)
    assert len(shown) == 3
    assert shown[0][0] == "what?"
    told = ended([*words, "--max_length", str(lengths[0] + 1)])
    assert "1 problem(s)" in told
    assert (
        "a.jsonl:2 (id 'a-2'): no token would carry loss: its first answer starts beyond max_length" in told
    )
    assert re.search(r"warning: .*: 1 conversations are longer than max_length", capsys.readouterr().out)


def test_a_question_with_choices_is_counted_with_all_of_them_as_it_is_trained(folder, tiny_base, capsys):
    """They are one row, whose tokens max_length limits, and stand at the same positions."""
    from mmpeft.data.packing import pack_choices
    from mmpeft.data.template import Template
    from mmpeft.models.language import load_tokenizer

    wide = [f"red {'red ' * number}" for number in range(70)]
    data = write_jsonl(
        folder / "a.jsonl", [{**ROW, "choices": ["red", "a blue one"]}, {**ROW, "choices": wide}]
    )
    language = str(tiny_base / "language")
    template = Template(load_tokenizer(language), 1, "minigpt", 10_000)
    rows = [pack_choices(template.encode_choices(record)) for record in load_records(data)]
    short, long = (len(row.ids) for row in rows)
    assert max(rows[1].positions) < 2048 < long, "more tokens than the model has positions"
    words = [str(data), "--language", language]
    main(["check", *words, "--max_length", str(long)])
    found = table(capsys.readouterr().out)
    assert found["tokens, 1 an image"] == f"{short} to {long:,}, median {short}"
    assert found["of them with all choices in one row"] == "2"
    assert found["beyond the model's 2,048 positions"] == "0"
    told = ended([*words, "--max_length", str(long - 1)])
    assert (
        f"a.jsonl:2 (id 'a-2') with its 70 choices has {long} tokens, more than max_length = {long - 1}"
        in told
    )


def test_rows_beyond_the_models_positions_are_warned_of(folder, tiny_base, capsys):
    data = write_jsonl(folder / "a.jsonl", [ROW, ROW, {**ROW, "answer": "red " * 3000}])
    main(["check", str(data), "--language", str(tiny_base / "language"), "--max_length", "100000"])
    out = capsys.readouterr().out
    assert table(out)["beyond the model's 2,048 positions"] == "1"
    assert "1 conversations are longer than the 2,048 positions" in out
    assert "1 warning(s), no fault" in out


@pytest.mark.parametrize(("narrow", "warned"), [(98, True), (99, False)])
def test_what_an_encoder_cuts_off_is_warned_of_above_a_hundredth_of_the_images(
    folder, capsys, narrow, warned
):
    rows = [{**ROW, "image": "wide.png"}]
    for number in range(narrow):
        Image.new("RGB", (24, 24)).save(folder / f"{number}.png")
        rows.append({**ROW, "image": f"{number}.png"})
    main(["check", str(write_jsonl(folder / "a.jsonl", rows)), "--encoder", "test_vit"])
    out = capsys.readouterr().out
    assert (f"more than 20% of the pixels of 1 of {narrow + 1} images" in out) is warned
    assert ("set model.vision.fit to pad" in out) is warned


def test_images_of_another_shape_are_told_from_a_border_that_all_lose():
    """At a crop_pct of 0.875 even a square image loses 23 %."""
    from mmpeft.models.vision import VisionConfig, VisionEncoder
    from mmpeft.tools.encoder_sight import cut_warning

    encoder = VisionEncoder(VisionConfig("test_vit"), load_weights=False)
    wide = {(3000, 200): 1, (96, 96): 2, (110, 100): 3}
    assert "1 of 6 images, and 94% of one of 3,000 x 200: they are cut off" in str(cut_warning(encoder, wide))
    encoder.data_config["crop_pct"] = 0.875
    told = str(cut_warning(encoder, wide))
    assert (
        "more than 20% of the pixels of 6 of 6 images: it cuts off a border of 23% even of images of its own"
        in told
    )
    assert "much more of 1, 95% of one of 3,000 x 200; set model.vision.fit" in told
    even = str(cut_warning(encoder, {(96, 96): 2, (110, 100): 3}))
    assert (
        "of 5 of 5 images: it cuts off a border of 23% even of images of its own shape, and of none much more"
        in even
    )


def test_the_clean_part_is_read_as_the_good_rows_were(folder, capsys):
    good = [
        {**ROW, "id": "1", "system": "Be brief.", "task": "vqa", "choices": ["red", "blue"]},
        {"images": ["a.png", "b.png"], "question": "<image> like <image>?", "answers": ["no", "no", "nope"]},
        {"question": "what is [{ here?", "answer": '[{"type": "text", "text": "x"}]'},
        {"image": "a.png", "id": "7", "conversations": said("a?", "b", "c?", "d")},
    ]
    bad = [{**ROW, "nte": 3}, {**ROW, "image": "gone.png"}, {**ROW, "id": "1"}, {**ROW, "answer": " "}]
    data = write_jsonl(folder / "a.jsonl", [*good, *bad])
    wanted = load_records(write_jsonl(folder / "good.jsonl", good))
    told = ended([data, "--fix", folder / "clean.jsonl"])
    assert "3 problem(s)" in told
    clean = load_records(folder / "clean.jsonl")
    keys = ("images", "turns", "task", "system", "choices", "references")
    assert [[r.get(k) for k in keys] for r in clean] == [[r.get(k) for k in keys] for r in wanted]
    assert clean[0]["id"] == "1"
    aside = [json.loads(line) for line in (folder / "clean.quarantine.jsonl").read_text().splitlines()]
    assert [row["where"] for row in aside] == [f"a.jsonl:{number}" for number in (5, 6, 7, 8)]
    assert [row["row"] for row in aside] == bad
    for row, reason in zip(aside, ("'nte'", "gone.png", "also used at a.jsonl:1", "is empty"), strict=True):
        assert reason in row["reason"]
    assert "clean.jsonl: 4 conversations; read by mmpeft fit" in capsys.readouterr().out
    main(["check", str(folder / "clean.jsonl")])
    assert "4 conversations about 2 images; nothing to object to" in capsys.readouterr().out
    assert "clean.jsonl is there already" in ended([data, "--fix", folder / "clean.jsonl"])


def test_lists_of_captions_are_told_and_stay_lists_in_the_clean_part(folder, capsys):
    rows = [
        {"image": "a.png", "captions": ["red", "a red one"]},
        {"image": "b.png", "instruction": "Say it.", "captions": ["x", "y", "x"]},
        {"image": "b.png", "captions": ["one"]},
    ]
    data, clean = write_jsonl(folder / "a.jsonl", rows), folder / "clean.jsonl"
    main(["check", str(data), "--fix", str(clean)])
    told = (
        "2 rows list 5 captions: training learns each of them, a test asks once and takes all as references"
    )
    assert told in capsys.readouterr().out
    keys = ("images", "turns", "references")
    for each, count in ((False, 3), (True, 6)):
        wanted, found = (load_records(path, each_caption=each) for path in (data, clean))
        assert len(found) == count
        assert [[r.get(k) for k in keys] for r in found] == [[r.get(k) for k in keys] for r in wanted]


def test_the_clean_part_of_several_sources_elsewhere_and_of_images_as_bytes(folder, tmp_path_factory, capsys):
    rows = [{"image": writing.png("blue"), "question": "what?", "answer": "blue"}] * 2
    packed = folder / writing.parquet(folder, "p.parquet", *rows)
    first, second = (
        write_jsonl(folder / name, [{**ROW, "id": "1"}, {**ROW, "image": "b.png", "id": "2"}])
        for name in "ab"
    )
    first, second = first.rename(folder / "a.jsonl"), second.rename(folder / "b.jsonl")
    out = tmp_path_factory.mktemp("elsewhere") / "all.jsonl"
    main(["check", str(first), str(second), str(packed), "--fix", str(out)])
    told = capsys.readouterr().out
    assert "6 conversations; 2 ids that an earlier source has were counted on; read by mmpeft fit" in told
    root = re.search(r"--data\.image_root=(\S+)", told)
    assert root
    records = load_records(out, image_root=root[1])
    assert [record["id"] for record in records][:4] == ["1", "2", "1#2", "2#2"]
    assert len(list(out.with_suffix(".images").iterdir())) == 1
    assert np.asarray(Image.open(records[5]["images"][0])).tolist() == [[[0, 0, 255]] * 2] * 2


def test_samples_are_drawn_as_the_encoder_sees_them(folder):
    data = write_jsonl(folder / "a.jsonl", [{**ROW, "image": "wide.png"}, {"question": "1?", "answer": "2"}])
    main(["check", str(data), "--pictures", str(folder / "plain.png")])
    main(["check", str(data), "--pictures", str(folder / "seen.png"), "--encoder", "test_vit"])
    reds = []
    for name in ("plain.png", "seen.png"):
        pixels = np.asarray(Image.open(folder / name).convert("RGB")).astype(int)
        rows, columns = np.nonzero((pixels[..., 0] > 250) & (pixels[..., 1] < 5) & (pixels[..., 2] < 5))
        reds.append((columns.max() + 1 - columns.min()) / (rows.max() + 1 - rows.min()))
    assert reds[0] > 12, "a panorama as it is"
    assert reds[1] == pytest.approx(1, abs=0.02), "the square that is left of it"


def test_no_torch_without_a_model(folder):
    data = write_jsonl(folder / "a.jsonl", [ROW])
    words = ["check", str(data), "--pictures", str(folder / "s.png"), "--fix", str(folder / "c.jsonl")]
    code = f"import sys; from mmpeft.cli import main; main({words!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max_length", "9"], "add --language MODEL"),
        (["--language", "x", "--encoder", "a", "b"], "the tokens of one encoder, and 2 are named"),
        (["--fix", "clean.json"], "wanted the name of a new .jsonl file"),
        (["--max_tiles", "6"], "--max_tiles are of an encoder, and none is named"),
        (["--image.frame", "middle", "--decode", "false"], "--decode false decodes none"),
        (["--image.scale", "fixed:9:1"], "LO must be below HI"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(folder, words, told):
    assert told in ended([write_jsonl(folder / "a.jsonl", [{**ROW, "image": "gone.png"}]), *words])


@pytest.fixture
def config(folder, tiny_base):
    """Of a fit with settings of its own, whose data the defaults would refuse."""
    ramp = np.linspace(0, 65535, 32 * 24).astype(np.uint16).reshape(24, 32)
    Image.fromarray(ramp).save(folder / "deep.png")
    row = {"photo": "deep.png", "question": "what?", "answer": "red", "note": 1}
    write_jsonl(folder / "train.jsonl", [row, row | {"answer": "blue", "choices": ["red", "blue"]}])
    write_jsonl(folder / "val.jsonl", [{"photo": "wide.png", "captions": ["one", "two"]}])
    write_jsonl(folder / "questions.jsonl", [{"photo": "wide.png", "question": "what?"}])
    vision = {
        "name": "test_vit",
        "weights": None,
        "fit": "tile",
        "max_tiles": 2,
        "image": {"max_pixels": 700_000},
    }
    settings = {
        "model": {
            "language": {"name": str(tiny_base / "language")},
            "vision": vision,
            "choice_losses": {"unlikelihood": 0, "length_normalised": 0},
        },
        "data": {
            **{split: str(folder / f"{split}.jsonl") for split in ("train", "val")},
            "predict": str(folder / "questions.jsonl"),
            "columns": {"image": "photo"},
            "ignore": ["note"],
            "packing": {"max_length": 900},
        },
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(settings))
    return folder / "fit.yaml"


def test_the_data_of_a_config_is_read_as_the_fit_will(folder, config, capsys):
    main(["check", "--config", str(config)])
    out = capsys.readouterr().out
    for name, conversations in {"train": 2, "val": 1, "questions": 1}.items():
        assert f"{name}.jsonl: {conversations} conversations about 1 images; nothing to object to" in out
    assert out.count("tokens, an image's by its shape") == 3
    assert "cut at max_length 900" in out
    assert "with all choices in one row" not in out, "of a fit that learns from no wrong choices"


def test_another_file_is_checked_by_a_config_and_its_settings_stand_nowhere_else(folder, config, capsys):
    other = write_jsonl(folder / "other.jsonl", [{"photo": "wide.png", "captions": ["one", "two"]}])
    main(["check", str(other), "--config", str(config)])
    out = capsys.readouterr().out
    assert "other.jsonl: 2 conversations about 1 images" in out, "as training learns them"
    assert "train.jsonl" not in out
    config.write_text(config.read_text().replace("700000", "500000"))
    assert "3000 x 200 pixels; wanted 1 to 500,000 pixels" in ended(["--config", config, other])
    assert "and --columns, --fit too: leave one of them out" in ended(
        ["--config", config, "--columns", "{image: photo}", "--fit", "pad"]
    )
    config.write_text(re.sub(r"\n  (train|val|predict): .*", "", config.read_text()))
    assert "names no data: set data.train" in ended(["--config", config])
    assert "no data is named" in ended([])


def test_data_of_no_rows_is_a_fault(folder):
    (folder / "a.jsonl").write_text("\n")
    assert "holds no rows" in ended([folder / "a.jsonl"])


def test_images_are_read_as_the_settings_of_the_fit_say(folder, capsys):
    """Refused, told, set aside and drawn under the limits and the scale that are given, and by no default."""
    ramp = np.linspace(0, 65535, 32 * 24).astype(np.uint16).reshape(24, 32)
    Image.fromarray(ramp).save(folder / "deep.png")
    data = write_jsonl(folder / "a.jsonl", [{**ROW, "image": "deep.png"}, {**ROW, "image": "wide.png"}])
    main(["check", str(data)])
    told = ended([data, "--image.max_pixels", "1000", "--fix", folder / "small.jsonl"])
    assert "1 images cannot be used:\na.jsonl:2" in told
    assert "3000 x 200 pixels; wanted 1 to 1,000 pixels" in told
    assert len((folder / "small.jsonl").read_text().splitlines()) == 1
    deep = write_jsonl(folder / "deep.jsonl", [{**ROW, "image": "deep.png"}])
    brightest = {}
    for scale in ("file", "fixed:0:1000000"):
        for encoder in ([], ["--encoder", "test_vit"]):
            picture = folder / f"{scale}{len(encoder)}.png".replace(":", "_")
            main(
                ["check", str(deep), "--image", f"{{scale: '{scale}'}}", "--pictures", str(picture), *encoder]
            )
            pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
            brightest[scale, len(encoder)] = np.count_nonzero((pixels > 20).all(-1) & (pixels < 120).all(-1))
    for encoder in (0, 2):
        assert brightest["file", encoder] > 1.5 * brightest["fixed:0:1000000", encoder], (
            "the middle of the ramp is black"
        )


def test_tiles_are_counted_as_the_settings_of_the_fit_say(folder, tiny_base, capsys):
    data = write_jsonl(folder / "a.jsonl", [{**ROW, "image": "wide.png"}])
    words = [
        "check",
        str(data),
        "--language",
        str(tiny_base / "language"),
        "--encoder",
        "test_vit",
        "--fit",
        "tile",
    ]
    lengths = []
    for tiles in ("2", "6"):
        main([*words, "--max_tiles", tiles])
        lengths.append(
            int(table(capsys.readouterr().out)["tokens, an image's by its shape"].split()[0].replace(",", ""))
        )
    assert lengths[1] > lengths[0]
