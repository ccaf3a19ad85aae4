"""What one GPU does with the 7B shape: `python jobs/benchmark.py gpu`, in a few minutes.

No network, no run and no weights are needed. Sections: a step of every training, the engine's
memory over several versions of an adapter, how far the sampler is from the policy, tokens a second,
the way of an adapter from trainer to sampler, micro-batches with and without checkpointing,
capture. Figures stand beside the card's own limits, measured in the same minutes. A section that
fails does not cost the others: its error is written in its place.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nla_ray.activation import vectors
from nla_ray.activation.capture import ActivationReader
from nla_ray.activation.injection import detach_activations
from nla_ray.activation.positions import EncodedText
from nla_ray.base.adapters import adapter_state, add_lora, save_adapter, set_adapter_state
from nla_ray.base.encoding import end_ids_of
from nla_ray.base.families import causal_model
from nla_ray.bench.card import SHAPES, Scene, ShapeName
from nla_ray.bench.step import engine_trainer
from nla_ray.bench.timing import RESULTS, describe_machine, roofline_seconds
from nla_ray.description.engines.compact import CompactDecoder
from nla_ray.description.engines.slots import SlotEngine
from nla_ray.description.record import Description
from nla_ray.reinforce.grpo import float32_head, log_prob_gap
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.training.checkpoints import Checkpoints
from nla_ray.training.reconstruction import Examples, make_reconstruction_trainer
from nla_ray.training.sft import Pairs, make_sft_trainer
from nla_ray.training.verbalizer import TrainableVerbalizer

_FACTORS = (3e-4, 1e-3, 3e-3)
"""Sizes of the adapters' second factors, between a training's first steps and its end."""
_GAP_ROWS = 32

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GPUBenchmark:
    """What `jobs/benchmark.py gpu` takes."""

    shape: ShapeName = "qwen2.5-7b"
    """The base's shape; `small` runs the same script on a CPU, in seconds."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where it runs."""
    output: str | None = None
    """The results file; None: one named after the card, in the folder `nla_ray/bench/results`."""
    sections: tuple[str, ...] = ()
    """Sections to run, by name; none: all of them."""


# sections -----------------------------------------------------------------------------------------


def scorer_step(scene: Scene) -> Figures:
    """One step of a scorer, its validation and its checkpoint, by the stage's own trainer."""
    settings, count = scene.config.reward_scorer, scene.shape.batch
    numbers = [str(number) for number in range(count)]
    examples = Examples(
        descriptions=scene.labels(count),
        targets=scene.activations(count),
        doc_ids=numbers,
        family_ids=numbers,
    )
    model = add_lora(scene.model, settings.lora, num_blocks=scene.shape.layer + 1)
    with unloaded(scene, model):
        reconstructor = Reconstructor(
            model,
            scene.tokenizer,
            adapter="default",
            layer=scene.shape.layer,
            marker=scene.base.marker,
            mean=vectors.direction(scene.activations(1)[0]),
            max_tokens=settings.max_tokens,
            in_bf16=True,
        )
        checkpoints = Checkpoints(scene.config, "reward_scorer")
        trainer = make_reconstruction_trainer(
            reconstructor, examples, examples, settings, scene.config, checkpoints
        )
        return trained(scene, trainer, count)


def sft_step(scene: Scene) -> Figures:
    """One step of the verbalizer, by the stage's own trainer."""
    count = scene.shape.batch
    numbers = [str(number) for number in range(count)]
    pairs = Pairs(
        rows=list(range(count)),
        labels=scene.labels(count),
        doc_ids=numbers,
        family_ids=numbers,
        vectors=scene.activations(count)[:, None],
    )
    model = TrainableVerbalizer.build(
        scene.base, scene.config.sft.lora, pairs.vectors, scene.prompt, seed=0, model=scene.model
    )
    with unloaded(scene, model):
        checkpoints = Checkpoints(scene.config, "sft")
        by_layer = {scene.config.base.layer: pairs}
        trainer = make_sft_trainer(
            model, scene.tokenizer, by_layer, by_layer, scene.config, checkpoints
        )
        return trained(scene, trainer, count)


def grpo_step(scene: Scene) -> Figures:
    """One step of GRPO: rollouts by the engine on the same card, and TRL's update."""
    adapter, bank = scene.folder / "adapter", scene.activations(scene.shape.batch)
    model = add_lora(scene.model, scene.config.sft.lora)
    save_adapter(model, adapter)
    scene.model = model.unload()
    model = TrainableVerbalizer.load(
        scene.base, adapter, bank, scene.prompt, temperature=1.0, model=scene.model
    )
    with unloaded(scene, model):
        trainer = engine_trainer(
            scene.config, model, bank, scene.folder / "grpo", scene.prompt, scene.model
        )
        figures = trained(scene, trainer, scene.shape.batch)
        record = next(line for line in trainer.state.log_history if "sampler_gap/k3" in line)
        return {**figures, "k3": record["sampler_gap/k3"], "gap": record["sampler_gap/mean"]}


def engine_memory(scene: Scene) -> Figures:
    """Bytes of the base, of an engine beside it, and of its work, over versions of an adapter."""
    base = scene.memory()
    engine = compact_engine(scene)
    figures: Figures = {"base_bytes": base, "engine_bytes": scene.memory() - base, "versions": []}
    for version, size in enumerate(_FACTORS, 1):
        state = drawn_state(scene, size)
        scene.forget_peak()
        seconds = timed(scene, partial(engine.load_weights, state, version))
        loading = scene.peak()
        engine.generate(scene.activations(scene.shape.rows[0]), max_new_tokens=8)
        figures["versions"].append(
            {
                "load_seconds": seconds,
                "held_bytes": scene.memory(),
                "peak_bytes_while_loading": loading,
                "peak_bytes_while_generating": scene.peak(),
            }
        )
    return figures


def sampler_gap(scene: Scene) -> Figures:
    """k3 and mean gap of sampler and policy by adapter size, merged and beside the weights."""
    figures: Figures = {}
    for name, merged in (("beside", False), ("merged", True)):
        engine = compact_engine(scene, merged=merged)
        for size in _FACTORS:
            state = drawn_state(scene, size)
            engine.load_weights(state, 1)
            rollouts = engine.generate(
                scene.activations(_GAP_ROWS), temperature=1.0, max_new_tokens=scene.shape.new_tokens
            )
            figures[f"{name} {size:g}"] = policy_gap(scene, state, rollouts)
        del engine
        scene.forget_peak()
    return figures


def generation(scene: Scene) -> Figures:
    """Sampled tokens a second by number of rows, and the limit that the card sets.

    A step reads every weight once, and multiplies it with every row.
    """
    figures: Figures = {}
    weights, on_gpu = scene.parameters(), scene.device.type == "cuda"
    cases = [(rows, recorded) for rows in scene.shape.rows for recorded in {on_gpu, False}]
    for rows, recorded in cases:
        engine = compact_engine(scene, rows=rows, recorded=recorded)
        engine.load_weights(drawn_state(scene, _FACTORS[0]), 1)
        engine.end_ids = frozenset()
        work = partial(
            engine.generate,
            scene.activations(rows),
            temperature=1.0,
            max_new_tokens=scene.shape.new_tokens,
        )
        work()
        scene.forget_peak()
        tokens = rows * scene.shape.new_tokens
        figures[f"{rows} rows, {'graph' if recorded else 'eager'}"] = {
            "tokens": tokens,
            "seconds": timed(scene, work),
            "flop": 2 * weights * tokens,
            "bytes": 2 * weights * scene.shape.new_tokens,
            "peak_bytes": scene.peak(),
        }
        del engine, work
    return figures


def publication(scene: Scene) -> Figures:
    """An adapter's way from the trainer's card through the object store into an engine."""
    import ray

    from nla_ray.cluster.connect import connect

    model = add_lora(scene.model, scene.config.sft.lora)
    with unloaded(scene, model):
        engine = compact_engine(scene)
        taken: list[dict[str, Tensor]] = []
        seconds = {"from_card": timed(scene, lambda: taken.append(adapter_state(model)))}
        size = sum(value.nbytes for value in taken[0].values())
        references: list[Any] = []
        fetched: list[dict[str, Tensor]] = []
        with connect(scene.config.compute):
            seconds["put"] = timed(scene, lambda: references.append(ray.put(taken[0])))
            seconds["get"] = timed(scene, lambda: fetched.append(ray.get(references[0])))
            seconds["load"] = timed(scene, lambda: engine.load_weights(fetched[0], 1))
        return {"adapter_bytes": size, "seconds": sum(seconds.values()), "parts": seconds}


def micro_batches(scene: Scene) -> Figures:
    """Seconds and peak memory of forward and backward, by rows, with and without checkpointing."""
    figures: Figures = {}
    bank = scene.activations(scene.shape.batch)
    model = TrainableVerbalizer.build(
        scene.base, scene.config.sft.lora, bank, scene.prompt, seed=0, model=scene.model
    )
    with unloaded(scene, model):
        float32_head(model, temperature=1.0)
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            model.train()
            for rows in sorted({max(1, scene.shape.batch // 4), scene.shape.batch}):
                batch = labelled_batch(scene, rows)
                tokens = batch["input_ids"].numel()
                work = partial(backward, model, batch)
                work()
                scene.forget_peak()
                # Frozen weights have no gradient: two passes, and one more of what was not kept.
                passes = 3 if checkpointing else 2
                name = f"{rows} rows{', checkpointing' if checkpointing else ''}"
                figures[name] = {
                    "tokens": tokens,
                    "seconds": timed(scene, work),
                    "flop": 2 * passes * scene.parameters() * tokens,
                    "peak_bytes": scene.peak(),
                }
        model.activation_checkpointing_disable()
    return figures


def capture(scene: Scene) -> Figures:
    """Tokens a second of blocks 0 to K, over texts of 100 to 500 tokens."""
    limit = scene.shape.capture_tokens
    draw = torch.Generator().manual_seed(0)
    texts, tokens = [], 0
    while tokens < 4 * limit:
        length = int(torch.randint(100, 500, (), generator=draw))
        ids = torch.randint(10, 4_000, (length,), generator=draw).tolist()
        texts.append(EncodedText(ids=ids, positions=[length - 1]))
        tokens += length
    reader = ActivationReader(scene.model, [scene.shape.layer], limit)
    reader.read(texts[: max(1, len(texts) // 4)])
    scene.forget_peak()
    return {
        "tokens": tokens,
        "seconds": timed(scene, partial(reader.read, texts)),
        "flop": 2 * scene.parameters(scene.shape.layer + 1) * tokens,
        "peak_bytes": scene.peak(),
    }


SECTIONS: Mapping[str, Callable[[Scene], Figures]] = {
    "train_scorer": scorer_step,
    "train_sft": sft_step,
    "train_grpo": grpo_step,
    "engine_memory": engine_memory,
    "sampler_gap": sampler_gap,
    "generation": generation,
    "publication": publication,
    "micro_batches": micro_batches,
    "capture": capture,
}
"""In the order they run."""


# parts of sections --------------------------------------------------------------------------------


def compact_engine(
    scene: Scene, *, rows: int = _GAP_ROWS, merged: bool | None = None, recorded: bool | None = None
) -> SlotEngine:
    """An engine over the scene's base."""
    return SlotEngine(
        CompactDecoder(scene.model, rows=rows, merged=merged),
        end_ids_of(causal_model(scene.model), scene.tokenizer),
        scene.tokenizer,
        scene.prompt,
        scene.base.injection_norm,
        rows,
        scene.config.sft.lora,
        recorded=recorded,
    )


def drawn_state(scene: Scene, size: float) -> dict[str, Tensor]:
    """A new adapter's tensors, its second factors drawn with this size instead of zero."""
    model = add_lora(scene.model, scene.config.sft.lora)
    with unloaded(scene, model):
        generator = torch.Generator().manual_seed(2)
        return {
            name: size * torch.randn(value.shape, generator=generator)
            if "lora_B" in name
            else value
            for name, value in adapter_state(model).items()
        }


@contextmanager
def unloaded(scene: Scene, model: Any) -> Iterator[None]:
    """Give the scene its plain base back after a with-block, whatever happens in it."""
    try:
        yield
    finally:
        scene.model = model.unload()
        detach_activations(scene.model)
        scene.model.activation_checkpointing_disable()
        scene.model.eval().requires_grad_(False)
        scene.forget_peak()


def trained(scene: Scene, trainer: Any, examples: int) -> Figures:
    """Run a trainer to its end: seconds, loss, and the most memory it took."""
    scene.forget_peak()
    seconds = timed(scene, trainer.train)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    summary = [line["train_loss"] for line in trainer.state.log_history if "train_loss" in line]
    loss = (losses or summary)[-1]
    if loss != loss:
        raise RuntimeError(f"a step of training: got a loss of {loss}, expected a number.")
    return {
        "examples": examples,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "loss": loss,
        "peak_bytes": scene.peak(),
    }


def policy_gap(scene: Scene, state: Mapping[str, Tensor], rollouts: list[Description]) -> Figures:
    """Mean gap and k3 of rollouts' log-probs against the policy's own forward."""
    model = TrainableVerbalizer.build(
        scene.base,
        scene.config.sft.lora,
        scene.activations(_GAP_ROWS),
        scene.prompt,
        seed=0,
        model=scene.model,
    )
    with unloaded(scene, model):
        float32_head(model, temperature=1.0)
        set_adapter_state(model, state)
        rows = [rollout.row for rollout in rollouts]
        batch = padded(scene, rows, [rollout.token_ids for rollout in rollouts])
        with torch.no_grad():
            policy = model.eval()(**batch, fused_lm_head=True).log_probs.float().cpu()
        sampled = torch.zeros_like(policy)
        start = len(scene.prompt) - 1
        for row, rollout in enumerate(rollouts):
            sampled[row, start : start + rollout.num_sampled] = torch.tensor(rollout.log_probs)
        mask = batch["labels"][:, 1:].cpu() != -100
        gap, k3 = log_prob_gap(policy, sampled, mask)
        return {"gap": float(gap), "k3": float(k3), "tokens": int(mask.sum())}


def labelled_batch(scene: Scene, rows: int) -> dict[str, Tensor]:
    """Prompts of activations with labels, padded, on the card."""
    written = scene.tokenizer(scene.labels(rows), add_special_tokens=False)["input_ids"]
    return padded(scene, range(rows), written)


def padded(
    scene: Scene, rows: Sequence[int], completions: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """What a forward takes: ids, mask and labels [rows, seq]; labels of the completions alone.

    A completion follows the prompt of the activation in its row of the bank.
    """
    vocab_size = scene.shape.config["vocab_size"]
    whole = [
        torch.tensor([*scene.prompt.encode(row, vocab_size), *completion])
        for row, completion in zip(rows, completions, strict=True)
    ]
    ids = pad_sequence(whole, batch_first=True)
    mask = pad_sequence([torch.ones_like(part) for part in whole], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(scene.prompt)] = -100
    parts = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: part.to(scene.device) for name, part in parts.items()}


def backward(model: TrainableVerbalizer, batch: dict[str, Tensor]) -> None:
    """Log-probs of a batch and their gradient, which is then dropped."""
    model(**batch, fused_lm_head=True).log_probs.sum().backward()
    model.zero_grad(set_to_none=True)


def timed(scene: Scene, work: Callable[[], object]) -> float:
    """Seconds that the card and this process take for it."""
    scene.synchronize()
    started = time.perf_counter()
    work()
    scene.synchronize()
    return time.perf_counter() - started


# the job ------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Run what a command line asks for. Exits with status 1 where a section failed."""
    import tyro

    settings = tyro.cli(GPUBenchmark, args=arguments, description=__doc__)
    if settings.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: --device: got cuda, expected a GPU that torch sees. To try the script without"
            " one: --device cpu --shape small",
            file=sys.stderr,
        )
        raise SystemExit(1)
    results = run_gpu_benchmark(settings)
    if any("error" in part for part in results["sections"].values()):
        raise SystemExit(1)


def run_gpu_benchmark(settings: GPUBenchmark) -> dict[str, Any]:
    """Every section's figures, printed and written as they come."""
    machine = describe_machine("bfloat16", settings.device)
    results: dict[str, Any] = {"shape": settings.shape, "machine": machine, "sections": {}}
    output = (
        Path(settings.output) if settings.output else RESULTS / f"{_slug(machine['device'])}.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    print(describe_limits(machine))
    with tempfile.TemporaryDirectory(prefix="nla_ray_") as folder:
        scene = Scene(SHAPES[settings.shape], Path(folder), settings.device)
        for name in settings.sections or SECTIONS:
            started = time.perf_counter()
            try:
                figures = SECTIONS[name](scene)
            except Exception as error:
                traceback.print_exc()
                figures = {"error": f"{type(error).__name__}: {error}"}
            results["sections"][name] = beside_limits(figures, machine)
            output.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} ({time.perf_counter() - started:.0f} s)", flush=True)
            for line in describe_figures(results["sections"][name]):
                print(f"  {line}", flush=True)
    print(f"written to {output}")
    return results


def _slug(card: str) -> str:
    return "-".join(card.lower().split())


def beside_limits(figures: Figures, machine: Mapping[str, Any]) -> Figures:
    """The figures; where work is counted, also the seconds it would take at the card's limits."""
    if "flop" not in figures:
        return {
            name: beside_limits(value, machine) if isinstance(value, dict) else value
            for name, value in figures.items()
        }
    ideal = roofline_seconds(figures, machine)
    return {
        **figures,
        "per_second": figures["tokens"] / figures["seconds"],
        "roofline_seconds": ideal,
        "share_of_roofline": ideal / figures["seconds"],
    }


def describe_limits(machine: Mapping[str, Any]) -> str:
    """The card and what was measured of it, in a line."""
    return (
        f"{machine['device']}: {machine['matmul_flop_per_second'] / 1e12:.3g} TFLOP/s in bfloat16,"
        f" {machine['copy_bytes_per_second'] / 1e9:.4g} GB/s copied; torch {machine['torch']}"
    )


def describe_figures(figures: Figures, title: str = "") -> list[str]:
    """A line for each group of plain figures."""
    plain = {name: value for name, value in figures.items() if not isinstance(value, dict | list)}
    lines = []
    if plain:
        parts = [f"{name} {_written(name, value)}" for name, value in plain.items()]
        lines.append(f"{title}: {', '.join(parts)}" if title else ", ".join(parts))
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += describe_figures(value, name)
        elif isinstance(value, list):
            for number, part in enumerate(value, 1):
                lines += describe_figures(part, f"{name} {number}")
    return lines


def _written(name: str, value: Any) -> str:
    if name.endswith("_bytes") or "bytes_while" in name:
        return f"{value / 1e9:.3g} GB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
