"""The second stage: which residual-stream vectors of which texts, captured with Ray Data into one
file a corpus shard.

One corpus shard is one block and one output file, written whole and recorded beside it, so that a
run that died goes on with the shards it lacks. Protects the rule that what is captured depends on
the text and the base alone: not on the number of actors, on the order of shards, or on what else
was in the batch. Torch is imported by what runs the model only: the processes that read and write
shards do without.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nla_ray import cluster, prompts
from nla_ray.artifacts import Location, Run, Stage
from nla_ray.config import BaseConfig, CaptureConfig
from nla_ray.manifest import FileRecord, Manifest
from nla_ray.records import Split, activation_id, activation_schema, seed_of
from nla_ray.runlog import get_logger, stage_progress

if TYPE_CHECKING:
    from torch import Tensor

    from nla_ray.models.backbone import BaseInfo

MAX_PADDING = 0.05
"""Largest share of padding in one forward pass."""
STATS_NAME = "stats.json"
SKIPPED_NAME = "skipped.jsonl"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_SCRATCH = "scratch"
_SENTINEL = "nla-ray-text"
_TEXT_COLUMNS = ["text_id", "doc_id", "split", "domain", "text"]
_WRITER_CPUS = 0.25
_READER_CPUS = 1.0
_ATTEMPTS = 3

logger = get_logger(__name__)


# From text to token positions ---------------------------------------------------------------------


class Skipped(ValueError):
    """A text that has no activation. The message starts with the reason: `no_tokens`, `too_long` or
    `non_finite`."""

    @property
    def reason(self) -> str:
        return str(self).partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A chat-formatted text and the positions whose activations are wanted.

    Example: EncodedText(ids=[1, 40, 8, 2, 3], positions=[4])
    """

    ids: list[int]
    positions: list[int]
    """Ascending, 0-based."""


class TextEncoder:
    """Formats a text as one user turn with the generation prompt appended, and picks positions in
    it."""

    def __init__(self, tokenizer, base: BaseConfig, capture: CaptureConfig) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer of {base.model}: got a slow one, expected one that reports character"
                " offsets. Install its fast version (tokenizer.json)."
            )
        self._tokenizer, self._max_tokens = tokenizer, base.max_tokens
        self._random_count = (
            int(capture.positions[7:]) if capture.positions.startswith("random:") else None
        )
        around = prompts.chat_prompt(tokenizer, _SENTINEL).split(_SENTINEL)
        if len(around) != 2:
            raise ValueError(
                f"chat template of {base.model}: got the user's text {len(around) - 1} times in the"
                " prompt, expected once. Choose a base with an ordinary chat template."
            )
        self._before, self._after = len(around[0]), len(around[1])

    def encode(self, text_id: str, text: str) -> EncodedText:
        """Raises Skipped for a text without tokens or with more than base.max_tokens, template
        included."""
        prompt = prompts.chat_prompt(self._tokenizer, text)
        encoding = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, end = encoding["input_ids"], len(prompt) - self._after
        inside = [
            place
            for place, (left, right) in enumerate(encoding["offset_mapping"])
            if left < right and left < end and right > self._before
        ]
        if not inside:
            raise Skipped("no_tokens: the text became no token, expected at least one")
        if len(ids) > self._max_tokens:
            raise Skipped(
                f"too_long: the prompt has {len(ids)} tokens, expected at most {self._max_tokens} "
                "(--base.max-tokens)"
            )
        if self._random_count is None:
            return EncodedText(ids=ids, positions=[len(ids) - 1])
        drawn = random.Random(seed_of(0, "positions", text_id)).sample(
            inside, min(self._random_count, len(inside))
        )
        return EncodedText(ids=ids, positions=sorted(drawn))


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of texts in batches of like length: at most `batch_tokens` padded tokens and
    MAX_PADDING padding in each.

    A text longer than `batch_tokens` is a batch of its own. Example: plan_batches([10, 5, 10, 5],
    20) == [[1, 3], [0, 2]].
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[index]
        rows = len(batches[-1]) + 1 if batches else 1
        fits = (
            rows * length <= batch_tokens and tokens + length >= (1 - MAX_PADDING) * rows * length
        )
        if not batches or not fits:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += length
    return batches


def padded_tokens(lengths: Sequence[int], batch_tokens: int) -> int:
    """Tokens that the forward passes of `plan_batches` compute, padding included."""
    return sum(
        len(batch) * max(lengths[i] for i in batch) for batch in plan_batches(lengths, batch_tokens)
    )


# Running the model --------------------------------------------------------------------------------


def wanted_layers(base: BaseConfig, capture: CaptureConfig) -> tuple[int, ...]:
    """The base's layer and any further ones, ascending."""
    return tuple(sorted({base.layer, *capture.layers}))


class ActivationReader:
    """A base model's blocks 0..K, and the vectors they leave at wanted positions."""

    def __init__(self, model, layers: Sequence[int], batch_tokens: int) -> None:
        from nla_ray.models.backbone import ResidualReader

        self._residual, self._device, self._batch_tokens = (
            ResidualReader(model, layers),
            model.device,
            batch_tokens,
        )
        self.layers, self.d_model = self._residual.layers, model.config.hidden_size

    def read(self, texts: Sequence[EncodedText]) -> dict[int, list[np.ndarray]]:
        """For every layer, one float32 array [positions, d_model] a text, in the order of
        `texts`."""
        found: dict[int, list[np.ndarray]] = {
            layer: [np.empty(0)] * len(texts) for layer in self.layers
        }
        for batch in plan_batches([len(text.ids) for text in texts], self._batch_tokens):
            for layer, arrays in self._read_batch([texts[i] for i in batch]).items():
                for index, array in zip(batch, arrays, strict=True):
                    found[layer][index] = array
        return found

    def _read_batch(self, texts: Sequence[EncodedText]) -> dict[int, list[np.ndarray]]:
        import torch

        ids = torch.zeros(len(texts), max(len(text.ids) for text in texts), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
        counts = [len(text.positions) for text in texts]
        rows = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(counts)).to(
            self._device
        )
        places = torch.tensor(
            [place for text in texts for place in text.positions], device=self._device
        )
        with torch.inference_mode():
            residual = self._residual.read(ids.to(self._device))
            kept = {layer: values[rows, places].float().cpu() for layer, values in residual.items()}
        return {
            layer: [part.numpy() for part in values.split(counts)] for layer, values in kept.items()
        }


class Capture:
    """The actor of the capture stage: a table of encoded texts in, a table of activations out."""

    def __init__(self, base: BaseConfig, capture: CaptureConfig, threads: int) -> None:
        import torch

        from nla_ray.models.backbone import load_backbone

        torch.set_num_threads(threads)
        layers = wanted_layers(base, capture)
        self._reader = ActivationReader(
            load_backbone(base, num_blocks=layers[-1] + 1), layers, capture.batch_tokens
        )

    def __call__(self, texts: pa.Table) -> pa.Table:
        """Columns of `read_texts` -> one row an activation (columns of `activation_schema`); texts
        left out come last."""
        is_kept = pc.is_null(texts["skipped"])
        kept, left_out = texts.filter(is_kept), texts.filter(pc.invert(is_kept))
        encoded = [
            EncodedText(ids=ids, positions=positions)
            for ids, positions in zip(
                kept["ids"].to_pylist(), kept["positions"].to_pylist(), strict=True
            )
        ]
        vectors = self._reader.read(encoded)
        rows = [
            (row, layer, slot)
            for row, text in enumerate(encoded)
            for layer in self._reader.layers
            for slot in range(len(text.positions))
        ]
        activations = np.array([vectors[layer][row][slot] for row, layer, slot in rows], np.float32)
        activations = activations.reshape(-1, self._reader.d_model)  # also where there is none
        places = [encoded[row].positions[slot] for row, _, slot in rows]
        found = _activation_rows(
            kept.take(pa.array([row for row, _, _ in rows], pa.int64())),
            activations,
            [layer for _, layer, _ in rows],
            places,
            [encoded[row].ids[place] for (row, _, _), place in zip(rows, places, strict=True)],
        )
        nowhere, nothing = (
            [-1] * len(left_out),
            np.zeros((len(left_out), self._reader.d_model), np.float32),
        )
        return pa.concat_tables(
            [found, _activation_rows(left_out, nothing, nowhere, nowhere, nowhere)]
        )


def _activation_rows(
    texts: pa.Table,
    activations: np.ndarray,
    layers: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
) -> pa.Table:
    """Rows of texts with their activations [rows, d_model]; a vector that is not finite is marked
    as skipped."""
    ids = [
        activation_id(text_id, layer, position)
        for text_id, layer, position in zip(
            texts["text_id"].to_pylist(), layers, positions, strict=True
        )
    ]
    finite = np.isfinite(activations).all(axis=1)
    skipped = [
        reason
        or (None if ok else f"non_finite: {name} holds NaN or infinity, expected finite numbers")
        for reason, ok, name in zip(texts["skipped"].to_pylist(), finite, ids, strict=True)
    ]
    columns = {name: texts[name] for name in ("shard", *_TEXT_COLUMNS, "num_tokens")}
    return pa.table(
        {
            **columns,
            "skipped": pa.array(skipped, pa.string()),
            "activation_id": pa.array(ids, pa.string()),
            "position": pa.array(positions, pa.int32()),
            "token": pa.array(tokens, pa.int32()),
            "layer": pa.array(layers, pa.int32()),
            "activation": pa.FixedSizeListArray.from_arrays(
                pa.array(activations.reshape(-1)), activations.shape[1]
            ),
        }
    )


# Shards: read and tokenise, write -----------------------------------------------------------------


@functools.cache
def _encoder(base: BaseConfig, capture: CaptureConfig) -> TextEncoder:
    from nla_ray.models.backbone import load_tokenizer

    return TextEncoder(load_tokenizer(base), base, capture)


def read_texts(shards: pa.Table, *, run: Run, corpus: Manifest) -> pa.Table:
    """A table with one `shard` name -> its texts, verified against the corpus manifest and
    tokenised.

    Adds the columns ids, positions, num_tokens and skipped (null, or why there is nothing to
    capture).
    """
    [shard] = shards["shard"].to_pylist()
    texts = pq.read_table(
        io.BytesIO(run.verified("corpus", corpus, shard).read_bytes()), columns=_TEXT_COLUMNS
    )
    encoder = _encoder(run.config.base, run.config.capture)
    ids, positions, skipped = [], [], []
    for text_id, text in zip(texts["text_id"].to_pylist(), texts["text"].to_pylist(), strict=True):
        try:
            encoded = encoder.encode(text_id, text)
            reason = None
        except Skipped as error:
            encoded, reason = EncodedText(ids=[], positions=[]), str(error)
        ids.append(encoded.ids)
        positions.append(encoded.positions)
        skipped.append(reason)
    return pa.table(
        {
            "shard": pa.array([shard] * len(texts), pa.string()),
            **{name: texts[name] for name in _TEXT_COLUMNS},
            "ids": pa.array(ids, pa.list_(pa.int32())),
            "positions": pa.array(positions, pa.list_(pa.int32())),
            "num_tokens": pa.array(map(len, ids), pa.int32()),
            "skipped": pa.array(skipped, pa.string()),
        }
    )


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


# The stage ----------------------------------------------------------------------------------------


def capture_activations(run: Run) -> Manifest:
    """Capture every text of the corpus that this run has; the manifest's metrics count what was
    left out, by reason.

    Needs Ray. Raises ValueError when the corpus is missing or damaged, or when no activation is
    left.
    """
    from nla_ray.models.backbone import base_info, check_layer

    corpus = run.require("corpus", "corpus")
    stage = run.stage("activations", "base", "capture", parents={"corpus": corpus})
    info = base_info(run.config.base)
    if stage.complete:
        check_base(stage.manifest, info)
        return stage.manifest
    for layer in run.config.capture.layers:
        check_layer(layer, info.num_layers)
    digest = f"{info.digest}/{info.tokenizer_digest}"
    shards = sorted(path for path in corpus.files if path.endswith(".parquet"))
    _capture_shards(run, stage, corpus, shards, digest)
    return _publish(stage, shards, digest, info)


def _capture_shards(
    run: Run, stage: Stage, corpus: Manifest, shards: list[str], digest: str
) -> None:
    """Capture the shards that have no record yet; when an actor or node was lost, go on with those
    that are left."""
    import ray

    for attempts_left in reversed(range(_ATTEMPTS)):
        todo = [
            shard for shard in shards if ShardRecord.load(stage.location, shard, digest) is None
        ]
        if not todo:
            return
        if len(todo) < len(shards):
            logger.info(
                "activations: %d of %d shards are there already",
                len(shards) - len(todo),
                len(shards),
            )
        try:
            _stream_shards(run, stage, corpus, todo, digest)
            return
        except ray.exceptions.RayError as error:
            is_ours = cluster.user_message(error) is not None or isinstance(
                error, ray.exceptions.RayTaskError
            )
            if is_ours or not attempts_left:
                raise
            logger.warning(
                "activations: a process was lost (%s); going on with the shards that are left",
                type(error).__name__,
            )


def _stream_shards(
    run: Run, stage: Stage, corpus: Manifest, shards: list[str], digest: str
) -> None:
    """Stream shards through read -> tokenise -> capture -> write."""
    import ray.data

    config = run.config
    num_actors = min(config.capture.num_actors, len(shards))
    options = cluster.worker_options(config.compute, "capture")
    # On CPU the reader asks for the same as the actor, so that Ray Data can run it inside the
    # actor: one process less.
    reader = {"num_cpus": _READER_CPUS} if options["num_gpus"] else options
    # On one node, restarting an actor gains nothing over starting again on what is left, and Ray
    # prints an error line about it.
    capture = {**options, "max_restarts": -1 if len(ray.nodes()) > 1 else 0}
    # Ray Data waits for ever where its tasks find no room beside the actors.
    cluster.require_resources(
        [
            cluster.demand(config.compute, "capture", num_actors),
            cluster.Demand(name="reader", count=1, resources={"CPU": reader["num_cpus"]}),
            cluster.Demand(name="writer", count=1, resources={"CPU": _WRITER_CPUS}),
        ]
    )
    with _quiet_ray_data(), stage_progress("activations", len(shards)) as advance:
        blocks = ray.data.from_items(
            [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
        )
        texts = blocks.map_batches(
            read_texts,
            fn_kwargs={"run": run, "corpus": replace(corpus, documents={})},
            batch_size=None,
            batch_format="pyarrow",
            **reader,
        )
        rows = texts.map_batches(
            Capture,
            fn_constructor_args=(config.base, config.capture, config.compute.threads),
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            batch_size=None,
            batch_format="pyarrow",
            **capture,
        )
        target = {
            "target": stage.location,
            "batch_tokens": config.capture.batch_tokens,
            "base_digest": digest,
        }
        written = rows.map_batches(
            write_shard,
            fn_kwargs=target,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_WRITER_CPUS,
        )
        for counts in written.iter_rows():
            advance(
                note=(
                    f"{counts['activations']} activations of {counts['tokens']} tokens in"
                    f" {counts['shard']}"
                )
            )


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without its own bars and log lines (errors come as exceptions), and with blocks that
    are never split."""
    from ray.data import DataContext
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.target_max_block_size
    context.enable_progress_bars, context.target_max_block_size = False, None
    try:
        with warnings.catch_warnings():
            # `max_restarts` is passed the old way until Ray 2.64; there is no named parameter for
            # it yet.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            yield
    finally:
        context.enable_progress_bars, context.target_max_block_size = before


def _publish(stage: Stage, shards: list[str], digest: str, info: BaseInfo) -> Manifest:
    """Gather the shards' records into stats.json and skipped.jsonl, and write the manifest."""
    records = [
        ShardRecord.load(stage.location, shard, digest, check_file=False) for shard in shards
    ]
    if None in records:
        raise RuntimeError(
            f"{stage.location}: shard {shards[records.index(None)]} is not complete after capture, "
            "expected a whole file."
        )
    counts = _counts(records)
    if not counts["activations"]:
        raise ValueError(
            f"activations: got none from {counts['texts']} texts ({counts['skipped']}), expected at"
            " least one. Check --base.max-tokens and the base model."
        )
    layers, documents = _train_stats(stage.location, shards, info.d_model)
    skipped = [row for record in records for row in record.skipped]
    (stage.location / SKIPPED_NAME).write_text("".join(json.dumps(row) + "\n" for row in skipped))
    (stage.location / STATS_NAME).write_text(json.dumps({"layers": layers, **counts}, indent=1))
    for temporary in (path for path in stage.location.list_files() if path.endswith(".tmp")):
        (stage.location / temporary).delete()
    logger.info(
        "activations: %d from %d texts, %.1f %% padding, left out: %s",
        counts["activations"],
        counts["texts"],
        100 * counts["padding"],
        counts["skipped"] or "none",
    )
    return stage.publish(documents={"train": documents}, model=info.to_dict(), metrics=counts)


def _counts(records: list[ShardRecord]) -> dict[str, Any]:
    tokens, padded = (
        sum(record.tokens for record in records),
        sum(record.padded_tokens for record in records),
    )
    return {
        "texts": sum(record.texts for record in records),
        "activations": sum(record.activations for record in records),
        "skipped": dict(
            sorted(Counter(row["reason"] for record in records for row in record.skipped).items())
        ),
        "tokens": tokens,
        "padded_tokens": padded,
        "padding": 1 - tokens / padded if padded else 0.0,
    }


def _train_stats(
    location: Location, shards: list[str], d_model: int
) -> tuple[dict[str, Any], list[str]]:
    """Mean direction and norm quantiles of every layer over the train rows, and the train doc_ids,
    a shard at a time.

    What grows with the corpus is four bytes an activation (its norm) and the names of the
    documents.
    """
    import torch

    from nla_ray.vectors import direction, norm

    sums: dict[int, Tensor] = {}
    norms: dict[int, list[np.ndarray]] = {}
    documents: set[str] = set()
    for shard in shards:
        train = _read_rows(
            location / shard, ["split", "layer", "doc_id", "activation"], split="train"
        )
        documents.update(train["doc_id"].to_pylist())
        for layer in pc.unique(train["layer"]).to_pylist():
            rows = torch.tensor(
                _matrix(train.filter(pc.equal(train["layer"], layer))["activation"], d_model)
            )
            sums[layer] = sums.get(layer, torch.zeros(d_model, dtype=torch.float64)) + direction(
                rows
            ).double().sum(0)
            norms.setdefault(layer, []).append(norm(rows).squeeze(-1).numpy())
    stats = {}
    for layer in sorted(sums):
        every = np.concatenate(norms[layer]).astype(np.float64)
        stats[str(layer)] = {
            "mean_direction": (sums[layer] / len(every)).float().tolist(),
            "mean_norm": float(every.mean()),
            "norm_quantiles": {str(q): float(np.quantile(every, q)) for q in QUANTILES},
            "count": len(every),
        }
    return stats, sorted(documents)


# Reading them back --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ActivationTable:
    """Activations of one split and layer, sorted by activation_id; row i of every field belongs
    together.

    Example: ActivationTable(ids=["a#0@4:31"], text_ids=["a#0"], doc_ids=["a"], domains=["licence"],
    texts=["..."], vectors=<float32 [1, d_model]>)
    """

    ids: list[str]
    text_ids: list[str]
    doc_ids: list[str]
    domains: list[str]
    texts: list[str]
    vectors: Tensor
    """[rows, d_model] float32, as captured."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> ActivationTable:
        """The rows at `indices`, in that order."""
        import torch

        chosen = [int(index) for index in indices]
        lists = {
            name: [getattr(self, name)[index] for index in chosen]
            for name in ("ids", "text_ids", "doc_ids", "domains", "texts")
        }
        return ActivationTable(
            **lists, vectors=self.vectors[torch.tensor(chosen, dtype=torch.int64)]
        )


def load_activations(run: Run, split: Split, layer: int | None = None) -> ActivationTable:
    """The activations of one split at one layer (the base's, when None), verified against the
    manifest.

    Raises ValueError when there are no activations, or none of this layer.
    """
    import torch

    manifest = run.require("activations", "capture")
    layer = run.config.base.layer if layer is None else layer
    d_model = manifest.model["d_model"]
    columns = ["activation_id", *_TEXT_COLUMNS, "layer", "activation"]
    parts = [
        _read_rows(run.verified("activations", manifest, path), columns, split=split, layer=layer)
        for path in sorted(manifest.files)
        if path.endswith(".parquet")
    ]
    table = pa.concat_tables(parts)
    if not len(table):
        raise ValueError(
            f"activations of layer {layer}: got no {split} rows in {run.root / 'activations'},"
            " expected some. Capture that layer (--capture.layers), or more documents."
        )
    matrix = np.empty((len(table), d_model), np.float32)
    start = 0
    for chunk in table["activation"].chunks:
        matrix[start : start + len(chunk)] = _matrix(chunk, d_model)
        start += len(chunk)
    ids = table["activation_id"].to_pylist()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    loaded = ActivationTable(
        ids=ids,
        text_ids=table["text_id"].to_pylist(),
        doc_ids=table["doc_id"].to_pylist(),
        domains=table["domain"].to_pylist(),
        texts=table["text"].to_pylist(),
        vectors=torch.from_numpy(matrix),
    )
    return loaded if order == list(range(len(ids))) else loaded.select(order)


def load_stats(run: Run, layer: int | None = None) -> dict[str, Any]:
    """Train statistics of a layer: mean_direction (list of d_model floats), norm_quantiles,
    mean_norm, count."""
    manifest = run.require("activations", "capture")
    stats = json.loads(run.verified("activations", manifest, STATS_NAME).read_text())
    return stats["layers"][str(run.config.base.layer if layer is None else layer)]


def check_base(manifest: Manifest, info: BaseInfo) -> None:
    """Raise ValueError when an artifact was made with other weights, another tokenizer or another
    layer than the base that is here.

    An adapter is also bound to the marker and the injection norm that it learned with; activations
    know of neither.
    """
    compared = {"weights": "digest", "tokenizer": "tokenizer_digest", "layer": "layer"}
    if manifest.name != "activations":
        compared |= {"marker": "marker", "injection norm": "injection_norm"}
    for what, name in compared.items():
        there, here = manifest.model.get(name), getattr(info, name)
        if there != here:
            raise ValueError(
                f"artifact {manifest.name!r}: got {what} {here} of {info.name}, expected {there} of"
                f" {manifest.model.get('name')}, with which it was made. Give the same --base"
                " fields as then, or make the artifact again."
            )


def _read_rows(
    location: Location, columns: list[str], *, split: str, layer: int | None = None
) -> pa.Table:
    with location.filesystem.open_input_file(location.path) as file:
        table = pq.read_table(file, columns=columns)
    wanted = pc.equal(table["split"], split)
    return table.filter(
        wanted if layer is None else pc.and_(wanted, pc.equal(table["layer"], layer))
    )


def _matrix(activations: pa.ChunkedArray | pa.FixedSizeListArray, d_model: int) -> np.ndarray:
    """A fixed-size-list column as float32 [rows, d_model]; without a copy when it is one chunk."""
    array = (
        activations.combine_chunks() if isinstance(activations, pa.ChunkedArray) else activations
    )
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, d_model)
