"""A request of the live engine on its way: prepared beside the model, then read, then written."""

from dataclasses import dataclass, field

from torch import Tensor

from mmpeft.data.batch import Batch, collate
from mmpeft.data.encoder import stacked
from mmpeft.data.loader import pack_row
from mmpeft.data.packing import PackedRow
from mmpeft.errors import RefusedError
from mmpeft.inference.chunks import Prompt
from mmpeft.inference.engine import Engine
from mmpeft.inference.finetunes import Version
from mmpeft.inference.requests import Request
from mmpeft.inference.reuse import PrefixKey
from mmpeft.inference.tickets import Ticket
from mmpeft.inference.writer import Answer


@dataclass(eq=False)
class Job:
    """What the engine knows of a request."""

    ticket: Ticket
    version: Version
    request: Request
    """With the name that the bank has for its finetune."""
    row: PackedRow | None = None
    """Its prompt, or its choices; as soon as it is prepared."""
    features: list[Tensor] = field(default_factory=list)
    """(image tokens, vision dim) of every image"""
    refusal: RefusedError | None = None
    """Why it cannot be asked, as its preparation found."""
    prompt: Prompt | None = None
    """While it is being read."""
    begun: bool = False
    """Whether its reading has begun, and others may wait for what they share with it."""
    keys: list[PrefixKey] = field(default_factory=list)
    """Of the prefixes that others may share."""
    answer: Answer | None = None
    """While it is being written, with its handle of the decoder and the characters that have been told."""
    handle: int = -1
    told: int = 0

    @property
    def ready(self) -> bool:
        """Whether it is prepared."""
        return self.row is not None or self.refusal is not None

    def batch(self) -> Batch:
        """The row alone."""
        assert self.row is not None, "it is prepared"
        return collate([self.row], stacked(self.features) if self.features else None, [self.request.adapter])


def prepare(engine: Engine, job: Job) -> None:
    """Encodes the request and loads its images; what is wrong with them is its own refusal. Needs the tokenizer and the
    vision encoder, and no other part of the model."""
    try:
        if job.request.read_truth:
            raise RefusedError("read_truth is told by `Engine.answer`; a live request is answered only")
        example = engine.encode(job.request)
        for found in engine.features.load(job.request.record["images"]):
            if isinstance(found, RefusedError):
                raise found
            job.features.append(found)
        job.row = pack_row([example])
    except RefusedError as error:
        job.refusal = error
