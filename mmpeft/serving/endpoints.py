"""The endpoints: a body that was checked, put to the service, and the answer in the shape that clients read."""

import asyncio
import secrets
import time
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from mmpeft.data.choices import check_choices
from mmpeft.errors import RefusedError
from mmpeft.serving.answers import Deadline, unless_gone
from mmpeft.serving.body import OnceRoute
from mmpeft.serving.chat import Reply, logprobs_of, samplings
from mmpeft.serving.conversation import Posed, plain_text, read_messages
from mmpeft.serving.decisions import Decision, read_decisions, softmax
from mmpeft.serving.keys import Tenant, require_admin
from mmpeft.serving.refusals import invalid, require_at_most, unknown_model
from mmpeft.serving.schemas import ChatRequest, DecisionRequest, LoadRequest, ScoreRequest, UnloadRequest
from mmpeft.serving.service import Service
from mmpeft.serving.stream import EventStream

AT_ONCE = 4
"""Questions of one request that wait at the engine together: it shares its places out among requests."""

STREAM: Any = {200: {"content": {"text/event-stream": {}}}}
TEXT: Any = {200: {"content": {"text/plain": {}}}}
router = APIRouter(route_class=OnceRoute)
"""Of the API, which needs a key where there are some."""
open_router = APIRouter()
"""Of what looks after servers."""


def _service(client: Request) -> Service:
    return client.app.state.service


def _tenant(client: Request) -> Tenant:
    return client.state.tenant


Served = Annotated[Service, Depends(_service)]
Asker = Annotated[Tenant, Depends(_tenant)]


@open_router.get("/health")
async def health(service: Served) -> JSONResponse:
    """200 while requests can be answered, 503 after a forward that failed, until one succeeds."""
    good = service.live.healthy or await service.answers_again()
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)


@open_router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> PlainTextResponse:
    """The numbers of the server in Prometheus' format."""
    return PlainTextResponse(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(service: Served, tenant: Asker) -> dict[str, Any]:
    """The base and the finetunes that may be asked."""
    return {"object": "list", "data": service.models(tenant)}


@router.get("/v1/models/{model}")
async def model(model: str, service: Served, tenant: Asker) -> dict[str, Any]:
    """One of them."""
    for own in service.models(tenant):
        if own["id"] == model:
            return own
    raise unknown_model(model)


@router.post("/v1/chat/completions", response_model=None, responses=STREAM)
async def chat_completions(asked: ChatRequest, client: Request, service: Served, tenant: Asker) -> Response:
    """OpenAI's chat completions; ``model`` is a finetune, or "base" for the frozen model."""
    finetune, deadline = service.finetune(asked.model, tenant), Deadline(service.limits.request_seconds)
    require_at_most(asked.n or 1, service.live.places, "n", "engine.max_rows and engine.max_waiting")
    how = samplings(asked, service.vlm.manifest.max_new_tokens, service.limits)
    posed = read_messages(asked.messages, service.task, service.limits.images)
    async with AsyncExitStack() as stack:

        async def begin() -> Reply:
            number = await service.prepare(posed, deadline)
            answers = service.answers(posed.record, finetune, how, deadline, logprobs_of(asked))
            reply = Reply(asked, await stack.enter_async_context(answers), service.template.tokenizer, number)
            if asked.stream:
                await reply.begin()
            return reply

        reply = await unless_gone(client, begin())
        if not asked.stream:
            return JSONResponse(await unless_gone(client, reply.whole()))
        return EventStream(reply.events(), stack.pop_all(), service.limits.send_seconds)


@router.post("/v1/score", response_model=None)
async def score(asked: ScoreRequest, client: Request, service: Served, tenant: Asker) -> Response:
    """How likely each of the choices is as the answer: the mean log-probability of its tokens, end included."""
    finetune, deadline = service.finetune(asked.model, tenant), Deadline(service.limits.request_seconds)
    posed = read_messages(asked.messages, service.task, service.limits.images)
    require_at_most(len(asked.choices), service.limits.choices, "choices", "limits.choices")
    try:
        check_choices([plain_text(choice, "choices") for choice in asked.choices], "choices")
    except RefusedError as error:
        raise invalid("choices", str(error)) from None
    posed.record["choices"] = asked.choices
    number, scores = await unless_gone(client, _ranked(service, posed, finetune, deadline))
    data = [
        {"index": index, "object": "score", "choice": choice, "score": own, "probability": share}
        for index, (choice, own, share) in enumerate(zip(asked.choices, scores, softmax(scores), strict=True))
    ]
    named = {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}
    usage = {"prompt_tokens": number, "completion_tokens": 0, "total_tokens": number}
    return JSONResponse({**named, "model": asked.model, "data": data, "usage": usage})


@router.post("/v1/systemone", response_model=None)
async def systemone(asked: DecisionRequest, client: Request, service: Served, tenant: Asker) -> Response:
    """System One: typed questions about a state, answered with probabilities."""
    finetune, deadline = service.finetune(asked.model, tenant), Deadline(service.limits.request_seconds)
    decisions = read_decisions(asked, service.task, service.limits)
    places = asyncio.Semaphore(min(AT_ONCE, service.live.places))

    async def one(decision: Decision) -> tuple[int, dict[str, Any]]:
        if decision.is_settled:
            return 0, decision.answer([0.0])
        async with places:
            number, scores = await _ranked(service, decision.posed, finetune, deadline)
        return number, decision.answer(scores)

    async def each() -> list[tuple[int, dict[str, Any]]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(decision)) for decision in decisions]
        return [task.result() for task in tasks]

    found = await unless_gone(client, each())
    answers = {decision.name: answer for decision, (_, answer) in zip(decisions, found, strict=True)}
    usage = {"input_tokens": sum(number for number, _ in found), "output_tokens": 0}
    return JSONResponse({"model": asked.model, "answers": answers, "usage": usage})


@router.post("/v1/load_lora_adapter", responses=TEXT)
async def load_lora_adapter(asked: LoadRequest, service: Served, tenant: Asker) -> PlainTextResponse:
    """Loads a finetune of any method from a folder of this machine; for the admin alone."""
    require_admin(tenant)
    await service.load(asked.lora_name, plain_text(asked.lora_path, "lora_path"), asked.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=TEXT)
async def unload_lora_adapter(asked: UnloadRequest, service: Served, tenant: Asker) -> PlainTextResponse:
    """Takes a finetune away, for all requests that come from now on; for the admin alone."""
    require_admin(tenant)
    await service.unload(asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def _ranked(
    service: Service, posed: Posed, finetune: str | None, deadline: Deadline
) -> tuple[int, list[float]]:
    """The tokens of the prompt, and the score of every choice."""
    number = await service.prepare(posed, deadline)
    return number, await service.rank(posed.record, finetune, deadline)
