"""What a result owes to the seed: the figures of trainings that differ by their seed alone.

An interval over documents holds one training fixed; the spread over seeds does not. The trainings
are those of `--seeds`, and artifacts of finished runs named in `--compare` that prove by their
manifests, and those of what they were made from, that nothing but seeds is different.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nla_ray.report.compared import Compared
from nla_ray.report.controls import trained_in
from nla_ray.run.artifact import Run
from nla_ray.run.manifest import MANIFEST_NAME, Manifest
from nla_ray.run.recipe import recipe_of

Find = Callable[[str], Manifest | None]
"""The manifest of an artifact of one run, by its name."""
_SCORERS = ("judge", "claims")
"""Whose figures are shown by seed: those of nobody who was optimised against."""


def seed_section(
    summary: Mapping[str, Any],
    run: Run,
    manifests: Mapping[str, Manifest],
    compared: Sequence[Compared],
) -> dict[str, Any]:
    """`sft` or `grpo` -> `seeds` (verbalizer -> its seed), `figures` and `minus_sft`.

    `figures` and `minus_sft` hold `judge` and `claims` -> figure -> what `spread_of` makes of it. A
    training of one seed is left out.
    """
    section: dict[str, Any] = {}
    for stage in ("sft", run.config.grpo.artifact):
        seeds = _seeds_of(stage, run, manifests, compared)
        if len(seeds) < 2:
            continue
        named = {name: _own_figures(summary, name) for name in seeds}
        against = {name: summary["paired"].get(f"{name}-sft") for name in seeds}
        section[stage] = {"seeds": seeds, "figures": _spreads(named)}
        if all(against.values()):
            section[stage]["minus_sft"] = _spreads(against)
    return section


def spread_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every seed's figure, their mean, and their standard deviation (over n - 1), by name.

    >>> named = {"grpo": {"value": 0.5}, "grpo_seed1": {"value": 0.7}}
    >>> spread = spread_of(named)
    >>> round(spread["mean"], 3), round(spread["spread"], 3)
    (0.6, 0.141)
    """
    values = [figure["value"] for figure in figures.values()]
    return {
        "by_seed": dict(figures),
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values),
    }


def _own_figures(summary: Mapping[str, Any], verbalizer: str) -> dict[str, Any]:
    return {
        "judge": summary["results"][verbalizer]["judge"],
        "claims": summary["claims"][verbalizer],
    }


def _spreads(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    spreads: dict[str, dict[str, Any]] = {}
    for scorer in _SCORERS:
        shared = set.intersection(*(set(figures[scorer]) for figures in named.values()))
        first = next(iter(named.values()))
        spreads[scorer] = {
            metric: spread_of({name: named[name][scorer][metric] for name in named})
            for metric in first[scorer]
            if metric in shared
        }
    return spreads


# Which trainings differ by their seed alone -------------------------------------------------------


def _seeds_of(
    stage: str, run: Run, manifests: Mapping[str, Manifest], compared: Sequence[Compared]
) -> dict[str, int]:
    """Verbalizers that are this training under some seed, the run's own first, with their seeds."""
    own = manifests[stage]
    seeds = {stage: _seed_in(own)}
    for name in trained_in(manifests):
        if name != stage and differs_in_seed(manifests[name], own, run.find, run.find):
            seeds[name] = _seed_in(manifests[name])
    for verbalizer in compared:
        theirs = verbalizer.manifest
        if theirs and differs_in_seed(theirs, own, _finder(verbalizer), run.find):
            seeds[verbalizer.name] = _seed_in(theirs)
    return seeds


def differs_in_seed(theirs: Manifest, ours: Manifest, find_theirs: Find, find_ours: Find) -> bool:
    """Whether seeds are all that two artifacts, and all they were made from, differ in.

    What was made from nothing else, texts above all, must be the same. A training that was repeated
    under the same seeds is none: it would make the spread smaller than it is.
    """
    return bool(_seeds_differ(theirs, ours, find_theirs, find_ours))


def _seeds_differ(
    theirs: Manifest, ours: Manifest, find_theirs: Find, find_ours: Find
) -> bool | None:
    """Whether a seed differs anywhere; None: something else does."""
    if theirs.fingerprint == ours.fingerprint:
        return False
    if not ours.parents or theirs.parents.keys() != ours.parents.keys():
        return None
    recipes = [recipe_of(manifest.name, manifest.config) for manifest in (theirs, ours)]
    if _without_seeds(recipes[0]) != _without_seeds(recipes[1]):
        return None
    differ = recipes[0] != recipes[1]
    for name, fingerprint in ours.parents.items():
        if theirs.parents[name] == fingerprint:
            continue
        their_parent, our_parent = find_theirs(name), find_ours(name)
        if their_parent is None or our_parent is None:
            return None
        if their_parent.fingerprint != theirs.parents[name]:
            return None
        found = _seeds_differ(their_parent, our_parent, find_theirs, find_ours)
        if found is None:
            return None
        differ |= found
    return differ


def _without_seeds(recipe: Mapping[str, Any]) -> dict[str, Any]:
    without = {}
    for section, values in recipe.items():
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "seed"}
        without[section] = values
    return without


def _seed_in(manifest: Manifest) -> int:
    """The seed of the training itself."""
    section = "grpo" if "grpo" in manifest.config else "sft"
    return manifest.config[section]["seed"]


def _finder(verbalizer: Compared) -> Find:
    def find(name: str) -> Manifest | None:
        if verbalizer.run_folder is None:
            return None
        file = verbalizer.run_folder / name / MANIFEST_NAME
        return Manifest.from_json(file.read_text(), str(file)) if file.is_file() else None

    return find
