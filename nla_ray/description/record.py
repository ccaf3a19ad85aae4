"""One sampled description: its tokens, log-probabilities and text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled description with its tokens and log-probabilities.

    Example:
        Rollout(row=17, token_ids=[220, 5, 9, 2], log_probs=[-0.1, -1.2, -0.3, -0.0], text="- Python
        test{closing tag}",
                finished=True, weight_version=12)
    """

    row: int
    """Row of the activation bank it describes."""
    token_ids: list[int]
    """Sampled ids, end-of-sequence included when it was sampled; each below the vocabulary size."""
    log_probs: list[float]
    """Log-probability of each sampled id under the (temperature-scaled) sampling distribution."""
    text: str
    """Decoded text without special tokens: `{description}{closing tag}` when it is closed."""
    finished: bool
    """False: it ran into the token limit."""
    weight_version: int
    """Version of the adapter that sampled it."""
