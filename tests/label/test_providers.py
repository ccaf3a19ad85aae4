"""Teachers over real HTTP, through the official SDKs: what they answer, and what is wrong."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
from teacher_server import TeacherServer, teacher_server

from nla_ray.label.providers import NoReply, Reply, TeacherClient, retry_after_seconds
from nla_ray.settings.config import LabelConfig
from nla_ray.settings.teachers import TeacherName

KEY = "sk-planted-0123456789"
PROVIDERS = ("openai", "anthropic", "endpoint")
_Result = TypeVar("_Result")


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("OPENAI", "ANTHROPIC", "ENDPOINT"):
        monkeypatch.setenv(f"{name}_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


def named(
    provider: str, url: str, patch: pytest.MonkeyPatch, model: str = "model-a"
) -> TeacherName:
    """A teacher of the local server: by its address, or by the one that its SDK is told."""
    if provider == "endpoint":
        return TeacherName.of(f"endpoint:{model}@{url}/v1")
    patch.setenv("OPENAI_BASE_URL", f"{url}/v1")
    patch.setenv("ANTHROPIC_BASE_URL", url)
    return TeacherName.of(f"{provider}:{model}")


def with_client(
    teacher: TeacherName, use: Callable[[TeacherClient], Awaitable[_Result]], seconds: float = 60.0
) -> _Result:
    async def main() -> _Result:
        client = TeacherClient(teacher, answer_tokens=50, timeout_seconds=seconds)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(main())


def ask(teacher: TeacherName, text: str = "a text", seconds: float = 60.0) -> Reply:
    message = f"Describe.\n<text>\n{text}\n</text>"
    return with_client(teacher, lambda client: client.ask(message), seconds)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_model_is_asked_with_the_message_and_the_length_and_answers(
    keys: pytest.MonkeyPatch, provider: str
) -> None:
    with teacher_server(key=KEY) as server:
        teacher = named(provider, server.url, keys)
        with_client(teacher, lambda client: client.check())
        reply = ask(teacher)
    assert reply.text.startswith("1. **Tokens**: a, text") and reply.fault == ""
    assert (reply.input_tokens, reply.output_tokens) == (100, 20)
    [body] = server.bodies
    field = "max_completion_tokens" if provider == "openai" else "max_tokens"
    assert body == {
        "model": "model-a",
        field: 50,
        "messages": [{"role": "user", "content": "Describe.\n<text>\na text\n</text>"}],
    }


def always(server: TeacherServer, done: str) -> TeacherServer:
    server.behaviour = lambda model, text: done  # type: ignore[method-assign]
    return server


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("done", "fault"),
    [
        ("empty", "empty answer"),
        ("refusal", "refusal"),
        ("prose_refusal", "refusal"),
        ("length", "cut off at label.answer_tokens"),
        ("half_emoji", "not valid Unicode: it holds half a character"),
    ],
)
def test_an_answer_that_is_no_label_says_why(
    keys: pytest.MonkeyPatch, provider: str, done: str, fault: str
) -> None:
    with teacher_server() as server:
        reply = ask(named(provider, always(server, done).url, keys))
    assert reply.fault == fault
    reply.text.encode()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ("429", {"is_limit": True, "retry_after": 0.05, "repeat": True, "billed": False}),
        ("529", {"is_limit": True, "retry_after": None, "repeat": True, "billed": False}),
        ("500", {"is_limit": False, "repeat": True, "billed": False}),
        ("timeout", {"is_limit": False, "repeat": True, "billed": True}),
        ("cut", {"is_limit": False, "repeat": True, "billed": True}),
        ("no_json", {"is_limit": False, "repeat": True, "billed": True}),
        ("no_choice", {"is_limit": False, "repeat": True, "billed": True}),
        ("policy", {"repeat": False, "final": True, "billed": False}),
        ("bad", {"repeat": False, "final": False, "billed": False}),
    ],
)
def test_a_request_without_an_answer_is_made_once_and_says_what_to_do_of_it(
    keys: pytest.MonkeyPatch, provider: str, done: str, expected: dict
) -> None:
    with teacher_server() as server:
        teacher = named(provider, always(server, done).url, keys)
        with pytest.raises(NoReply) as failure:
            ask(teacher, seconds=2.0 if done == "timeout" else 60.0)
    found = failure.value
    assert {name: getattr(found, name) for name in expected} == expected
    assert len(server.bodies) == 1  # the SDK's own retries are off
    assert KEY not in str(found)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_wrong_set_up_is_one_message_without_the_key(
    keys: pytest.MonkeyPatch, provider: str
) -> None:
    def error_of(teacher: TeacherName) -> str:
        with pytest.raises(ValueError) as raised:
            with_client(teacher, lambda client: client.check())
        assert KEY not in str(raised.value)
        return str(raised.value)

    with teacher_server(key="another") as server:
        wrong_key = error_of(named(provider, server.url, keys))
    assert (
        f"got a refused key: status 401, expected that it answers. Correct {provider.upper()}_A"
        in wrong_key
    )
    with teacher_server(key=KEY) as server:
        no_model = error_of(named(provider, server.url, keys, model="model-z"))
        quota = named(provider, always(server, "quota").url, keys)
        with pytest.raises(ValueError, match=r"got no credit left: status 429 .insufficient_quota"):
            ask(quota)
    assert "got no model 'model-z'" in no_model and "Correct --label.teachers." in no_model
    down = error_of(named(provider, server.url, keys))
    assert "got a broken connection (ConnectError), expected an answer. Look at the address" in down
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        keys.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.1:{port}")
        proxied = error_of(named(provider, "http://203.0.113.1", keys))
    assert "the proxy that HTTP_PROXY sets" in proxied and "secret" not in proxied


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_missing_key_is_one_message_that_names_the_variable(
    keys: pytest.MonkeyPatch, provider: str
) -> None:
    keys.delenv(f"{provider.upper()}_API_KEY")
    with pytest.raises(ValueError, match=f"export {provider.upper()}_API_KEY="):
        with_client(TeacherName.of(f"{provider}:m"), lambda client: client.check())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("status", [403, 404, 405])
def test_a_server_without_a_list_of_models_is_taken_as_it_is(
    keys: pytest.MonkeyPatch, provider: str, status: int
) -> None:
    with teacher_server(key=KEY) as server:
        server.lookup_status = status
        with_client(named(provider, server.url, keys), lambda client: client.check())


def test_a_tag_behind_a_models_name_is_the_servers_to_know(keys: pytest.MonkeyPatch) -> None:
    with teacher_server() as server:
        teacher = named("endpoint", server.url, keys, model="model-a:latest")
        with_client(teacher, lambda client: client.check())


def test_an_endpoint_needs_no_key(keys: pytest.MonkeyPatch) -> None:
    keys.delenv("ENDPOINT_API_KEY")
    with teacher_server() as server:
        assert ask(named("endpoint", server.url, keys)).fault == ""


def test_without_the_extra_one_command_is_named() -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from nla_ray.label.providers import TeacherClient\n"
        "from nla_ray.settings.teachers import TeacherName\n"
        "try: TeacherClient(TeacherName.of('openai:m'), answer_tokens=1, timeout_seconds=1)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("Run: pip install 'nla-ray[teachers]'")


def test_a_date_says_how_long_to_wait_too() -> None:
    assert retry_after_seconds({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after_seconds({"retry-after": "soon"}) is None


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("openai:", "expected `openai:MODEL`"),
        ("endpoint:m", "without an address"),
        ("endpoint:m@http://user:hidden@host/v1", "holds a user, a password or parameters"),
        ("endpoint:m@http://host/v1?api-key=hidden", "holds a user, a password or parameters"),
    ],
)
def test_a_name_that_is_none_or_holds_a_key_is_refused_without_the_key(
    teacher: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        LabelConfig(teachers=(teacher,))
    assert "hidden" not in str(raised.value)


def test_a_store_with_a_password_in_its_address_is_refused_without_it() -> None:
    with pytest.raises(ValueError, match=r"label.store: got 's3://...@bucket'") as raised:
        LabelConfig(store="s3://user:hidden@bucket/labels")
    assert "hidden" not in str(raised.value)
