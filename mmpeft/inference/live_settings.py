"""Settings of a live engine: how much it holds at once, how it shares that out, and whether its shapes are fixed."""

from dataclasses import dataclass

from mmpeft.errors import RefusedError, require_positive


@dataclass(frozen=True)
class LiveSettings:
    """Bounds of a live engine."""

    max_rows: int = 32
    """Requests that are read or written at once; each has a row of keys and values."""
    max_columns: int = 2048
    """Tokens of one row: its virtual tokens, its prompt and the longest answer that it may have. A request of more is
    refused."""
    max_waiting: int = 16
    """Requests that wait for a row: by default half as many as have one, so that under overload an answer takes half as
    long again, and who finds no place is told at once. A finetune may have as many waiting as there are places left for
    others, so that one that floods leaves half of them."""
    chunk: int = 256
    """Tokens of prompts that are read between two tokens of the answers being written."""
    feature_bytes: int = 2**28
    """Projected images that are kept, the latest used."""
    prefix_bytes: int = 2**29
    """Keys and values of read prompts that are kept, the latest used."""
    deterministic: bool = False
    """Whether no shape depends on others, so that an answer is the same bit by bit whatever is answered beside it:
    every step has ``max_rows`` rows of ``max_columns`` columns, prompts are read one by one in whole chunks, and logits
    are computed row by row. Experts that gather tokens of all rows do so still, and a finetune that is loaded with a
    larger rank than all before widens the products of its method."""

    def __post_init__(self):
        for name in ("max_rows", "max_columns", "chunk"):
            require_positive(name, getattr(self, name))
        for name in ("max_waiting", "feature_bytes", "prefix_bytes"):
            if getattr(self, name) < 0:
                raise RefusedError(f"{name} is {getattr(self, name)}; it must be at least 0")
