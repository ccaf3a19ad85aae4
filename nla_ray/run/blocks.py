"""How rows are cut into blocks, so that memory does not grow with the number of rows.

A block is what is held, and written, at once. Protects two limits: a process that writes rows needs
memory for some blocks and no more; and no column of strings in a block comes near 2^31 bytes, the
largest offset of an Arrow string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

BLOCK_BYTES = 128 << 20
"""Largest block, unless one row alone is larger: a sixteenth of 2^31."""
_ROW_BYTES = 256
"""Of ids, numbers and offsets in a row, about."""
_CHAR_BYTES = 4
"""Most bytes of a character in UTF-8."""
_Row = TypeVar("_Row")


def activation_row_bytes(d_model: int, num_chars: int) -> int:
    """Most bytes of an activation's row with so many characters of text.

    >>> activation_row_bytes(d_model=3584, num_chars=420)
    16272
    """
    return 4 * d_model + text_row_bytes(num_chars)


def text_row_bytes(num_chars: int) -> int:
    """Most bytes of a row with so many characters in all of its strings."""
    return _CHAR_BYTES * num_chars + _ROW_BYTES


def block_rows(row_bytes: int) -> int:
    """Rows of this size in a block, whatever the number of positions and layers.

    A 7B model's, after 420 characters each:

    >>> block_rows(activation_row_bytes(d_model=3584, num_chars=420))
    8248
    """
    return max(1, BLOCK_BYTES // row_bytes)


def gather_blocks(
    rows: Iterable[_Row], size_of: Callable[[_Row], int], most: int = BLOCK_BYTES
) -> Iterator[list[_Row]]:
    """Rows in their order, in lists of at most `most` bytes together; a larger row is a list.

    `size_of`: bytes of a row. Rows are asked for when their list is.

    >>> list(gather_blocks([3, 3, 3, 9, 1], lambda size: size, most=6))
    [[3, 3], [3], [9], [1]]
    """
    block: list[_Row] = []
    total = 0
    for row in rows:
        size = size_of(row)
        if block and total + size > most:
            yield block
            block, total = [], 0
        block.append(row)
        total += size
    if block:
        yield block
