"""How rows are cut into blocks, so that memory does not grow with the number of rows.

A block is what is held, and written, at once. Protects two limits: a process that writes rows needs
memory for some blocks and no more; and no column of strings in a block comes near 2^31 bytes, the
largest offset of an Arrow string.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

BLOCK_BYTES = 256 << 20
"""Largest block, unless one item alone is larger: an eighth of 2^31."""
_ROW_BYTES = 256
"""Of ids, numbers and offsets in a row, about."""
_CHAR_BYTES = 4
"""Most bytes of a character in UTF-8."""


def activation_row_bytes(d_model: int, num_chars: int) -> int:
    """Most bytes of an activation's row with so many characters of text.

    >>> activation_row_bytes(d_model=3584, num_chars=420)
    16272
    """
    return 4 * d_model + _CHAR_BYTES * num_chars + _ROW_BYTES


def block_rows(row_bytes: int) -> int:
    """Rows of this size in a block, whatever the number of positions and layers.

    A 7B model's, after 420 characters each:

    >>> block_rows(activation_row_bytes(d_model=3584, num_chars=420))
    16496
    """
    return max(1, BLOCK_BYTES // row_bytes)


def cut_blocks(sizes: Iterable[int], most: int = BLOCK_BYTES) -> Iterator[slice]:
    """Consecutive items of these sizes in blocks of at most `most`; a larger item is a block.

    >>> list(cut_blocks([3, 3, 3, 9, 1], most=6))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    start = end = total = 0
    for end, size in enumerate(sizes):
        if end > start and total + size > most:
            yield slice(start, end)
            start, total = end, 0
        total += size
    if total or end > start:
        yield slice(start, end + 1)
