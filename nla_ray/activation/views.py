"""The vectors that stand in a verbalizer's prompt for one activation, a token each.

By default that is the activation itself. Beside it may stand its direction without the mean of all,
the mean over its text, or the same position at another layer. It is given vectors or a reader, and
knows no run. What is scored is always the activation alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.base.encoding import EncodedChat
from nla_ray.base.layers import ResidualReader
from nla_ray.settings.config import BaseConfig
from nla_ray.settings.views import View, is_activation_alone


def view_activations(
    views: Sequence[View],
    activations: Float[Tensor, "rows d_model"],
    *,
    mean: Float[Tensor, " d_model"] | None = None,
    text_means: Float[Tensor, "rows d_model"] | None = None,
    layers: Mapping[int, Float[Tensor, "rows d_model"]] | None = None,
) -> Float[Tensor, "rows tokens d_model"]:
    """What is injected for each activation, a vector for each of `views`, of any length.

    `mean`: train mean direction. `text_means`: the mean over each activation's text at its layer.
    `layers`: the same positions at other layers. Raises ValueError for a view whose vectors are not
    given.
    """
    if is_activation_alone(views):
        return activations[:, None]
    found: dict[View, Tensor | None] = {
        View(kind="activation"): activations,
        View(kind="centred"): None if mean is None else vectors.centre(activations, mean),
        View(kind="text_mean"): text_means,
        **{View(kind="layer", layer=layer): rows for layer, rows in (layers or {}).items()},
    }
    taken = [found.get(view) for view in views]
    lacking = [view for view, rows in zip(views, taken, strict=True) if rows is None]
    if lacking:
        raise ValueError(
            f"base.injected: got no vectors for {lacking[0]}, expected one for each of"
            f" {len(activations)} activations. Give texts, or capture it: --capture.layers,"
            " --capture.text-mean."
        )
    return torch.stack([rows for rows in taken if rows is not None], dim=1)


def read_layers(base: BaseConfig) -> list[int]:
    """The layers that a text is read at to be described: the base's, its views', further ones."""
    of_views = {view.layer for view in base.views if view.layer is not None}
    return sorted({*base.described_layers, *of_views})


def read_prompt(
    base: BaseConfig,
    reader: ResidualReader,
    encoded: EncodedChat,
    positions: Sequence[int],
    mean: Float[Tensor, " d_model"] | None,
    layer: int | None = None,
) -> tuple[Float[Tensor, "rows d_model"], Float[Tensor, "rows tokens d_model"]]:
    """The activations at positions of one prompt, and what is injected for them, on CPU.

    `reader`: of `read_layers`. `mean`: as `view_activations` takes it. `layer`: one of
    `base.further_layers`, or the base's. What stands behind the last of the positions is not read:
    attention is causal.
    """
    [read] = read_together(base, reader, [(encoded, positions, layer)], mean)
    return read


def read_together(
    base: BaseConfig,
    reader: ResidualReader,
    prompts: Sequence[tuple[EncodedChat, Sequence[int], int | None]],
    mean: Float[Tensor, " d_model"] | None,
) -> list[tuple[Float[Tensor, "rows d_model"], Float[Tensor, "rows tokens d_model"]]]:
    """What `read_prompt` returns of each (prompt, positions, layer); they are one batch."""
    kept = [encoded.ids[: max(positions) + 1] for encoded, positions, _ in prompts]
    ids = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.int64)
    for row, own_ids in enumerate(kept):
        ids[row, : len(own_ids)] = torch.tensor(own_ids)
    streams = {layer: values.cpu() for layer, values in reader.read(ids.to(reader.device)).items()}
    results = []
    for row, (encoded, positions, layer) in enumerate(prompts):
        stream = {number: values[row] for number, values in streams.items()}
        layer = base.layer if layer is None else layer
        activations = stream[layer][list(positions)].float()
        if layer == base.layer:
            injected = view_positions(base, stream, positions, list(encoded.spans), mean)
        else:
            injected = activations[:, None]
        results.append((activations, injected))
    return results


def view_positions(
    base: BaseConfig,
    stream: Mapping[int, Float[Tensor, "seq d_model"]],
    positions: Sequence[int],
    text_positions: Sequence[int],
    mean: Float[Tensor, " d_model"] | None,
) -> Float[Tensor, "rows tokens d_model"]:
    """What is injected for the activations at positions of one prompt.

    `stream`: what was read at each of `read_layers`. `text_positions`: the tokens of the text; the
    mean over it ends at the activation's own position, and is the activation where no token of the
    text stands before it. `mean`: as `view_activations` takes it.
    """
    own = {layer: values[list(positions)].float() for layer, values in stream.items()}
    before = [[token for token in text_positions if token <= end] or [end] for end in positions]
    means = [stream[base.layer][tokens].float().mean(0) for tokens in before]
    return view_activations(
        base.views, own[base.layer], mean=mean, text_means=torch.stack(means), layers=own
    )
