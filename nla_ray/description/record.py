"""One description, from the engine that samples it to the page that shows it.

The only record of a description: rewards, the monitor, the report and the HTTP interface read it.
It knows nothing of models. The rule it protects: `text` is always without tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nla_ray.base.prompts import parse_description


@dataclass(frozen=True, kw_only=True)
class Description:
    """Text about one activation, and how it was sampled where it was.

    Example:
        >>> from nla_ray.base.prompts import wrap_description
        >>> sampled = Description.from_sample(
        ...     row=17,
        ...     token_ids=[220, 5, 9, 2],
        ...     log_probs=[-0.1, -1.2, -0.3, -0.0],
        ...     written=wrap_description("- Python test"),
        ...     finished=True,
        ...     weight_version=12,
        ... )
        >>> sampled.text, sampled.closed, sampled.num_sampled
        ('- Python test', True, 4)
        >>> Description.from_text("- Python test", num_tokens=3)
        Description(text='- Python test', closed=True, num_tokens=3)
    """

    text: str
    """Without tags and outer white space."""
    closed: bool
    """False: the closing tag never came."""
    num_tokens: int | None = None
    """Tokens of `text` alone, as the tokenizer encodes it; None: not counted."""
    written: str | None = field(default=None, repr=False)
    """`token_ids` decoded without special tokens, tags included; None: not sampled."""
    row: int | None = field(default=None, repr=False)
    """Row of the activation bank it describes."""
    token_ids: list[int] = field(default_factory=list, repr=False)
    """Sampled ids, end of sequence included when it was sampled; each below the vocabulary size."""
    log_probs: list[float] = field(default_factory=list, repr=False, compare=False)
    """Log-probability of each sampled id under the (temperature-scaled) sampling distribution.

    Not compared: its last bits depend on the batch that the id was sampled in.
    """
    claim_log_probs: dict[str, float] | None = field(default=None, repr=False, compare=False)
    """Log-probability of every claim of `text`; None: that was not kept. Not compared either."""
    finished: bool = field(default=True, repr=False)
    """False: it ran into the token limit."""
    weight_version: int | None = field(default=None, repr=False)
    """Version of the adapter that sampled it."""

    @classmethod
    def from_sample(
        cls,
        *,
        row: int,
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        written: str,
        finished: bool,
        weight_version: int,
    ) -> Description:
        """A rollout: what an engine sampled, and `written`, the decoded ids."""
        text, closed = parse_description(written)
        return cls(
            text=text,
            closed=closed,
            written=written,
            row=row,
            token_ids=list(token_ids),
            log_probs=list(log_probs),
            finished=finished,
            weight_version=weight_version,
        )

    @classmethod
    def from_text(
        cls,
        text: str,
        *,
        num_tokens: int,
        closed: bool = True,
        claim_log_probs: dict[str, float] | None = None,
    ) -> Description:
        """A label, a control, or a line of a file of descriptions."""
        return cls(text=text, closed=closed, num_tokens=num_tokens, claim_log_probs=claim_log_probs)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens, closing tag and end of sequence included; 0 where nothing was sampled."""
        return len(self.token_ids)
