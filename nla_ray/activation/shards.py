"""One shard of activations or answers: its file, written whole, and the record that says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.activation.bank import activation_schema
from nla_ray.activation.capture import CapturedBlock
from nla_ray.run.location import Location
from nla_ray.run.manifest import FileRecord

_SCRATCH = "scratch"
_REPEATED = ["split", "domain", "doc_id", "text"]
"""Columns whose values come often."""


def write_shard(blocks: Iterable[CapturedBlock], *, target: Location, base_digest: str) -> pa.Table:
    """Write the activations of a shard under the shard's name, then the record; its counts.

    A block is a row group of the file, and is written before the next one is asked for. The record
    says that the file is complete. Raises RuntimeError for rows of several shards.
    """
    remaining = iter(blocks)
    block: CapturedBlock | None = next(remaining)
    shard = block.rows["shard"][0].as_py()
    counts = _ShardCounts(shard=shard)
    schema = activation_schema(block.rows.schema.field("activation").type.list_size)
    with (
        (target / shard).replacement() as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=_REPEATED,  # pyright: ignore[reportArgumentType]  (a list works)
        ) as writer,
    ):
        while block is not None:
            kept = counts.add(block).select(schema.names).cast(schema)
            if len(kept):
                writer.write_table(kept)
            del block, kept  # before the next one is made
            block = next(remaining, None)
    record = counts.record(base_digest, (target / shard).record())
    record.save(target)
    return pa.table(
        {"shard": [shard], "activations": [record.activations], "tokens": [record.tokens]}
    )


@dataclass
class _ShardCounts:
    """What is counted of a shard while its blocks are written."""

    shard: str
    tokens_of_text: dict[str, int] = field(default_factory=dict)
    activations: int = 0
    padded_tokens: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, block: CapturedBlock) -> pa.Table:
        """Count a block; its rows that are not left out."""
        shards = {self.shard, *block.rows["shard"].to_pylist()}
        if len(shards) != 1:
            raise RuntimeError(
                f"block of activations: got rows of {len(shards)} shards, expected those of one; "
                "Ray Data has joined blocks."
            )
        kept, left_out = block.rows, block.rows.slice(0, 0)
        if block.rows["skipped"].null_count < len(block.rows):  # a filter copies
            kept = block.rows.filter(block.rows["skipped"].is_null())
            left_out = block.rows.filter(block.rows["skipped"].is_valid())
        columns = (block.rows[name].to_pylist() for name in ("text_id", "num_tokens"))
        self.tokens_of_text |= dict(zip(*columns, strict=True))
        self.activations += len(kept)
        self.padded_tokens += block.padded_tokens
        self.skipped += [
            {
                "text_id": text_id,
                "reason": reason.partition(":")[0],
                "detail": reason.partition(": ")[2],
            }
            for text_id, reason in zip(
                left_out["text_id"].to_pylist(), left_out["skipped"].to_pylist(), strict=True
            )
        ]
        return kept

    def record(self, base_digest: str, file: FileRecord) -> ShardRecord:
        """The record of the finished shard."""
        return ShardRecord(
            shard=self.shard,
            base_digest=base_digest,
            file=file,
            texts=len(self.tokens_of_text),
            activations=self.activations,
            tokens=sum(self.tokens_of_text.values()),
            padded_tokens=self.padded_tokens,
            skipped=self.skipped,
        )


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """What is known of one finished shard; its presence means that the shard's file is whole."""

    shard: str
    base_digest: str
    """Of weights and tokenizer: a shard made with another base is made again."""
    file: FileRecord
    texts: int
    tokens: int

    def save(self, target: Location) -> None:
        """Write it beside the shard's file, in the scratch folder."""
        content = {**vars(self), "file": vars(self.file)}
        (target / _SCRATCH / f"{self.shard}.json").write_text(json.dumps(content))

    @classmethod
    def load(
        cls, target: Location, shard: str, base_digest: str, *, check_file: bool = True
    ) -> Self | None:
        """The record of a shard that is complete, whole and of this base.

        None: the shard must be made (again). `check_file=False` trusts the record, for shards
        that this process has just seen written.
        """
        try:
            content = json.loads((target / _SCRATCH / f"{shard}.json").read_text())
            record = cls(**{**content, "file": FileRecord(**content["file"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None  # absent or torn: either way it is made again
        is_whole = not check_file or (
            (target / shard).exists() and (target / shard).record() == record.file
        )
        return record if is_whole and record.base_digest == base_digest else None


@dataclass(frozen=True, kw_only=True)
class ShardRecord(FinishedShard):
    """The record of a shard of activations."""

    activations: int
    padded_tokens: int
    skipped: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class AnswersRecord(FinishedShard):
    """The record of a shard of answers; `tokens` are theirs."""

    answers: int
    """Texts that got one."""


ANSWER_SCHEMA = pa.schema(
    [
        pa.field("text_id", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    ]
)
"""What the plain base answers to a text, greedily, without the token that ends it; nothing where it
ends at once, or where the text is no prompt for it. `answer` is for people to read."""


def write_answers(
    prompts: pa.Table,
    answers: Sequence[tuple[str, list[int]]],
    *,
    target: Location,
    base_digest: str,
) -> pa.Table:
    """Write the answers to the texts of a shard, as (text, ids), then the record; its counts.

    `prompts`: columns `shard`, the same in every row, and `text_id`.
    """
    shard = prompts["shard"][0].as_py()
    said, ids = zip(*answers, strict=True)
    columns = [prompts["text_id"].combine_chunks(), pa.array(said), pa.array(ids)]
    rows = pa.table(columns, names=ANSWER_SCHEMA.names).cast(ANSWER_SCHEMA)
    with (target / shard).replacement() as file:
        pq.write_table(rows, file, compression="zstd")
    record = AnswersRecord(
        shard=shard,
        base_digest=base_digest,
        file=(target / shard).record(),
        texts=len(rows),
        tokens=sum(map(len, ids)),
        answers=sum(map(bool, ids)),
    )
    record.save(target)
    return pa.table({"shard": [shard], "answers": [record.answers], "tokens": [record.tokens]})
