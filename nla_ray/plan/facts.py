"""Plan facts: what every stage's formula is computed from, and what a plan says of a stage.

It knows tokens, memory and processes, but no stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from nla_ray.plan.sizes import BaseSizes, base_sizes
from nla_ray.run.artifact import Run
from nla_ray.run.blocks import BLOCK_BYTES
from nla_ray.run.identity import VALIDATION_SHARE
from nla_ray.settings.config import ReconstructorConfig, RunConfig, SFTConfig
from nla_ray.settings.positions import PositionRule
from nla_ray.settings.precision import cpu_dtype
from nla_ray.settings.resources import Kind, resources_of

_CHARS_PER_TOKEN = 3.2
"""Source: measured on the embedded corpus with byte-level BPE tokenizers of 4,096 to 49,152 tokens,
2.6 to 3.8."""
_TEMPLATE_TOKENS = 30
LABEL_TOKENS = 60
PROMPT_TOKENS = 45
"""Of the verbalizer's prompt; the same for every activation."""
CPU_PROCESS_BYTES = 0.6e9
"""A process that imported torch, transformers and peft, before any weight. Measured: 0.45 to 0.65
GB."""
_CPU_HEAP = 2.5
"""What a process on a CPU holds for each byte that the formulas count: buffers, and the holes that
batches of many lengths leave. Measured with SmolLM2-135M: 1.1 (GRPO's trainer) to 7 (its rollout
actor), 2.6 for all processes of GRPO together."""
_GPU_PROCESS_BYTES, _GPU_HOST_BYTES = 1.5e9, 3e9
"""A process with a GPU, before any weight: its CUDA context, and its host memory with CUDA
libraries. Estimates."""
_SHARD_COPIES = 5
"""Of a block of activations in a capture process: as read, as a table, and while it is encoded.
Measured with blocks of 256 MiB, one to seventeen a shard: 4.2 to 4.8."""
_FLOPS = {"cpu float32": 6e10, "cpu bfloat16": 1.5e11, "gpu": 2.5e14}
"""Sustained FLOP/s of one thread, or of one GPU. Source: measured forward passes of a 135M model on
two idle cores; a quarter of the dense bf16 peak of an H100."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes of one kind that a stage holds at the same time."""

    kind: str
    count: int
    resources: dict[str, float]
    bytes: float
    """Memory of one of them: that of each of its GPUs where it has any, else resident memory."""
    changing_bytes: float = 0.0
    """What it holds beside that while an engine's weights change."""
    host_bytes: float = 0.0
    """Host memory of one that has a GPU: the weights pass through it while they are loaded."""

    @property
    def on_gpu(self) -> bool:
        """Whether each of them books a GPU, or a part of it."""
        return self.gpus > 0

    @property
    def gpus(self) -> float:
        """GPUs that each of them books."""
        return self.resources.get("GPU", 0.0)


DRIVER = Processes(kind="driver", count=1, resources={}, bytes=0.4e9)
"""The job's own process, in stages that start no other."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage would do."""

    processes: tuple[Processes, ...]
    """The first are those that compute."""
    tokens: float = 0.0
    """Tokens that the base model computes, over all processes."""
    flops: float = 0.0
    files: str
    """What the stage writes."""
    lines: tuple[str, ...] = ()
    """What it would do beside that, ready to print."""


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What every stage's plan is computed from."""

    config: RunConfig
    texts: int
    texts_counted: bool
    """True: counted in the corpus artifact; False: the most that the configuration allows."""
    labels_per_text: float
    """Counted in the labels artifact. Before it is made: one of each offline teacher, or one where
    labels are imported, for every kept position."""
    counted_positions: float | None = None
    """Kept positions of a text, counted in the activations artifact; None before it is made."""

    @classmethod
    def of(cls, run: Run) -> PlanFacts:
        """Facts of a run."""
        num_chunks = _counted_chunks(run)
        return cls(
            config=run.config,
            texts=run.config.corpus.max_chunks if num_chunks is None else num_chunks,
            texts_counted=num_chunks is not None,
            labels_per_text=_labels_per_text(run),
            counted_positions=_counted_positions(run),
        )

    @cached_property
    def sizes(self) -> BaseSizes:
        """Sizes of the base. Raises ValueError when they cannot be known, or no job takes it."""
        return base_sizes(self.config)

    @property
    def item_bytes(self) -> int:
        """Bytes of one plain weight of the base, in the type that its processes compute in."""
        return _item_bytes(self.config, self.sizes)

    @property
    def train_texts(self) -> float:
        """Texts of the train split."""
        return self.texts * (1 - self.config.corpus.test_share - VALIDATION_SHARE)

    def labels_of(self, settings: SFTConfig | ReconstructorConfig) -> float:
        """Labels of train texts that a stage learns from, over all documents."""
        of_each = self.labels_per_text if settings.labels == "all" else self.positions_per_text
        return self.train_texts * of_each

    @property
    def text_tokens(self) -> float:
        """Tokens of a chat-formatted text."""
        return _text_tokens(self.config)

    @property
    def read_tokens(self) -> float:
        """Tokens that a base reads of a text in capture: with its answer, where it gives one."""
        capture, longest = self.config.capture, self.config.base.max_tokens
        answer = capture.answer_tokens if capture.needs_answers else 0
        return min(longest, self.text_tokens + answer)

    @property
    def num_shards(self) -> int:
        """Parquet shards of the corpus, and of the activations."""
        return -(-self.texts // self.config.corpus.shard_rows)

    @property
    def activations_per_text(self) -> float:
        """Kept positions of a text, and the mean of it, in all kept layers."""
        kept = self.positions_per_text + self.config.capture.text_mean
        return kept * len({self.config.base.layer, *self.config.capture.layers})

    @property
    def injected_bytes(self) -> float:
        """What is injected for one train activation."""
        return len(self.config.base.injected) * self.activations_bytes(1)

    @property
    def positions_per_text(self) -> float:
        """Kept positions of a text: each has labels of its own. One where it cannot be known."""
        if self.counted_positions is not None:
            return self.counted_positions
        return _positions_per_text(self.config)

    @property
    def knows_positions(self) -> bool:
        """Whether the number of positions is known: what texts match is known after capture."""
        rule = PositionRule.of(self.config.capture.positions)
        return rule.is_counted or self.counted_positions is not None

    @property
    def top_layer(self) -> int:
        """The highest layer that is kept."""
        return max(self.config.base.layer, *self.config.capture.layers, 0)

    def trainer_bytes(self, weights: float, trainable: int) -> float:
        """Weights of so many bytes, float32 adapter, gradients and two Adam moments of one worker.

        ZeRO 2 shards gradients and moments over the workers, ZeRO 3 the weights too.
        """
        compute = self.config.compute
        weights_shards = compute.trainer_workers if compute.zero_stage == 3 else 1
        moments_shards = compute.trainer_workers if compute.zero_stage else 1
        return weights / weights_shards + trainable * 4 + trainable * 12 / moments_shards

    def backward_bytes(self, blocks: int, tokens: float, *, with_head: bool = False) -> float:
        """What a micro-batch of so many tokens keeps for the backward pass.

        That is `kept_bytes` or, where trainers recompute activations, the input of every block and
        all of the block at work: .50 MB a token of the 7B shape, .51 measured on an H200
        (`bench/results`). With the head, float32 logits twice.
        """
        kept = kept_bytes(self.config, self.sizes, blocks, tokens)
        if recomputes_activations(self.config, self.sizes, blocks, tokens):
            inputs = tokens * blocks * self.sizes.d_model * self.item_bytes
            kept = inputs + kept / blocks
        return kept + (8 * self.sizes.vocab * tokens if with_head else 0)

    def weights_bytes(self, layer: int | None = None) -> float:
        """Weights of the base, of blocks 0..layer and the embedding where `layer` is given."""
        return self.sizes.weights_bytes(self.item_bytes, layer)

    def read_bytes(self, layer: int) -> float:
        """Weights that a process reads that keeps blocks 0..layer: of a quantised base all."""
        return self.weights_bytes(None if self.sizes.quantisation else layer)

    def activations_bytes(self, texts: float) -> float:
        """Activations of texts at one position and layer, float32, as banks hold them."""
        return texts * self.sizes.d_model * 4

    @property
    def shard_bytes(self) -> float:
        """Most host memory that activations take while a shard is captured: that of some blocks."""
        rows_of_text = self.activations_per_text
        if not self.knows_positions:  # all tokens at most
            rows_of_text *= max(1, self.text_tokens / self.positions_per_text)
        block = max(BLOCK_BYTES, self.activations_bytes(rows_of_text))
        rows = min(self.texts, self.config.corpus.shard_rows) * rows_of_text
        return _SHARD_COPIES * min(block, self.activations_bytes(rows))

    def engine_bytes(self, kind: Kind) -> tuple[float, float]:
        """What a generation engine holds beside the base, and again while its weights change.

        The engine `vllm` holds a copy of the base and, in bfloat16, factors. The engine `plain`
        holds the adapter's factors alone and, on a CPU, the head in float32. The engine `compact`,
        in float32, merges the adapter into a copy of blocks and head, and builds the next copy of
        the blocks beside the last one. In bfloat16 the base's weights are used as they are, except
        queries, keys and values, which are joined; a CPU packs all of them and holds the head in
        float32. The adapter's factors stay beside them. Measured on an H200 (`bench/results`): base
        and engine of the 7B shape hold 16.6 GB, 16.8 while weights change; 16.3 and 16.5 by this.
        """
        sizes, item_bytes = self.sizes, self.item_bytes
        on_gpu = bool(resources_of(self.config.compute, kind).get("GPU"))
        adapter = sizes.lora_parameters(self.config.sft.lora, sizes.num_layers)
        if self.config.base.engine == "vllm":
            return self.weights_bytes() + (0 if item_bytes == 4 else adapter * item_bytes), 0
        if self._generates_plainly:
            of_head = 0 if on_gpu else sizes.vocab * sizes.d_model * 4
            return of_head + 4 * adapter, 4 * adapter
        blocks = sizes.num_layers * sizes.block_parameters * item_bytes
        head = sizes.vocab * sizes.d_model * 4
        if item_bytes == 4:
            return blocks + head, blocks
        factors = adapter * item_bytes
        if not on_gpu:
            return blocks + head + factors, factors
        joined = sizes.d_model * (sizes.query_width + 2 * sizes.key_value_width)
        return sizes.num_layers * joined * item_bytes + factors, factors

    @property
    def _generates_plainly(self) -> bool:
        """Whether the engine `plain` generates, by choice or for what `compact` does not know."""
        sizes = self.sizes
        beyond = sizes.family.parts is None or sizes.quantisation is not None
        return self.config.base.engine == "plain" or beyond

    def generation_bytes(self, rows: int, length: int) -> float:
        """Keys and values of rows of `length` tokens, and their logits twice in float32."""
        caches = self.sizes.kv_bytes(rows * length, self.item_bytes)
        return caches + 8 * rows * self.sizes.vocab

    def process(
        self,
        kind: Kind,
        count: int,
        held: float,
        *,
        loaded: float,
        changing: float = 0.0,
        data: float = 0.0,
    ) -> Processes:
        """Processes of a kind, with what Python and CUDA take; all in bytes of each of them.

        `held`: where it computes, on each of its GPUs, weights included. `loaded`: weights that are
        read, into host memory first; a quantised base's where they stay. `changing`: as in
        Processes. `data`: arrays that stay in host memory.
        """
        resources = resources_of(self.config.compute, kind)
        if self.sizes.quantisation is not None:
            held = max(held, loaded)
        if resources.get("GPU"):
            return Processes(
                kind=kind,
                count=count,
                resources=resources,
                bytes=_GPU_PROCESS_BYTES + held,
                changing_bytes=changing,
                host_bytes=_GPU_HOST_BYTES + loaded + data,
            )
        return Processes(
            kind=kind,
            count=count,
            resources=resources,
            bytes=CPU_PROCESS_BYTES + _CPU_HEAP * held + data,
            changing_bytes=changing,
        )

    def flops_per_second(self, processes: Processes) -> float:
        """What each of these processes sustains."""
        if processes.on_gpu:
            return _FLOPS["gpu"]
        return _FLOPS[f"cpu {cpu_dtype(self.config.base.dtype)}"] * self.config.compute.threads


def recomputes_activations(config: RunConfig, sizes: BaseSizes, blocks: int, tokens: float) -> bool:
    """Whether trainers compute activations twice, because keeping them takes too much of a GPU.

    `tokens`: of a micro-batch, padding included. It doubles the launches of a small base, which are
    what its steps take: on an H100 a scorer's on SmolLM2-135M's shape 507 ms instead of 261. A
    micro-batch of the 7B shape takes 1.3 times as long (`bench/results`).
    """
    on_gpu = bool(resources_of(config.compute, "trainer").get("GPU"))
    return on_gpu and kept_bytes(config, sizes, blocks, tokens) > config.compute.kept_gib * 2**30


def kept_bytes(config: RunConfig, sizes: BaseSizes, blocks: int, tokens: float) -> float:
    """What blocks keep of a micro-batch for the backward pass when all of it is kept.

    About 20 d_model + 4 ffn items a block and token: 8.3 MB a token of the 7B shape, as measured on
    an H200 (`bench/results`); .88 MB of 25 blocks of SmolLM2-135M's, .79 measured on an H100.
    """
    items = tokens * blocks * (20 * sizes.d_model + 4 * sizes.active_ffn)
    return items * _item_bytes(config, sizes)


def _item_bytes(config: RunConfig, sizes: BaseSizes) -> int:
    dtype = config.base.dtype
    if sizes.quantisation is not None:  # what is not packed is never converted for a CPU
        return sizes.quantisation.item_bytes or (2 if dtype == "bfloat16" else 4)
    if not any(resources_of(config.compute, kind).get("GPU") for kind in get_args(Kind)):
        dtype = cpu_dtype(dtype)
    return 2 if dtype == "bfloat16" else 4


def _counted_chunks(run: Run) -> int | None:
    corpus = run.find("corpus")
    count = corpus.metrics.get("num_chunks") if corpus is not None else None
    return count if isinstance(count, int) else None


def _labels_per_text(run: Run) -> float:
    labels = run.find("labels")
    if labels is not None and isinstance(labels.metrics.get("labels"), int):
        return labels.metrics["labels"] / labels.metrics["texts"]
    teachers = len(run.config.label.teachers) if run.config.label.import_path is None else 1
    return teachers * _positions_per_text(run.config)


def _counted_positions(run: Run) -> float | None:
    activations = run.find("activations")
    if activations is None or not activations.metrics.get("texts"):
        return None
    captured = activations.config["capture"]
    layers = {run.config.base.layer, *captured.get("layers", ())}
    rows = activations.metrics["activations"] / activations.metrics["texts"] / len(layers)
    return rows - bool(captured.get("text_mean"))


def _text_tokens(config: RunConfig) -> float:
    tokens = config.corpus.chunk_chars / _CHARS_PER_TOKEN + _TEMPLATE_TOKENS
    return min(config.base.max_tokens, tokens)


def _positions_per_text(config: RunConfig) -> float:
    """Expected from the setting; a text that is no conversation is the user's."""
    rule = PositionRule.of(config.capture.positions)
    if rule.kind in ("random", "generated"):
        return rule.count
    of_whole_text = rule.kind == "all" or (rule.kind == "role" and rule.role == "user")
    if of_whole_text and not rule.is_mean:
        return round(_text_tokens(config) - _TEMPLATE_TOKENS)
    return 1
