"""One captured shard: its file, written whole, and the record beside it that says so."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.activation.bank import activation_schema
from nla_ray.activation.positions import padded_tokens
from nla_ray.run.location import Location
from nla_ray.run.manifest import FileRecord

_SCRATCH = "scratch"
_REPEATED = ["split", "domain", "doc_id", "text"]
"""Columns whose values come often."""


def write_shard(
    rows: pa.Table, *, target: Location, batch_tokens: int, base_digest: str
) -> pa.Table:
    """Write the activations of a shard under the shard's name, then the record; its counts.

    The record says that the file is complete. Raises RuntimeError for rows of several shards.
    """
    shards = set(rows["shard"].to_pylist())
    if len(shards) != 1:
        raise RuntimeError(
            f"block of activations: got rows of {len(shards)} shards, expected those of one; "
            "Ray Data has joined blocks."
        )
    [shard] = shards
    kept = rows.filter(rows["skipped"].is_null())
    left_out = rows.filter(rows["skipped"].is_valid())
    schema = activation_schema(rows.schema.field("activation").type.list_size)
    buffer = io.BytesIO()
    pq.write_table(
        kept.select(schema.names).cast(schema),
        buffer,
        compression="zstd",
        use_dictionary=_REPEATED,  # pyright: ignore[reportArgumentType]  (a list of columns works)
    )
    (target / shard).write_bytes(buffer.getvalue())
    text_ids, num_tokens = rows["text_id"].to_pylist(), rows["num_tokens"].to_pylist()
    lengths = [length for length in dict(zip(text_ids, num_tokens, strict=True)).values() if length]
    record = ShardRecord(
        shard=shard,
        base_digest=base_digest,
        file=(target / shard).record(),
        texts=len(set(rows["text_id"].to_pylist())),
        activations=len(kept),
        tokens=sum(lengths),
        padded_tokens=padded_tokens(lengths, batch_tokens),
        skipped=[
            {
                "text_id": text_id,
                "reason": reason.partition(":")[0],
                "detail": reason.partition(": ")[2],
            }
            for text_id, reason in zip(
                left_out["text_id"].to_pylist(), left_out["skipped"].to_pylist(), strict=True
            )
        ],
    )
    record.save(target)
    return pa.table(
        {"shard": [shard], "activations": [record.activations], "tokens": [record.tokens]}
    )


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is known of one finished shard; its presence means that the shard's file is whole."""

    shard: str
    base_digest: str
    """Of weights and tokenizer: a shard captured from another base is captured again."""
    file: FileRecord
    texts: int
    activations: int
    tokens: int
    padded_tokens: int
    skipped: list[dict[str, str]]

    def save(self, target: Location) -> None:
        """Write it beside the shard's file, in the scratch folder."""
        content = {**vars(self), "file": vars(self.file)}
        (target / _SCRATCH / f"{self.shard}.json").write_text(json.dumps(content))

    @classmethod
    def load(
        cls, target: Location, shard: str, base_digest: str, *, check_file: bool = True
    ) -> ShardRecord | None:
        """The record of a shard that is complete, whole and of this base.

        None: the shard must be captured (again). `check_file=False` trusts the record, for shards
        that this process has just seen written.
        """
        try:
            content = json.loads((target / _SCRATCH / f"{shard}.json").read_text())
            record = cls(**{**content, "file": FileRecord(**content["file"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None  # absent or torn: either way it is captured again
        is_whole = not check_file or (
            (target / shard).exists() and (target / shard).record() == record.file
        )
        return record if is_whole and record.base_digest == base_digest else None
