"""One formula a stage: its processes, tokens, FLOP and files.

A forward pass costs 2 FLOP for a weight and a token, training 6. It knows no file: what a run has
made already is in the facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nla_ray.plan.facts import (
    CPU_PROCESS_BYTES,
    DRIVER,
    LABEL_TOKENS,
    PROMPT_TOKENS,
    PlanFacts,
    Processes,
    StagePlan,
)
from nla_ray.plan.requests import request_lines
from nla_ray.plan.sizes import pretrain_section, pretrained_sizes
from nla_ray.plan.units import format_bytes
from nla_ray.run.identity import VALIDATION_SHARE
from nla_ray.run.stages import BENCHMARK_NAME, INSPECTION_NAME, PROPOSAL_NAME
from nla_ray.settings.config import ReconstructorConfig
from nla_ray.settings.resources import Kind, gpus_of

_ROWS_AT_ONCE, _ROLLOUTS_AT_ONCE = 64, 128
"""Descriptions that a generation engine writes at the same time, in the report and in GRPO."""
_CONFIDENCE_ROWS = 256
"""The same where the confidence of claims is learned."""
_UNLIMITED = float("inf")
_PROBED_WORDS = 1_500
"""Words of a probe, about."""


def _plan_base(facts: PlanFacts) -> StagePlan:
    pretrain = pretrain_section(facts.config)
    sizes = pretrained_sizes(pretrain)
    tokens = pretrain.steps * pretrain.rows_per_step * pretrain.row_tokens
    work = pretrain.rows_per_step * pretrain.row_tokens / pretrain.num_processes * 12 * sizes.vocab
    process = Processes(
        kind="pretraining",
        count=pretrain.num_processes,
        resources={"CPU": 1.0},
        bytes=CPU_PROCESS_BYTES + sizes.parameters * 16 + work,
    )
    return StagePlan(
        processes=(process,),
        tokens=tokens,
        flops=6 * sizes.active_parameters * tokens,
        files=f"{format_bytes(sizes.parameters * 2)} of safetensors, tokenizer, card.json",
    )


def _plan_corpus(facts: PlanFacts) -> StagePlan:
    text_bytes = facts.texts * facts.config.corpus.chunk_chars * 0.6
    return StagePlan(
        processes=(DRIVER,),
        files=(
            f"{facts.num_shards} Parquet shards, {format_bytes(text_bytes)} of text, rejects.jsonl"
        ),
    )


def _plan_answers(facts: PlanFacts) -> StagePlan:
    capture, sizes = facts.config.capture, facts.sizes
    length = facts.read_tokens
    rows = max(1, capture.batch_tokens // length)
    weights = facts.weights_bytes()
    held = weights + facts.generation_bytes(rows, length)
    tokens = 2 * facts.texts * length  # drafted, and read again in one pass
    answers = facts.texts * (length - facts.text_tokens)
    return StagePlan(
        processes=(facts.process("capture", capture.num_actors, held, loaded=weights),),
        tokens=tokens,
        flops=2 * sizes.active_parameters * tokens,
        files=(
            f"{facts.num_shards} Parquet shards, {facts.texts:,} answers of at most"
            f" {capture.answer_tokens} tokens, {answers:,.0f} in all"
        ),
    )


def _plan_activations(facts: PlanFacts) -> StagePlan:
    capture, sizes = facts.config.capture, facts.sizes
    tokens = facts.texts * facts.read_tokens
    num_gpus = gpus_of(facts.config.compute, "capture")
    most_blocks = -(-(facts.top_layer + 1) // num_gpus)  # of a GPU; the first has the embedding too
    weights, read = facts.weights_bytes(most_blocks - 1), facts.read_bytes(facts.top_layer)
    work = capture.batch_tokens * (3 * sizes.active_ffn + 6 * sizes.d_model) * facts.item_bytes
    process = facts.process(
        "capture", capture.num_actors, weights + work, loaded=read, data=facts.shard_bytes
    )
    rows = facts.texts * facts.activations_per_text
    return StagePlan(
        processes=(process,),
        tokens=tokens,
        flops=2 * (facts.top_layer + 1) * sizes.active_block_parameters * tokens,
        files=(
            f"{facts.num_shards} Parquet shards, {_expected_rows(facts, rows)}, stats.json; a shard"
            f" takes {format_bytes(facts.shard_bytes)} of host memory"
        ),
    )


def _expected_rows(facts: PlanFacts, rows: float) -> str:
    """How many activations are expected, or that nobody knows."""
    d_model = facts.sizes.d_model
    if facts.knows_positions:
        size = format_bytes(facts.activations_bytes(rows))
        return f"{rows:,.0f} activations x {d_model} float32 = {size}"
    return (
        f"an activation x {d_model} float32 = {format_bytes(facts.activations_bytes(1))} for every"
        f" token that `{facts.config.capture.positions}` finds, not known before capture (further"
        f" figures count {rows:,.0f})"
    )


def _plan_labels(facts: PlanFacts) -> StagePlan:
    label = facts.config.label
    num_offline = len(label.teachers) - len(label.asked)
    sources = [f"{num_offline} offline teachers"] if num_offline else []
    sources += [f"{len(label.asked)} teachers over the network"] if label.asked else []
    source = label.import_path or " and ".join(sources)
    labels = facts.texts * facts.labels_per_text
    return StagePlan(
        processes=(DRIVER,),
        files=f"{labels:,.0f} labels of {source}",
        lines=tuple(request_lines(facts)),
    )


def _plan_reward_scorer(facts: PlanFacts) -> StagePlan:
    return _plan_scorer_of_labels(facts, facts.config.reward_scorer)


def _plan_judge_scorer(facts: PlanFacts) -> StagePlan:
    return _plan_scorer_of_labels(facts, facts.config.judge_scorer)


def _plan_scorer_of_labels(facts: PlanFacts, settings: ReconstructorConfig) -> StagePlan:
    examples = min(facts.labels_of(settings) / 2, settings.max_examples or _UNLIMITED)
    return _plan_reconstructor(facts, settings, examples)


def _plan_reconstructor(
    facts: PlanFacts, settings: ReconstructorConfig, examples: float
) -> StagePlan:
    sizes, layer = facts.sizes, facts.config.base.layer
    workers, blocks = facts.config.compute.trainer_workers, layer + 1
    tokens = examples * settings.epochs * min(settings.max_tokens, LABEL_TOKENS + 8)
    trainable = sizes.lora_parameters(settings.lora, blocks) + sizes.d_model**2
    state = facts.trainer_bytes(facts.weights_bytes(layer), trainable)
    batch_tokens = settings.batch_size / workers * settings.max_tokens
    memory = state + facts.backward_bytes(blocks, batch_tokens)
    process = facts.process(
        "trainer",
        workers,
        memory,
        loaded=facts.read_bytes(layer),
        data=facts.activations_bytes(facts.train_texts / 2),
    )
    return StagePlan(
        processes=(process,),
        tokens=tokens,
        flops=6 * blocks * sizes.active_block_parameters * tokens,
        files=f"adapter of {format_bytes(trainable * 4)}, head, metrics.jsonl",
    )


def _plan_readable_labels(facts: PlanFacts) -> StagePlan:
    sizes = facts.sizes
    rows = facts.train_texts * facts.activations_per_text
    # Sums in float64 of five folds, of all rows, and of those being solved; rows read for words.
    data = facts.activations_bytes(rows) + 8 * 8 * (sizes.d_model + _PROBED_WORDS) * sizes.d_model
    return StagePlan(
        processes=(facts.process("scorer", 1, 0, loaded=0, data=data),),
        flops=2 * rows * sizes.d_model * (sizes.d_model + 2 * _PROBED_WORDS),
        files=f"{facts.train_texts * facts.labels_per_text:,.0f} labels in three forms",
    )


def _plan_linear_scorer(facts: PlanFacts) -> StagePlan:
    config, sizes = facts.config, facts.sizes
    layer = config.linear_scorer.layer
    if layer is None:
        layer = config.base.layer // 2
    half = facts.labels_of(config.judge_scorer) / 2
    examples = min(half, config.linear_scorer.max_examples or half)
    tokens = examples * LABEL_TOKENS
    weights = facts.weights_bytes(layer)
    # Features and activations, and the equations of a ridge regression in float64.
    layers = len(config.base.described_layers)
    data = (1 + layers) * facts.activations_bytes(examples) + 2 * sizes.d_model**2 * 8
    return StagePlan(
        processes=(facts.process("scorer", 1, weights, loaded=facts.read_bytes(layer), data=data),),
        tokens=tokens,
        flops=2 * (layer + 1) * sizes.active_block_parameters * tokens,
        files=f"matrix of {format_bytes(sizes.d_model**2 * 4 * layers)}",
    )


def _plan_sft(facts: PlanFacts) -> StagePlan:
    sft, sizes, workers = facts.config.sft, facts.sizes, facts.config.compute.trainer_workers
    examples = min(facts.labels_of(sft), sft.max_examples or _UNLIMITED)
    share = len(facts.config.base.described_layers) + sft.difference_share
    examples *= share * (1 + sft.unlikelihood_share)
    length = PROMPT_TOKENS + LABEL_TOKENS
    tokens = examples * sft.epochs * length
    trainable = sizes.lora_parameters(sft.lora, sizes.num_layers)
    state = facts.trainer_bytes(facts.weights_bytes(), trainable)
    batch_tokens = sft.batch_size / workers * length
    memory = state + facts.backward_bytes(sizes.num_layers, batch_tokens, with_head=True)
    process = facts.process(
        "trainer",
        workers,
        memory,
        loaded=facts.weights_bytes(),
        data=facts.injected_bytes * facts.train_texts * share,
    )
    return StagePlan(
        processes=(process,),
        tokens=tokens,
        flops=6 * sizes.active_parameters * tokens,
        files=f"adapter of {format_bytes(trainable * 4)}, metrics.jsonl",
    )


def _plan_grpo(facts: PlanFacts) -> StagePlan:
    config, grpo, sizes = facts.config, facts.config.grpo, facts.sizes
    blocks_below = config.base.layer + 1
    rollouts = grpo.steps * grpo.prompts_per_step * grpo.group_size
    trainable = sizes.lora_parameters(config.sft.lora, sizes.num_layers)
    passes = 1 + 3 * grpo.iterations + 1  # sampling, training, the frozen SFT adapter's log-probs
    weights_used = sizes.active_parameters * passes + blocks_below * sizes.active_block_parameters
    tokens = rollouts * grpo.max_new_tokens
    return StagePlan(
        processes=_grpo_processes(facts, trainable),
        tokens=tokens,
        flops=2 * tokens * weights_used,
        files=(
            f"adapter of {format_bytes(trainable * 4)}, metrics.jsonl,"
            f" a checkpoint of {format_bytes(trainable * 12)} while it runs;"
            f" {rollouts:,} rollouts"
        ),
    )


def _grpo_processes(facts: PlanFacts, trainable: int) -> tuple[Processes, ...]:
    """Trainer, rollout and scorer processes, and the driver with the activations of them all."""
    config, grpo, sizes = facts.config, facts.config.grpo, facts.sizes
    length = PROMPT_TOKENS + grpo.max_new_tokens
    # Beside the adapter in training: the frozen SFT adapter.
    state = facts.trainer_bytes(facts.weights_bytes(), trainable) + trainable * 4
    batch_tokens = grpo.micro_batch_size * length
    training = state + facts.backward_bytes(sizes.num_layers, batch_tokens, with_head=True)
    layer, adapters = config.base.layer, 0
    for scorer in (config.reward_scorer, config.judge_scorer):
        adapter = sizes.lora_parameters(scorer.lora, layer + 1)
        adapters += 4 * (adapter + sizes.d_model**2)
    # As it reads them, and in the object store, where all processes of a node read them in place.
    texts = facts.texts * (1 - config.corpus.test_share)
    data = 2 * facts.injected_bytes * texts
    if grpo.difference_share:  # what is compared of differences is not what is injected
        data += 2 * facts.activations_bytes(texts)
    return (
        facts.process(
            "trainer", config.compute.trainer_workers, training, loaded=facts.weights_bytes()
        ),
        _generating(facts, "rollout", grpo.num_rollout_actors, _ROLLOUTS_AT_ONCE, length),
        facts.process(
            "scorer",
            grpo.num_scorer_actors,
            facts.weights_bytes(layer) + adapters,
            loaded=facts.read_bytes(layer) + adapters,
        ),
        dataclasses.replace(DRIVER, bytes=DRIVER.bytes + data),
    )


def _generating(facts: PlanFacts, kind: Kind, count: int, rows: int, length: int) -> Processes:
    """Processes with a base, a generation engine, and rows of `length` tokens that it writes."""
    weights, (engine, changing) = facts.weights_bytes(), facts.engine_bytes(kind)
    held = engine + facts.generation_bytes(rows, length)
    num_gpus = gpus_of(facts.config.compute, kind)
    # Several hold vLLM's copy in parts, and the base itself is in host memory.
    held = weights + held if num_gpus == 1 else held / num_gpus
    return facts.process(kind, count, held, loaded=weights, changing=changing)


def _plan_refreshed_scorer(facts: PlanFacts) -> StagePlan:
    refreshed, sizes = facts.config.reward_scorer_refreshed, facts.sizes
    rows = min(facts.train_texts / 2, refreshed.max_examples or _UNLIMITED)
    settings = dataclasses.replace(facts.config.reward_scorer, epochs=refreshed.epochs)
    training = _plan_reconstructor(facts, settings, 2 * rows)  # a label and a description of each
    length = PROMPT_TOKENS + refreshed.max_new_tokens
    writer = _generating(facts, "scorer", 1, _ROWS_AT_ONCE, length)
    described = rows * refreshed.max_new_tokens
    return dataclasses.replace(
        training,
        processes=(*training.processes, writer),
        tokens=training.tokens + described,
        flops=training.flops + 2 * sizes.active_parameters * described,
        files=f"{training.files}, {rows:,.0f} descriptions",
    )


def _plan_claim_confidence(facts: PlanFacts) -> StagePlan:
    config, settings, sizes = facts.config, facts.config.claim_confidence, facts.sizes
    validation = facts.texts * VALIDATION_SHARE * facts.activations_per_text
    rows = min(validation, settings.max_activations or _UNLIMITED)
    probe = _plan_readable_labels(facts)
    tokens = rows * (1 + settings.samples) * config.grpo.max_new_tokens
    length = PROMPT_TOKENS + config.grpo.max_new_tokens
    return StagePlan(
        processes=(_generating(facts, "scorer", 1, _CONFIDENCE_ROWS, length),),
        tokens=tokens,
        flops=2 * sizes.active_parameters * tokens + probe.flops,
        files=f"a probe of {format_bytes(_PROBED_WORDS * sizes.d_model * 4)}, descriptions of"
        f" {rows:,.0f} validation activations",
    )


def _plan_report(facts: PlanFacts) -> StagePlan:
    config, sizes, evaluation = facts.config, facts.sizes, facts.config.evaluation
    most = evaluation.max_activations or _UNLIMITED
    activations = min(facts.texts * config.corpus.test_share, most)
    further, pairs = len(config.base.further_layers), min(evaluation.differences, activations)
    # SFT, SFT on random vectors, GRPO; at further layers and of differences both verbalizers.
    descriptions = activations * (3 + evaluation.samples + 2 * further) + 2 * pairs
    described = descriptions * config.grpo.max_new_tokens
    # Labels, controls, what is cut or reworded, samples; and the texts, by three scorers each.
    scored = activations * 3 * ((10 + evaluation.samples) * LABEL_TOKENS + facts.text_tokens)
    scored += activations * 3 * further * LABEL_TOKENS  # and the labels, by the linear scorer alone
    scored += pairs * 3 * 4 * LABEL_TOKENS  # labels, theirs of another pair, SFT, GRPO
    patched = min(evaluation.patch_rows, activations) * facts.read_tokens
    blocks = config.base.layer + 1
    length = PROMPT_TOKENS + config.grpo.max_new_tokens
    return StagePlan(
        processes=(_generating(facts, "scorer", 1, _ROWS_AT_ONCE, length),),
        tokens=described + scored + patched,
        flops=2 * sizes.active_parameters * (described + patched)
        + 2 * blocks * sizes.active_block_parameters * scored,
        files=(
            "report.html, report.json, report.md, scores.parquet, descriptions of"
            f" {activations:,.0f} test activations"
        ),
    )


def _plan_inspection(facts: PlanFacts) -> StagePlan:
    sizes = facts.sizes
    top = min(facts.top_layer, sizes.num_layers - 1)
    read_texts = facts.texts * (1 - facts.config.corpus.test_share)
    tokens = read_texts * (facts.read_tokens + LABEL_TOKENS)
    memory = CPU_PROCESS_BYTES + facts.read_bytes(top)
    return StagePlan(
        processes=(dataclasses.replace(DRIVER, bytes=memory),),
        tokens=tokens,
        flops=2 * (top + 1) * sizes.active_block_parameters * tokens,
        files=f"{INSPECTION_NAME}, {PROPOSAL_NAME}",
    )


def _plan_benchmark(facts: PlanFacts) -> StagePlan:
    engine, changing = facts.engine_bytes("serve")
    memory = CPU_PROCESS_BYTES + 2 * facts.weights_bytes() + engine + changing
    process = dataclasses.replace(DRIVER, bytes=memory)
    return StagePlan(processes=(process,), files=BENCHMARK_NAME)


def _plan_serve(facts: PlanFacts) -> StagePlan:
    serve, length = facts.config.serve, PROMPT_TOKENS + facts.config.grpo.max_new_tokens
    verbalizer = _generating(facts, "serve", 1, serve.max_batch, length)
    layer = max(facts.config.base.described_layers)
    below, read = facts.weights_bytes(layer), facts.read_bytes(layer)
    return StagePlan(
        # The scorer and the reader of activations hold the same blocks.
        processes=(verbalizer, facts.process("serve", 2, below, loaded=read)),
        files=f"none; http://{serve.host}:{serve.port}",
    )


FORMULAS: dict[str, Callable[[PlanFacts], StagePlan]] = {
    "base": _plan_base,
    "corpus": _plan_corpus,
    "answers": _plan_answers,
    "activations": _plan_activations,
    "labels": _plan_labels,
    "reward_scorer": _plan_reward_scorer,
    "judge_scorer": _plan_judge_scorer,
    "linear_scorer": _plan_linear_scorer,
    "readable_labels": _plan_readable_labels,
    "sft": _plan_sft,
    "grpo": _plan_grpo,
    "reward_scorer_refreshed": _plan_refreshed_scorer,
    "claim_confidence": _plan_claim_confidence,
    "report": _plan_report,
    "inspection": _plan_inspection,
    "benchmark": _plan_benchmark,
    "serve": _plan_serve,
}
"""The formula of every stage in `run.stages`."""
