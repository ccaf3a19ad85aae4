"""Which errors a user can cause, and the one line that is said of each.

It protects the rule that an error of the system keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

_USER_ERRNOS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "choose another --run-dir",
    errno.EACCES: "choose another --run-dir",
    errno.EADDRINUSE: "choose another --serve.port",
}
"""Operating-system errors that a user can cause, and the remedy."""

_DISK_FULL = re.compile(
    r"No space left on device|PytorchStreamWriter failed|inline_container.*unexpected pos"
)
"""What libraries that write files below Python say instead of raising an OSError."""


def user_message(error: BaseException) -> str | None:
    """The message of an error that a user can cause, wherever in Ray it was raised.

    None for any other error.
    """
    for cause in _causes(error):
        if type(cause) is ValueError:
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in _USER_ERRNOS:
            return _refused(cause.errno, cause.filename)
        if _DISK_FULL.search(str(cause)):
            return _refused(errno.ENOSPC, None)
        if type(cause).__module__.startswith("ray.") and (message := _message_in(str(cause))):
            return message
    return None


def _message_in(text: str) -> str | None:
    """The message of a user's error inside the text of Ray's.

    Ray Data, and an actor that died in __init__, keep nothing but the text.
    """
    if value_error := re.search(r"^ValueError: (.+)$", text, re.MULTILINE):
        return value_error[1].strip()
    os_error = re.search(r"^(?:OSError|PermissionError): \[Errno (\d+)\]", text, re.MULTILINE)
    if os_error and int(os_error[1]) in _USER_ERRNOS:
        return _refused(int(os_error[1]), None)
    return None


def _refused(number: int, path: str | None) -> str:
    where = f" at {path}" if path else ""
    return (
        f"operating system: got {os.strerror(number).lower()!r}{where}, expected to be allowed and"
        f" able to use it. Nothing complete was damaged: {_USER_ERRNOS[number]} and run the same"
        " command again."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it.

    Causes lie inside Ray's task, actor and training errors, and along `raise ... from`.
    """
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        attributes = vars(current)
        causes = [
            attributes.get("cause"),
            attributes.get("controller_failure"),
            current.__cause__,
            *(attributes.get("worker_failures") or {}).values(),
        ]
        waiting += [cause for cause in causes if isinstance(cause, BaseException)]
