"""The live engine (continuous batching): requests join and leave between steps, while one thread runs the model.

::

    submit -> FairQueue -> a row -> prompt read in chunks -> a token a step -> Ticket: pieces, then the completion
    load, unload ----------------------------------------> between two steps
"""

import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch

from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import Decoder
from mmpeft.inference.engine import Engine, Work
from mmpeft.inference.fair_queue import FairQueue
from mmpeft.inference.finetunes import Finetunes, Version
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.requests import Completion, Request
from mmpeft.inference.tickets import CancelledError, Event, FailedError, OverloadedError, Piece, Ticket
from mmpeft.inference.writer import Writer


@dataclass(eq=False)
class _Job:
    """A request on its way."""

    ticket: Ticket
    version: Version
    request: Request
    """As the bank knows its finetune."""
    writer: Writer | None = None
    handle: int = -1
    told: str = ""


class LiveEngine:
    """Answers requests of many callers on one model, each as if it were alone. Between `start` and `close` its thread
    is the only one that may use the model.

    Args:
        engine: turns records into prompts, and has the model.
        settings: how much it holds at once.
    """

    def __init__(self, engine: Engine, settings: LiveSettings | None = None):
        self.engine, self.settings = engine, settings or LiveSettings()
        self.finetunes = Finetunes(engine.model)
        self._queue = FairQueue[_Job](self.settings.max_rows, self.settings.max_waiting)
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: list[_Job] = []
        self._changed = Condition()
        self._thread: Thread | None = None
        self._closing = self._draining = False
        self._steps = self._tokens = 0
        self._seconds = 1.0
        self._decoder = self._new_decoder()

    def start(self) -> None:
        """Starts the thread."""
        self._closing = self._draining = False
        self._thread = Thread(target=self._work, name="live engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancels what has not ended, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "LiveEngine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        request: Request,
        *,
        logprobs: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Ticket:
        """Takes a request in, at once and from any thread. Its finetune stays what it is now until the request has
        ended, also when it is replaced or unloaded.

        Args:
            request: written or ranked. What is wrong with its record or images is told by its completion.
            logprobs: how many likely tokens to tell at every place; None for no log-probabilities.
            on_event: see `Ticket`.

        Raises:
            UnknownNameError: there is no such finetune.
            OverloadedError: no place to wait, or the engine is closed or draining.
        """
        with self._changed:
            if self._closing or self._draining or self._thread is None:
                raise OverloadedError("the engine is being closed; ask again later", self._seconds)
            version = self.finetunes.pin(request.adapter)
            if not self._queue.has_place(version.name):
                self.finetunes.unpin(version)
                raise OverloadedError(
                    f"{len(self._queue)} requests are waiting; ask again later", self._retry_after()
                )
            ticket = Ticket(request, logprobs, on_event)
            self._queue.put(version.name, _Job(ticket, version, replace(request, adapter=version.in_bank)))
            self._changed.notify_all()
        return ticket

    def load(self, name: str, folder: str | Path) -> None:
        """Adds a finetune, a folder in PEFT's format of any method with or without its ``projector.safetensors``,
        between two steps; or puts it in the place of the one of that name for all requests that come from now on.

        Raises:
            RefusedError: its files are damaged or do not fit, it changes nothing, or reaches others' rows. Nothing has
                changed then.
        """
        self._call(lambda: self.finetunes.load(name, folder))

    def unload(self, name: str) -> None:
        """Takes a finetune away for all requests that come from now on.

        Raises:
            UnknownNameError: there is none of that name.
        """
        self._call(lambda: self.finetunes.unload(name))

    def names(self) -> list[str]:
        """Of the finetunes that can be asked, without the base."""
        return self.finetunes.names()

    def drain(self, timeout: float) -> bool:
        """Takes nothing more in and waits until all has ended, at most so many seconds; what has not is cancelled.

        Returns:
            Whether all has ended by itself.
        """
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not self._queue and not self._running, timeout)
        self.close()
        return done

    def statistics(self) -> dict[str, float]:
        """Numbers of now (``waiting``, ``running``, ``columns``) and since the start (``steps``, ``tokens``)."""
        with self._changed:
            return {
                "waiting": len(self._queue),
                "running": len(self._running),
                "steps": self._steps,
                "tokens": self._tokens,
            }

    # -- the worker's thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._closing or self._queue or self._running or self._commands
                )
                if self._closing:
                    break
            self._run_commands()
            self._drop_cancelled()
            while job := self._take():
                self._begin(job)
            self._step()
            self.finetunes.clear()
        for job in [*self._running, *self._queue]:
            job.ticket.cancel()
        self._drop_cancelled()
        self._run_commands()

    def _call(self, action: Callable[[], Any]) -> Any:
        """Does something between two steps and waits for it."""
        future: Future[Any] = Future()
        with self._changed:
            if self._thread is None or self._closing:
                raise OverloadedError("the engine is not running", self._seconds)
            self._commands.append((action, future))
            self._changed.notify_all()
        return future.result()

    def _run_commands(self) -> None:
        while self._commands:
            action, future = self._commands.popleft()
            try:
                with torch.inference_mode():
                    future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

    def _take(self) -> _Job | None:
        with self._changed:
            return self._queue.take(lambda _: True)

    def _begin(self, job: _Job) -> None:
        """Reads its prompt, or ranks its choices."""
        self._running.append(job)
        try:
            if job.request.rank:
                ((_, completion),) = self.engine.run(Work([[0]]), [job.request])
                self._end(job, completion)
                return
            example = self.engine.encode(job.request)
            with torch.inference_mode():
                batch = self.engine.batch(job.request, example)
                (job.handle,) = self._decoder.join(batch, [job.request.sampling])
            job.ticket.prompt_tokens = len(example.conversations[0].ids)
            job.writer = Writer(self.engine.template, [job.request.sampling], [job.handle])
        except RefusedError as error:
            self._end(job, Completion.refused(error))
        except Exception as error:
            self._fail([job], error)

    def _step(self) -> None:
        if not self._decoder:
            return
        try:
            with torch.inference_mode():
                steps = {step.conversation: step for step in self._decoder.step()}
        except Exception as error:
            self._fail(self._running, error)
            self._decoder = self._new_decoder()
            return
        self._steps += 1
        for job in list(self._running):
            step, writer = steps[job.handle], job.writer
            assert writer is not None, "those that run are being written"
            self._tokens += step.token >= 0
            going_on = writer.put(0, step)
            text = writer.text(0)
            settled = text[: writer.settled(0, text)] if going_on else text
            job.ticket.tell(Piece(settled[len(job.told) :], [step.token] if step.token >= 0 else []))
            job.told = max(job.told, settled, key=len)
            if not going_on:
                self._decoder.leave(job.handle)
                self._end(job, writer.completion(0))

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = self._queue.remove(lambda job: job.ticket.cancelled)
        for job in gone:
            self.finetunes.unpin(job.version)
            job.ticket.end(Completion.refused(CancelledError("cancelled")))
        for job in [job for job in self._running if job.ticket.cancelled]:
            self._decoder.leave(job.handle)
            self._end(job, Completion.refused(CancelledError("cancelled")))

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        traceback.print_exception(error)
        failure = FailedError(f"the model failed in this step ({type(error).__name__}: {error}); ask again")
        for job in list(jobs):
            self._end(job, Completion.refused(failure))

    def _end(self, job: _Job, completion: Completion) -> None:
        with self._changed:
            self._running.remove(job)
            self._queue.give_back(job.version.name)
            self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - job.ticket.submitted)
        self.finetunes.unpin(job.version)
        job.ticket.end(completion)

    def _retry_after(self) -> float:
        return self._seconds * (1 + len(self._queue) / self.settings.max_rows)

    def _new_decoder(self) -> Decoder:
        engine = self.engine
        return Decoder(engine.model, engine.template.layout.end_ids(engine.model.reader.end_ids))
