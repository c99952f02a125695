"""So many examples of every class, by seed."""

import pytest

from mmpeft.data.sampling import sample_shots
from mmpeft.data.sources import DataError
from tests.tiny import make_record


def record(number, answer, choices=None):
    own = make_record(answer=answer, id=str(number), where=f"train.jsonl:{number + 1}")
    return own | ({"choices": choices} if choices else {})


RECORDS = [record(n, ["circle", "square", "star"][n % 3], ["circle", "square", "star"]) for n in range(30)]


def answers(records):
    return sorted(r["turns"][-1][1] for r in records)


def test_every_class_has_as_many():
    assert answers(sample_shots(RECORDS, 4, seed=0)) == ["circle"] * 4 + ["square"] * 4 + ["star"] * 4


def test_the_seed_decides_and_the_order_of_the_records_stays():
    first, again, other = (sample_shots(RECORDS, 4, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    numbers = [int(r["id"]) for r in first]
    assert numbers == sorted(numbers)


def test_without_choices_the_answers_are_the_classes():
    plain = [record(n, "yes" if n % 2 else "no") for n in range(10)]
    assert answers(sample_shots(plain, 2, seed=0)) == ["no", "no", "yes", "yes"]


def test_a_class_with_too_few_examples_is_named_with_its_row():
    with pytest.raises(
        DataError, match=r"10 examples have the answer 'circle', which train.jsonl:1 \(id '0'\)"
    ):
        sample_shots(RECORDS, 11, seed=0)


def test_a_class_that_is_absent_is_named_with_the_row_that_lists_it():
    records = [*RECORDS, record(30, "star", ["star", "moon"])]
    with pytest.raises(DataError, match=r"0 examples have the answer 'moon', which train.jsonl:31"):
        sample_shots(records, 1, seed=0)
