"""The domains of the embedded corpus: their slugs in ids, and their names in descriptions."""

from __future__ import annotations

DOMAIN_NAMES = {
    "python_code": "Python code",
    "python_test": "unit test",
    "model_code": "model code",
    "native_code": "native code",
    "type_stub": "type stub",
    "cython": "Cython",
    "licence": "licence",
    "package_metadata": "package metadata",
    "api_reference": "API reference",
    "language_manual": "language manual",
    "configuration": "configuration",
    "jinja_template": "Jinja template",
    "protocol_buffer": "protocol buffer",
    "cmake": "build script",
}
"""Slug of every embedded domain -> its human name, fixed because labels name it.

No two names begin with the same token: the first token already tells the domain.
"""
