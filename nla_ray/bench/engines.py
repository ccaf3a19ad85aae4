"""Every engine on one base, by turns: `python jobs/benchmark.py generate`.

`model.generate`, the engines `plain` and `compact`, and vLLM where it is installed, in an actor of
its own, as rollouts have it. A random adapter is loaded, all descriptions have the same length, and
the sides take turns, so that whatever else the machine does falls on all of them. No run is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nla_ray.base.adapters import adapter_settings, adapter_state
from nla_ray.base.families import beyond_parts
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import InjectionPrompt, build_injection_prompt
from nla_ray.bench.generate import library_generate
from nla_ray.bench.models import with_random_adapter
from nla_ray.bench.timing import Timing, describe_machine, taking_turns
from nla_ray.cluster.connect import connect
from nla_ray.description.engines.interface import make_engine
from nla_ray.description.engines.vllm import VllmEngine
from nla_ray.settings.config import RunConfig
from nla_ray.settings.presets import PRESETS, override, preset

_VLLM, _MERGED = "vllm", "vllm_merged"
_NEVER: frozenset[int] = frozenset()
"""No id ends a description: all have the same length, and as many tokens are compared."""
Generate = Callable[[Tensor, float], Sequence[Any]]
"""(activations [n, d_model], temperature) -> n descriptions."""


@dataclass(frozen=True, kw_only=True)
class EngineBenchmark:
    """What `jobs/benchmark.py generate` takes."""

    preset: str = "smollm2-135m"
    """The preset whose base generates."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the base's weights."""
    rows: tuple[int, ...] = (64, 128)
    """Descriptions at once."""
    tokens: int = 100
    """Tokens of each."""
    repetitions: int = 3
    """Turns of every side."""
    without: tuple[str, ...] = ()
    """Sides to leave out, of generate, plain, compact, vllm, vllm_merged."""
    output: str | None = None
    """The results file; None: it is only printed."""


@dataclass(frozen=True)
class _Scene:
    """A base with a random adapter, and what an engine is made from."""

    config: RunConfig
    model: Any
    tokenizer: Any
    prompt: InjectionPrompt

    @property
    def arguments(self) -> tuple[Any, InjectionPrompt, float]:
        return self.tokenizer, self.prompt, self.config.base.injection_norm


def benchmark_engines(arguments: Sequence[str]) -> None:
    """Run what a command line asks for."""
    import tyro

    settings = tyro.cli(EngineBenchmark, args=list(arguments), description=__doc__)
    if settings.preset not in PRESETS:
        print(
            f"error: --preset: got {settings.preset!r}, expected one of {', '.join(PRESETS)}.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    results = compare_engines(settings)
    print("\n".join(describe_comparison(results)))
    if settings.output is not None:
        Path(settings.output).write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {settings.output}")


def compare_engines(settings: EngineBenchmark) -> dict[str, Any]:
    """Tokens a second of every side, for each number of rows, greedy and sampled."""
    config = override(preset(settings.preset), base={"dtype": settings.dtype})
    torch.set_num_threads(config.compute.threads)
    backbone, tokenizer = load_backbone(config.base), load_tokenizer(config.base)
    prompt = build_injection_prompt(tokenizer, config.base.marker)
    scene = _Scene(config, with_random_adapter(backbone, config).eval(), tokenizer, prompt)
    draw = torch.Generator().manual_seed(0)
    activations = torch.randn(max(settings.rows), backbone.config.hidden_size, generator=draw)
    results: dict[str, Any] = {
        "preset": settings.preset,
        "tokens": settings.tokens,
        "machine": describe_machine(settings.dtype, backbone.device.type),
        "runs": [],
    }
    with _sides(scene, settings) as sides:
        for rows in settings.rows:
            for temperature in (0.0, 1.0):
                works = {
                    name: partial(generate, activations[:rows], temperature)
                    for name, generate in sides.items()
                }
                timings = taking_turns(works, settings.repetitions)
                results["runs"].append(_figures(timings, rows, temperature, settings.tokens))
    return results


@contextmanager
def _sides(scene: _Scene, settings: EngineBenchmark) -> Iterator[dict[str, Generate]]:
    """Every side by name, with the adapter loaded."""
    most, state = max(settings.rows), adapter_state(scene.model)
    lora, tokens = adapter_settings(scene.model), settings.tokens
    beyond = beyond_parts(scene.model.config)
    sides: dict[str, Generate] = {"generate": partial(_by_library, scene, tokens)}
    for name in ("plain", "compact"):
        if name == "plain" or not beyond:
            engine = make_engine(scene.model, *scene.arguments, most, lora, chosen=name)
            engine.load_weights(state, 1)
            engine.end_ids = _NEVER
            sides[name] = partial(_by_engine, engine.generate, tokens)
    if _VLLM in settings.without or importlib.util.find_spec(_VLLM) is None:
        yield _left(sides, settings.without)
        return
    with connect(dataclasses.replace(scene.config.compute, threads=torch.get_num_threads())):
        import ray

        def generate(actor: Any, *arguments: Any, **options: Any) -> Sequence[Any]:
            return ray.get(actor.generate.remote(*arguments, **options))

        # Beside narrow weights the engine keeps an adapter apart, which costs it time.
        ways = {_VLLM: None} | ({_MERGED: True} if settings.dtype != "float32" else {})
        for name, merged in ways.items():
            actor = ray.remote(num_cpus=0)(_EndlessVllm).remote(
                scene.model, *scene.arguments, most, lora, merged=merged
            )
            ray.get(actor.load_weights.remote(state, 1))
            sides[name] = partial(_by_engine, partial(generate, actor), tokens)
        yield _left(sides, settings.without)


class _EndlessVllm(VllmEngine):
    """It ends no description before its last token."""

    def __init__(self, *arguments: Any, merged: bool | None) -> None:
        super().__init__(*arguments, merged=merged)
        self.end_ids = _NEVER


def _left(sides: dict[str, Generate], without: Sequence[str]) -> dict[str, Generate]:
    return {name: side for name, side in sides.items() if name not in without}


def _by_engine(
    generate: Callable[..., Any], tokens: int, activations: Tensor, temperature: float
) -> Sequence[Any]:
    return generate(activations, temperature=temperature, max_new_tokens=tokens)


def _by_library(
    scene: _Scene, tokens: int, activations: Tensor, temperature: float
) -> Sequence[Any]:
    return library_generate(
        scene.model,
        scene.tokenizer,
        scene.prompt,
        activations,
        scene.config.base.injection_norm,
        tokens,
        _NEVER,
        temperature=temperature,
    )


def _figures(
    timings: Mapping[str, Timing], rows: int, temperature: float, tokens: int
) -> dict[str, Any]:
    sides = {name: timing.to_dict(rows * tokens) for name, timing in timings.items()}
    return {"rows": rows, "temperature": temperature, "sides": sides}


def describe_comparison(results: Mapping[str, Any]) -> Iterator[str]:
    """A line for each number of rows and way of sampling: tokens a second by side."""
    machine = results["machine"]
    yield (
        f"{results['preset']}, {machine['dtype']}, {machine['torch_threads']} threads of"
        f" {machine['processor']}; {results['tokens']} tokens a description"
    )
    for run in results["runs"]:
        decoding = "sampled" if run["temperature"] else "greedy"
        shown = ", ".join(
            f"{name} {side['per_second']:,.0f} ({min(side['all_seconds']):.2f} to"
            f" {max(side['all_seconds']):.2f} s)"
            for name, side in run["sides"].items()
        )
        yield f"{run['rows']} rows, {decoding}, tokens/s: {shown}"
