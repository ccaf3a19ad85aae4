"""Every artifact that evaluation and serving need, made in seconds: real captures, labels by rule,
adapters left random."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nla_ray.activation.stage import ShardCapture, capture_activations, load_stats, read_texts
from nla_ray.base.adapters import adapter_state, add_lora, save_adapter, set_adapter_state
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_backbone
from nla_ray.label.rows import LABEL_SCHEMA
from nla_ray.run.artifact import Run
from nla_ray.run.identity import SPLITS, document_half, split_of
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.settings.config import LoraSettings
from nla_ray.text.chunks import CHUNK_SCHEMA
from nla_ray.text.stage import FAMILIES_NAME, write_families
from nla_ray.training.linear import make_linear_scorer

DOCUMENTS = {"train": 24, "validation": 8, "test": 14}
"""Documents of two chunks each, by split."""
LORA = LoraSettings(rank=4, alpha=8)
SHARD = "part-00000.parquet"
WORDS = (
    "frame",
    "index",
    "rows",
    "file",
    "licence",
    "copy",
    "path",
    "open",
    "assert",
    "number",
    "token",
    "function",
)


def make_artifacts(
    run: Run, *, verbalizers: tuple[str, ...] = ("sft", "grpo"), with_ray: bool = True
) -> None:
    """Publish corpus, activations, labels, the three scorers and the named verbalizers. Needs Ray,
    for the capture, unless that is to be done in this process."""
    rows = _chunks()
    _publish_table(run, "corpus", ("corpus",), [], pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA))
    if not with_ray:
        _capture_shard(run)
    capture_activations(run)
    labels = [
        {
            **{name: row[name] for name in ("text_id", "doc_id", "split", "domain")},
            "teacher": "offline",
            "raw": _label(row),
            "label": _label(row),
            "drawn": True,
        }
        for row in rows
    ]
    _publish_table(
        run, "labels", ("label",), ["corpus"], pa.Table.from_pylist(labels, schema=LABEL_SCHEMA)
    )
    train = sorted({row["doc_id"] for row in rows if row["split"] == "train"})
    for seed, (name, half) in enumerate((("reward_scorer", "even"), ("judge_scorer", "odd"))):
        publish_scorer(
            run, name, seed, [doc_id for doc_id in train if document_half(doc_id) == half]
        )
    make_linear_scorer(run.config)
    for seed, name in enumerate(verbalizers):
        publish_verbalizer(run, name, seed)


def join_families(run: Run, families: dict[str, str]) -> None:
    """Join documents (doc_id -> family id) of a finished local run; its artifacts stay as they
    are."""
    corpus, folder = run.find("corpus"), run.root / "corpus"
    write_families(families, Path(folder.path))
    files = {**corpus.files, FAMILIES_NAME: (folder / FAMILIES_NAME).record()}
    (folder / "manifest.json").write_text(dataclasses.replace(corpus, files=files).to_json())


def _chunks() -> list[dict]:
    wanted, rows, number = dict(DOCUMENTS), [], 0
    while any(wanted.values()):
        doc_id, number = f"doc{number:04}", number + 1
        split = split_of(doc_id)
        if not wanted[split]:
            continue
        wanted[split] -= 1
        for chunk in range(2):
            picked = [
                WORDS[(number * 7 + chunk * 5 + place * (1 + number % 3)) % len(WORDS)]
                for place in range(6)
            ]
            text = (
                f"def {picked[0]}(): {' '.join(picked)}"
                if number % 2
                else f"{picked[0].title()}: {', '.join(picked)}."
            )
            rows.append(
                {
                    "text_id": f"{doc_id}#{chunk}",
                    "doc_id": doc_id,
                    "split": split,
                    "chunk_index": chunk,
                    "text": text,
                    "domain": "python_test" if number % 2 else "licence",
                }
            )
    return sorted(rows, key=lambda row: row["text_id"])


def _capture_shard(run: Run) -> None:
    """The one shard, as a process of the stage makes it: what is complete the stage takes."""
    base, corpus = run.config.base, run.require("corpus")
    texts = read_texts(pa.table({"shard": [SHARD]}), run=run, corpus=corpus)
    capture = ShardCapture(
        base,
        run.config.capture,
        threads=1,
        num_gpus=1,
        target=run.open("activations").location,
        base_digest=base_info(base).reading_digest,
    )
    capture(texts)


def _label(row: dict) -> str:
    words = [word for word in WORDS if word in row["text"].lower()]
    kind = "unit test" if row["domain"] == "python_test" else "licence"
    return (
        f"- {kind}: {', '.join(words[:2])}\n- tokens: {', '.join(words[2:])}\n- next: another check"
    )


def _publish_table(
    run: Run, name: str, sections: tuple[str, ...], parents: list[str], table: pa.Table
) -> None:
    stage = run.open_artifact(
        name, *sections, parents={parent: run.find(parent) for parent in parents}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    (stage.location / SHARD).write_bytes(buffer.getvalue())
    rows = table.select(["split", "doc_id"]).to_pylist()
    stage.publish(
        documents={
            split: [row["doc_id"] for row in rows if row["split"] == split] for split in SPLITS
        }
    )


def publish_scorer(run: Run, name: str, seed: int, documents: list[str]) -> None:
    """A reconstructor of random weights as artifact `name`."""
    stage = run.open_artifact(
        name,
        "base",
        name,
        parents={parent: run.find(parent) for parent in ("activations", "labels")},
    )
    reconstructor = Reconstructor.build(
        run.config.base, LORA, torch.tensor(load_stats(run)["mean_direction"]), seed=seed
    )
    torch.nn.init.normal_(
        reconstructor.head.weight, std=0.05, generator=torch.Generator().manual_seed(seed)
    )
    with stage.local_folder() as folder:
        reconstructor.save(folder)
    stage.publish(documents={"train": documents}, model=base_info(run.config.base).to_dict())


def publish_verbalizer(run: Run, name: str, seed: int, scale: float = 0.1) -> None:
    """An adapter of random weights as artifact `name`: `sft`, `grpo` or `grpo_no_contrast`.

    `scale`: their standard deviation; at 0.3 and seed 0 it says words."""
    parents = (
        ("activations", "labels")
        if name == "sft"
        else ("activations", "sft", "reward_scorer", "judge_scorer")
    )
    stage = run.open_artifact(
        name,
        "base",
        "sft" if name == "sft" else "grpo",
        parents={parent: run.find(parent) for parent in parents},
    )
    model = add_lora(load_backbone(run.config.base), LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: torch.randn(tensor.shape, generator=generator) * scale
        for key, tensor in adapter_state(model).items()
    }
    set_adapter_state(model, state)
    with stage.local_folder() as folder:
        save_adapter(model, folder / "adapter")
    train = run.find("activations").documents["train"]
    stage.publish(
        documents={"train": train},
        model=base_info(run.config.base).to_dict(),
        metrics={"examples": 2 * len(train)} if name == "sft" else {},
    )
