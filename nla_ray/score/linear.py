"""The linear reconstructor: description -> activation by ridge regression on features of the frozen
base.

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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.base import prompts
from nla_ray.base.adapters import adapter_active
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.settings.config import BaseConfig

FILE_NAME = "linear.safetensors"
_SETTINGS = "linear"
"""Key of the file's metadata: one entry, because the library writes several in an order that
changes."""
_BATCH = 64


class DescriptionFeatures:
    """phi: the mean of a description's tokens in the stream after block `layer` of the plain
    base."""

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
        encoded = (
            self._tokenizer(list(descriptions), add_special_tokens=False)["input_ids"]
            if descriptions
            else []
        )
        encoded = [ids[: self.max_tokens] for ids in encoded]
        device = next(self._model.parameters()).device
        features = torch.zeros(len(encoded), self._model.config.hidden_size)
        order = sorted(
            (row for row, ids in enumerate(encoded) if ids), key=lambda row: len(encoded[row])
        )
        with adapter_active(self._model, None):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                longest = len(encoded[rows[-1]])
                ids = torch.tensor(
                    [
                        self._prefix + encoded[row] + [0] * (longest - len(encoded[row]))
                        for row in rows
                    ],
                    device=device,
                )
                own = torch.tensor(
                    [[place < len(encoded[row]) for place in range(longest)] for row in rows],
                    device=device,
                )
                stream = self._reader.read(ids)[self.layer][:, len(self._prefix) :].float()
                features[rows] = ((stream * own[..., None]).sum(1) / own.sum(1, keepdim=True)).cpu()
        return features


class LinearReconstructor:
    """Reads descriptions; writes reconstructions near unit norm, to be compared by direction."""

    def __init__(self, features: DescriptionFeatures, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: `weight` [d_model, d_model], `feature_mean` [d_model], `offset` b [d_model],
        `mean` mu [d_model]."""
        self._features, self._tensors = features, dict(tensors)
        self.mean = tensors["mean"]

    @property
    def model(self):
        """The loaded base, to be shared with other reconstructors."""
        return self._features._model

    @classmethod
    def load(cls, base: BaseConfig, folder: Path | str, *, model=None) -> LinearReconstructor:
        """A fitted one. `model`: a loaded base to share, with or without adapters in it."""
        file = Path(folder) / FILE_NAME
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no dict)
            settings = json.loads(content.metadata()[_SETTINGS])
        model = load_backbone(base, num_blocks=settings["layer"] + 1) if model is None else model
        return cls(DescriptionFeatures(model, load_tokenizer(base), **settings), tensors)

    def save(self, folder: Path | str) -> None:
        """Write linear.safetensors."""
        settings = json.dumps(
            {"layer": self._features.layer, "max_tokens": self._features.max_tokens}
        )
        save_file(
            {name: tensor.contiguous() for name, tensor in self._tensors.items()},
            Path(folder) / FILE_NAME,
            metadata={_SETTINGS: settings},
        )

    def reconstruct(self, descriptions: Sequence[str], batch_size: int = _BATCH) -> Tensor:
        """Reconstructions [n, d_model] in the order given, float32 on CPU."""
        unique = list(dict.fromkeys(descriptions))
        read = self._tensors["mean"] + predict(self._features(unique, batch_size), self._tensors)
        place = {text: index for index, text in enumerate(unique)}
        return read[[place[text] for text in descriptions]]


def fit(features: Tensor, targets: Tensor, mean: Tensor, penalty: float) -> dict[str, Tensor]:
    """Ridge from features [n, d] to c(v) of targets [n, d_model]; `mean` mu [d_model]. In float64.

    W = argmin sum |c(v) - b - W (phi - mean phi)|^2 + penalty * (mean squared feature) * n * |W|^2.
    """
    deviation = vectors.centre(targets, mean).double()
    feature_mean, offset = features.double().mean(0), deviation.mean(0)
    centred = features.double() - feature_mean
    gram = centred.T @ centred
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ (deviation - offset)).T
    return {
        name: tensor.float()
        for name, tensor in {
            "weight": weight,
            "feature_mean": feature_mean,
            "offset": offset,
            "mean": mean,
        }.items()
    }


def predict(features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """b + W (phi - mean phi): the predicted deviation from the train mean [n, d_model]; b alone
    where phi is zero."""
    told = features.any(1, keepdim=True)
    return tensors["offset"] + (features - tensors["feature_mean"]) * told @ tensors["weight"].T


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean squared feature; the one with the highest centred cosine on validation is
kept."""
