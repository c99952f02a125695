"""The rows of a live engine: in each step some columns of prompts are read, and every answer gets a token.

What goes wrong is the end of those that it concerns: of one request where it is its own or its finetune gives NaN, of
those of a forward where that raised. The others go on.
"""

import traceback
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.packing import PREFIX, Role
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import Decoder, Step
from mmpeft.inference.engine import Engine, add_likelihood
from mmpeft.inference.finetunes import Version
from mmpeft.inference.kv_cache import Room
from mmpeft.inference.live_job import Job
from mmpeft.inference.live_prompts import Prompts
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.requests import Completion
from mmpeft.inference.reuse import Identity
from mmpeft.inference.tickets import FailedError, Piece, TokenLogprob
from mmpeft.inference.writer import Answer
from mmpeft.models.head_losses import losses_of_tokens
from mmpeft.models.token_losses import TokenLosses, length_normalised
from mmpeft.transfer import to_device

Ended = tuple[Job, Completion]


class LiveRows:
    """Everything that runs the model for a live engine; one thread uses it.

    Args:
        engine: has the model.
        settings: how much there may be at once.
        identify: the hashes of a version.
    """

    def __init__(self, engine: Engine, settings: LiveSettings, identify: Callable[[Version], Identity]):
        self.engine, self.model, self.settings = engine, engine.model, settings
        self.prompts = Prompts(engine.model, settings, identify)
        self.writing: dict[int, Job] = {}
        """By the decoder's handles."""
        self.unread: list[Job] = []
        """Prompts of a model that does not read in chunks; one is read in a step."""
        self.steps = self.tokens = self.failures = 0
        """Steps of decoding, tokens written, and forwards that raised."""
        self.columns = 0
        """Of keys and values, as the last step left them; for whoever asks while the next one changes them."""
        self.broken = False
        """Whether the last one did."""
        self.decoder = self._new_decoder()

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def jobs(self) -> list[Job]:
        return [*self.unread, *self.prompts.jobs, *self.writing.values()]

    def add(self, job: Job) -> Iterator[Ended]:
        """Takes in a request that is prepared; gives it back if it cannot be asked."""
        if job.refusal is not None:
            yield job, Completion.refused(job.refusal)
        elif not self.model.reader.reading.packed:
            self.unread.append(job)
        else:
            with torch.inference_mode():
                yield from self._guarded([job], lambda: self.prompts.open(job))

    def remove(self, job: Job) -> None:
        """Nobody wants it any more; its row is free at once."""
        if job in self.prompts.jobs:
            self.prompts.remove(job)
        if job in self.unread:
            self.unread.remove(job)
        if self.writing.pop(job.handle, None):
            self.decoder.leave(job.handle)
            self.columns = self.decoder.columns

    def step(self) -> Iterator[Ended]:
        """Reads some columns and writes a token of every answer; gives those that have ended."""
        with torch.inference_mode():
            if self.unread:
                yield from self._read_whole(self.unread.pop(0))
            if chosen := self.prompts.chosen():
                yield from self._read(chosen)
            if self.writing:
                yield from self._write()
        self.columns = self.decoder.columns

    # -- reading ------------------------------------------------------------------------------------------------

    def _read(self, chosen: list[tuple[Job, int]]) -> Iterator[Ended]:
        """What is refused of several is asked of each alone."""
        done: list[Job] = []
        try:
            done = self.prompts.read(chosen)
        except RefusedError as error:
            if len(chosen) == 1:
                yield chosen[0][0], Completion.refused(error)
            else:
                for each in chosen:
                    yield from self._read([each])
        except Exception as error:
            yield from self._failed([job for job, _ in chosen], error)
        self.broken = self.broken and not done
        for job in done:
            yield from self._guarded([job], lambda job=job: self._begin_answer(job))

    def _read_whole(self, job: Job) -> Iterator[Ended]:
        yield from self._guarded([job], lambda: self._begin_whole(job))

    def _begin_answer(self, job: Job) -> Completion | None:
        prompt = job.prompt
        assert prompt is not None, "it has been read"
        assert job.row is not None, "it was prepared"
        if not job.request.rank:
            handle = self.decoder.admit(prompt.prefilled(), job.request.adapter, job.request.sampling)
            job.prompt = None
            self._begin_writing(job, handle)
            return None
        hidden = prompt.hidden()
        targets, segments = np.array(job.row.targets), np.array(job.row.segments)
        labelled = targets != IGNORE_INDEX
        labels = to_device(targets[labelled], hidden.device)
        owners = [job.request.adapter] * len(labels)
        scored = losses_of_tokens(
            self.model.reader, self.model.bank, hidden, labels, owners, {}, in_float32=True
        )
        return self._ranked(job, TokenLosses(*scored, np.zeros(len(labels), np.int64), segments[labelled]))

    def _begin_whole(self, job: Job) -> Completion | None:
        batch = job.batch().to(self.model.device)
        job.ticket.prompt_tokens = int((batch.targets == IGNORE_INDEX).sum())
        if job.request.rank:
            return self._ranked(job, self.model.token_losses(batch, in_float32=True))
        (handle,) = self.decoder.join(batch, [job.request.sampling])
        self._begin_writing(job, handle)
        return None

    def _begin_writing(self, job: Job, handle: int) -> None:
        job.handle, job.answer = handle, Answer(self.engine.template, job.request.sampling)
        self.writing[handle] = job

    def _ranked(self, job: Job, losses: TokenLosses) -> Completion:
        assert job.row is not None, "it is prepared"
        if not bool(losses.nll.isfinite().all()):
            raise _diverged(job)
        completion = Completion.chosen(job.request, length_normalised(losses, 1)[0].tolist())
        for segment, role in enumerate(job.row.roles, start=PREFIX + 1):
            if role == Role.RIGHT:
                add_likelihood(completion, losses, 0, segment)
        return completion

    # -- writing ------------------------------------------------------------------------------------------------

    def _write(self) -> Iterator[Ended]:
        """Tokens are told before the forward for the next."""
        try:
            steps = self.decoder.write()
            finite = self.decoder.logits.amax(-1).isfinite().tolist()
        except Exception as error:
            yield from self._lost(error)
            return
        for step, logits, usable in zip(steps, self.decoder.logits, finite, strict=True):
            job = self.writing[step.conversation]
            completion = self._put(job, step, logits) if usable else Completion.refused(_diverged(job))
            if completion is not None:
                self.remove(job)
                yield job, completion
        try:
            self.decoder.advance()
        except Exception as error:
            yield from self._lost(error)
            return
        self.steps += 1
        self.broken = False

    def _lost(self, error: Exception) -> Iterator[Ended]:
        """The end of all answers that are being written: what they have read may be half changed."""
        jobs, self.writing = list(self.writing.values()), {}
        self.decoder = self._new_decoder()
        yield from self._failed(jobs, error)

    def _put(self, job: Job, step: Step, logits: Tensor) -> Completion | None:
        """One token of one answer; the completion if it was the last."""
        answer = job.answer
        assert answer is not None, "it is being written"
        going_on = answer.put(step)
        text = answer.text()
        settled = answer.settled(text) if going_on else len(text)
        tokens = [step.token] if step.token >= 0 else []
        self.tokens += len(tokens)
        logprobs = None if job.ticket.logprobs is None else _logprobs(tokens, logits, job.ticket.logprobs)
        if tokens or settled > job.told:
            job.ticket.tell(Piece(text[job.told : settled], tokens, logprobs))
        job.told = max(job.told, settled)
        return None if going_on else answer.completion()

    # -- what goes wrong ----------------------------------------------------------------------------------------

    def _guarded(self, jobs: list[Job], action: Callable[[], Completion | None]) -> Iterator[Ended]:
        """Does something for jobs; gives their end, if it is one."""
        try:
            completion = action()
        except RefusedError as error:
            completion = Completion.refused(error)
        except Exception as error:
            yield from self._failed(jobs, error)
            return
        if completion is not None:
            for job in jobs:
                yield job, completion

    def _failed(self, jobs: list[Job], error: Exception) -> Iterator[Ended]:
        """The end of all that took part in a forward that raised."""
        self.failures += 1
        self.broken = True
        traceback.print_exception(error)
        told = f"the model failed in this step ({type(error).__name__}: {error}); ask again"
        for job in jobs:
            yield job, Completion.refused(FailedError(told))

    def _new_decoder(self) -> Decoder:
        ends = self.engine.template.layout.end_ids(self.model.reader.end_ids)
        settings = self.settings
        return Decoder(
            self.model, ends, Room(settings.max_rows, settings.max_columns, settings.deterministic)
        )


def _diverged(job: Job) -> FailedError:
    who = "the base" if job.version.name is None else f"the finetune {job.version.name!r}"
    return FailedError(
        f"{who} gives numbers that are NaN or infinite here: its training diverged; train it again, or ask another"
    )


def _logprobs(tokens: list[int], logits: Tensor, top: int) -> list[TokenLogprob]:
    """Of the tokens of one step, from their logits (vocabulary,)."""
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    best = list(zip(ids.tolist(), values.tolist(), strict=True))
    return [TokenLogprob(token, float(logprobs[token]), best) for token in tokens]
