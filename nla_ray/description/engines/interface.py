"""What a generation engine is, and which one generates.

Rollouts, the report, serving and the benchmark ask `make_engine` and know no engine by name. An
engine knows nothing of Ray. To add an engine: write a class with the members of
`GenerationEngine`, or, where slots and sampling stay as they are, of `decoder.Decoder`; choose it
in `make_engine`, and run tests/description/test_engine.py, which holds its promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from nla_ray.base.encoding import end_ids_of
from nla_ray.base.families import beyond_parts, causal_model, wrapper_of
from nla_ray.base.prompts import InjectionPrompt, LayerEnding
from nla_ray.description.engines.compact import CompactDecoder
from nla_ray.description.engines.plain import PlainDecoder
from nla_ray.description.engines.requests import Submission, never
from nla_ray.description.engines.self_check import check_generation
from nla_ray.description.engines.slots import SlotEngine
from nla_ray.description.engines.vllm import VllmEngine
from nla_ray.description.record import Description
from nla_ray.settings.config import LoraSettings

EngineChoice = Literal["auto", "compact", "plain", "vllm"]


class GenerationEngine(Protocol):
    """Activations -> sampled descriptions, under one version of an adapter at a time.

    What every engine promises:
    - Greedy output equals the model's own `generate`, token for token (float32).
    - Log-probabilities equal the trainer's within 1e-4 (float32).
    - A description is a function of weights, activation, seed, row and sample alone: neither slots
      nor the order and number of the other descriptions change it.
    - A call can be cancelled between two tokens, and leaves nothing behind.
    - Submissions are written side by side; one that comes late is let in at the next step, and
      takes turns with the others.

    It belongs to one thread at a time.
    """

    weight_version: int
    """Version of the weights that were loaded last."""
    end_ids: frozenset[int]
    """Sampled ids that end a description."""

    def load_weights(self, adapter_state: Mapping[str, Tensor] | None, version: int) -> None:
        """Use these adapter weights (names as in `adapters.adapter_state`) from now on.

        None: the plain base. Raises ValueError for weights of another base, and for an engine that
        was made without the adapter's settings; RuntimeError while submissions are not finished.
        """
        ...

    def generate(
        self,
        activations: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ending: LayerEnding | None = None,
        is_cancelled: Callable[[], bool] = never,
    ) -> list[Description]:
        """`group_size` descriptions of each of n activations, by (activation, sample).

        `activations` [n, d_model], or [n, vectors, d_model] where several vectors stand in a
        prompt, one behind the other; it may be another number in every call.
        `temperature` 0 is greedy (log-probabilities then at temperature 1). `rows` [n]: the
        activations' rows in their bank, which name them in the descriptions and seed their
        samples; default 0 to n - 1. `ending`: how the prompt of their layer ends, where that is
        another one than the engine was made for. `is_cancelled` is asked before every pass of the
        base; once it says so nothing more is written, GenerationCancelled is raised, and the engine
        is as it was before the call. Raises ValueError for activations of another width or with
        non-finite values, and for more tokens than the model's context holds.
        """
        ...

    def submit(
        self,
        activations: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ending: LayerEnding | None = None,
    ) -> Submission:
        """Ask for what `generate` returns, and write nothing yet: `step` does."""
        ...

    def step(self) -> Sequence[Submission]:
        """One pass of the base for what is submitted; the submissions that it has finished.

        It prefills activations that wait where a slot is free for them; otherwise every
        description that is being written gets a token. An engine to which nothing is submitted
        does nothing.
        """
        ...

    def cancel(self, submission: Submission) -> None:
        """Write nothing more of it, and free its slots. One that is finished stays as it is."""
        ...


def engine_name(config: Any, chosen: EngineChoice = "auto") -> str:
    """The engine that generates on a base, as generation protocols record it.

    `config`: the base's transformers configuration. `auto`: `compact` for a base whose blocks it
    knows, else `plain`, which runs every one. An engine whose greedy text may differ, for the same
    weights, gets another name. Raises ValueError for an engine that cannot run the base.
    """
    beyond = beyond_parts(config)
    if chosen == "compact" and beyond:
        raise ValueError(
            f"base.engine: got 'compact' for {', '.join(beyond)}, expected 'plain' there. Set"
            " --base.engine auto."
        )
    if chosen == "vllm" and wrapper_of(config) is not None:
        raise ValueError(
            f"base.engine: got 'vllm' for the text model in a {wrapper_of(config)!r}, expected"
            " 'plain' there. Set --base.engine auto."
        )
    if chosen != "auto":
        return chosen
    return "plain" if beyond else "compact"


def make_engine(
    model: nn.Module,
    tokenizer,
    prompt: InjectionPrompt,
    injection_norm: float,
    max_slots: int = 64,
    lora: LoraSettings | None = None,
    *,
    chosen: EngineChoice = "auto",
    num_gpus: int = 1,
) -> GenerationEngine:
    """The engine for a frozen base, which may have adapters in it; the base is never changed.

    `max_slots`: descriptions decoded at once. `lora`: settings of the adapters that `load_weights`
    will get. `chosen`: as `engine_name` takes it. `num_gpus`: of this process, for `vllm` alone; of
    several the base is on none. Raises ValueError where the engine does not generate what the base
    does.
    """
    causal = causal_model(model)
    name = engine_name(causal.config, chosen)
    if name == "vllm":
        engine: GenerationEngine = VllmEngine(
            model, tokenizer, prompt, injection_norm, max_slots, lora, num_gpus=num_gpus
        )
    else:
        kind = CompactDecoder if name == "compact" else PlainDecoder
        decoder, end_ids = kind(model, rows=max_slots), end_ids_of(causal, tokenizer)
        engine = SlotEngine(decoder, end_ids, tokenizer, prompt, injection_norm, max_slots, lora)
    check_generation(engine, model, prompt, injection_norm)
    return engine
