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
    """Whether two artifacts are of one recipe but for seeds, and all they were made from too.

    What was made from nothing else, texts above all, must be the same.
    """
    if theirs.fingerprint == ours.fingerprint:
        return False
    return _is_same_but_for_seeds(theirs, ours, find_theirs, find_ours)


def _is_same_but_for_seeds(
    theirs: Manifest, ours: Manifest, find_theirs: Find, find_ours: Find
) -> bool:
    if theirs.fingerprint == ours.fingerprint:
        return True
    if not ours.parents or theirs.parents.keys() != ours.parents.keys():
        return False
    if _without_seeds(theirs) != _without_seeds(ours):
        return False
    for name, fingerprint in ours.parents.items():
        if theirs.parents[name] == fingerprint:
            continue
        parents = find_theirs(name), find_ours(name)
        if None in parents or parents[0].fingerprint != theirs.parents[name]:
            return False
        if not _is_same_but_for_seeds(*parents, find_theirs, find_ours):
            return False
    return True


def _without_seeds(manifest: Manifest) -> dict[str, Any]:
    recipe = recipe_of(manifest.name, manifest.config)
    return {
        section: {name: value for name, value in values.items() if name != "seed"}
        if isinstance(values, dict)
        else values
        for section, values in recipe.items()
    }


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
