"""The routes over HTTP: bodies within limits, one form of every refusal and error, a page of docs.

Knows nothing of models; the same application stands behind Ray Serve and behind any other server of
ASGI. Protects two rules: whoever hangs up ends the work, and no answer is without a form.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import nla_ray
from nla_ray.run.log import get_logger
from nla_ray.serve.endpoint import Endpoint
from nla_ray.serve.schema import (
    DescribeResponse,
    ErrorBody,
    ExplainResponse,
    HealthResponse,
    ModelsResponse,
    ReadyResponse,
    Refusal,
    ScoreResponse,
)

logger = get_logger(__name__)

_GONE = {
    "ActorDiedError",
    "ActorUnavailableError",
    "BackPressureError",
    "DeploymentUnavailableError",
    "NodeDiedError",
    "RayActorError",
    "WorkerCrashedError",
}
"""Errors of Ray that say that a replica is gone or away; Serve starts another."""
_RETRY_SECONDS = 5
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        422: "Refused: what, got, expected.",
        429: "Too much waits already; Retry-After says when to ask again.",
        500: "An error of the server; its log says more.",
        503: "Models are being loaded, or one is away; Retry-After says when to ask again.",
    }.items()
}


def build_api(endpoint: Endpoint) -> FastAPI:
    """Routes, OpenAPI page and the form of refusals."""
    api = FastAPI(
        title="nla_ray",
        version=nla_ray.__version__,
        description="Descriptions of a language model's activations, and scores of them.",
        # Their pages load scripts from elsewhere; `_docs_page` loads nothing.
        docs_url=None,
        redoc_url=None,
    )
    for path, answer, body in (
        ("/v1/describe", endpoint.describe, DescribeResponse),
        ("/v1/score", endpoint.score, ScoreResponse),
        ("/v1/explain", endpoint.explain, ExplainResponse),
    ):
        api.add_api_route(path, answer, methods=["POST"], response_model=body, responses=_ERRORS)
    api.add_api_route("/v1/models", endpoint.models, methods=["GET"], response_model=ModelsResponse)
    api.add_api_route("/healthz", endpoint.health, methods=["GET"], response_model=HealthResponse)

    async def readyz() -> JSONResponse:
        """200 when verbalizer, scorer and capture answer within ten seconds; else 503."""
        found = await endpoint.ready()
        return JSONResponse(found.model_dump(), status_code=200 if found.status == "ok" else 503)

    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs_page(api.openapi()))

    api.add_api_route(
        "/readyz",
        readyz,
        methods=["GET"],
        response_model=ReadyResponse,
        responses={503: {"model": ReadyResponse, "description": "Not ready."}},
    )
    api.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    api.add_exception_handler(Refusal, _answer_refusal)
    api.add_exception_handler(RequestValidationError, _answer_validation)
    api.add_exception_handler(HTTPException, _answer_no_route)
    api.add_middleware(ClientGate, endpoint=endpoint)
    return api


# the form of refusals -----------------------------------------------------------------------------


async def _answer_refusal(request: Request, refusal: Any) -> JSONResponse:
    return _refused(refusal)


async def _answer_validation(request: Request, error: Any) -> JSONResponse:
    """The first error in the body's form, answered as every refusal is."""
    return _refused(refusal_of(error.errors()))


async def _answer_no_route(request: Request, error: Any) -> JSONResponse:
    """What FastAPI refuses by itself: paths, methods, and bodies that no parser reads."""
    if error.status_code == 400:
        return _refused(Refusal("body", error.detail, "JSON"))
    is_path = error.status_code == 404
    return _refused(
        Refusal(
            "path" if is_path else "method",
            request.url.path if is_path else request.method,
            "a route that /docs lists",
            status=error.status_code,
        )
    )


def refusal_of(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """The first of pydantic's errors as a refusal."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    missing = first["type"] == "missing"
    return Refusal(field, "nothing" if missing else first.get("input"), first["msg"])


def _refused(refusal: Refusal) -> JSONResponse:
    body = ErrorBody(what=refusal.what, got=refusal.got, expected=refusal.expected)
    seconds = refusal.retry_seconds
    return JSONResponse(
        body.model_dump(),
        status_code=refusal.status,
        headers=None if seconds is None else {"Retry-After": str(seconds)},
    )


def _failure(error: Exception) -> Refusal:
    """An error of the server as a refusal; what it says stays in the log."""
    name = type(error).__name__
    if name in _GONE:
        return Refusal(
            "endpoint",
            f"{name} of a deployment",
            f"all of them. Ask again in {_RETRY_SECONDS} s",
            status=503,
            retry_seconds=_RETRY_SECONDS,
        )
    return Refusal("endpoint", name, "an answer. The server's log has the error", status=500)


# bodies, and clients that leave -------------------------------------------------------------------


class ClientGate:
    """Stands before the routes: reads bodies within limits, and ends the work for who is gone."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint) -> None:
        self._app, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, in the form of refusals whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_answered = False

        async def answer(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            body = await self._body(scope, receive)
            if body is not None:
                await self._until_gone(scope, body, receive, answer)
        except Refusal as refusal:
            await _refused(refusal)(scope, receive, send)
        except Exception as error:
            logger.exception("%s %s", scope["method"], scope["path"])
            if has_answered:
                raise
            await _refused(_failure(error))(scope, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None: the client is gone. Refuses it before it is read, where it can."""
        settings = self._endpoint.settings
        if scope["method"] == "POST":
            self._endpoint.require_room(1)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self._check_size(int(length) if length.isdigit() else 0)
        try:
            async with asyncio.timeout(settings.body_seconds):
                return await self._read(receive)
        except TimeoutError:
            raise Refusal(
                "body",
                f"no end of it after {settings.body_seconds:g} s",
                "all of it by then",
                status=408,
            ) from None

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_size(self, size: int) -> None:
        largest = self._endpoint.settings.max_body_bytes
        if size > largest:
            raise Refusal("body", f"{size} bytes", f"at most {largest} bytes", status=413)

    async def _until_gone(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the routes until they have answered, or nobody waits for the answer any more."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.ensure_future(_gone(receive))

        async def receive_body() -> Message:
            return messages.pop() if messages else await asyncio.shield(gone)

        answering = asyncio.ensure_future(self._app(scope, receive_body, send))
        try:
            await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for task in (answering, gone):
                task.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)


async def _gone(receive: Receive) -> Message:
    """Return when the client has left."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message


# the page of docs ---------------------------------------------------------------------------------

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{border:1px solid #8888;padding:.3rem .6rem;"
    "text-align:left;vertical-align:top}code{overflow-wrap:anywhere}"
    ":root{color-scheme:light dark}"
)


def _docs_page(openapi: Mapping[str, Any]) -> str:
    """Every route and every field of the OpenAPI description, as a page that loads nothing."""
    about = openapi["info"]
    title = html.escape(f"{about['title']} {about['version']}")
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<p>{html.escape(about['description'])} For programs:"
        " <a href='openapi.json'>openapi.json</a>.</p>"
    ]
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(route.get('description', ''))}</p>")
            body = route.get("requestBody")
            parts.append(f"<p>Body: {_type_of(_json_schema(body))}</p>" if body else "")
            answers = "".join(
                f"<li>{status}: {_type_of(_json_schema(answer))}"
                f" {html.escape(answer['description'])}</li>"
                for status, answer in route["responses"].items()
            )
            parts.append(f"<ul>{answers}</ul>")
    parts.extend(_docs_table(name, body) for name, body in openapi["components"]["schemas"].items())
    return "".join(parts)


def _json_schema(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part.get("content", {}).get("application/json", {}).get("schema", {})


def _docs_table(name: str, body: Mapping[str, Any]) -> str:
    required = body.get("required", ())
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code><td>{_type_of(about)}"
        f"<td>{'required' if field in required else html.escape(str(about.get('default', '')))}"
        f"<td>{html.escape(about.get('description', ''))}"
        for field, about in body.get("properties", {}).items()
    )
    return (
        f"<h2 id='{html.escape(name)}'>{html.escape(name)}</h2>"
        f"<p>{html.escape(body.get('description', ''))}</p>"
        f"<table><tr><th>Field<th>Type<th>Default<th>What it is{rows}</table>"
    )


def _type_of(about: Mapping[str, Any]) -> str:
    """A field's type in words, with links to the tables of others."""
    if "$ref" in about:
        name = html.escape(about["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in about:
        return " or ".join(_type_of(part) for part in about["anyOf"])
    if "items" in about:
        return f"list of {_type_of(about['items'])}"
    kind = about.get("type", "")
    if kind == "object" and "additionalProperties" in about:
        return f"by name: {_type_of(about['additionalProperties'])}"
    return html.escape(str(kind))
