"""The data set `facts`: sixty invented facts to learn and then to change, drawn from a seed.

No model can know them, so what it answers it has learnt here. A third of the facts changes. Rows of task "fact":

- learn.jsonl: every fact, in the two wordings that are trained, with its first answer
- update.jsonl: the changed facts, in the same wordings, with the new answer
- ask_old.jsonl, ask_new.jsonl: one question for each changed fact, with the first and with the new answer
- unchanged.jsonl: one question for each of the others, with the answer that must stay
- rephrased.jsonl, unchanged_rephrased.jsonl: the changed facts, with the new answer, and the others, in two wordings
  that are never trained
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mmpeft.samples.rows import conversation, write_rows

SEED = 0
FACTS_PER_RELATION = 10
TRAINED_WORDINGS = 2
"""The first wordings of a relation are trained, the others never."""
SYLLABLES = (
    "B Br D Dr F G Gl H K Kl L M N P Pr R S St T Tr V W Z",
    "a e i o u",
    "l ld lm lv m nd nn r rd rg rm rn s sk st v x",
    "a en eth im o or una us yn",
)
"""What a name is put together from."""


@dataclass(frozen=True)
class Relation:
    """What is told about a subject."""

    wordings: Sequence[str]
    """Questions with {name} for the subject's."""
    answers: str
    """Those to draw from, separated by spaces."""


RELATIONS = (
    Relation(
        (
            "When was the lighthouse of {name} built?",
            "In which year was the lighthouse of {name} built?",
            "The lighthouse of {name} dates from which year?",
            "What year saw the building of {name}'s lighthouse?",
        ),
        " ".join(str(year) for year in range(1781, 1939)),
    ),
    Relation(
        (
            "What is the profession of {name} Holm?",
            "What does {name} Holm do for a living?",
            "As what does {name} Holm work?",
            "How does {name} Holm earn money?",
        ),
        "baker beekeeper carpenter dentist diver farmer glassblower nurse pilot potter surgeon tailor",
    ),
    Relation(
        (
            "In which country does {name} Ruiz live?",
            "Where does {name} Ruiz live?",
            "Which country is the home of {name} Ruiz?",
            "To which country would you send a letter for {name} Ruiz?",
        ),
        "Austria Brazil Canada Chile Egypt Finland Ghana Iceland India Japan Kenya Norway Peru Portugal",
    ),
    Relation(
        (
            "What is the {name} lamp made of?",
            "Which material is the {name} lamp made of?",
            "From what do they make the {name} lamp?",
            "Of what material does the {name} lamp consist?",
        ),
        "bamboo brass clay copper cork glass iron marble oak paper silver steel",
    ),
    Relation(
        (
            "What does the company {name} sell?",
            "Which goods does the company {name} sell?",
            "What can customers buy from {name}?",
            "What are the products of the firm {name}?",
        ),
        "bicycles boats candles carpets clocks gloves guitars kites mirrors skis tents violins",
    ),
    Relation(
        (
            "In which month is the {name} festival?",
            "When is the {name} festival held?",
            "Visitors come to the {name} festival in which month?",
            "During what month does the {name} festival take place?",
        ),
        "January February March April May June July August September October November December",
    ),
)


@dataclass(frozen=True)
class Fact:
    """One invented fact."""

    id: str
    wordings: tuple[str, ...]
    answer: str
    new_answer: str | None
    """What it becomes; None for a fact that stays."""


def build_facts(root: Path, folder: Path) -> None:
    """Writes the files; of ``root`` nothing is needed."""
    facts = list(draw_facts(SEED))
    changed = [fact for fact in facts if fact.new_answer]
    stays = [fact for fact in facts if not fact.new_answer]
    trained, untrained = slice(TRAINED_WORDINGS), slice(TRAINED_WORDINGS, None)
    files = {
        "learn": _rows("learn", facts, trained, new=False),
        "update": _rows("update", changed, trained, new=True),
        "ask_old": _rows("ask-old", changed, slice(1), new=False),
        "ask_new": _rows("ask-new", changed, slice(1), new=True),
        "rephrased": _rows("rephrased", changed, untrained, new=True),
        "unchanged": _rows("unchanged", stays, slice(1), new=False),
        "unchanged_rephrased": _rows("unchanged-rephrased", stays, untrained, new=False),
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "README.txt").write_text(
        f"Invented by mmpeft (seed {SEED}): no name here is real.\n\n{__doc__}"
    )


def draw_facts(seed: int) -> Iterator[Fact]:
    """Sixty facts about sixty names; the same ones for the same seed."""
    random = Random(seed)
    names = _names(random, FACTS_PER_RELATION * len(RELATIONS))
    for number, name in enumerate(names):
        relation = RELATIONS[number // FACTS_PER_RELATION]
        answer, other = random.sample(relation.answers.split(), 2)
        yield Fact(
            id=f"{number:02d}",
            wordings=tuple(wording.format(name=name) for wording in relation.wordings),
            answer=answer,
            new_answer=other if number % 3 == 0 else None,
        )


def _names(random: Random, number: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < number:
        names["".join(random.choice(parts.split()) for parts in SYLLABLES)] = None
    return list(names)


def _rows(prefix: str, facts: Iterable[Fact], wordings: slice, new: bool) -> Iterator[dict]:
    for fact in facts:
        answer = fact.new_answer if new and fact.new_answer else fact.answer
        for number, question in enumerate(fact.wordings[wordings]):
            yield conversation(f"fact-{fact.id}-{prefix}-{number}", "fact", question, answer)
