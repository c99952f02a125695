from dataclasses import dataclass
@dataclass
class Example:
    image: str | None
    question: str
    truth: str | None
    answer: str
def draw_report(*a): pass
