"""The application: endpoints, and for every error a status and OpenAI's body."""

from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mmpeft import __version__
from mmpeft.errors import RefusedError
from mmpeft.serving.answers import GoneError
from mmpeft.serving.endpoints import open_router, router
from mmpeft.serving.intake import Intake
from mmpeft.serving.metrics import GONE, Observed
from mmpeft.serving.refusals import HttpError, of_engine, of_fault, of_schema
from mmpeft.serving.service import Service


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's."""

    error: ErrorDetail


REFUSALS: Any = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
}


def make_app(service: Service) -> Any:
    """The ASGI application of a service."""
    app = FastAPI(title="mmpeft", version=__version__, responses=REFUSALS, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(open_router)
    app.include_router(
        router, dependencies=[Security(HTTPBearer(auto_error=False))] if service.keys.digests else []
    )
    app.add_exception_handler(RequestValidationError, _schema)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(GoneError, _gone)
    app.add_exception_handler(ExceptionGroup, _group)
    app.add_exception_handler(Exception, _fault)
    paths = {route.path for route in (*open_router.routes, *router.routes) if isinstance(route, APIRoute)}
    inner = Intake(app, service.keys, service.limits, service.open_requests)
    return Observed(inner, service.metrics, paths)


def _json(refusal: HttpError) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _schema(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for it"
    return _json(of_schema(list(error.errors()), error.body))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    return _json(HttpError(error.status_code, str(error.detail), headers=error.headers))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError), "registered for it"
    return _json(of_engine(error))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)


async def _group(client: Request, error: Exception) -> Response:
    """Of several questions that were asked together, the first that was refused."""
    assert isinstance(error, ExceptionGroup), "registered for it"
    first = error.exceptions[0]
    if isinstance(first, RefusedError):
        return await _refused(client, first)
    raise error


async def _fault(_: Request, __: Exception) -> Response:
    """What it was is logged by uvicorn, which is handed it."""
    return _json(of_fault())
