"""easy-VQA's questions and answers in German, by rule.

easy-VQA asks by 24 fixed templates. A negated question becomes "Stimmt es, dass ... kein ...?", which ja and nein
answer as clearly as yes and no answer the English one; after a plain German negation they would not ("doch").
"""

import re
from dataclasses import dataclass

from mmpeft.samples.sample import PrepareError

ADJECTIVES = {
    "black": "schwarze",
    "blue": "blaue",
    "brown": "braune",
    "gray": "graue",
    "green": "grüne",
    "red": "rote",
    "teal": "türkisfarbene",
    "yellow": "gelbe",
}
"""Before "Form", which is feminine: the ending is -e after "die", "eine" and "keine" alike."""


@dataclass(frozen=True)
class Noun:
    """A German noun with its article in the cases that the templates need."""

    name: str
    der: str
    """Nominative, definite."""
    des: str
    """Genitive, definite."""
    ein: str
    """Nominative, indefinite."""
    einen: str
    """Accusative, indefinite."""


NOUNS = {
    "circle": Noun("Kreis", "der Kreis", "des Kreises", "ein Kreis", "einen Kreis"),
    "rectangle": Noun("Rechteck", "das Rechteck", "des Rechtecks", "ein Rechteck", "ein Rechteck"),
    "triangle": Noun("Dreieck", "das Dreieck", "des Dreiecks", "ein Dreieck", "ein Dreieck"),
}
ANSWERS = {
    "yes": "ja",
    "no": "nein",
    "black": "schwarz",
    "blue": "blau",
    "brown": "braun",
    "gray": "grau",
    "green": "grün",
    "red": "rot",
    "teal": "türkis",
    "yellow": "gelb",
    **{name: noun.name for name, noun in NOUNS.items()},
}
TEMPLATES = {
    "what color is the shape?": "Welche Farbe hat die Form?",
    "what color is the SHAPE?": "Welche Farbe hat {shape.der}?",
    "what is the color of the shape?": "Was ist die Farbe der Form?",
    "what is the color of the SHAPE?": "Was ist die Farbe {shape.des}?",
    "what is the COLOR shape?": "Was ist die {color} Form?",
    "what shape is present?": "Welche Form ist vorhanden?",
    "what shape is in the image?": "Welche Form ist im Bild?",
    "what shape does the image contain?": "Welche Form enthält das Bild?",
    "is a COLOR shape present?": "Ist eine {color} Form vorhanden?",
    "is a SHAPE present?": "Ist {shape.ein} vorhanden?",
    "is no COLOR shape present?": "Stimmt es, dass keine {color} Form vorhanden ist?",
    "is no SHAPE present?": "Stimmt es, dass k{shape.ein} vorhanden ist?",
    "is there a COLOR shape?": "Gibt es eine {color} Form?",
    "is there a SHAPE?": "Gibt es {shape.einen}?",
    "is there not a COLOR shape?": "Stimmt es, dass es keine {color} Form gibt?",
    "is there not a SHAPE?": "Stimmt es, dass es k{shape.einen} gibt?",
    "is there a COLOR shape in the image?": "Gibt es im Bild eine {color} Form?",
    "is there a SHAPE in the image?": "Gibt es im Bild {shape.einen}?",
    "is there not a COLOR shape in the image?": "Stimmt es, dass es im Bild keine {color} Form gibt?",
    "is there not a SHAPE in the image?": "Stimmt es, dass es im Bild k{shape.einen} gibt?",
    "does the image contain a COLOR shape?": "Enthält das Bild eine {color} Form?",
    "does the image contain a SHAPE?": "Enthält das Bild {shape.einen}?",
    "does the image not contain a COLOR shape?": "Stimmt es, dass das Bild keine {color} Form enthält?",
    "does the image not contain a SHAPE?": "Stimmt es, dass das Bild k{shape.einen} enthält?",
}
"""English question with COLOR and SHAPE for the words that change -> German question; "ein" negated is "kein"."""
COLOR_WORD = re.compile(rf"\b({'|'.join(ADJECTIVES)})\b")
SHAPE_WORD = re.compile(rf"\b({'|'.join(NOUNS)})\b")


def translate(question: str, answer: str) -> tuple[str, str]:
    """A question and its answer in German.

    Raises:
        PrepareError: easy-VQA has no such question or answer.
    """
    color, shape = COLOR_WORD.search(question), SHAPE_WORD.search(question)
    template = SHAPE_WORD.sub("SHAPE", COLOR_WORD.sub("COLOR", question))
    if template not in TEMPLATES:
        raise PrepareError(
            f"no German rule for the question {question!r}; wanted one of easy-VQA's {len(TEMPLATES)} templates"
        )
    if answer not in ANSWERS:
        raise PrepareError(f"no German word for the answer {answer!r}; wanted one of {sorted(ANSWERS)}")
    german = TEMPLATES[template].format(
        color=ADJECTIVES[color[1]] if color else "", shape=NOUNS[shape[1]] if shape else None
    )
    return german, ANSWERS[answer]
