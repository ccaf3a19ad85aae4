"""What every engine asks of its arguments, requests and adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Protocol

from torch import Tensor

from nla_ray.base.prompts import InjectionPrompt
from nla_ray.description.record import Description
from nla_ray.settings.config import LoraSettings


class GenerationCancelled(RuntimeError):
    """Nobody waits for these descriptions any more."""


def never() -> bool:
    """Whether a call is cancelled that nobody cancels."""
    return False


class Submission(Protocol):
    """Descriptions that an engine was asked for and has not finished, or has."""

    descriptions: list[Description] | None
    """All of them, in the order of `GenerationEngine.generate`; None: not finished yet."""
    missing: int
    """Descriptions that are not finished."""
    count: int
    """Descriptions that were asked for."""


class StepwiseEngine(Protocol):
    """The part of a `GenerationEngine` that goes on step by step."""

    def step(self) -> Sequence[Submission]:
        """As `GenerationEngine` says."""
        ...

    def cancel(self, submission: Submission) -> None:
        """As `GenerationEngine` says."""
        ...


def run_submission(
    engine: StepwiseEngine, submission: Submission, is_cancelled: Callable[[], bool]
) -> list[Description]:
    """Steps until a submission is finished: its descriptions.

    Raises GenerationCancelled before a step. Whatever ends it early takes it out of the engine.
    """
    try:
        while submission.descriptions is None:
            if is_cancelled():
                raise GenerationCancelled(
                    f"{submission.missing} of {submission.count} were not finished"
                )
            engine.step()
        return submission.descriptions
    finally:
        if submission.descriptions is None:
            engine.cancel(submission)


def check_request(
    activations: Tensor,
    rows: Sequence[int],
    group_size: int,
    max_new_tokens: int,
    *,
    d_model: int,
    prompt: InjectionPrompt,
    context: int,
) -> Tensor:
    """What is injected: [n, vectors, d_model].

    Raises ValueError for what `GenerationEngine.generate` refuses. `context`: positions of the
    longest prompt with its description.
    """
    injected = activations[:, None] if activations.ndim == 2 else activations
    if injected.ndim != 3 or injected.shape[2] != d_model or len(rows) != len(activations):
        raise ValueError(
            f"activations: got shape {tuple(activations.shape)} and {len(rows)} rows, expected"
            f" [n, {d_model}] or [n, vectors, {d_model}], and n rows. They come from another model;"
            " capture them again."
        )
    if injected.shape[1] < 1:
        raise ValueError(
            "activations: got no vector for a prompt, expected at least one. Leave such rows out."
        )
    if not activations.isfinite().all():
        raise ValueError(
            "activations: got non-finite values, expected finite ones. Capture them again."
        )
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"group_size and max_new_tokens: got {group_size} and {max_new_tokens}, expected at"
            " least 1 of each."
        )
    length = len(prompt.prefix_ids) + injected.shape[1] + len(prompt.suffix_ids)
    if length + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {length},"
            f" expected at most {context} positions, the model's context. Lower it."
        )
    return injected


def check_slots(max_slots: int) -> None:
    """Raise ValueError for an engine that could decode nothing."""
    if max_slots < 1:
        raise ValueError(
            f"max_slots: got {max_slots}, expected at least 1. It is the number of rows decoded"
            " at once."
        )


def require_idle(unfinished: Sized) -> None:
    """Raise RuntimeError for weights that come while descriptions are written under others."""
    if len(unfinished):
        raise RuntimeError(
            f"generation engine: got weights while {len(unfinished)} submissions are not finished,"
            " expected none. Finish or cancel them first."
        )


def scaling_of(lora: LoraSettings | None, state: Mapping[str, Tensor] | None) -> float:
    """alpha / rank of the adapter that is loaded; 1 for the plain base.

    Raises ValueError for an adapter in an engine that was made without its settings.
    """
    if lora is not None:
        return lora.alpha / lora.rank
    if state is not None:
        raise ValueError(
            "generation engine: got adapter weights without their settings, expected "
            "lora=LoraSettings(...) when the engine was made. alpha / rank is not part of the "
            "tensors."
        )
    return 1.0


def check_log_probs(log_probs: Sequence[float], weight_version: int) -> None:
    """Raise RuntimeError for one that is not a number."""
    if any(log_prob != log_prob for log_prob in log_probs):
        raise RuntimeError(
            "generation engine: got a log-probability that is not a number under weight"
            f" version {weight_version}, expected finite logits. The adapter has diverged; go back"
            " to an earlier checkpoint."
        )
