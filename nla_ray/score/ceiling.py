"""What a layer could give a verbalizer: its gold ceiling, and the words that it holds.

From features of labels to activations goes a ridge regression, which says how well labels tell
activations apart; from activations to words a linear probe. Pure arithmetic on vectors, and the
lines that tell a terminal of it; it knows neither models nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.activation.vectors import norm
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.linear import PENALTIES, fit, predict
from nla_ray.score.metrics import Figure, figures
from nla_ray.score.probe import fit_probe, share_in_text

PUBLIC_DEPTH = 20 / 28
"""Share of the blocks below the layer that public verbalizers read (block 20 of 28)."""
DEPTHS = (0.35, 0.5, 0.6, PUBLIC_DEPTH, 0.82)
_CEILING = ("top1_2way", "top1_10way", "centred_cosine", "fve")
PROBED = (3, 5)
"""Of how many of a probe's best words it is measured whether the text has them."""


def inspect_layer(
    train: Float[Tensor, "train d_model"],
    validation: Float[Tensor, "validation d_model"],
    train_features: Float[Tensor, "train d_features"],
    validation_features: Float[Tensor, "validation d_features"],
    family_ids: Sequence[str],
) -> dict[str, Any]:
    """One layer: norms of its train activations, and the gold ceiling on validation activations.

    The features are those of the texts' labels; `family_ids` are the validation texts'. The ridge
    penalty with the best centred cosine counts. It is chosen on the rows that the ceiling is
    measured on, so the ceiling serves to choose a layer and is no evidence. The 2-way choice is by
    centred cosine: raw, gold labels fail it where activations differ in their distance to the mean.
    """
    norms, mean = norm(train)[:, 0], vectors.mean_direction(train)
    comparisons = Comparisons.draw(validation, family_ids, mean, seed=0)
    by_penalty: dict[float, dict[str, Figure]] = {}
    for penalty in PENALTIES:
        fitted = fit(train_features, train, mean, penalty)
        by_penalty[penalty] = figures(mean + predict(validation_features, fitted), comparisons)
    penalty = max(by_penalty, key=lambda penalty: by_penalty[penalty]["centred_cosine"].value)
    ceiling = {name: by_penalty[penalty][name] for name in _CEILING}
    intervals = FamilyBootstrap(family_ids).intervals(ceiling)
    return {
        "mean_norm": norms.mean().item(),
        "norm_quantiles": {str(share): norms.quantile(share).item() for share in (0.01, 0.5, 0.99)},
        "injection_norm": round_up(norms.mean().item()),
        "cosine_with_mean": vectors.cosine(train, mean).mean().item(),
        "penalty": penalty,
        "ceiling": {name: interval.to_dict() for name, interval in intervals.items()},
    }


def probe_words(
    train: Float[Tensor, "train d_model"],
    validation: Float[Tensor, "validation d_model"],
    train_texts: Sequence[str],
    validation_texts: Sequence[str],
    family_ids: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Share of a linear probe's best words, so many of PROBED, that validation texts have.

    It says where words can be read, whoever reads them. The penalty is chosen on the same rows, as
    that of the ceiling. Empty where the train texts have no word that a probe could learn.
    """
    mean = vectors.mean_direction(train)
    probe = fit_probe(train, train_texts, validation, validation_texts, mean)
    if not probe.words:
        return {}
    ranked = probe.rank(validation, max(PROBED))
    shares = {
        str(count): Figure.mean(
            [
                share_in_text(words[:count], text)
                for words, text in zip(ranked, validation_texts, strict=True)
            ]
        )
        for count in PROBED
    }
    intervals = FamilyBootstrap(family_ids).intervals(shares)
    return {count: interval.to_dict() for count, interval in intervals.items()}


def round_up(value: float) -> float:
    """The next number of two digits whose second one is 0 or 5.

    >>> round_up(472.0), round_up(50.0)
    (500, 50)
    """
    step = 5 * 10 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / step) * step


def _probed_words(probe: Mapping[str, Mapping[str, float]]) -> str:
    shown = ("{value:.3f} {low:.3f} to {high:.3f}".format(**figure) for figure in probe.values())
    return ", ".join(shown) or "-"


def describe_inspection(results: dict[str, Any]) -> list[str]:
    """For a terminal: what was found, and the flags that say so."""
    marker = results["marker"]
    lines = [
        (
            f"{results['base']}: {results['num_layers']} blocks, d_model {results['d_model']};"
            f" ceiling of gold labels by ridge regression on {results['texts']['train']} train"
            f" texts, of {results['texts']['validation']} validation texts"
        ),
        (
            f"marker {marker['found']!r} (id {marker['id']}, between {marker['neighbours'][0]} and"
            f" {marker['neighbours'][1]}); configured {marker['configured']!r}"
        ),
        (
            "layer  depth  mean norm  1% to 99%        cos with mean  2-way  10-way  centred"
            " cosine, 95%    FVE  words of the probe in the text: best 3, best 5; from the text's"
            " mean"
        ),
    ]
    for layer, inspected in results["layers"].items():
        ceiling = {name: figure["value"] for name, figure in inspected["ceiling"].items()}
        quantiles = inspected["norm_quantiles"]
        interval = "{value:.3f} {low:.3f} to {high:.3f}".format(
            **inspected["ceiling"]["centred_cosine"]
        )
        lines.append(
            f"{layer:>5}  {int(layer) / results['num_layers']:5.2f}  {inspected['mean_norm']:9.1f} "
            f" {quantiles['0.01']:7.1f} {quantiles['0.99']:8.1f} "
            f" {inspected['cosine_with_mean']:13.3f}  {ceiling['top1_2way']:5.3f} "
            f" {ceiling['top1_10way']:6.3f}  {interval:>19}  {ceiling['fve']:5.3f}"
            f"  {_probed_words(inspected['probe'])};"
            f" {_probed_words(inspected.get('probe_text_mean', {}))}"
        )
    best = results["proposed_layer"]
    lines.append(
        f"best ceiling (10-way): --base.layer {best} --base.injection-norm"
        f" {results['layers'][str(best)]['injection_norm']:g} --base.marker {marker['found']};"
        f" {PUBLIC_DEPTH:.0%} depth is layer {int(PUBLIC_DEPTH * results['num_layers'])}"
    )
    return lines
