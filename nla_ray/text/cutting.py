"""Where a document is cut into pieces, and which pieces of program text say anything.

Knows strings alone. Protects the rule that where a document is cut depends on its id alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

MIN_CHUNK_CHARS, MAX_CHUNK_CHARS = 240, 420
MIN_CHARS_SHARE = 4 / 7
"""Shortest piece of a document, as a share of the longest: 240 of 420 characters."""
CHARS_PER_DISTINCT_WORD = 40
"""A piece needs one distinct word for so many characters; less is a table of numbers."""
_WORD = re.compile(r"[A-Za-z]{3,}")


def cut_document(text: str, doc_id: str, max_chars: int, *, fill: bool = False) -> list[str]:
    """`cut_chunks` as the corpus cuts: seeded by the id, pieces of 4/7 of `max_chars` at least."""
    min_chars = max(1, round(max_chars * MIN_CHARS_SHARE))
    return cut_chunks(text, seed_key=doc_id, min_chars=min_chars, max_chars=max_chars, fill=fill)


def cut_chunks(
    text: str,
    *,
    seed_key: str,
    min_chars: int = MIN_CHUNK_CHARS,
    max_chars: int = MAX_CHUNK_CHARS,
    fill: bool = False,
) -> list[str]:
    """Consecutive pieces, cut at line ends, each of a seeded length in [min_chars, max_chars].

    A line that is longer than max_chars is cut at a space. Pieces below min_chars are left out: the
    end of the text, and what stands before a line that does not fit any more. `fill`: that line is
    cut too, so that prose in long lines loses nothing but its end.
    """
    draw = random.Random(f"{seed_key}/cut")
    pieces: list[str] = []
    lines: list[str] = []
    size = 0
    """Of the lines, each with a line break: the piece has none at its end."""
    target = draw.randint(min_chars, max_chars)
    for line in _bounded_lines(text, max_chars):
        if lines and size + len(line) + 1 > target:
            if fill and size <= min_chars:
                head, line = _split_line(line, min_chars - size, target - size, max_chars - size)
                lines += [head] if head else []
            pieces.append("\n".join(lines).strip("\n"))
            lines, size, target = [], 0, draw.randint(min_chars, max_chars)
        if line.strip() or lines:
            lines.append(line)
            size += len(line) + 1
    pieces.append("\n".join(lines).strip("\n"))
    return [piece for piece in pieces if min_chars <= len(piece) <= max_chars]


def _bounded_lines(text: str, max_chars: int) -> Iterator[str]:
    """The lines; a line longer than max_chars in parts, cut at spaces where that is possible."""
    for line in text.split("\n"):
        while len(line) > max_chars:
            space = line.rfind(" ", max_chars // 2, max_chars)
            end = space if space > 0 else max_chars
            yield line[:end]
            line = line[end:].lstrip()
        yield line


def _split_line(line: str, least: int, wanted: int, most: int) -> tuple[str, str]:
    """The line's beginning and rest: of `least` to `wanted` characters, else of `most` at most.

    It is cut at a space or at its end; the beginning is empty where that is not possible.
    """
    spaced, least = line + " ", max(1, least)
    space = max(spaced.rfind(" ", least, wanted + 1), spaced.find(" ", least, most + 1))
    return (line[:space], line[space:].lstrip()) if space > 0 else ("", line)


def is_informative(piece: str) -> bool:
    """Whether a piece of program text has words to tell it by; tables of numbers have not.

    >>> is_informative("def read_frame(index):"), is_informative("0.25, 1.50, 3.75, e+1")
    (True, False)
    """
    return len(set(_WORD.findall(piece))) >= max(3, len(piece) // CHARS_PER_DISTINCT_WORD)
