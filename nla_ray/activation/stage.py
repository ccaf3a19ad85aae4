"""The second stage: activations of the corpus, captured with Ray Data into a file a corpus shard.

Before it, where positions are inside the base's own answers, these answers in the same way. One
corpus shard is one block and one output file, written whole and recorded beside it, so that a run
that died goes on with the shards it lacks. Protects the rule that what is captured depends on
the text and the base alone: not on the number of actors, on the order of shards, or on what else
was in the batch. Torch is imported by what runs the model only: the processes that read and write
shards do without.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nla_ray.activation.bank import TEXT_COLUMNS, ActivationTable, activation_matrix, drawn_rows
from nla_ray.activation.capture import Capture
from nla_ray.activation.positions import MEAN_POSITION, EncodedText, Skipped, TextEncoder
from nla_ray.activation.shards import (
    AnswersRecord,
    FinishedShard,
    ShardRecord,
    write_answers,
    write_shard,
)
from nla_ray.base.encoding import written_text
from nla_ray.base.identity import check_base
from nla_ray.cluster.errors import user_message
from nla_ray.cluster.resources import Demand, demand, require_resources, worker_options
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.identity import Split
from nla_ray.run.location import Location
from nla_ray.run.log import get_logger, stage_progress
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import BaseConfig, CaptureConfig, ComputeConfig, require
from nla_ray.settings.positions import PositionRule
from nla_ray.settings.resources import gpus_of
from nla_ray.settings.views import is_activation_alone
from nla_ray.text.stage import families_of, read_chunk_table, read_chunks

if TYPE_CHECKING:
    import ray.data
    from torch import Tensor

    from nla_ray.activation.typical import TrainActivations
    from nla_ray.base.identity import BaseInfo

_SAMPLED_SHARDS = 16
"""Most that a sample of train activations is drawn from: a large run is not read whole for it."""

logger = get_logger(__name__)

STATS_NAME = "stats.json"
SKIPPED_NAME = "skipped.jsonl"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_READER_CPUS = 1.0
_ATTEMPTS = 3


# Shards: read and tokenise, write -----------------------------------------------------------------


@functools.cache
def _encoder(base: BaseConfig, capture: CaptureConfig) -> TextEncoder:
    from nla_ray.base.load import load_tokenizer

    return TextEncoder(load_tokenizer(base), base, capture)


def read_texts(shards: pa.Table, *, run: Run, corpus: Manifest) -> pa.Table:
    """A table with the name of one `shard` -> its texts, verified by the manifest and tokenised.

    Adds the columns ids, positions, averaged, ends, num_tokens and skipped (null, or why there is
    nothing to capture). Where the base has answered, `text` goes on with its answer.
    """
    [shard] = shards["shard"].to_pylist()
    texts, capture = _corpus_texts(run, corpus, shard), run.config.capture
    encoder, answers = _encoder(run.config.base, capture), read_answers(run, capture, shard)
    found: list[EncodedText] = []
    skipped: list[str | None] = []
    for row in texts.select(["text_id", "text", "messages"]).to_pylist():
        try:
            found.append(encoder.encode(**row, answer=answers.get(row["text_id"], ())))
            skipped.append(None)
        except Skipped as error:
            found.append(EncodedText(ids=[], positions=[], text=row["text"]))
            skipped.append(str(error))
    lists = ("ids", "positions", "averaged", "ends")
    return pa.table(
        {
            "shard": pa.array([shard] * len(texts), pa.string()),
            **{name: texts[name] for name in TEXT_COLUMNS},
            "text": pa.array([text.text for text in found], pa.string()),
            **{
                name: pa.array([getattr(text, name) for text in found], pa.list_(pa.int32()))
                for name in lists
            },
            "num_tokens": pa.array([len(text.ids) for text in found], pa.int32()),
            "skipped": pa.array(skipped, pa.string()),
        }
    )


def _corpus_texts(run: Run, corpus: Manifest, shard: str) -> pa.Table:
    """The texts of a shard, verified by the manifest."""
    shard_bytes = run.verified("corpus", corpus, shard).read_bytes()
    return read_chunk_table(io.BytesIO(shard_bytes), [*TEXT_COLUMNS, "messages"])


class ShardCapture:
    """The actor of the stage: a table of encoded texts in, their shard written, its counts out.

    Activations never pass through the object store: a shard of them may be larger than memory.
    """

    def __init__(
        self,
        base: BaseConfig,
        capture: CaptureConfig,
        *,
        threads: int,
        num_gpus: int,
        target: Location,
        base_digest: str,
    ) -> None:
        self._capture = Capture(base, capture, threads, num_gpus)
        self._target, self._base_digest = target, base_digest

    def __call__(self, texts: pa.Table) -> pa.Table:
        """Columns of `read_texts` -> the row of `write_shard`."""
        blocks = self._capture(texts)
        return write_shard(blocks, target=self._target, base_digest=self._base_digest)


def read_prompts(shards: pa.Table, *, run: Run, corpus: Manifest) -> pa.Table:
    """A table with the name of one `shard` -> what the base is to answer to each of its texts.

    Columns shard, text_id, ids and most, the tokens that an answer may have: 0 where a text is no
    prompt, which capture says why.
    """
    [shard] = shards["shard"].to_pylist()
    encoder = _encoder(run.config.base, run.config.capture)
    rows = []
    for row in _corpus_texts(run, corpus, shard).to_pylist():
        try:
            ids, most = encoder.prompt(row["text"], row["messages"])
        except Skipped:
            ids, most = [], 0
        rows.append({"shard": shard, "text_id": row["text_id"], "ids": ids, "most": most})
    return pa.Table.from_pylist(rows)


class ShardAnswers:
    """The actor of the stage before: a table of prompts in, their answers written, counts out."""

    def __init__(
        self,
        base: BaseConfig,
        capture: CaptureConfig,
        *,
        threads: int,
        target: Location,
        base_digest: str,
    ) -> None:
        from nla_ray.activation.answers import Answerer
        from nla_ray.base.load import load_tokenizer

        self._answerer = Answerer.load(base, capture, threads)
        self._tokenizer = load_tokenizer(base)
        self._target, self._base_digest = target, base_digest

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Columns of `read_prompts` -> the row of `write_answers`."""
        ids, most = (prompts[name].to_pylist() for name in ("ids", "most"))
        asked = [row for row, longest in enumerate(most) if longest]
        found = self._answerer.answer([ids[row] for row in asked], [most[row] for row in asked])
        answers = dict(zip(asked, found, strict=True))
        written = [answers.get(row, []) for row in range(len(prompts))]
        return write_answers(
            prompts,
            [(written_text(self._tokenizer, answer), answer) for answer in written],
            target=self._target,
            base_digest=self._base_digest,
        )


@dataclass(frozen=True, kw_only=True)
class _ShardWork:
    """What reads a shard of the corpus, what makes a file of it, and the record of that."""

    read: Callable[..., pa.Table]
    actor: type[ShardCapture] | type[ShardAnswers]
    record: type[FinishedShard]
    options: Callable[[ComputeConfig], dict[str, Any]] = lambda compute: {}
    """What the actor is made with, beside what every actor is."""


_WORK = {
    "answers": _ShardWork(read=read_prompts, actor=ShardAnswers, record=AnswersRecord),
    "activations": _ShardWork(
        read=read_texts,
        actor=ShardCapture,
        record=ShardRecord,
        options=lambda compute: {"num_gpus": gpus_of(compute, "capture")},
    ),
}


# The stages ---------------------------------------------------------------------------------------


def answer_texts(run: Run) -> Manifest:
    """What the plain base answers to every text of the corpus that this run has, ANSWER_SCHEMA.

    Needs Ray. Raises ValueError when the corpus is missing or damaged.
    """
    from nla_ray.base.identity import base_info

    corpus = run.require("corpus")
    stage, info = run.open("answers"), base_info(run.config.base)
    if stage.manifest is not None:
        check_base(stage.manifest, info)
        return stage.manifest
    records = _make_shards(run, stage, corpus, info.reading_digest)
    metrics = {
        name: sum(getattr(record, name) for record in records)
        for name in ("texts", "answers", "tokens")
    }
    return stage.publish(model=info.to_dict(), metrics=metrics)


def capture_activations(run: Run) -> Manifest:
    """Capture every text of the corpus that this run has.

    Needs Ray. The manifest's metrics count what was left out, by reason. Raises ValueError when the
    corpus is missing or damaged, for answers of another base, and when no activation is left.
    """
    from nla_ray.base.families import check_layer
    from nla_ray.base.gpus import check_gpus_of_base
    from nla_ray.base.identity import base_info
    from nla_ray.base.load import load_model_config

    corpus = run.require("corpus")
    stage = run.open("activations")
    info = base_info(run.config.base)
    if stage.manifest is not None:
        check_base(stage.manifest, info)
        return stage.manifest
    for layer in run.config.capture.layers:
        check_layer(layer, info.num_layers, "capture.layers")
    if run.config.capture.needs_answers:
        check_base(run.require("answers"), info)
    check_gpus_of_base(load_model_config(run.config.base), run.config.compute)
    records = _make_shards(run, stage, corpus, info.reading_digest)
    return _publish(stage, records, info, run.config.capture)


def _make_shards(run: Run, stage: Artifact, corpus: Manifest, digest: str) -> list[Any]:
    """Make of every shard of the corpus a shard of the stage; their records, in order."""
    shards = sorted(path for path in corpus.files if path.endswith(".parquet"))
    _make_missing(run, stage, corpus, shards, digest)
    records = []
    for shard in shards:
        record = _WORK[stage.name].record.load(stage.location, shard, digest, check_file=False)
        if record is None:
            raise RuntimeError(
                f"{stage.location}: shard {shard} is not complete after its stage, expected a whole"
                " file."
            )
        records.append(record)
    return records


def _make_missing(
    run: Run, stage: Artifact, corpus: Manifest, shards: list[str], digest: str
) -> None:
    """Make the shards that have no record yet.

    When an actor or node was lost, it goes on with those that are left.
    """
    from ray.exceptions import RayError, RayTaskError

    load = _WORK[stage.name].record.load
    for attempts_left in reversed(range(_ATTEMPTS)):
        todo = [shard for shard in shards if load(stage.location, shard, digest) is None]
        if not todo:
            return
        if len(todo) < len(shards):
            logger.info(
                "%s: %d of %d shards are there already",
                stage.name,
                len(shards) - len(todo),
                len(shards),
            )
        try:
            _stream_shards(run, stage, corpus, todo, digest)
            return
        except RayError as error:
            is_ours = user_message(error) is not None or isinstance(error, RayTaskError)
            if is_ours or not attempts_left:
                raise
            logger.warning(
                "%s: a process was lost (%s); going on with the shards that are left",
                stage.name,
                type(error).__name__,
            )


def _stream_shards(
    run: Run, stage: Artifact, corpus: Manifest, shards: list[str], digest: str
) -> None:
    """Make shards as the stream gives them, once there is room for its processes."""
    config = run.config
    num_actors = min(config.capture.num_actors, len(shards))
    reader, _ = _stream_options(config.compute)
    # Ray Data waits for ever where its tasks find no room beside the actors.
    require_resources(
        config.compute,
        [
            demand(config.compute, "capture", num_actors),
            Demand(name="reader", count=1, resources={"CPU": reader["num_cpus"]}),
        ],
    )
    with _quiet_ray_data(), stage_progress(stage.name, len(shards)) as advance:
        for counts in shard_stream(run, stage, corpus, shards, digest).iter_rows():
            made = f"{counts[stage.name]} {stage.name} of {counts['tokens']} tokens"
            advance(note=f"{made} in {counts['shard']}")


def shard_stream(
    run: Run, stage: Artifact, corpus: Manifest, shards: list[str], digest: str
) -> ray.data.Dataset:
    """Shards through read and tokenise -> compute and write, lazily: a row of counts a shard."""
    import ray.data

    config, work = run.config, _WORK[stage.name]
    reader, capture = _stream_options(config.compute)
    blocks = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    texts = blocks.map_batches(
        work.read,  # pyright: ignore[reportArgumentType]  (its names come as fn_kwargs)
        fn_kwargs={"run": run, "corpus": replace(corpus, documents={})},
        batch_size=None,
        batch_format="pyarrow",
        **reader,
    )
    # Not `map_batches`: that refuses a GPU to batches that are whole blocks, here shards, because
    # a block may be too large for its memory. Actors cut a shard into batches by themselves.
    return texts.map_batches_internal(
        work.actor,
        fn_constructor_args=(config.base, config.capture),
        fn_constructor_kwargs={
            "threads": config.compute.threads,
            **work.options(config.compute),
            "target": stage.location,
            "base_digest": digest,
        },
        compute=ray.data.ActorPoolStrategy(size=min(config.capture.num_actors, len(shards))),
        batch_size=None,
        batch_format="pyarrow",
        **capture,
    )


def _stream_options(compute: ComputeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Ray Data gives the reader and the capture actor."""
    import ray

    options = worker_options(compute, "capture")
    # On CPU the reader asks for the same as the actor, so that Ray Data can run it inside the
    # actor: one process less.
    reader = {"num_cpus": _READER_CPUS} if options["num_gpus"] else options
    # On one node, restarting an actor gains nothing over starting again on what is left, and Ray
    # prints an error line about it.
    return reader, {**options, "max_restarts": -1 if len(ray.nodes()) > 1 else 0}


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without its own bars and log lines, and with blocks that are never split.

    Errors come as exceptions.
    """
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


def _publish(
    stage: Artifact, records: list[ShardRecord], info: BaseInfo, capture: CaptureConfig
) -> Manifest:
    """Gather the shards' records into stats.json and skipped.jsonl, and write the manifest."""
    counts = _counts(records)
    if not counts["activations"]:
        raise ValueError(
            f"activations: got none from {counts['texts']} texts ({counts['skipped']}), expected at"
            " least one. Check --base.max-tokens and the base model."
        )
    shards = [record.shard for record in records]
    means = PositionRule.of(capture.positions).is_mean
    layers, documents = _train_stats(stage.location, shards, info.d_model, means=means)
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
    """The manifest's metrics, over all shards."""
    tokens = sum(record.tokens for record in records)
    padded = sum(record.padded_tokens for record in records)
    reasons = Counter(row["reason"] for record in records for row in record.skipped)
    return {
        "texts": sum(record.texts for record in records),
        "activations": sum(record.activations for record in records),
        "skipped": dict(sorted(reasons.items())),
        "tokens": tokens,
        "padded_tokens": padded,
        "padding": 1 - tokens / padded if padded else 0.0,
    }


def _train_stats(
    location: Location, shards: list[str], d_model: int, *, means: bool
) -> tuple[dict[str, Any], list[str]]:
    """Mean direction and norm quantiles of every layer over the train rows; the train doc_ids.

    A block at a time: what grows with the corpus is four bytes an activation (its norm) and the
    names of the documents.
    """
    import torch

    from nla_ray.activation.vectors import direction, norm

    columns = ["split", "layer", "doc_id", "activation"]
    sums: dict[int, Tensor] = {}
    norms: dict[int, list[np.ndarray]] = {}
    documents: set[str] = set()
    blocks = (_read_rows(location / shard, columns, "train", means=means) for shard in shards)
    for train in chain.from_iterable(blocks):
        documents.update(train["doc_id"].to_pylist())
        for layer in train["layer"].unique().to_pylist():
            of_layer = train.filter(_equal(train["layer"], layer))
            rows = torch.tensor(activation_matrix(of_layer["activation"], d_model))
            before = sums.get(layer, torch.zeros(d_model, dtype=torch.float64))
            sums[layer] = before + direction(rows).double().sum(0)
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


def read_answers(
    run: Run, capture: CaptureConfig, shard: str | None = None
) -> dict[str, list[int]]:
    """The ids of the base's answer to each text, of a shard of the corpus or of all, by text_id.

    Empty where `capture` needs none. Raises ValueError where they are missing or damaged.
    """
    if not capture.needs_answers:
        return {}
    manifest = run.require("answers")
    shards = sorted(manifest.files) if shard is None else [shard]
    answers: dict[str, list[int]] = {}
    for name in shards:
        content = run.verified("answers", manifest, name).read_bytes()
        table = pq.read_table(io.BytesIO(content), columns=["text_id", "token_ids"])
        answers.update(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return answers


def captured_ids(run: Run, text_ids: Collection[str]) -> dict[str, list[int]]:
    """The ids that the base has read of texts in capture: prompt and, where it gave one, answer."""
    positions = run.require("activations").config["capture"]["positions"]
    capture = replace(run.config.capture, positions=positions)
    encoder, answers = _encoder(run.config.base, capture), read_answers(run, capture)
    wanted, chunks = set(text_ids), read_chunks(run, ("text_id", "text", "messages")).to_pylist()
    return {
        row["text_id"]: encoder.encode(**row, answer=answers.get(row["text_id"], ())).ids
        for row in chunks
        if row["text_id"] in wanted
    }


def load_activations(run: Run, split: Split, layer: int | None = None) -> ActivationTable:
    """The activations of one split at one layer, verified against the manifest.

    `layer` None: the base's, with what is injected for them. Raises ValueError when there are no
    activations, none of this layer, or none of those that are injected.
    """
    if layer is not None:
        return _load_table(run, split, layer)
    table, views = _load_table(run, split, run.config.base.layer), run.config.base.views
    if is_activation_alone(views):
        return table
    return replace(table, views=_view_table(run, split, table))


def view_mean(run: Run) -> Tensor | None:
    """The train mean direction [d_model], where `base.injected` needs it."""
    import torch

    if not any(view.kind == "centred" for view in run.config.base.views):
        return None
    return torch.tensor(load_stats(run)["mean_direction"])


def _view_table(run: Run, split: Split, table: ActivationTable) -> Tensor:
    """What `base.injected` asks for of each activation: [rows, vectors, d_model]."""
    from nla_ray.activation.views import view_activations

    base, stored = run.config.base, run.require("activations").config["capture"]
    wanted = sorted({view.layer for view in base.views if view.layer is not None})
    means = None
    if any(view.kind == "text_mean" for view in base.views):
        require(
            bool(stored.get("text_mean")),
            "base.injected",
            "text_mean of activations without means of texts",
            "them beside the activations",
            f"Capture them (--capture.text-mean) into another --run-dir than {run.root}.",
        )
        of_texts = _load_table(run, split, base.layer, text_means=True)
        means = _rows_by_key(of_texts, of_texts.text_ids, table.text_ids, "the means of texts")
    return view_activations(
        base.views,
        table.vectors,
        mean=view_mean(run),
        text_means=means,
        layers={layer: activations_at(run, split, table, layer) for layer in wanted},
    )


def activations_at(run: Run, split: Split, table: ActivationTable, layer: int) -> Tensor:
    """The activations [rows, d_model] of another layer at the positions of a table's rows.

    Raises ValueError for a layer that was not captured, or not at one of them.
    """
    other = _load_table(run, split, layer)
    keys, wanted = (zip(each.text_ids, each.positions, strict=True) for each in (other, table))
    return _rows_by_key(other, keys, list(wanted), f"layer {layer}")


def _rows_by_key(
    table: ActivationTable, keys: Iterable[Any], wanted: Sequence[Any], what: str
) -> Tensor:
    """The vectors [wanted, d_model] of a table's rows with these keys.

    Raises ValueError for a key that it lacks.
    """
    row_of = {key: row for row, key in enumerate(keys)}
    missing = [key for key in wanted if key not in row_of]
    if missing:
        raise ValueError(
            f"activations to inject beside others: got none of {what} for {len(missing)} of"
            f" {len(wanted)} activations ({missing[0]} first), expected one for each. One of them"
            f" was left out at capture ({SKIPPED_NAME}: non_finite); leave those texts out of the"
            " corpus."
        )
    return table.vectors[[row_of[key] for key in wanted]]


def _load_table(run: Run, split: Split, layer: int, *, text_means: bool = False) -> ActivationTable:
    """The activations of one split and layer, or the means over their texts beside them."""
    import torch

    manifest = run.require("activations")
    d_model = manifest.model["d_model"]
    columns = ["activation_id", *TEXT_COLUMNS, "layer", "activation"]
    parts = [
        part
        for path in sorted(manifest.files)
        if path.endswith(".parquet")
        for part in _read_rows(
            run.verified("activations", manifest, path),
            columns,
            split,
            layer=layer,
            means=text_means or _captures_means(manifest),
        )
    ]
    if not any(len(part) for part in parts):
        raise ValueError(
            f"activations of layer {layer}: got no {split} rows in {run.root / 'activations'},"
            " expected some. Capture that layer (--capture.layers), or more documents."
        )
    table = pa.concat_tables(parts)
    matrix = np.empty((len(table), d_model), np.float32)
    start = 0
    for chunk in table["activation"].chunks:
        matrix[start : start + len(chunk)] = activation_matrix(chunk, d_model)
        start += len(chunk)
    ids, doc_ids = table["activation_id"].to_pylist(), table["doc_id"].to_pylist()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    loaded = ActivationTable(
        ids=ids,
        text_ids=table["text_id"].to_pylist(),
        doc_ids=doc_ids,
        family_ids=families_of(run, doc_ids),
        domains=table["domain"].to_pylist(),
        texts=table["text"].to_pylist(),
        vectors=torch.from_numpy(matrix),
    )
    return loaded if order == list(range(len(ids))) else loaded.select(order)


def load_train_activations(
    run: Run, most: int = 2_048, layer: int | None = None
) -> TrainActivations:
    """A sample of the train activations of a layer (None: the base's), from some shards, by seed.

    Their blocks are read one by one. Raises ValueError when there are no activations.
    """
    import torch

    from nla_ray.activation import typical

    manifest = run.require("activations")
    layer = run.config.base.layer if layer is None else layer
    means = _captures_means(manifest)
    shards = sorted(path for path in manifest.files if path.endswith(".parquet"))
    shards = [shards[number] for number in drawn_rows(len(shards), _SAMPLED_SHARDS, 0)]
    ids: list[str] = []
    rows: list[np.ndarray] = []
    for number, shard in enumerate(shards):
        location = run.verified("activations", manifest, shard)
        columns = ["activation_id", "split", "layer", "activation"]
        left = (most - len(ids)) // (len(shards) - number)
        blocks = _read_rows(location, columns, "train", layer=layer, means=means)
        drawn = [_drawn(block, left, number) for block in blocks]
        if not drawn:  # nothing of its texts was kept
            continue
        table = _drawn(pa.concat_tables(drawn), left, 0)
        ids += table["activation_id"].to_pylist()
        rows.append(activation_matrix(table["activation"], manifest.model["d_model"]))
    mean = torch.tensor(load_stats(run, layer)["mean_direction"])
    none = np.zeros((0, len(mean)), np.float32)
    return typical.TrainActivations(ids, torch.from_numpy(np.concatenate(rows or [none])), mean)


def _captures_means(manifest: Manifest) -> bool:
    """Whether the activations of a run are means over tokens, and stand at none."""
    return PositionRule.of(manifest.config["capture"]["positions"]).is_mean


def _drawn(table: pa.Table, most: int, seed: int) -> pa.Table:
    """At most so many of its rows, by seed."""
    return table.take(pa.array(drawn_rows(len(table), most, seed), pa.int64()))


def load_stats(run: Run, layer: int | None = None) -> dict[str, Any]:
    """Train statistics of a layer (None: the base's).

    mean_direction (list of d_model floats), norm_quantiles, mean_norm, count.
    """
    manifest = run.require("activations")
    stats = json.loads(run.verified("activations", manifest, STATS_NAME).read_text())
    return stats["layers"][str(run.config.base.layer if layer is None else layer)]


def _read_rows(
    location: Location, columns: list[str], split: str, *, means: bool, layer: int | None = None
) -> Iterator[pa.Table]:
    """The rows of a split, and of a layer, in each block of a shard.

    `means`: those of means over tokens, or those at tokens: a shard may hold both.
    """
    read = list(dict.fromkeys([*columns, "split", "layer", "position"]))
    with location.filesystem.open_input_file(location.path) as opened:
        file = pq.ParquetFile(opened)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=read)
            is_mean = _equal(table["position"], MEAN_POSITION)
            wanted = [_equal(table["split"], split), _equal(is_mean, means)]
            if layer is not None:
                wanted.append(_equal(table["layer"], layer))
            yield table.select(columns).filter(functools.reduce(_both, wanted))


def _both(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where both are true."""
    return pc.and_(first, second)  # pyright: ignore[reportAttributeAccessIssue]  (made at import)


def _equal(column: pa.ChunkedArray, value: str | int | bool) -> pa.ChunkedArray:
    """Which values equal `value`."""
    return pc.equal(column, value)  # pyright: ignore[reportAttributeAccessIssue]  (made at import)
