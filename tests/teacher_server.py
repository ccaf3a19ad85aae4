"""A local server that speaks the wire formats of two teachers, and misbehaves by a seeded schedule.

It stands in for providers, not for our code: the real SDKs talk to it over HTTP. What it does to a
request depends on the seed, the model, the text and how often that text was asked, so no order of
requests changes it. It bills whatever a provider could bill, and says for what.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = ("model-a", "model-b")
REPEATABLE = ("429", "500", "529", "timeout", "cut", "no_json", "no_choice", "slow")
"""What another try of the same request may not meet again."""
FINAL = ("empty", "refusal", "prose_refusal", "length", "filter", "half_emoji", "policy")
"""What the same text would meet again."""
BILLED_FAILURES = ("timeout", "cut", "no_json", "no_choice")
"""Generated and billed, though no answer arrives."""
ANSWER = "1. **Tokens**: {words}.\n2. **Topic**: a text on {topic}.\n3. **Next**: another word."
_TEXT = re.compile(r"<text>\n(.*)\n</text>", re.DOTALL)


class TeacherServer(ThreadingHTTPServer):
    """The state of the server; `url` is its address, without `/v1`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        *,
        behaviours: Sequence[str] = (),
        share: float = 0.0,
        seed: int = 0,
        key: str = "",
        seconds: float = 0.0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviours, self.share, self.seed = behaviours, share, seed
        self.key, self.seconds = key, seconds
        """`seconds`: how long every answer takes, so that requests are under way side by side."""
        self.reply: Callable[[str, str], str] | None = None
        """(model, text) -> a good answer; None: ANSWER."""
        self.lookup_status = 200
        """Of requests for models."""
        self.lock = threading.Lock()
        self.asked: Counter[tuple[str, str]] = Counter()
        """(model, text) -> requests."""
        self.billed: Counter[str] = Counter()
        """What was done to a request -> how many of those that were billed."""
        self.answered: Counter[tuple[str, str]] = Counter()
        """(model, text) -> answers that were billed and sent whole."""
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone (killed, or out of patience) is no error here."""

    def behaviour(self, model: str, text: str) -> str:
        """What is done to this request; `good` after four tries."""
        with self.lock:
            number = self.asked[(model, text)]
            self.asked[(model, text)] += 1
        draw = random.Random(f"{self.seed}:{model}:{text}:{number}")
        if number >= 4 or draw.random() >= self.share:
            return self.final(model, text)
        return draw.choice([name for name in self.behaviours if name in REPEATABLE] or ["good"])

    def final(self, model: str, text: str) -> str:
        """How this text is answered in the end: `good`, or one of FINAL."""
        finals = [name for name in self.behaviours if name in FINAL]
        draw = random.Random(f"{self.seed}:final:{model}:{text}")
        return draw.choice(finals) if finals and draw.random() < self.share / 2 else "good"


@contextmanager
def teacher_server(**settings: Any) -> Iterator[TeacherServer]:
    """A server in a thread of this process."""
    server = TeacherServer(**settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: TeacherServer

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        if not self._has_key():
            return
        if self.server.lookup_status != 200:
            self._error(self.server.lookup_status, "not_here", "no list of models")
            return
        listed = [{"id": model, "object": "model", "type": "model"} for model in MODELS]
        if self.path.startswith("/v1/models/"):
            name = self.path.rsplit("/", 1)[1]
            found = [row for row in listed if row["id"] == name]
            if found:
                self._send(200, found[0])
            else:
                self._error(404, "not_found_error", f"model: {name}")
        else:
            self._send(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._has_key():
            return
        server, is_chat = self.server, self.path.endswith("/chat/completions")
        message = body["messages"][0]["content"]
        found = _TEXT.search(message)
        text = found[1] if found else message
        with server.lock:
            server.bodies.append(body)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            done = server.behaviour(body["model"], text)
            time.sleep(server.seconds)
            self._answer(done, is_chat, body["model"], text)
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, done: str, is_chat: bool, model: str, text: str) -> None:
        statuses = {"429": 429, "500": 500, "529": 529, "quota": 429}
        if done in statuses:
            code = "insufficient_quota" if done == "quota" else f"code_{done}"
            headers = {"retry-after": "0.05"} if done == "429" else {}
            self._error(
                statuses[done], code, f"said for {self._given_key()}, see /account/billing", headers
            )
            return
        if done == "policy":
            self._error(400, "content_policy_violation", "the input was flagged")
            return
        if done == "bad":
            self._error(400, "unsupported_parameter", f"not for {self._given_key()}")
            return
        with self.server.lock:
            self.server.billed[done] += 1
            if done not in BILLED_FAILURES:
                self.server.answered[(model, text)] += 1
        if done == "timeout":
            self.rfile.read(1)  # until the client is out of patience, and hangs up
        if done in ("timeout", "cut"):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "500")
            self.end_headers()
            self.wfile.write(b'{"id": "x", "choi')
            self.wfile.flush()
            self.close_connection = True
            return
        if done == "no_json":
            self._send_bytes(200, b"{<html>not JSON")
            return
        if done == "no_choice":
            self._send(200, {"error": {"code": 502, "message": "upstream"}})
            return
        if done == "slow":
            time.sleep(0.3)  # later than answers to requests that were sent after it
        said = _said(done, text)
        if done in ("good", "slow") and self.server.reply is not None:
            said = self.server.reply(model, text)
        self._send(200, _chat(done, said) if is_chat else _message(done, said))

    def _given_key(self) -> str:
        bearer = self.headers.get("authorization", "").removeprefix("Bearer ")
        return self.headers.get("x-api-key") or bearer

    def _has_key(self) -> bool:
        if self.server.key and self._given_key() != self.server.key:
            self._error(401, "invalid_api_key", f"Incorrect key {self._given_key()}")
            return False
        return True

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        error = {"code": code, "type": code, "message": message}
        self._send(status, {"type": "error", "error": error}, headers)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(body).encode(), headers)

    def _send_bytes(
        self, status: int, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def _said(done: str, text: str) -> str:
    texts = {
        "empty": "",
        "refusal": "",
        "prose_refusal": "I'm sorry, but I can't help with that.",
        "length": "1. **Tok",
        "filter": "",
        "half_emoji": "- a smile \ud83d",
    }
    words = text.split() or ["none"]
    answer = ANSWER.format(words=", ".join(words[:3]), topic=words[-1])
    return texts.get(done, answer)


def _chat(done: str, said: str) -> dict[str, Any]:
    finishes = {"length": "length", "filter": "content_filter"}
    message = {"role": "assistant", "content": said or None}
    if done == "refusal":
        message["refusal"] = "I can't."
    return {
        "id": "chat",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finishes.get(done, "stop")}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


def _message(done: str, said: str) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "filter": "refusal", "refusal": "refusal"}
    return {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": said}] if said else [],
        "stop_reason": reasons.get(done, "end_turn"),
        "usage": {"input_tokens": 100, "output_tokens": 20},
    }
