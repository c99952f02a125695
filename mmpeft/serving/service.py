"""What all endpoints stand on: who may ask which finetune, requests made ready and put to the live engine."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mmpeft.data.records import Record
from mmpeft.errors import RefusedError, UnknownNameError
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.requests import Request
from mmpeft.inference.sampling import Sampling
from mmpeft.inference.vlm import VisionLanguageModel
from mmpeft.names import RESERVED_NAME
from mmpeft.serving.answers import Answer, Deadline
from mmpeft.serving.conversation import Posed
from mmpeft.serving.finetunes import finetune_folder
from mmpeft.serving.images import RequestImages
from mmpeft.serving.keys import Keys, Tenant
from mmpeft.serving.limits import Limits
from mmpeft.serving.metrics import Metrics
from mmpeft.serving.refusals import HttpError, invalid, require_at_most, unknown_model

PROBE_SECONDS = 5.0
"""That the answer to a probe may take."""


class Service:
    """A run that is being served.

    Args:
        vlm: the run; its model is the live engine's.
        live: answers.
        limits: of requests.
        keys: of tenants.
    """

    def __init__(self, vlm: VisionLanguageModel, live: LiveEngine, limits: Limits, keys: Keys):
        self.vlm, self.live, self.limits, self.keys = vlm, live, limits, keys
        self.template = vlm.template
        self.images = RequestImages(vlm.engine.features, limits)
        self.metrics = Metrics(live)
        self.created = int(time.time())
        self.loading = asyncio.Lock()

    @property
    def task(self) -> str | None:
        """The identifier that questions begin with, as `VisionLanguageModel.ask` takes it."""
        return self.vlm.manifest.default_task

    @property
    def open_requests(self) -> int:
        """Requests that are read at all while others are under way: as many as are answered or may wait."""
        return self.live.settings.max_rows + self.live.settings.max_waiting

    def models(self, tenant: Tenant) -> list[dict[str, Any]]:
        """The base and the finetunes that a tenant may ask, as /v1/models lists them."""
        root = Path(str(self.vlm.manifest.language["name"])).name
        own = {"object": "model", "created": self.created, "owned_by": "mmpeft", "root": root}
        return [
            {"id": name, **own, "parent": None if name == RESERVED_NAME else RESERVED_NAME}
            for name in (RESERVED_NAME, *self.live.names())
            if tenant.may_ask(name)
        ]

    def finetune(self, model: str, tenant: Tenant) -> str | None:
        """What a request's ``model`` means; None is the base.

        Raises:
            HttpError: 404, there is none of that name, or not for this tenant.
        """
        if not tenant.may_ask(model) or model not in (RESERVED_NAME, *self.live.names()):
            raise unknown_model(model)
        return None if model == RESERVED_NAME else model

    async def prepare(self, posed: Posed, deadline: Deadline) -> int:
        """Checks a question and makes the features of its images, away from the engine.

        Returns:
            The tokens of its prompt.

        Raises:
            HttpError: it cannot be asked, or not in time.
        """
        require_at_most(_characters(posed.record), self.limits.characters, posed.where, "limits.characters")
        async with deadline.kept():
            number = await asyncio.to_thread(self._prompt_tokens, posed)
            if posed.record["images"]:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self.images.threads, self.images.prepare, posed)
        return number

    @asynccontextmanager
    async def answers(
        self,
        record: Record,
        finetune: str | None,
        samplings: Sequence[Sampling],
        deadline: Deadline,
        logprobs: int | None = None,
        rank: bool = False,
    ):
        """Inside, one answer for each of the settings; afterwards those that have not ended are cancelled.

        Raises:
            RefusedError: the engine does not take them in, be it only one.
        """
        answers: list[Answer] = []
        try:
            for sampling in samplings:
                request = Request(record, finetune, rank, sampling)
                answers.append(Answer(self.live, request, logprobs, deadline))
            yield answers
        except UnknownNameError:  # unloaded since it was looked up
            raise unknown_model(str(finetune)) from None
        finally:
            for answer in answers:
                answer.cancel()
                if answer.ticket.first_token is not None:
                    self.metrics.first_token.observe(answer.ticket.first_token - answer.ticket.submitted)

    async def rank(self, record: Record, finetune: str | None, deadline: Deadline) -> list[float]:
        """The mean log-probability of each of the record's choices."""
        async with self.answers(record, finetune, [Sampling()], deadline, rank=True) as (answer,):
            completion, _ = await answer.whole()
        if completion.scores is None:
            raise RefusedError("the engine gave no scores")
        return completion.scores

    async def answers_again(self) -> bool:
        """Whether the base writes a token after a forward that failed: nobody else asks a server that calls itself
        ill."""
        turns: Any = [("?", None)]
        record = Record(id="", images=[], turns=turns, task=self.task, where="health")
        try:
            async with self.answers(record, None, [Sampling(1)], Deadline(PROBE_SECONDS)) as (answer,):
                await answer.whole()
        except RefusedError:
            return False
        return self.live.healthy

    async def load(self, name: str, folder: str, in_place: bool = False) -> None:
        """Loads a finetune from a folder, in PEFT's format or of a run on the same base.

        Raises:
            HttpError: the name is taken or reserved, or the folder has nothing that fits.
        """
        if name == RESERVED_NAME:
            raise invalid("lora_name", f"{name!r} is the frozen model, which no finetune may be called")
        async with self.loading:
            if name in self.live.names() and not in_place:
                raise invalid(
                    "lora_name",
                    f"The lora adapter {name!r} has already been loaded. If you want to load the adapter in place, set "
                    "'load_inplace' to True.",
                )
            try:
                await asyncio.to_thread(self._load, name, folder)
            except RefusedError as error:
                raise invalid("lora_path", str(error)) from None

    async def unload(self, name: str) -> None:
        """Raises:
        HttpError: 404, there is none of that name.
        """
        async with self.loading:
            try:
                await asyncio.to_thread(self.live.unload, name)
            except UnknownNameError as error:
                raise HttpError(404, str(error), code="model_not_found", param="lora_name") from None

    def close(self) -> None:
        """Ends what it has started; the engine is its maker's."""
        self.images.close()

    def _load(self, name: str, folder: str) -> None:
        self.live.load(name, finetune_folder(folder, name, self.vlm.manifest))

    def _prompt_tokens(self, posed: Posed) -> int:
        try:
            prompt = self.template.encode_prompt(posed.record)
        except RefusedError as error:
            raise invalid(posed.where, str(error)) from None
        return len(prompt.ids)


def _characters(record: Record) -> int:
    """Of all texts: they are counted before anything is made of them."""
    turns = (text or "" for turn in record["turns"] for text in turn)
    return sum(map(len, [*turns, record.get("system") or "", *record.get("choices", ())]))
