"""Differences of two test activations: what is said of them, and whether it tells them from others.

Of seeded pairs (a, b) of two families verbalizers describe n(a) - n(b). A scorer reads what they
say, and its reading, without the train mean, is compared with the difference itself:

    right_pair    share of readings nearer to it than to 9 others, n(x) - n(y), x of another family
    right_second  the same among 9 others with the same first, n(a) - n(y): whoever describes a
                  alone is at chance, 0.1
    pair_cosine   mean cosine with it

Beside a verbalizer stand what it says of a alone (`_of_first`), what only the first one's label
says (`gold`), and that of another pair (`shuffled`). Intervals draw families of a. It knows neither
models nor files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nla_ray.activation.vectors import beside_mean, direction_difference
from nla_ray.report.readings import Readings
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import NUM_OTHERS, Comparisons, family_pairs, rows_of_neither
from nla_ray.score.metrics import Figure, figures

if TYPE_CHECKING:
    from nla_ray.activation.bank import ActivationTable
    from nla_ray.report.evaluated import Evaluated

DIFFERENCE_FIGURES = {
    "right_pair": "top1_10way",
    "right_second": "top1_10way_hard",
    "pair_cosine": "centred_cosine",
}
"""Figure -> the metric that it is, where differences are what is compared."""
_NOT_OF_FIRST = "shuffled"
"""Says nothing of the first activation alone."""
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Pairs of test activations, each by its difference; every list has one entry a pair.

    Example: Differences(firsts=[3], seconds=[0], ids=["d@4:9 - a@4:7"], family_ids=["d"], ...)
    with said={"sft": ["- tokens: frame"]} is about n(row 3) - n(row 0).
    """

    firsts: Sequence[int]
    """a: rows of the report."""
    seconds: Sequence[int]
    """b."""
    ids: Sequence[str]
    family_ids: Sequence[str]
    """Of the first ones: what every interval draws."""
    injected: Tensor
    """[pairs, vectors, d_model]: what is described."""
    comparisons: Comparisons
    """Differences as `beside_mean` places them. The hard others have the same first."""
    said: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By verbalizer, `gold` and `shuffled` too: what is said of every difference."""
    readings: Readings = field(default_factory=lambda: Readings([], {}))
    """Of all that is said: apart from those of the report, whose figures it must not touch."""

    def __len__(self) -> int:
        return len(self.ids)


def of_first(verbalizer: str) -> str:
    """The name of what a verbalizer says of the first activation alone, where pairs are compared.

    >>> of_first("sft")
    'sft_of_first'
    """
    return f"{verbalizer}_of_first"


def draw_differences(
    test: ActivationTable, mean: Tensor, count: int, seed: int
) -> Differences | None:
    """`count` seeded pairs, each activation at most once as the first; None of 0.

    `mean`: mu. Raises ValueError for too few families.
    """
    if not count:
        return None
    firsts, seconds = family_pairs(test.family_ids, min(count, len(test)), seed)
    others = rows_of_neither(test.family_ids, firsts, seconds, NUM_OTHERS, seed)
    families = [test.family_ids[row] for row in firsts]
    starts = test.vectors[firsts]
    placed = beside_mean(direction_difference(starts, test.vectors[seconds]), mean)
    from_others = direction_difference(
        starts.repeat_interleave(NUM_OTHERS, dim=0), test.vectors[others.flatten()]
    )
    comparisons = Comparisons.draw(
        placed, [test.doc_ids[row] for row in firsts], mean, seed, family_ids=families
    )
    same_first = len(placed) + torch.arange(len(from_others)).reshape(others.shape)
    return Differences(
        firsts=firsts,
        seconds=seconds,
        ids=[f"{test.ids[a]} - {test.ids[b]}" for a, b in zip(firsts, seconds, strict=True)],
        family_ids=families,
        injected=direction_difference(test.injected[firsts], test.injected[seconds]),
        comparisons=dataclasses.replace(
            comparisons,
            pool=torch.cat([placed, beside_mean(from_others, mean)]),
            hard_others=same_first,
        ),
    )


def difference_section(evaluated: Evaluated, resamples: int, seed: int) -> dict[str, Any]:
    """`pairs`, their number; `results`, verbalizer -> scorer -> figure of DIFFERENCE_FIGURES.

    Also `paired`: `{first}-{second}` -> scorer -> figure, first less second; the `chance` of a
    figure; and `examples`, the first of the pairs. Empty for a report without differences.
    """
    differences = evaluated.differences
    if differences is None:
        return {}
    named: dict[str, dict[str, dict[str, Figure]]] = {}
    for name, texts in differences.said.items():
        named[name] = _figures(differences.readings, texts, differences.comparisons)
        if name != _NOT_OF_FIRST:
            of_rows = evaluated.texts_of(name)
            alone = [of_rows[row] for row in differences.firsts]
            named[of_first(name)] = _figures(evaluated.readings, alone, differences.comparisons)
    bootstrap = FamilyBootstrap(differences.family_ids, resamples, seed)
    return {
        "pairs": len(differences),
        "chance": dict.fromkeys(("right_pair", "right_second"), 1 / (1 + NUM_OTHERS)),
        "results": {
            name: {scorer: bootstrap.intervals(of_scorer) for scorer, of_scorer in found.items()}
            for name, found in named.items()
        },
        "paired": {
            f"{first}-{second}": {
                scorer: bootstrap.differences(of_scorer, named[second][scorer])
                for scorer, of_scorer in named[first].items()
            }
            for first, second in _compared_pairs(evaluated, named)
        },
        "examples": [_example(evaluated, differences, pair) for pair in range(_EXAMPLES)],
    }


def _figures(
    readings: Readings, texts: Sequence[str], comparisons: Comparisons
) -> dict[str, dict[str, Figure]]:
    """scorer -> figure of DIFFERENCE_FIGURES, of a text a pair."""
    by_scorer = {}
    for scorer in readings.scorers:
        found = figures(readings.of(scorer, texts), comparisons)
        by_scorer[scorer] = {name: found[metric] for name, metric in DIFFERENCE_FIGURES.items()}
    return by_scorer


def _compared_pairs(evaluated: Evaluated, named: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every verbalizer with the labels and with itself on the first one alone, then with others."""
    pairs = []
    for name in named:
        if of_first(name) in named:
            pairs += [(name, "gold")] if name != "gold" else []
            pairs.append((name, of_first(name)))
    return [*pairs, *(pair for pair in evaluated.pairs if set(pair) <= set(named))]


def _example(evaluated: Evaluated, differences: Differences, pair: int) -> dict[str, Any]:
    """As `examples` of activations are: both texts, and what is said of their difference."""
    first, second = differences.firsts[pair], differences.seconds[pair]
    return {
        "activation_id": differences.ids[pair],
        "domain": f"{evaluated.domains[first]} - {evaluated.domains[second]}",
        "text": f"{evaluated.texts[first]}\n\n-- less --\n\n{evaluated.texts[second]}",
        "descriptions": {name: texts[pair] for name, texts in differences.said.items()},
    }
