"""Where an embedded Ray keeps its session: a folder that this user may write, of a short path.

Ray's sockets lie in it, and the system takes no longer path for one than 107 bytes (macOS: 103).
Knows no Ray.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_SOCKET = f"session_{'0' * 26}_{'0' * 7}/sockets/plasma_store"
"""The longest path of a socket below the folder. Source: `Node._init_temp` of Ray."""
_LONGEST = 103 if sys.platform == "darwin" else 107
_ADDRESS_NAME = "ray_current_cluster"
"""A file that Ray reads where another user's cluster has left one."""


def session_folder(candidates: Sequence[Path] | None = None) -> str | None:
    """A folder for Ray's session, as `ray.init` takes `_temp_dir`; None: Ray's own choice will do.

    `candidates`: the first is Ray's own choice. Raises ValueError when none of them can be used.
    """
    folders = _candidates() if candidates is None else candidates
    refused = [(folder, _obstacle(folder)) for folder in folders]
    for folder, obstacle in refused:
        if obstacle is None:
            return None if folder == folders[0] else str(folder)
    got = "; ".join(f"{folder}: {obstacle}" for folder, obstacle in refused)
    raise ValueError(
        f"folder for Ray's session: got {got}, expected one of a short path that can be written."
        " Set RAY_TMPDIR to such a folder."
    )


def _candidates() -> list[Path]:
    """Ray's own choice, then a folder of this user. Source: `get_default_ray_temp_dir` of Ray."""
    chosen = os.environ.get("RAY_TMPDIR")
    if chosen is None and sys.platform.startswith("linux"):
        chosen = os.environ.get("TMPDIR")
    return [Path(chosen or "/tmp", "ray"), Path(f"/tmp/ray-{os.getuid()}")]


def _obstacle(folder: Path) -> str | None:
    """Why Ray cannot keep a session in a folder; None where it can."""
    length = len(os.fsencode(folder / _SOCKET))
    if length > _LONGEST:
        return f"{length - _LONGEST} bytes too long for a socket"
    address = folder / _ADDRESS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if address.exists() and not os.access(address, os.R_OK):
            return f"{address} belongs to another user"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None if os.access(folder, os.W_OK | os.X_OK) else "not writable"
