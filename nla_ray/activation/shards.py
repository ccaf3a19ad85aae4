"""One captured shard: its file, written whole, and the record beside it that says so."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nla_ray.activation.bank import activation_schema
from nla_ray.activation.positions import padded_tokens
from nla_ray.run.location import Location
from nla_ray.run.manifest import FileRecord

_SCRATCH = "scratch"


def write_shard(
    rows: pa.Table, *, target: Location, batch_tokens: int, base_digest: str
) -> pa.Table:
    """Write the activations of a shard under the shard's name, then the record that it is complete;
    returns its counts."""
    shards = set(rows["shard"].to_pylist())
    if len(shards) != 1:
        raise RuntimeError(
            f"block of activations: got rows of {len(shards)} shards, expected those of one; "
            "Ray Data has joined blocks."
        )
    [shard] = shards
    is_kept = pc.is_null(rows["skipped"])
    kept, left_out = rows.filter(is_kept), rows.filter(pc.invert(is_kept))
    schema = activation_schema(rows.schema.field("activation").type.list_size)
    buffer = io.BytesIO()
    pq.write_table(
        kept.select(schema.names).cast(schema),
        buffer,
        compression="zstd",
        use_dictionary=["split", "domain", "doc_id", "text"],
    )
    (target / shard).write_bytes(buffer.getvalue())
    lengths = list(
        dict(zip(rows["text_id"].to_pylist(), rows["num_tokens"].to_pylist(), strict=True)).values()
    )
    lengths = [length for length in lengths if length]
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
        content = {**vars(self), "file": vars(self.file)}
        (target / _SCRATCH / f"{self.shard}.json").write_text(json.dumps(content))

    @classmethod
    def load(
        cls, target: Location, shard: str, base_digest: str, *, check_file: bool = True
    ) -> ShardRecord | None:
        """The record of a shard that is complete, whole and of this base; None when it must be
        captured (again).

        `check_file=False` trusts the record, for shards that this process has just seen written.
        """
        try:
            content = json.loads((target / _SCRATCH / f"{shard}.json").read_text())
            record = cls(**{**content, "file": FileRecord(**content["file"])})
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
        ):  # absent, or torn: either way it is captured again
            return None
        is_whole = not check_file or (
            (target / shard).exists() and (target / shard).record() == record.file
        )
        return record if is_whole and record.base_digest == base_digest else None
