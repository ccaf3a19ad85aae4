"""Where documents are cut."""

import textwrap

import pytest
from tiny import random_sentences

from nla_ray.text.cutting import cut_chunks


def test_chunks_end_at_lines_and_keep_their_bounds() -> None:
    lines = [f"line {number} of a text with several words in it" for number in range(60)]
    chunks = cut_chunks("\n".join(lines), seed_key="doc", min_chars=100, max_chars=200)
    assert all(100 <= len(chunk) <= 200 for chunk in chunks)
    starts = [lines.index(chunk.split("\n")[0]) for chunk in chunks]
    assert all(
        chunk.split("\n") == lines[start : start + chunk.count("\n") + 1]
        for chunk, start in zip(chunks, starts, strict=True)
    )
    assert len(chunks) > 10 and starts == sorted(set(starts))
    assert chunks == cut_chunks("\n".join(lines), seed_key="doc", min_chars=100, max_chars=200)


@pytest.mark.parametrize("length", [90, 115, 150, 190])
def test_prose_in_long_lines_loses_nothing_but_its_end_where_pieces_are_filled(length: int) -> None:
    words = [f"word{number}" for number in range(600)]
    lines = textwrap.wrap(" ".join(words), length)
    chunks = cut_chunks("\n".join(lines), seed_key="doc", min_chars=120, max_chars=210, fill=True)
    kept = " ".join(chunks).split()
    assert kept == words[: len(kept)] and len(" ".join(words[len(kept) :])) < 120
    assert all(120 <= len(chunk) <= 210 for chunk in chunks)


def test_a_line_longer_than_a_chunk_is_cut_at_a_space() -> None:
    chunks = cut_chunks(random_sentences(5, 300), seed_key="doc", min_chars=50, max_chars=120)
    assert chunks and all(len(chunk) <= 120 for chunk in chunks)
    words = set(random_sentences(5, 300).split())
    assert all(word in words for chunk in chunks for word in chunk.split())
