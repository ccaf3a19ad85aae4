"""The linear reconstructor: description -> activation by ridge regression on the frozen base.

phi(d) = mean over the description's tokens of the residual stream after a middle block, no adapter
active; r = mu + b + W (phi(d) - mean phi), W by ridge. It is fitted in closed form, so it has no
training noise; it shares no adapter with the other reconstructors and cannot be hacked in the way
they can. Knows nothing of files of a run or of Ray.
Source: Hoerl & Kennard, "Ridge Regression", 1970.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.base import prompts
from nla_ray.base.adapters import adapter_active
from nla_ray.base.encoding import encode_texts
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.settings.config import BaseConfig

FILE_NAME = "linear.safetensors"
"""Of what reads the activations of the base's layer; `further_file` names those of others."""
_SETTINGS = "linear"
"""Key of the file's metadata: one entry, because the library writes several in an order that
changes."""
_BATCH = 64


def further_file(layer: int) -> str:
    """The file of what reads a further layer's activations.

    >>> further_file(2)
    'linear_layer2.safetensors'
    """
    stem, dot, ending = FILE_NAME.partition(".")
    return f"{stem}_layer{layer}{dot}{ending}"


class DescriptionFeatures:
    """phi: the mean over a description's tokens of the stream after a block of the plain base."""

    def __init__(self, model, tokenizer, *, layer: int, max_tokens: int) -> None:
        self.layer, self.max_tokens = layer, max_tokens
        self._model, self._tokenizer = model, tokenizer
        self._reader = ResidualReader(model, [layer])
        # A model's first token carries a norm that drowns all others: it belongs to the prefix,
        # never to the mean.
        self._prefix = tokenizer.encode(prompts.OPENING_TAG)

    @torch.no_grad()
    def __call__(self, descriptions: Sequence[str], batch_size: int = _BATCH) -> Tensor:
        """[n, d_model] float32 on CPU; zeros for a description without tokens."""
        encoded = [ids[: self.max_tokens] for ids in encode_texts(self._tokenizer, descriptions)]
        device = next(self._model.parameters()).device
        features = torch.zeros(len(encoded), self._model.config.hidden_size)
        order = sorted(
            (row for row, ids in enumerate(encoded) if ids), key=lambda row: len(encoded[row])
        )
        with adapter_active(self._model, None):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                longest = len(encoded[rows[-1]])
                lengths = torch.tensor([len(encoded[row]) for row in rows], device=device)
                padded = [
                    self._prefix + encoded[row] + [0] * (longest - len(encoded[row]))
                    for row in rows
                ]
                stream = self._reader.read(torch.tensor(padded, device=device))[self.layer]
                stream = stream[:, len(self._prefix) :].float()
                is_token = torch.arange(longest, device=device) < lengths[:, None]
                total = (stream * is_token[..., None]).sum(1)
                features[rows] = (total / is_token.sum(1, keepdim=True)).cpu()
        return features


class LinearReconstructor:
    """Reads descriptions; writes reconstructions near unit norm, to be compared by direction."""

    def __init__(self, features: DescriptionFeatures, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: `weight` [d_model, d_model]; of [d_model] `feature_mean`, `offset`, `mean`.

        `offset` is b and `mean` is mu.
        """
        self._features, self._tensors = features, dict(tensors)
        self.mean = tensors["mean"]

    @property
    def model(self):
        """The loaded base, to be shared with other reconstructors."""
        return self._features._model

    @classmethod
    def load(
        cls, base: BaseConfig, folder: Path | str, *, model=None, name: str = FILE_NAME
    ) -> LinearReconstructor:
        """A fitted one. `model`: a loaded base to share, with or without adapters in it.

        `name`: of the file.
        """
        file = Path(folder) / name
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no dict)
            settings = json.loads(content.metadata()[_SETTINGS])
        model = load_backbone(base, num_blocks=settings["layer"] + 1) if model is None else model
        return cls(DescriptionFeatures(model, load_tokenizer(base), **settings), tensors)

    def save(self, folder: Path | str, name: str = FILE_NAME) -> None:
        """Write a file of this name."""
        settings = json.dumps(
            {"layer": self._features.layer, "max_tokens": self._features.max_tokens}
        )
        save_file(
            {name: tensor.contiguous() for name, tensor in self._tensors.items()},
            Path(folder) / name,
            metadata={_SETTINGS: settings},
        )

    def reconstruct(self, descriptions: Sequence[str], batch_size: int = _BATCH) -> Tensor:
        """Reconstructions [n, d_model] in the order given, float32 on CPU."""
        unique = list(dict.fromkeys(descriptions))
        read = self._tensors["mean"] + predict(self._features(unique, batch_size), self._tensors)
        index_of = {text: index for index, text in enumerate(unique)}
        return read[[index_of[text] for text in descriptions]]


def fit(
    features: Float[Tensor, "rows d_features"],
    targets: Float[Tensor, "rows d_model"],
    mean: Float[Tensor, " d_model"],
    penalty: float,
) -> dict[str, Tensor]:
    """Ridge from features to c(v) of targets, in float64; `mean` is mu.

    W = argmin sum |c(v) - b - W (phi - mean phi)|^2 + penalty * (mean squared feature) * n * |W|^2.
    """
    deviation = vectors.centre(targets, mean).double()
    feature_mean, offset = features.double().mean(0), deviation.mean(0)
    centred = features.double() - feature_mean
    weight = solve_ridge(centred.T @ centred, centred.T @ (deviation - offset), penalty)
    return {
        "weight": weight.float(),
        "feature_mean": feature_mean.float(),
        "offset": offset.float(),
        "mean": mean.float(),
    }


def solve_ridge(
    gram: Float[Tensor, "d_features d_features"],
    cross: Float[Tensor, "d_features d_targets"],
    penalty: float,
) -> Float[Tensor, "d_targets d_features"]:
    """W = argmin |Y - X W'|^2 + penalty * (mean squared feature) * n * |W|^2.

    `gram`: X'X, `cross`: X'Y, both of centred features; they are left as they are.
    """
    damped = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(damped, cross).T


def predict(
    features: Float[Tensor, "rows d_features"], tensors: Mapping[str, Tensor]
) -> Float[Tensor, "rows d_model"]:
    """b + W (phi - mean phi): the predicted deviation from the train mean.

    It is b alone where phi is zero: a description without tokens.
    """
    has_tokens = features.any(1, keepdim=True)
    deviation = (features - tensors["feature_mean"]) * has_tokens
    return tensors["offset"] + deviation @ tensors["weight"].T


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean squared feature; the one with the highest centred cosine on validation is
kept."""
