"""Text that every installation has: files of the standard library and of the core dependencies.

A document is one file, or one topic of the language manual. Only distributions in the requirement
closure of the core dependencies count, so that a test-only package cannot change the corpus. This
module knows where documents come from and how they are read; cutting and choosing are elsewhere.
Protects the rule that a document's id depends neither on the machine nor on a package's version.
"""

from __future__ import annotations

import ast
import csv
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

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
"""Packages read for docstrings only, all others for code only: no text is in two documents."""

MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 400_000
MAX_MEAN_LINE_CHARS = 200
"""Above this mean a file is taken for minified or generated data."""
MAX_MEAN_CHAR_BYTES = 1.1
"""Above this mean a text is not mostly ASCII."""

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
_LICENCE_SUFFIXES = ("", ".txt", ".md", ".rst", ".MIT", ".APACHE", ".BSD")


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
    """Every candidate document, sorted by doc_id.

    Nothing is opened yet but the lists of installed files.
    """
    sources = {source.doc_id: source for source in _walk_sources()}
    return [sources[doc_id] for doc_id in sorted(sources)]


def read_source(source: Source) -> str | None:
    """The document's text; None when it is binary, not UTF-8, minified, too short or too long."""
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
    """All docstrings of a module in source order, each under the name it documents.

    Empty for code that does not parse.

    >>> extract_docstrings("def outer():\\n    'Says hello.'")
    'outer\\nSays hello.'
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    pieces = []
    for node in _definitions(tree):
        if text := ast.get_docstring(node):
            pieces.append((node.lineno, f"{node.name}\n{text}"))
    return "\n\n".join(text for _, text in sorted(pieces))


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions at any depth.

    Only statements are visited: expressions are most of a tree and define none.
    """
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
    """Domain of a file by its package-relative path; None for what the corpus leaves out.

    >>> domain_of("torch/include/ATen/Tensor.h"), domain_of("ray/dashboard/client/main.js")
    ('native_code', None)
    """
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
    if _LICENCE_NAME.search(parts[-1]) and suffix in _LICENCE_SUFFIXES:
        return "licence"
    if parts[-1] == "METADATA" or suffix in (".md", ".rst"):
        return "package_metadata"
    return None


def _id_prefix(domain: str, relative_path: str) -> str:
    """The first part of a document's id: its domain, but native code says header or source.

    A chunk of C++ seldom shows which of the two it is from, so both are of one domain. The id
    decides a document's split, and the shipped base was trained by these splits: the prefixes must
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
    """Installed distributions that the requirements need, by name; extras and markers count."""
    distributions: dict[str, metadata.Distribution] = {}
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
            distributions[name] = distribution
            for child in map(Requirement, distribution.requires or []):
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    waiting.append(child)
    return [distributions[name] for name in sorted(distributions)]


def _recorded_files(distribution: metadata.Distribution) -> list[str]:
    record = distribution.read_text("RECORD") or ""
    return sorted(row[0] for row in csv.reader(record.splitlines()) if row)


def _without_version(relative: str) -> str:
    """The path without its package's version: an update keeps a document's split.

    >>> _without_version("numpy-2.4.6.dist-info/METADATA")
    'numpy.dist-info/METADATA'
    """
    return re.sub(r"^([^/]+?)-[^/-]+(\.dist-info/)", r"\1\2", relative)


def _manual_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _clean(text: str) -> str | None:
    """The text with plain line ends and spaces; None for what the corpus does not take."""
    text = text.replace("\r\n", "\n").expandtabs(4).strip()
    if not MIN_DOCUMENT_CHARS <= len(text) <= MAX_DOCUMENT_CHARS or "\0" in text:
        return None
    if len(text) / (text.count("\n") + 1) > MAX_MEAN_LINE_CHARS:
        return None
    if len(text.encode()) > MAX_MEAN_CHAR_BYTES * len(text):
        return None
    return "\n".join(line.rstrip() for line in text.split("\n"))
