"""Asks one model over the network, through the official SDK of its provider.

What a provider answers becomes a `Reply`, and what it fails with a `NoReply` (this request) or a
ValueError (the set-up: every request would fail alike). The SDKs' own retries are off: when a
request is repeated is decided in `asking`. Keys come from the environment; protects the rule that
none of them stands in an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from nla_ray.settings.teachers import TeacherName

KEY_VARIABLES = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "endpoint": "ENDPOINT_API_KEY",
}
"""Provider -> the environment variable of its key; an endpoint may need none."""
_NO_KEY = "none"
"""What an endpoint without a key is sent: the SDK wants one."""
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_MAX_DETAIL_CHARS = 200
_OVERLOADED = 529
_REFUSAL = re.compile(
    r"\W*(?:i(?:'|’)?m (?:really )?sorry|i am sorry|sorry, (?:but )?i|i can(?:no|'|’)?t\b"
    r"|i(?:'|’)m unable|i am unable|i won(?:'|’)t)",
    re.IGNORECASE,
)
"""How an answer begins that refuses in prose; bullets about a text do not."""
_OF_THE_TEXT = re.compile(r"content.?(?:filter|policy)|moderation|flagged|context.?length", re.I)
"""In errors that are about this one text, and would come again."""
_NO_CREDIT = re.compile(
    r"insufficient_quota|exceeded your current quota|credit balance|billing_(?:hard|not)", re.I
)
"""In errors of an account without money; that of a rate may name a page on billing too."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a teacher answered; it was billed.

    Example: Reply(text="- a licence: copying", fault="", input_tokens=310, output_tokens=12)
    """

    text: str
    fault: str = ""
    """Why the text is no label; empty: it is one."""
    input_tokens: int | None = None
    """None: the provider did not say."""
    output_tokens: int | None = None


class NoReply(Exception):
    """A request without an answer.

    `repeat`: another try may succeed. `final`: none ever will, for this text. `is_limit`: the
    provider asks for fewer requests, `retry_after` seconds from now where it says so. `billed`: it
    may have cost something all the same.
    """

    def __init__(
        self,
        reason: str,
        *,
        repeat: bool = True,
        final: bool = False,
        is_limit: bool = False,
        retry_after: float | None = None,
        billed: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.repeat, self.final = reason, repeat, final
        self.is_limit, self.retry_after, self.billed = is_limit, retry_after, billed


class TeacherClient:
    """One teacher's model, asked through its provider's SDK.

    Use it in one event loop and close it there. Raises ValueError where the SDK or the key is
    missing.
    """

    def __init__(self, teacher: TeacherName, *, answer_tokens: int, timeout_seconds: float) -> None:
        self._teacher, self._seconds = teacher, timeout_seconds
        self._answer_tokens = answer_tokens
        self._sdk = _require_sdk(teacher)
        self._key = _require_key(teacher)
        make = (
            self._sdk.AsyncAnthropic if teacher.provider == "anthropic" else self._sdk.AsyncOpenAI
        )
        self._client: Any = make(
            api_key=self._key, base_url=teacher.base_url, max_retries=0, timeout=timeout_seconds
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def check(self) -> None:
        """Look the model up, which costs nothing; a server that lists none is taken as it is.

        Raises ValueError that says what is wrong: the key, the model, the address or a proxy.
        """
        name, models = self._teacher.model, self._client.models
        try:
            if self._teacher.provider != "endpoint":
                await self._raw(lambda: models.with_raw_response.retrieve(name), is_lookup=True)
                return
            listed = await self._raw(lambda: models.with_raw_response.list(), is_lookup=True)
        except NoReply as failure:
            if failure.is_limit:
                return  # it answers, and will again
            raise ValueError(
                f"teacher {self._teacher.name}: got {failure.reason}, expected an answer."
                f" {self._address_hint()}"
            ) from None
        rows = listed.get("data")
        ids = [str(row.get("id")) for row in rows or () if isinstance(row, dict)]
        # A tag behind the name chooses among variants, which servers list or do not.
        if ids and name.partition(":")[0] not in [found.partition(":")[0] for found in ids]:
            raise ValueError(
                f"teacher {self._teacher.name}: got no model {name!r} there, expected one of"
                f" {', '.join(ids[:8])}. Correct --label.teachers."
            )

    async def ask(self, message: str) -> Reply:
        """The answer to one message. Raises NoReply, and ValueError for a wrong set-up."""
        create = _CREATORS[self._teacher.provider]
        payload = {
            "model": self._teacher.model,
            "messages": [{"role": "user", "content": message}],
            _LENGTH_FIELDS[self._teacher.provider]: self._answer_tokens,
        }
        body = await self._raw(lambda: create(self._client)(**payload))
        reply = _READERS[self._teacher.provider](body)
        if reply is None:
            detail = self._detail(body.get("error")) or "no answer in it"
            raise NoReply(f"a response without an answer ({detail})", billed=True)
        return _without_faults(reply)

    async def _raw(
        self, send: Callable[[], Awaitable[Any]], *, is_lookup: bool = False
    ) -> dict[str, Any]:
        """The JSON object of a response, whatever it holds; empty for a lookup that is not had."""
        try:
            async with asyncio.timeout(self._seconds):
                response = await send()
        except (TimeoutError, self._sdk.APITimeoutError):
            raise NoReply("no answer in time", billed=True) from None
        except self._sdk.APIConnectionError as error:
            kind = type(error.__cause__).__name__
            raise NoReply(f"a broken connection ({kind})", billed=kind != "ConnectError") from None
        except self._sdk.APIStatusError as error:
            if is_lookup and self._has_no_lookup(error):
                return {}
            raise self._of_status(error) from None
        try:
            body = json.loads(response.http_response.content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise NoReply("a response that is no JSON object", billed=True)
        return body

    def _has_no_lookup(self, error: Any) -> bool:
        """Whether a server has no list of models, or a key may not read it."""
        names_model = self._teacher.model in self._detail(error.body)
        return error.status_code in (403, 405, 501) or (
            error.status_code == 404 and not names_model
        )

    def _of_status(self, error: Any) -> Exception:
        """What an HTTP status says: NoReply, or ValueError where every request would fail."""
        status, headers = error.status_code, error.response.headers
        detail = self._detail(error.body)
        found = f"status {status}" + (f" ({detail})" if detail else "")
        if status in (400, 403) and _OF_THE_TEXT.search(detail):
            return NoReply(f"refused by the provider: {found}", repeat=False, final=True)
        if status == 402 or (status in (400, 403, 429) and _NO_CREDIT.search(detail)):
            return self._wrong("no credit left", found, "Add credit, or raise the account's limit.")
        if status in (401, 403):
            variable = KEY_VARIABLES[self._teacher.provider]
            return self._wrong("a refused key", f"status {status}", f"Correct {variable}.")
        if status == 404:
            return self._wrong(
                f"no model {self._teacher.model!r}", found, "Correct --label.teachers."
            )
        if status == 407:
            return self._wrong("a refused proxy", found, self._address_hint())
        wait = retry_after_seconds(headers)
        if status in (429, _OVERLOADED) or (status == 503 and wait is not None):
            return NoReply(found, is_limit=True, retry_after=wait)
        is_ours = 400 <= status < 500 and status not in (408, 409)
        return NoReply(found, repeat=not is_ours, retry_after=wait)

    def _wrong(self, what: str, found: str, remedy: str) -> ValueError:
        return ValueError(
            f"teacher {self._teacher.name}: got {what}: {found}, expected that it answers. {remedy}"
        )

    def _address_hint(self) -> str:
        proxies = [
            name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())
        ]
        if proxies:
            return f"Look at the address, and at the proxy that {' and '.join(proxies)} sets."
        return "Look at the address, and whether the server runs."

    def _detail(self, body: object) -> str:
        """What a provider says of an error, in a line, without the key that it may repeat."""
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            body = body["error"]
        if isinstance(body, dict):
            body = " ".join(str(body[name]) for name in ("code", "message") if body.get(name))
        text = " ".join(str(body or "").split())
        if self._key != _NO_KEY:
            text = text.replace(self._key, "[key]")
        return _printable(text)[:_MAX_DETAIL_CHARS]


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait, by `retry-after-ms` or `retry-after`; None: it says no.

    >>> retry_after_seconds({"retry-after": "2"}), retry_after_seconds({"retry-after-ms": "30"})
    (2.0, 0.03)
    """
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if re.fullmatch(r"[\d.]+", value.strip()):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# The set-up ---------------------------------------------------------------------------------------


def _require_sdk(teacher: TeacherName) -> Any:
    package = "anthropic" if teacher.provider == "anthropic" else "openai"
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"teacher {teacher.name}: got no package {package!r}, expected it installed. Run:"
            " pip install 'nla-ray[teachers]'"
        ) from None


def _require_key(teacher: TeacherName) -> str:
    variable = KEY_VARIABLES[teacher.provider]
    key = os.environ.get(variable, "").strip()
    if not key and teacher.provider != "endpoint":
        raise ValueError(
            f"teacher {teacher.name}: got no key, expected one in the environment variable"
            f" {variable}. Set it: export {variable}=..."
        )
    return key or _NO_KEY


# Wire formats -------------------------------------------------------------------------------------

_CREATORS: dict[str, Callable[[Any], Any]] = {
    "openai": lambda client: client.chat.completions.with_raw_response.create,
    "endpoint": lambda client: client.chat.completions.with_raw_response.create,
    "anthropic": lambda client: client.messages.with_raw_response.create,
}
_LENGTH_FIELDS = {
    "openai": "max_completion_tokens",
    "endpoint": "max_tokens",
    "anthropic": "max_tokens",
}


def read_chat(body: Mapping[str, Any]) -> Reply | None:
    """A response of OpenAI's chat API; None: there is no answer in it."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return None
    text, finish = message.get("content"), choice.get("finish_reason")
    faults = {"length": "cut off at label.answer_tokens", "content_filter": "content filter"}
    fault = "refusal" if message.get("refusal") else faults.get(str(finish), "")
    return _reply(text, fault, body.get("usage"), ("prompt_tokens", "completion_tokens"))


def read_message(body: Mapping[str, Any]) -> Reply | None:
    """A response of Anthropic's messages API; None: there is no answer in it."""
    content = body.get("content")
    if body.get("type") != "message" or not isinstance(content, list):
        return None
    blocks = [block for block in content if isinstance(block, dict) and block.get("type") == "text"]
    text = "".join(block["text"] for block in blocks if isinstance(block.get("text"), str))
    faults = {
        "refusal": "refusal",
        "max_tokens": "cut off at label.answer_tokens",
        "model_context_window_exceeded": "cut off at the model's context window",
    }
    fault = faults.get(str(body.get("stop_reason")), "")
    return _reply(text, fault, body.get("usage"), ("input_tokens", "output_tokens"))


_READERS = {"openai": read_chat, "endpoint": read_chat, "anthropic": read_message}


def _reply(text: Any, fault: str, usage: Any, names: tuple[str, str]) -> Reply:
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    tokens = [count if isinstance(count, int) and count >= 0 else None for count in counts]
    return Reply(
        text=text if isinstance(text, str) else "",
        fault=fault,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
    )


def _without_faults(reply: Reply) -> Reply:
    """The reply with the fault of its text, where it has none of another kind."""
    fault = reply.fault or fault_of_text(reply.text)
    return dataclasses.replace(reply, text=_printable(reply.text), fault=fault)


def fault_of_text(text: str) -> str:
    """Why an answer's text is no label; empty: it is one.

    >>> fault_of_text("I'm sorry, but I can't describe that."), fault_of_text("- a licence")
    ('refusal', '')
    """
    if not text.strip():
        return "empty answer"
    if _printable(text) != text:
        return "not valid Unicode: it holds half a character"
    return "refusal" if _REFUSAL.match(text) else ""


def _printable(text: str) -> str:
    """The text with a mark for each half of a character, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
