"""Answers for the metrics' tests."""

import pytest

from mmpeft.metrics.answer import Answer


@pytest.fixture
def make():
    """Makes answers from (prediction, references) pairs; other parts of `Answer` are lists with one item each."""

    def run(*pairs, **parts) -> list[Answer]:
        answers = []
        for number, (prediction, references) in enumerate(pairs):
            texts = [references] if isinstance(references, str) else list(references)
            own = {name: values[number] for name, values in parts.items()}
            answers.append(Answer(f"q{number}", f"test.jsonl:{number + 1}", prediction, texts, **own))
        return answers

    return run
