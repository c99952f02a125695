"""The live engine (continuous batching): requests join and leave between steps, while one thread runs the model.

::

    submit -> FairQueue -> a row -> prompt read in chunks -> a token a step -> Ticket: pieces, then the completion
         prepared meanwhile       load, unload: between two steps
"""

import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch

from mmpeft.errors import RefusedError
from mmpeft.inference.engine import Engine
from mmpeft.inference.fair_queue import FairQueue
from mmpeft.inference.finetunes import Finetunes
from mmpeft.inference.live_job import Job, prepare
from mmpeft.inference.live_rows import LiveRows
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.requests import Completion, Request
from mmpeft.inference.tickets import CancelledError, Event, FailedError, OverloadedError, Ticket


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
        if self.settings.deterministic:
            self.finetunes.fix_shapes()
        self._queue = FairQueue[Job](self.settings.max_rows, self.settings.max_waiting)
        self.places = self._queue.places_of_one
        """Requests that one finetune may have at the same time while nobody else asks; more are always refused."""
        self._rows = self._new_rows()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = Condition()
        self._thread: Thread | None = None
        self._preparing: list[ThreadPoolExecutor] = []
        self._closing = self._draining = False
        self._seconds, self._broken = 1.0, 0

    def start(self) -> None:
        """Starts the thread."""
        self._closing = self._draining = False
        self._preparing = [ThreadPoolExecutor(1) for _ in range(2)]  # of texts, and of images
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
        for each in self._preparing:
            each.shutdown(cancel_futures=True)

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
        if logprobs is not None and logprobs < 0:
            raise RefusedError(f"logprobs is {logprobs}; it must be at least 0, or None")
        with self._changed:
            self._require_open()
            version = self.finetunes.pin(request.adapter)
            if not self._queue.has_place(version.name):
                self.finetunes.unpin(version)
                told = f"{len(self._queue)} requests are waiting, and others keep a share; ask again later"
                raise OverloadedError(told, self._retry_after())
            ticket = Ticket(request, logprobs, on_event, self._wake)
            job = Job(ticket, version, replace(request, adapter=version.in_bank))
            self._queue.put(version.name, job)
            self._preparing[bool(request.record["images"])].submit(self._prepare, job)
        return ticket

    def load(self, name: str, folder: str | Path) -> None:
        """Adds a finetune, a folder in PEFT's format of any method with or without its ``projector.safetensors``,
        between two steps; or puts it in the place of the one of that name for all requests that come from now on.

        Raises:
            RefusedError: its files are damaged or do not fit, it changes nothing, or reaches others' rows. Nothing has
                changed then.
        """
        finetune = self.finetunes.read(folder)
        self.between_steps(lambda: self.finetunes.put(name, finetune))

    def unload(self, name: str) -> None:
        """Takes a finetune away for all requests that come from now on.

        Raises:
            UnknownNameError: there is none of that name.
        """
        self.finetunes.unload(name)
        self._wake()

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
            done = self._changed.wait_for(lambda: not self._queue and not self._queue.rows, timeout)
        self.close()
        return done

    def between_steps(self, action: Callable[[], Any]) -> Any:
        """Does something with the model between two steps, and waits for it."""
        future: Future[Any] = Future()
        with self._changed:
            if self._closing or self._thread is None:
                raise OverloadedError("the engine is not running", self._retry_after())
            self._commands.append((action, future))
            self._changed.notify_all()
        return future.result()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs, and the last forward did not raise."""
        return self._thread is not None and self._thread.is_alive() and not self._rows.broken

    def statistics(self) -> dict[str, float]:
        """Of now: requests ``waiting``, ``running``, columns of keys and values used (``columns``) and bytes kept for
        reuse. Since the start: decoding ``steps``, ``tokens`` written, forwards that raised (``failures``), and how
        often what was asked for was kept."""
        rows, prompts = self._rows, self._rows.prompts
        with self._changed:
            return {
                "waiting": len(self._queue),
                "running": self._queue.rows.total(),
                "columns": rows.columns,
                "steps": rows.steps,
                "tokens": rows.tokens,
                "failures": rows.failures + self._broken,
                "image_hits": prompts.images.hits,
                "image_misses": prompts.images.misses,
                "image_bytes": prompts.images.bytes,
                "prefix_columns_found": prompts.prefixes.found_columns,
                "prefix_columns_asked": prompts.prefixes.asked_columns,
                "prefix_bytes": prompts.prefixes.bytes,
            }

    # -- beside the model ---------------------------------------------------------------------------------------

    def _prepare(self, job: Job) -> None:
        if not job.ticket.cancelled:
            try:
                prepare(self.engine, job)
            except Exception as error:
                traceback.print_exception(error)
                job.refusal = FailedError(
                    f"the request could not be prepared ({type(error).__name__}: {error})"
                )
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._closing or self._draining or self._thread is None:
            raise OverloadedError("the engine is being closed; ask again later", self._retry_after())

    def _retry_after(self) -> float:
        """Seconds until those that wait now have rows."""
        return self._seconds * (1 + len(self._queue) / self.settings.max_rows)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._wait():
            try:
                self._round()
            except Exception as error:  # a fault of ours: nobody may wait for it for ever
                traceback.print_exception(error)
                self._broken += 1
                self._end_all(FailedError(f"the engine failed ({type(error).__name__}: {error}); ask again"))
        self._end_all(CancelledError("the engine was closed"))
        self._run_commands()

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self._changed:
            self._changed.notify_all()  # to who waits for the end of all
            self._changed.wait_for(
                lambda: (
                    self._closing
                    or self._commands
                    or len(self._rows)
                    or any(job.ready or job.ticket.cancelled for job in self._queue)
                    or self.finetunes.has_leaving
                )
            )
            return not self._closing

    def _round(self) -> None:
        cleared = self.finetunes.clear()  # first, so that what is loaded finds its places free
        if self._run_commands() or cleared:
            self._rows.decoder.rearrange()
        self._drop_cancelled()
        while job := self._take():
            for ended in self._rows.add(job):
                self._end(*ended)
        for ended in self._rows.step():
            self._end(*ended)

    def _run_commands(self) -> bool:
        changed = bool(self._commands)
        while self._commands:
            action, future = self._commands.popleft()
            try:
                with torch.no_grad():
                    future.set_result(action())
            except BaseException as error:
                future.set_exception(error)
        return changed

    def _take(self) -> Job | None:
        with self._changed:
            return self._queue.take(lambda job: job.ready)

    def _drop_cancelled(self) -> None:
        error = CancelledError("the request was cancelled")
        self._drop_waiting(lambda job: job.ticket.cancelled, error)
        for job in [job for job in self._rows.jobs if job.ticket.cancelled]:
            self._end(job, Completion.refused(error))

    def _end_all(self, error: RefusedError) -> None:
        for job in self._rows.jobs:
            self._end(job, Completion.refused(error))
        self._rows = self._new_rows()
        if self._closing:
            self._drop_waiting(lambda _: True, error)

    def _drop_waiting(self, unwanted: Callable[[Job], bool], error: RefusedError) -> None:
        with self._changed:
            gone = self._queue.remove(unwanted)
        for job in gone:
            self.finetunes.unpin(job.version)
            job.ticket.end(Completion.refused(error))

    def _end(self, job: Job, completion: Completion) -> None:
        """Frees its row, then tells its caller."""
        self._rows.remove(job)
        with self._changed:
            self._queue.give_back(job.version.name)
            self._seconds += 0.1 * (time.monotonic() - job.ticket.submitted - self._seconds)
        self.finetunes.unpin(job.version)
        job.ticket.end(completion)

    def _new_rows(self) -> LiveRows:
        return LiveRows(self.engine, self.settings, self.finetunes.identify)
