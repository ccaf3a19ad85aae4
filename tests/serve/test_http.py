"""The endpoint over HTTP in one process: company, limits, clients that leave, errors, the docs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

import nla_ray
from nla_ray.activation.stage import load_activations
from nla_ray.run.artifact import Run
from nla_ray.serve.application import find_models
from nla_ray.serve.endpoint import Endpoint
from nla_ray.serve.local import local_endpoint
from nla_ray.serve.routes import build_api
from nla_ray.settings.config import RunConfig, ServeConfig

OPENAPI = Path(nla_ray.__file__).parent / "serve" / "openapi.json"
LIMITS = ServeConfig(
    max_waiting=100,
    max_request_tokens=10_000,
    max_body_bytes=200_000,
    body_seconds=5.0,
    window_seconds=0.05,
)


@contextmanager
def served(endpoint: Endpoint) -> Iterator[str]:
    """An address at which the endpoint answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(build_api(endpoint), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def endpoint(published_run: RunConfig) -> Endpoint:
    config = dataclasses.replace(published_run, serve=LIMITS)
    return local_endpoint(config, find_models(Run(config)))


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with served(endpoint) as address, httpx.Client(base_url=address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def rows(published_run: RunConfig) -> list[list[float]]:
    return load_activations(Run(published_run), "test").vectors[:6].tolist()


@pytest.fixture
def engine(endpoint: Endpoint) -> Iterator[Any]:
    """The engine of the default verbalizer, whose descriptions have their full length."""
    engine = endpoint._verbalizer._service._verbalizers["grpo"].engine
    ends, engine.end_ids = engine.end_ids, frozenset()
    yield engine
    engine.end_ids = ends


class Observed:
    """A method that counts its calls, and is held from one call on until it is let go."""

    def __init__(self, function: Callable, held_from: int | None = None) -> None:
        self.function, self.held_from, self.calls = function, held_from, 0
        self.is_held, self.go = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.held_from:
            self.is_held.set()
            self.go.wait()
        return self.function(*arguments)


def connected(client: httpx.Client) -> socket.socket:
    """A connection of its own to the client's server."""
    return socket.create_connection((client.base_url.host, client.base_url.port))


def raw_post(path: str, body: bytes) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def answered(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    return response.json()["descriptions"]


def refused(response: httpx.Response, status: int) -> tuple[str, str, str]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"what", "got", "expected"}
    return body["what"], body["got"], body["expected"]


# Company ------------------------------------------------------------------------------------------


def test_an_activation_and_a_seed_are_described_alike_alone_and_in_company(
    client: httpx.Client, rows: list[list[float]]
) -> None:
    sampling = [
        {},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 0.7, "seed": 3, "max_new_tokens": 20},
        {"verbalizer": "sft"},
    ]
    asked = [{"activations": rows, **each} for each in sampling]
    with ThreadPoolExecutor(8) as pool:
        company = list(pool.map(lambda body: client.post("/v1/describe", json=body), asked * 2))
    for body, response in zip(asked * 2, company, strict=True):
        alone = [
            answered(client.post("/v1/describe", json=body | {"activations": [row]}))[0]
            for row in rows[:2]
        ]
        for one, many in zip(alone, answered(response)[:2], strict=True):
            assert (one["description"], one["num_tokens"]) == (
                many["description"],
                many["num_tokens"],
            )
    twice = answered(client.post("/v1/describe", json=asked[1] | {"activations": [rows[0]] * 2}))
    assert twice[0] == twice[1]


def test_texts_of_a_request_and_of_requests_are_captured_and_scored_in_few_batches(
    client: httpx.Client,
    endpoint: Endpoint,
    rows: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"def frame_{number}(): return index" for number in range(32)]
    capture = endpoint._capture._service
    read = Observed(capture._reader.read)
    monkeypatch.setattr(capture._reader, "read", read)
    whole = answered(client.post("/v1/describe", json={"texts": texts}))
    assert read.calls <= 3
    alone = answered(client.post("/v1/describe", json={"texts": texts[5:6]}))
    assert alone[0]["description"] == whole[5]["description"]
    reward = endpoint._scorer._service._reconstructors["reward"]
    scored = Observed(reward.reconstruct)
    monkeypatch.setattr(reward, "reconstruct", scored)
    items = [{"description": f"- word {number}", "activation": rows[0]} for number in range(40)]
    body = {"items": items, "scorers": ["reward"]}
    assert client.post("/v1/score", json=body).status_code == 200
    assert scored.calls <= 2


# Clients that leave, and limits -------------------------------------------------------------------


def test_an_abandoned_request_frees_its_slots_and_meanwhile_all_else_is_answered(
    client: httpx.Client, engine: Any, rows: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Observed(engine.step, held_from=4)
    monkeypatch.setattr(engine, "step", step)
    body = {"activations": rows[:2], "samples": 16, "max_new_tokens": 300}
    with connected(client) as leaving:
        leaving.sendall(raw_post("/v1/describe", json.dumps(body).encode()))
        assert step.is_held.wait(60), "it was begun"
        assert client.get("/healthz").json() == {"status": "ok", "waiting": 32}
        assert client.get("/readyz").status_code == 200
        response = client.post("/v1/describe", json={"activations": rows, "samples": 16})
        assert refused(response, 429)[1] == "96 activations, samples counted, while 32 wait"
        assert int(response.headers["Retry-After"]) >= 1
        assert client.post("/v1/describe", json={"texts": []}).status_code == 422
    # The connection is closed: nobody waits any more, while the engine is in a step.
    while client.get("/healthz").json()["waiting"]:
        pass
    step.go.set()
    described = answered(
        client.post("/v1/describe", json={"activations": rows[:1], "max_new_tokens": 5})
    )
    assert described[0]["num_tokens"] == 5
    assert step.calls < 20, "a step for each of 5 tokens, and what was begun before; not 300"
    assert not engine._works and not engine._held


def test_what_is_too_large_is_refused_before_it_is_read(
    client: httpx.Client, rows: list[list[float]]
) -> None:
    what, got, expected = refused(client.post("/v1/describe", content=b" " * 200_001), 413)
    assert (what, got, expected) == ("body", "200001 bytes", "at most 200000 bytes")
    pieces = (b" " * 50_000 for _ in range(5))
    assert refused(client.post("/v1/describe", content=pieces), 413)[0] == "body"
    body = {"activations": rows[:4], "samples": 6, "max_new_tokens": 450}
    assert refused(client.post("/v1/describe", json=body), 422) == (
        "max_new_tokens",
        "4 activations x 6 samples x 450 tokens = 10800",
        "at most 10000 tokens in a request",
    )


def test_a_body_that_does_not_end_is_refused(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "settings", dataclasses.replace(LIMITS, body_seconds=0.1))
    with (
        served(endpoint) as address,
        httpx.Client(base_url=address) as client,
        connected(client) as slow,
    ):
        slow.sendall(raw_post("/v1/describe", b"{}")[:-1])
        assert slow.recv(1_000).startswith(b"HTTP/1.1 408 ")


def test_descriptions_that_a_scorer_does_not_read_whole_are_refused_or_said_so(
    client: httpx.Client, engine: Any, published_run: RunConfig, rows: list[list[float]]
) -> None:
    marker = published_run.base.marker
    for description, got in (("word " * 200, "tokens"), (f"a {marker} b", f"{marker!r}")):
        items = [
            {"description": "fine", "activation": rows[0]},
            {"description": description, "activation": rows[0]},
        ]
        what, found, expected = refused(client.post("/v1/score", json={"items": items}), 422)
        assert what == "items[1].description" and got in found
        assert "at most 96 tokens (reward), 96 tokens (judge)" in expected
    explained = client.post("/v1/explain", json={"text": "def frame()", "max_new_tokens": 300})
    [explanation] = explained.json()["explanations"]
    assert "tokens" in explanation["scores"]["judge"]["unread"]
    body = {"activations": rows[:1], "samples": 2, "max_new_tokens": 300}
    assert "tokens" in answered(client.post("/v1/describe", json=body))[0]["unread"]
    explained = client.post("/v1/explain", json={"text": "def frame()", "max_new_tokens": 3})
    assert explained.json()["explanations"][0]["scores"]["judge"]["unread"] is None
    unsure = {"text": "def frame()", "samples": 2, "min_confidence": 1.0}
    explained = client.post("/v1/explain", json=unsure).json()["explanations"]
    assert (explained[0]["description"], explained[0]["scores"]) == (None, {})


# One form -----------------------------------------------------------------------------------------


def test_every_refusal_has_one_form(client: httpx.Client) -> None:
    assert refused(client.get("/v2"), 404)[:2] == ("path", "/v2")
    assert refused(client.get("/v1/describe"), 405)[:2] == ("method", "GET")
    deep = b'{"activations": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/describe", content=deep, headers=headers).status_code == 422
    digits = b'{"texts": ["a"], "seed": ' + b"9" * 5_000 + b"}"
    refused(client.post("/v1/describe", content=digits, headers=headers), 422)


def test_an_error_is_answered_in_that_form_and_the_next_request_as_ever(
    client: httpx.Client, engine: Any, rows: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"activations": rows[:2]}
    expected = answered(client.post("/v1/describe", json=body))
    with monkeypatch.context() as patch:
        # What a diverged adapter does.
        patch.setattr(
            engine.decoder, "logits", lambda stream: torch.full((len(stream), 9), torch.nan)
        )
        response = client.post("/v1/describe", json=body)
        assert refused(response, 500) == (
            "endpoint",
            "RuntimeError",
            "an answer. The server's log has the error",
        )
    assert answered(client.post("/v1/describe", json=body)) == expected


class Loading:
    """A handle of a deployment that has no replica yet."""

    def __getattr__(self, method: str) -> Loading:
        return self

    def remote(self, *arguments: Any) -> asyncio.Future:
        return asyncio.get_running_loop().create_future()


def test_until_the_models_are_loaded_requests_are_refused_and_health_is_good(
    endpoint: Endpoint, published_run: RunConfig, rows: list[list[float]]
) -> None:
    models = find_models(Run(published_run))
    starting = Endpoint(LIMITS, models, endpoint._verbalizer, Loading(), endpoint._capture)
    with served(starting) as address, httpx.Client(base_url=address, timeout=60) as client:
        response = client.post("/v1/describe", json={"activations": rows})
        assert refused(response, 503)[1] == "models that are being loaded"
        assert int(response.headers["Retry-After"]) >= 1
        assert client.get("/healthz").json() == {"status": "ok", "waiting": 0}
        starting._scorer = endpoint._scorer
        starting._loading = None
        assert client.post("/v1/describe", json={"activations": rows}).status_code == 200


# Docs ---------------------------------------------------------------------------------------------


def test_the_docs_list_every_route_and_field_and_load_nothing(client: httpx.Client) -> None:
    page, openapi = client.get("/docs").text, client.get("/openapi.json").json()
    for forbidden in ("<script", "http:", "https:", "<link", "src="):
        assert forbidden not in page
    for path in openapi["paths"]:
        assert f" {path}</code>" in page
    for schema in openapi["components"]["schemas"].values():
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in page


def test_the_committed_openapi_page_is_the_one_that_is_served(client: httpx.Client) -> None:
    openapi = client.get("/openapi.json").json()
    assert json.loads(OPENAPI.read_text()) == openapi, (
        f"write it again: curl localhost:8000/openapi.json | python -m json.tool > {OPENAPI}"
    )
