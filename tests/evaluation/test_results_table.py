"""The metrics on the screen: totals first, classes in a table of their own."""

from mmpeft.evaluation.results_table import print_metrics

OWN = {
    "exact_match": 0.5,
    **{f"{family}/{label}": 0.25 for family in ("precision", "f1") for label in ("red", "[b]a/b", "macro")},
    "forgetting/kl": 0.125,
    "questions": 4_000,
    "cut_answers": 3,
}


def rows_of(text):
    """The cells of every row of a table."""
    lines = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def test_totals_come_first_and_classes_have_their_own_table(capsys):
    print_metrics({"default": OWN})
    told = capsys.readouterr().out
    assert "test: 4,000 questions" in told
    assert rows_of(told) == [
        ["metric", "value"],
        ["exact_match", "0.5000"],
        ["precision/macro", "0.2500"],
        ["f1/macro", "0.2500"],
        ["forgetting/kl", "0.1250"],
        ["cut_answers", "3"],
        ["class", "precision", "f1"],
        ["red", "0.2500", "0.2500"],
        ["[b]a/b", "0.2500", "0.2500"],
    ]
    assert "3 answers were cut before their end" in told


def test_a_table_of_classes_with_intervals_fits_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    labels = ("rectangle", "a name of many words")
    values = {f"{family}/{label}": 1 / 3 for family in ("precision", "recall", "f1") for label in labels}
    bounds = {f"ci95_{end}/{name}": bound for name in values for end, bound in (("low", 0.25), ("high", 1.0))}
    print_metrics({"default": values | bounds | {"questions": 9}})
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    rows = rows_of(told)
    assert ["rectangle", *["0.333 (0.25-1.00)"] * 3] in rows
    assert ["words", "", "", ""] in rows, "a long name goes on below, a value does not"


def test_each_of_several_finetunes_has_its_classes(capsys):
    print_metrics(
        {"lora": OWN, "tfew": {"f1/red": 1.0, "f1/macro": 1.0, "questions": 2}, "text": {"questions": 1}}
    )
    told = capsys.readouterr().out
    rows = rows_of(told)
    assert rows[0] == ["metric", "lora", "tfew", "text"]
    assert ["f1/macro", "0.2500", "1.0000", ""] in rows
    assert rows[-2:] == [["class", "f1"], ["red", "1.0000"]]
    assert "lora: classes" in told
    assert "tfew: classes" in told
    assert "text: classes" not in told
    assert "lora: 3 answers were cut" in told
