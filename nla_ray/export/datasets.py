"""Activations and labels as the Parquet files that the reference implementation trains from.

`base`: every activation with its text. `av_sft`: prompt, label, activation; `<INJECT>` stands for
it. `ar_sft`: a label in the reconstructor's template, and the activation. `rl`: prompt and
activation. A manifest lies beside each. Vectors are raw, in fixed-size lists: these have no offsets
that could overflow, and row groups stay far below what readers can take at once.

It knows tables and no run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nla_ray.activation.bank import ActivationTable
from nla_ray.base.encoding import encode_texts
from nla_ray.base.identity import BaseInfo
from nla_ray.base.prompts import VERBALIZER_TEMPLATE, reconstructor_prompt
from nla_ray.base.reference import (
    EXPLANATION_TAGS,
    REFERENCE_MANIFEST,
    package_templates,
    prompt_sections,
    write_reference_manifest,
)

DatasetStage = Literal["base", "av_sft", "ar_sft", "rl"]
DATASET_STAGES: tuple[DatasetStage, ...] = ("base", "av_sft", "ar_sft", "rl")
_PLACEHOLDER = "<INJECT>"
"""In a prompt, where the activation is to stand."""
_GROUP_BYTES = 1 << 26
"""Of vectors in a row group."""
_PROMPT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def export_datasets(
    folder: Path,
    table: ActivationTable,
    labels: Sequence[str],
    info: BaseInfo,
    tokenizer: Any,
    corpus: str,
) -> dict[DatasetStage, int]:
    """Write all files of one split; how many rows each has.

    `labels`: of each activation, "" where it has none: such rows are in `base` and `rl` alone.
    `corpus`: a name for the manifests.
    """
    opening, closing = EXPLANATION_TAGS
    turn = VERBALIZER_TEMPLATE.format(marker=_PLACEHOLDER)
    prompt = [{"role": "user", "content": turn}]
    num_tokens = [len(ids) for ids in encode_texts(tokenizer, table.texts)]
    everything = list(range(len(table)))
    labelled = [row for row in everything if labels[row]]
    identity = {
        "n_raw_tokens": (pa.int64(), num_tokens.__getitem__),
        "activation_layer": (pa.int64(), lambda row: info.layer),
        "doc_id": (pa.string(), table.doc_ids.__getitem__),
    }
    asked = {"prompt": (_PROMPT, lambda row: prompt)}
    filled = {"prompt": (pa.string(), lambda row: reconstructor_prompt(labels[row], info.marker))}
    answered = (pa.string(), lambda row: f"{opening}\n{labels[row]}\n{closing}")
    text = {"detokenized_text_truncated": (pa.string(), table.texts.__getitem__)}
    columns: dict[DatasetStage, tuple[list[int], dict[str, Any]]] = {
        "base": (everything, {**text, **identity}),
        "av_sft": (labelled, {**asked, "response": answered, **identity}),
        "ar_sft": (labelled, {**filled, **identity}),
        "rl": (everything, {**asked, **identity}),
    }
    for stage, (rows, of_stage) in columns.items():
        file = folder / f"{stage}.parquet"
        _write(file, table, rows, of_stage)
        manifest = _manifest(stage, len(rows), info, corpus)
        sidecar = file.with_name(f"{file.name}.{REFERENCE_MANIFEST}")
        write_reference_manifest(sidecar, manifest)
    return {stage: len(rows) for stage, (rows, _) in columns.items()}


def _write(file: Path, table: ActivationTable, rows: list[int], columns: Mapping[str, Any]) -> None:
    d_model = table.vectors.shape[1]
    vectors = pa.field("activation_vector", pa.list_(pa.float32(), d_model))
    schema = pa.schema([*(pa.field(name, kind) for name, (kind, _) in columns.items()), vectors])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        most = max(1, _GROUP_BYTES // (4 * d_model))
        for start in range(0, len(rows), most):
            group = rows[start : start + most]
            flat = pa.array(table.vectors[group].numpy().ravel(), pa.float32())
            arrays = [
                pa.array([value_of(row) for row in group], kind)
                for kind, value_of in columns.values()
            ]
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, d_model))
            writer.write_table(pa.table(arrays, schema=schema))


def _manifest(stage: DatasetStage, rows: int, info: BaseInfo, corpus: str) -> dict[str, Any]:
    return {
        "kind": "nla_dataset",
        "schema_version": 1,
        "stage": stage,
        "row_count": rows,
        "extraction": {
            "base_model": info.name,
            "d_model": info.d_model,
            "layer_index": info.layer,
            "norm": "none",
            "corpus": corpus,
        },
        **prompt_sections(
            package_templates(info.marker),
            info.marker,
            info.marker_id,
            info.neighbours,
            [info.marker_id],
        ),
    }
