"""What `base.injected` says: which vectors stand in a verbalizer's prompt for one activation.

Knows the words of the setting alone. Protects the rule that what nobody can inject is refused when
it is said, in words.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

_LAYER = "layer"


def is_activation_alone(views: Sequence[View]) -> bool:
    """Whether nothing but the activation stands in the prompt, once."""
    return [view.kind for view in views] == ["activation"]


def check_views(views: Sequence[View], layers: Collection[int], *, text_mean: bool) -> None:
    """Raise ValueError for a view that a capture of these layers does not keep.

    `text_mean`: whether it keeps means of texts.
    """
    for view in views:
        if view.layer is not None and view.layer not in layers:
            raise ValueError(
                f"base.injected: got `layer:{view.layer}`, expected a layer that is captured:"
                f" {sorted(layers)}. Set --capture.layers {view.layer} as well."
            )
        if view.kind == "text_mean" and not text_mean:
            raise ValueError(
                "base.injected: got `text_mean`, expected means of texts to be captured. Set"
                " --capture.text-mean as well."
            )


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
