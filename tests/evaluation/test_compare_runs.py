"""`mmpeft compare`: the same questions or none, by name; and what it tells of them."""

import json
from pathlib import Path

import pytest

from mmpeft.cli import main
from mmpeft.evaluation.compare_runs import compare_tests, read_test
from tests.tiny import write_jsonl


def rows(right, **changes):
    """Twenty questions about ten images, of which the first ``right`` are answered rightly."""
    return [
        {
            **{"id": str(number), "question": "what?", "answer": "a" if number < right else "b"},
            **{"truth": "a", "images": [f"image{number // 2}"]},
            **changes,
        }
        for number in range(20)
    ]


@pytest.fixture
def folders(tmp_path):
    """Writes predictions of two tests; their folders."""

    def write(first, second):
        found = []
        for name, own in (("A", first), ("B", second)):
            (tmp_path / name).mkdir()
            write_jsonl(tmp_path / name / "predictions.jsonl", own)
            found.append(str(tmp_path / name))
        return found

    return write


def test_two_tests_are_compared_question_by_question(folders, tmp_path, capsys):
    first, second = folders(rows(8), [*reversed(rows(14))])
    main(["compare", first, second, "--output", str(tmp_path / "out.json")])
    told = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out.json").read_text())
    own = found["metrics"]["exact_match"]
    assert (own["first"], own["second"], own["better"], own["worse"]) == (0.4, 0.7, 6, 0)
    assert own["difference"] == pytest.approx(0.3)
    assert (own["questions"], own["clusters"]) == (20, 10)
    assert own["p_value"] == 2 / 2**3, "three images, each as good as one pair"
    assert "no difference can be told from chance" in told
    assert f"takes {own['questions_needed']:,} questions" in told


DIFFERENT = [
    (lambda row: row | {"id": "x"} if row["id"] == "3" else row, "id '3' \\('what\\?'\\)"),
    (lambda row: row | {"truth": "c"} if row["id"] == "3" else row, "id '3' \\(another right answers\\)"),
    (lambda row: row | {"images": ["other"]} if row["id"] == "3" else row, "id '3' \\(another images\\)"),
    (lambda row: row | {"question": "who?"} if row["id"] == "3" else row, "id '3' \\(another question\\)"),
    (lambda row: row | {"references": ["a", "c"]} if row["id"] == "3" else row, "another right answers"),
]


@pytest.mark.parametrize(("change", "message"), DIFFERENT)
def test_other_questions_are_refused_by_name(folders, change, message):
    first, second = folders(rows(8), [*map(change, rows(14))])
    with pytest.raises(SystemExit, match=f"1 of 20 questions of .* are not in .*{message}"):
        main(["compare", first, second])


def test_a_question_that_is_asked_twice_is_two(folders):
    first, second = folders([*rows(8), rows(8)[0]], rows(8))
    with pytest.raises(SystemExit, match="1 of 21 questions"):
        main(["compare", first, second])


def test_finetunes_of_one_test(folders, capsys):
    joint = [*rows(8, adapter="lora"), *rows(14, adapter="tfew")]
    first, _ = folders(joint, [])
    with pytest.raises(SystemExit, match="several finetunes: name one of lora, tfew"):
        main(["compare", first, first])
    with pytest.raises(SystemExit, match="a finetune 'ia3'; there are: lora, tfew"):
        main(["compare", first, first, "--adapter_a", "ia3", "--adapter_b", "lora"])
    main(["compare", first, first, "--adapter_a", "lora", "--adapter_b", "tfew"])
    assert "+0.3000" in capsys.readouterr().out


def test_what_could_not_be_asked_is_left_out_and_counted(folders, capsys):
    broken = [row | {"answer": None, "error": "gone.png"} if row["id"] == "0" else row for row in rows(14)]
    first, second = folders(rows(8), broken)
    compared = compare_tests(read_test(first), read_test(second))
    assert compared.unanswered == 1
    assert compared.metrics["exact_match"].questions == 19
    main(["compare", first, second])
    assert "1 questions are left out" in capsys.readouterr().out


def test_metrics_of_several_right_answers_and_of_choices(folders):
    several = {"references": ["a", "c"], "scores": {"a": -0.1, "b": -2.0}}
    compared = compare_tests(*map(read_test, folders(rows(8, **several), rows(14, **several))))
    assert {"exact_match", "accuracy", "anls", "brier"} <= compared.metrics.keys()
    assert compared.metrics["brier"].difference == 0


REFUSED = [
    (["gone", "gone"], "gone has no predictions.jsonl"),
    (["A", "B", "--metrics", "bleu"], "bleu scores no single answer"),
    (["A", "B", "--metrics", "exact"], "no metric is called 'exact'"),
    (["A", "B", "--metrics", "[]"], "no metric is named; leave --metrics out"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused(folders, tmp_path, monkeypatch, words, message):
    folders(rows(8), rows(14))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["compare", *words])


def test_one_question_is_compared_and_says_that_it_tells_little(folders, tmp_path, capsys):
    first, second = folders(rows(0)[:1], rows(1)[:1])
    main(["compare", first, second, "--output", str(tmp_path / "out.json")])
    assert "one cluster alone does not tell how many questions" in capsys.readouterr().out
    own = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)["metrics"][
        "exact_match"
    ]
    assert (own["standard_error"], own["detectable"], own["questions_needed"]) == (None, None, None)
    main(["compare", first, first])
    assert "no difference in any question" in capsys.readouterr().out


def test_texts_may_hold_other_ends_of_lines(folders, tmp_path, capsys):
    own = [row | {"question": "what\u2028is\x85it?"} for row in rows(8)]
    first, second = folders(own, own)
    for folder in (first, second):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (tmp_path / folder / "predictions.jsonl").write_text(text, "utf-8")
    main(["compare", first, second])
    assert "20 questions" in capsys.readouterr().out


DAMAGED = [
    ('{"id": "3", "que', "B/predictions.jsonl, line 3 is damaged"),
    ("[1]", r"line 3 is '\[1\]'; wanted an object"),
    ('{"id": "x", "question": "q", "images": [], "answer": "a"}', "no right answer .* of id 'x'"),
    ('{"id": "x", "question": "q", "images": [], "truth": "a"}', "no answer for the question of id 'x'"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGED)
def test_a_file_that_no_test_wrote_is_refused_by_its_line(folders, line, message):
    first, second = folders(rows(8)[:2], rows(8)[:2])
    with (Path(second) / "predictions.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match=message):
        main(["compare", first, second])


def test_predictions_of_before_are_refused(folders):
    old = [{key: value for key, value in row.items() if key != "images"} for row in rows(8)]
    first, second = folders(old, rows(8))
    with pytest.raises(SystemExit, match=r"older mmpeft: test it again, with `mmpeft test --run"):
        main(["compare", first, second])


def test_a_test_writes_what_a_comparison_reads(tiny_run, tmp_path, capsys):
    """Also beside its metrics their intervals, which the table and the report tell."""
    for name in ("a", "b"):
        main(["test", f"--run={tiny_run}", f"--output={tmp_path / name}"])
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    low, high = metrics["ci95_low/exact_match"], metrics["ci95_high/exact_match"]
    assert low <= metrics["exact_match"] <= high
    assert f"{metrics['exact_match']:.4f} ({low:.4f} to {high:.4f})" in capsys.readouterr().out
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "6 questions, 2 clusters" in " ".join(capsys.readouterr().out.split())
