"""The embedded corpus: text that every installation of the core dependencies carries.

A document is one file of the standard library or of an installed package (or one topic of the
language manual). Only distributions in the requirement closure of the core dependencies count, so
that a test-only package cannot change the corpus. This module knows where documents come from and
how they are cut; splits, artifacts and duplicates are elsewhere.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import (
    HEAD_CHARS,
    Chunk,
    CutDocument,
    choose_chunks,
    cut_document,
    distinct_chunks,
    distinct_documents,
    first_chunks_first,
    is_informative,
    seeded_order,
)
from nla_ray.text.duplicates import minhash_signatures

CORE_REQUIREMENTS = (
    "torch",
    "ray[data,serve,train]",
    "transformers",
    "peft",
    "trl",
    "deepspeed",
    "pyarrow",
    "datasets",
    "jinja2",
)
"""Roots of the closure whose files may enter the corpus."""

API_PACKAGES = frozenset(
    {"numpy", "pandas", "networkx", "sympy", "pyarrow", "huggingface_hub", "accelerate", "aiohttp"}
)
"""Packages read for docstrings only. All others are read for code only: no text is in two
documents."""

MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 400_000
MAX_MEAN_LINE_CHARS = 200
"""Above this mean a file is taken for minified or generated data."""

_SUFFIX_DOMAINS = {
    **dict.fromkeys((".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu", ".c"), "native_code"),
    ".pyi": "type_stub",
    ".pyx": "cython",
    ".pxd": "cython",
    ".pxi": "cython",
    ".yaml": "configuration",
    ".yml": "configuration",
    ".json": "configuration",
    ".toml": "configuration",
    ".jinja": "jinja_template",
    ".j2": "jinja_template",
    ".proto": "protocol_buffer",
    ".cmake": "cmake",
}
_SKIPPED_PARTS = frozenset(
    {
        "thirdparty_files",
        "_vendor",
        "_vendored",
        "vendored",
        "__pycache__",
        "jars",
        "site-packages",
        "client",
        "lib2to3",
    }
)
"""Copies of other packages, build output, web bundles."""
_SKIPPED_PREFIXES = ("torch/include/ATen/ops/", "numpy/_core/tests/data/")
"""Thousands of generated one-operator headers; numeric tables."""
_LICENCE_NAME = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one document comes from, before anything is read.

    Example:
        Source(doc_id="cpp_header/torch/include/ATen/ATen.h", domain="native_code",
        path=Path("..."))
    """

    doc_id: str
    domain: str
    path: Path | None
    """None for a topic of the language manual, which lies in a module."""


def list_sources() -> list[Source]:
    """Every candidate document, sorted by doc_id. Nothing is opened yet but the lists of installed
    files."""
    found = {source.doc_id: source for source in _walk_sources()}
    return [found[doc_id] for doc_id in sorted(found)]


def read_source(source: Source) -> str | None:
    """The document's text, or None when it is binary, not UTF-8, minified, too short or too
    long."""
    if source.path is None:
        return _clean(_manual_topics()[source.doc_id.split("/", 1)[1]])
    try:
        if source.path.stat().st_size > 2 * MAX_DOCUMENT_CHARS:
            return None
        text = source.path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    if source.domain == "api_reference":
        text = extract_docstrings(text)
    return _clean(text)


def extract_docstrings(code: str) -> str:
    """All docstrings of a module in source order, each under the name it documents; empty for code
    that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # an old escape in somebody else's string is no concern here
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    pieces = []
    for node in _definitions(tree):
        if text := ast.get_docstring(node):
            pieces.append((node.lineno, f"{node.name}\n{text}"))
    return "\n\n".join(text for _, text in sorted(pieces))


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions at any depth. Only statements are visited: expressions are most of a
    tree and define none."""
    for name in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, name, ()):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _definitions(child)


def _walk_sources() -> Iterator[Source]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - _SKIPPED_PARTS)
        for name in names:
            relative = (Path(folder) / name).relative_to(library).as_posix()
            if (domain := domain_of(relative)) is not None:
                yield Source(
                    doc_id=f"{_id_prefix(domain, relative)}/python/{relative}",
                    domain=domain,
                    path=library / relative,
                )
    for distribution in closure_distributions(CORE_REQUIREMENTS):
        for relative in _recorded_files(distribution):
            if (domain := domain_of(relative)) is not None:
                path = Path(str(distribution.locate_file(relative)))
                doc_id = f"{_id_prefix(domain, relative)}/{_without_version(relative)}"
                yield Source(doc_id=doc_id, domain=domain, path=path)
    for topic in _manual_topics():
        yield Source(doc_id=f"language_manual/{topic}", domain="language_manual", path=None)


def domain_of(relative_path: str) -> str | None:
    """Domain slug of a file by its package-relative path, None for what the corpus leaves out."""
    suffix = os.path.splitext(relative_path)[1]
    if suffix == ".pyc" or relative_path.startswith(("..", "/", *_SKIPPED_PREFIXES)):
        return None
    parts = relative_path.split("/")
    if not _SKIPPED_PARTS.isdisjoint(parts):
        return None
    if suffix == ".py":
        return _python_domain(parts)
    if suffix in _SUFFIX_DOMAINS:
        return None if ".dist-info" in relative_path else _SUFFIX_DOMAINS[suffix]
    if _LICENCE_NAME.search(parts[-1]) and suffix in (
        "",
        ".txt",
        ".md",
        ".rst",
        ".MIT",
        ".APACHE",
        ".BSD",
    ):
        return "licence"
    if parts[-1] == "METADATA" or suffix in (".md", ".rst"):
        return "package_metadata"
    return None


def _id_prefix(domain: str, relative_path: str) -> str:
    """The first part of a document's id: its domain, but native code says header or source.

    A chunk of C++ seldom shows which of the two it is from, so they are one domain. The id decides
    a document's split, and the shipped base model was trained by these splits: the prefixes must
    stay as they are.
    """
    if domain != "native_code":
        return domain
    return "cpp_header" if relative_path.endswith((".h", ".hpp", ".cuh")) else "cpp_source"


def _python_domain(parts: list[str]) -> str:
    if not {"test", "tests", "testing"}.isdisjoint(parts[:-1]) or parts[-1].startswith("test_"):
        return "python_test"
    if parts[:2] == ["transformers", "models"]:
        return "model_code"
    return "api_reference" if parts[0] in API_PACKAGES else "python_code"


def closure_distributions(requirements: tuple[str, ...]) -> list[metadata.Distribution]:
    """Installed distributions that the requirements need, extras and markers honoured, sorted by
    name."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in sorted({"", *requirement.extras}):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            found[name] = distribution
            children = [Requirement(text) for text in distribution.requires or []]
            waiting += [
                child
                for child in children
                if child.marker is None or child.marker.evaluate({"extra": extra})
            ]
    return [found[name] for name in sorted(found)]


def _recorded_files(distribution: metadata.Distribution) -> list[str]:
    record = distribution.read_text("RECORD") or ""
    return sorted(row[0] for row in csv.reader(record.splitlines()) if row)


def _without_version(relative: str) -> str:
    """`numpy-2.4.6.dist-info/METADATA` -> `numpy.dist-info/METADATA`: an update keeps the split."""
    return re.sub(r"^([^/]+?)-[^/-]+(\.dist-info/)", r"\1\2", relative)


def _manual_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _clean(text: str) -> str | None:
    text = text.replace("\r\n", "\n").expandtabs(4).strip()
    if not MIN_DOCUMENT_CHARS <= len(text) <= MAX_DOCUMENT_CHARS or "\0" in text:
        return None
    if len(text) / (text.count("\n") + 1) > MAX_MEAN_LINE_CHARS or len(text.encode()) > 1.1 * len(
        text
    ):
        return None
    return "\n".join(line.rstrip() for line in text.split("\n"))


DOMAIN_SHARE = 1 / 8
"""Most chunks one embedded domain may have, as a share of max_chunks."""
DOCUMENTS_PER_CHUNK = 0.7
"""Documents read for each chunk of a domain's quota: many documents, few chunks of each."""
CANDIDATES_PER_CHUNK = 1.5
"""Chunks read at least for each chunk of a domain's quota: up to a third of them repeat others."""
CUT_CHARS = 60_000
"""Part of an embedded document that chunks are taken from."""


def embedded_chunks(config: CorpusConfig) -> list[Chunk]:
    """The embedded corpus, sorted by text_id; the same on every run in one environment."""
    quota = int(config.max_chunks * DOMAIN_SHARE)
    limit = int(quota * max(DOCUMENTS_PER_CHUNK, CANDIDATES_PER_CHUNK / config.chunks_per_document))
    documents = distinct_documents(_embedded_documents(list_sources(), limit, config), config)
    by_domain: dict[str, list[CutDocument]] = {}
    for document in documents:
        by_domain.setdefault(document.chunks[0].domain, []).append(document)
    candidates = [
        chunk
        for members in by_domain.values()
        for chunk in first_chunks_first(members)[: 2 * quota]
    ]
    taken: Counter[str] = Counter()
    chosen = []
    for chunk in distinct_chunks(candidates, config):
        if taken[chunk.domain] < quota:
            taken[chunk.domain] += 1
            chosen.append(chunk)
    order = {
        text_id: rank
        for rank, text_id in enumerate(
            seeded_order([chunk.text_id for chunk in chosen], config.seed)
        )
    }
    chosen = sorted(chosen, key=lambda chunk: order[chunk.text_id])[: config.max_chunks]
    return sorted(chosen, key=lambda chunk: chunk.text_id)


def _embedded_documents(
    sources: list[Source], limit: int, config: CorpusConfig
) -> list[CutDocument]:
    """Up to `limit` documents a domain, in seeded order."""
    by_domain: dict[str, dict[str, Source]] = {}
    for source in sources:
        by_domain.setdefault(source.domain, {})[source.doc_id] = source
    documents: list[CutDocument] = []
    heads: list[str] = []
    for domain, known in sorted(by_domain.items()):
        start = len(heads)
        for doc_id in seeded_order(list(known), config.seed):
            text = read_source(known[doc_id])
            pieces = cut_document(text[:CUT_CHARS], doc_id, config) if text is not None else []
            if chunks := choose_chunks(
                doc_id, domain, [piece for piece in pieces if is_informative(piece)], config
            ):
                documents.append(CutDocument(doc_id=doc_id, chunks=chunks, signature=np.empty(0)))
                heads.append(text[:HEAD_CHARS])
            if len(heads) - start == limit:
                break
    signatures = minhash_signatures(heads)
    return [
        dataclasses.replace(document, signature=row)
        for document, row in zip(documents, signatures, strict=True)
    ]
