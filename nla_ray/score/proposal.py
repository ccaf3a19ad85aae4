"""The preset that an inspection proposes: what was measured, and what it was called with.

Pure: results and configurations in, the text of a preset file out, each measured value below the
measurement that it comes from. It knows no folder.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from nla_ray.settings.config import RunConfig
from nla_ray.settings.preset_file import differing_settings, to_preset_file, toml_value

_MEASURED = ("model", "layer", "injection_norm", "marker")
"""Fields of `base` that a proposal always names, in this order."""
_WIDTH = 96
"""Characters in a line of a comment."""


def proposed_config(results: Mapping[str, Any], given: RunConfig, start: RunConfig) -> RunConfig:
    """The configuration that an inspection was called with, on the base as it was measured.

    `start`: the named preset that `given` started from. Two settings go: `capture.layers`, which
    said where to look, and a `linear_scorer.layer` that lies above the proposed layer.
    """
    best = results["proposed_layer"]
    base = dataclasses.replace(
        given.base,
        layer=best,
        injection_norm=float(results["layers"][str(best)]["injection_norm"]),
        marker=results["marker"]["found"],
    )
    linear = given.linear_scorer
    if linear.layer is not None and linear.layer > best:
        linear = dataclasses.replace(linear, layer=None)
    capture = dataclasses.replace(given.capture, layers=start.capture.layers)
    return dataclasses.replace(given, base=base, linear_scorer=linear, capture=capture)


def proposal_text(
    results: Mapping[str, Any], given: RunConfig, start: RunConfig, run_dir: str | None
) -> str:
    """A preset file; `run_dir` None: it is not named there."""
    proposed = proposed_config(results, given, start)
    sections = differing_settings(proposed, start)
    measured = {name: getattr(proposed.base, name) for name in _MEASURED}
    base = measured | sections.pop("base", {})
    return to_preset_file(
        _heading(results["texts"]),
        {"preset": start.preset} | ({} if run_dir is None else {"run_dir": run_dir}),
        {"base": base, **sections},
        {
            "base.model": [f"{results['num_layers']} blocks, d_model {results['d_model']}."],
            "base.layer": _layer_sources(results),
            "base.injection_norm": [_norm_source(results)],
            "base.marker": _marker_sources(results["marker"]),
        },
    )


def _wrapped(text: str) -> list[str]:
    """Lines of a comment."""
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _heading(texts: Mapping[str, Any]) -> list[str]:
    return _wrapped(
        "A preset that jobs/inspect_base.py proposes. Every job takes this file as --preset, and"
        " flags override it; what it does not name is as in the preset it starts from. Measured"
        f" on {texts['train']:,} train and {texts['validation']:,} validation texts, positions"
        f" {toml_value(texts['positions'])}; inspection.json of the run has all of it. A value"
        " without a source is one that the inspection was called with."
    )


def _layer_sources(results: Mapping[str, Any]) -> list[str]:
    lines = _wrapped(
        "The layer with the highest ceiling of those compared. Ceiling: how often gold labels,"
        " through a ridge regression, pick their activation out of ten validation activations; the"
        " penalty was chosen on the same texts, so it serves to choose a layer and is no evidence."
        " Words: the share of a linear probe's best words that the text has; of the mean, where it"
        " reads the mean over the text's tokens (--base.injected activation text_mean,"
        " --capture.text-mean). All with 95% intervals over families."
    )
    lines.append(
        "layer  ceiling               words, best 3         of the mean, best 3   mean norm"
    )
    for layer, inspected in results["layers"].items():
        probe = inspected["probe"]
        of_mean = inspected.get("probe_text_mean", {})
        figures = inspected["ceiling"]["top1_10way"], probe.get("3"), of_mean.get("3")
        cells = "  ".join(f"{_figure(figure):<20}" for figure in figures)
        lines.append(f"{layer:>5}  {cells}  {inspected['mean_norm']:9.1f}")
    return lines


def _figure(figure: Mapping[str, float] | None) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure) if figure else "-"


def _norm_source(results: Mapping[str, Any]) -> str:
    inspected = results["layers"][str(results["proposed_layer"])]
    low, high = (inspected["norm_quantiles"][share] for share in ("0.01", "0.99"))
    return (
        f"The mean norm at layer {results['proposed_layer']}, {inspected['mean_norm']:.1f}"
        f" (1% to 99%: {low:.1f} to {high:.1f}), rounded up."
    )


def _marker_sources(marker: Mapping[str, Any]) -> list[str]:
    left, right = marker["neighbours"]
    points = " ".join(f"U+{ord(character):04X}" for character in marker["found"])
    source = (
        f"{points}, id {marker['id']}: the tokenizer's rarest character that is one token in both"
        f" prompts. The verbalizer's prompt has it between the ids {left} and {right}."
    )
    if marker["configured"] != marker["found"]:
        source += f" The inspection was called with {toml_value(marker['configured'])}."
    return _wrapped(source)
