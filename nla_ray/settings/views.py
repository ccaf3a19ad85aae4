"""What `base.injected` says: which vectors stand in a verbalizer's prompt for one activation.

Knows the words of the setting alone. Protects the rule that what nobody can inject is refused when
it is said, in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_LAYER = "layer"


@dataclass(frozen=True, kw_only=True)
class View:
    """One vector that stands for an activation.

    Example: `layer:18` is View(kind="layer", layer=18).
    """

    kind: Literal["activation", "centred", "text_mean", "layer"]
    layer: int | None = None
    """Of `layer`."""

    @property
    def is_of_activation(self) -> bool:
        """Whether an activation alone gives it, without its text."""
        return self.kind in ("activation", "centred")

    @classmethod
    def of(cls, value: str) -> View:
        """What an entry of the setting says. Raises ValueError for one that says nothing known.

        >>> View.of("centred"), View.of("layer:18").layer
        (View(kind='centred', layer=None), 18)
        """
        if value in ("activation", "centred", "text_mean"):
            return cls(kind=value)
        kind, _, layer = value.partition(":")
        if kind == _LAYER and layer.isascii() and layer.isdigit():
            return cls(kind=_LAYER, layer=int(layer))
        raise ValueError(
            f"base.injected: got {value!r}, expected `activation`, `centred`, `text_mean` or"
            " `layer:K`. Set one or several of these."
        )
