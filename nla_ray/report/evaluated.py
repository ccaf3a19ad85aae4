"""`Evaluated`: the test activations, everything that was said of them, and what scorers read in it.

Pure: it knows neither models nor files. `gathering.py` fills it, `summary.py` and `gallery.py` read
it. Protects the rule that a text is read once: `texts_to_read` names every text whose
reconstruction any figure asks for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from nla_ray.report.claim_figures import claim_figures
from nla_ray.report.controls import SCORERS, SOURCE
from nla_ray.report.pairing import comparable_pairs
from nla_ray.score import claims
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.metrics import Figure, figures

if TYPE_CHECKING:
    from nla_ray.description.protocol import GenerationProtocol
    from nla_ray.description.record import Description
    from nla_ray.report.claim_confidence import JudgedClaims
    from nla_ray.report.differences import Differences
    from nla_ray.report.readings import Readings
    from nla_ray.report.recovered import PatchBack


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """The same test rows at a further layer, and what was said of them there."""

    comparisons: Comparisons
    """Of the layer's activations."""
    descriptions: Mapping[str, Sequence[Description]]
    """By verbalizer, `gold` among them."""
    read: Mapping[str, Tensor]
    """What the linear scorer fitted to the layer reads in them: [rows, d_model], by verbalizer;
    none where it was not fitted."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The test rows and everything that was said of them; every list has one entry a row."""

    doc_ids: Sequence[str]
    family_ids: Sequence[str]
    """Of the documents: what every interval draws."""
    domains: Sequence[str]
    texts: Sequence[str]
    salient: Sequence[Sequence[str]]
    """The most salient words of each text."""
    comparisons: Comparisons
    descriptions: Mapping[str, Sequence[Description]]
    """By verbalizer."""
    protocols: Mapping[str, GenerationProtocol | None] = field(default_factory=dict)
    """How they were generated, by verbalizer; None or no entry: that is not recorded."""
    from_elsewhere: Collection[str] = ()
    """Verbalizers that are not the run's own."""
    readings: Readings
    """Of all `texts_to_read`."""
    domain_names: Mapping[str, str]
    """Slug -> the name a description may use."""
    samples: Sequence[Sequence[Description]] = ()
    """N samples of the arm of GRPO for each row; empty when none were drawn."""
    prefix_rows: Sequence[int] = ()
    """The rows whose descriptions are also read in part."""
    prefixes: Mapping[str, Mapping[int, Sequence[str]]]
    """Verbalizer -> number of tokens -> the descriptions of those rows cut to them."""
    cut: Mapping[tuple[str, str], tuple[Sequence[Description], Sequence[Description]]] = field(
        default_factory=dict
    )
    """Two verbalizers -> the descriptions of both, cut to the shorter one's tokens row by row."""
    refreshed: Readings | None = None
    """What the refreshed scorer reads in what the run's verbalizers and the labels say; None: the
    report is made without it."""
    reworded: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Verbalizer -> form of rewording -> the descriptions of `reworded_rows` reworded."""
    reworded_rows: Sequence[int] = ()
    """The rows whose descriptions are also read reworded."""
    probed: Sequence[Sequence[str]] = ()
    """Words that a linear probe reads in each activation, best first."""
    patched: PatchBack | None = None
    """What the base said with reconstructions put back; None: that was not measured."""
    differences: Differences | None = None
    """What is said of differences of two rows; None: none were asked for."""
    sampled: str
    """The verbalizer that the samples are of."""
    judged_claims: JudgedClaims | None = None
    """The claims of its greedy descriptions, how likely each is; None: nobody has said."""
    layer: int | None = None
    """The layer that all of this is about; None: not told."""
    layers: Mapping[int, LayerRows] = field(default_factory=dict)
    """Further layers that the verbalizers have learned to describe."""

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Which verbalizers are compared row by row: see `report.pairing`."""
        return comparable_pairs(list(self.descriptions), self.protocols, self.from_elsewhere)

    @cached_property
    def geometry(self) -> dict[str, dict[str, dict[str, Figure]]]:
        """verbalizer -> scorer -> metric, and figure of patch-back where that was measured."""
        geometry: dict[str, dict[str, dict[str, Figure]]] = {}
        for name in self.descriptions:
            texts = self.texts_of(name)
            geometry[name] = {
                scorer: {
                    **figures(self.read(scorer, texts), self.comparisons),
                    **self._patch_figures(name, scorer),
                }
                for scorer in SCORERS
            }
        return geometry

    def _patch_figures(self, verbalizer: str, scorer: str) -> dict[str, Figure]:
        if self.patched is None:
            return {}
        return self.patched.figures(verbalizer, scorer, len(self.doc_ids))

    @cached_property
    def claims(self) -> dict[str, dict[str, Figure]]:
        """verbalizer -> figure of CLAIM_FIGURES."""
        return {name: claim_figures(self, name) for name in self.descriptions}

    def texts_of(self, verbalizer: str) -> list[str]:
        """What a verbalizer says, row by row."""
        return [description.text for description in self.descriptions[verbalizer]]

    def read(self, scorer: str, texts: Sequence[str]) -> Tensor:
        """Reconstructions [texts, d_model]."""
        return self.readings.of(scorer, texts)


def texts_to_read(
    descriptions: Mapping[str, Sequence[Description]],
    samples: Sequence[Sequence[Description]],
    prefixes: Mapping[str, Mapping[int, Sequence[str]]],
    cut: Iterable[tuple[Sequence[Description], Sequence[Description]]] = (),
    reworded: Iterable[Mapping[str, Sequence[str]]] = (),
) -> set[str]:
    """Everything that the readings of an `Evaluated` must hold."""
    wanted: set[str] = set()
    for name, described in descriptions.items():
        for description in described:
            forms = forms_of(description.text)
            wanted.update(forms[:1] if name == SOURCE else forms)
    for by_form in (*prefixes.values(), *reworded):
        for texts in by_form.values():
            wanted.update(texts)
    for both in cut:
        for described in both:
            wanted.update(description.text for description in described)
    for drawn in samples:
        wanted.update(sample.text for sample in drawn)
    return wanted


def forms_of(text: str) -> tuple[str, str]:
    """A description whole, and with its quoted strings stripped.

    >>> forms_of('- licence: "as is", copy')
    ('- licence: "as is", copy', '- licence: , copy')
    """
    return text, claims.strip_quotes(text)
