"""The sections whose figures stand along an axis: steps, labels, layers, tokens, choices, samples.

A chart and the table of its numbers are made from the same points. Computes no figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nla_ray.report.claim_confidence import KEPT_FROM
from nla_ray.report.rendering.checks import NOT_MEASURED
from nla_ray.report.rendering.content import (
    Cell,
    ChartGroup,
    Choice,
    Column,
    LineChart,
    ReportBlock,
    Section,
    Series,
    Table,
    TableRow,
    number,
)
from nla_ray.report.rendering.rows import Report, judge_first, keys_of, plain_columns
from nla_ray.report.rendering.vocabulary import SUPERVISED_TITLES, TRAINING_TITLES, spaced, title_of


@dataclass(frozen=True, kw_only=True)
class _GrowthAxis:
    """What figures grow along."""

    head: str
    """Of its column."""
    x_label: str
    title: str
    """Of its table."""
    explanation: str
    """In the section's intro."""


_GROWTH = {
    "labels": _GrowthAxis(
        head="labels",
        x_label="labels that SFT learned from",
        title="With the labels that SFT learned from",
        explanation="with the labels that SFT learned from (on these documents)",
    ),
    "steps": _GrowthAxis(
        head="step",
        x_label="step of GRPO",
        title="With the steps of GRPO, on validation",
        explanation="with the steps of GRPO (greedy descriptions of validation documents)",
    ),
    "layers": _GrowthAxis(
        head="layer",
        x_label="layer",
        title="The gold ceiling by layer, on validation",
        explanation=(
            "with the layer that is read (what labels say of validation activations, through a"
            " ridge regression)"
        ),
    ),
}
"""By axis."""
Points = Mapping[str, Mapping[float, Mapping[str, Any] | None]]
"""name of a line -> x -> figure."""
_WARNED = "monitor/warned"
"""1 in the record of a step at which the monitor warned."""
_WARNED_EXPLANATION = (
    "Dashed vertical lines are steps at which the monitor warned of reward hacking: what is"
    " rewarded rose while the judge fell, by the paired interval of its difference to the best."
)


def to_point(x: float, figure: Mapping[str, Any] | None) -> dict[str, float | None]:
    """A figure as a point of a line."""
    figure = figure or {}
    return {"x": x, "y": figure.get("value"), "low": figure.get("low"), "high": figure.get("high")}


def lines_of(points: Points) -> list[Series]:
    """A line for each name; one without points is left out."""
    lines = []
    for name, by_x in points.items():
        if by_x:
            line = [to_point(x, figure) for x, figure in by_x.items()]
            lines.append(Series(name=name, points=line))
    return lines


def points_table(
    points: Points, *, title: str, head: str, choice: Choice, only: Literal["", "page"] = ""
) -> Table:
    """A row for each name, a column for each x at which any name has a point."""
    positions = sorted({x for by_x in points.values() for x in by_x})
    rows = []
    for name, by_x in points.items():
        cells: list[Cell] = [by_x.get(x) for x in positions]
        rows.append(TableRow(name=name, title=spaced(name), cells=cells))
    return Table(
        title=title,
        head=head,
        columns=plain_columns(f"{x:g}" for x in positions),
        rows=rows,
        choice=choice,
        is_folded=True,
        only=only,
    )


# Training -----------------------------------------------------------------------------------------


def training_section(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section:
    """What training wrote down step by step: GRPO's arms together, then SFT and the scorers."""
    reinforced, supervised = {}, {}
    for name, records in training.items():
        if any("reward" in record or "monitor/rewarded" in record for record in records):
            reinforced[name] = records
        elif records:
            supervised[name] = records
    blocks: list[ReportBlock] = []
    for written, titles in ((reinforced, TRAINING_TITLES), (supervised, SUPERVISED_TITLES)):
        if written:
            blocks += [_training_charts(written, titles), _training_table(written, titles)]
    return Section(
        id="curves",
        name="Training",
        title="Training",
        how_to_read=_WARNED_EXPLANATION if _warns(training) else "",
        blocks=blocks,
    )


def _warns(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    return any(record.get(_WARNED) == 1 for records in training.values() for record in records)


def _training_charts(
    training: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]
) -> ChartGroup:
    """Small charts over one axis of steps, one for each figure that any record has."""
    steps = [record["step"] for records in training.values() for record in records]
    rules = []
    for name, records in training.items():
        for record in records:
            if record.get(_WARNED) == 1:
                title = f"{spaced(name)}: warning at step {record['step']:g}"
                rules.append({"x": record["step"], "series": name, "title": title})
    charts = []
    for key, title in titles.items():
        series = []
        for name, records in training.items():
            points = [
                _record_point(record, key) for record in records if record.get(key) is not None
            ]
            if points:
                series.append(Series(name=name, points=points))
        if series:
            chart = LineChart(
                label=f"{title} by step",
                caption=title,
                series=series,
                x_domain=[min(steps), max(steps)],
                rules=rules,
                x_label="step",
                height=184,
            )
            charts.append(chart)
    return ChartGroup(charts=charts, legend=list(training))


def _training_table(
    training: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]
) -> Table:
    """Where every curve begins and ends."""
    rows = []
    for name, records in training.items():
        for key, title in titles.items():
            steps = [record for record in records if record.get(key) is not None]
            if steps:
                cells: list[Cell] = [title]
                for record in (steps[0], steps[-1]):
                    cells += [int(record["step"]), record[key]]
                rows.append(TableRow(name=name, title=spaced(name), cells=cells))
    return Table(
        title="first and last of " + ", ".join(spaced(name) for name in training),
        head="artifact",
        columns=plain_columns(["figure", "first step", "value", "last step", "value then"]),
        rows=rows,
        is_folded=True,
    )


def _record_point(record: Mapping[str, Any], key: str) -> dict[str, float | None]:
    return {
        "x": record["step"],
        "y": record[key],
        "low": record.get(f"{key}_low"),
        "high": record.get(f"{key}_high"),
    }


# Growth -------------------------------------------------------------------------------------------


def growth_section(report: Report) -> Section:
    """How figures grow along every axis that the report has."""
    blocks: list[ReportBlock] = []
    for axis, by_series in report.get("growth", {}).items():
        words = _GROWTH[axis]
        names = judge_first(by_series)
        figures = keys_of(measured for curve in by_series.values() for measured in curve)
        figures.remove("at")
        for figure in figures:
            points = {
                name: {measured["at"]: measured.get(figure) for measured in by_series[name]}
                for name in names
            }
            label = f"{title_of(figure)} by {words.x_label}"
            chart = LineChart(series=lines_of(points), label=label, x_label=words.x_label)
            choice = {f"figure by {words.head}": figure}
            blocks.append(ChartGroup(charts=[chart], legend=names, choice=choice))
        rows = []
        for name in names:
            for measured in by_series[name]:
                cells = [measured["at"], *(measured.get(figure) for figure in figures)]
                rows.append(TableRow(name=name, title=spaced(name), cells=cells))
        columns = [Column(name=name, title=title_of(name)) for name in (words.head, *figures)]
        table = Table(title=words.title, head="of", columns=columns, rows=rows, is_folded=True)
        blocks.append(table)
    return Section(
        id="growth",
        name="Growth",
        title="How results grow",
        intro=_growth_intro(report.get("growth", {})),
        blocks=blocks,
    )


def _growth_intro(axes: Iterable[str]) -> str:
    """What the axes that are shown mean."""
    explanations = "; ".join(_GROWTH[axis].explanation for axis in axes)
    return f"{explanations[:1].upper()}{explanations[1:]}." if explanations else ""


# Along tokens, choices and samples ----------------------------------------------------------------


def prefix_section(report: Report) -> Section:
    """Scores of descriptions cut after so many tokens."""
    prefix = report.get("prefix", {})
    blocks: list[ReportBlock] = []
    for scorer in judge_first(keys_of(prefix.values())):
        curves = {name: by_scorer.get(scorer) or [] for name, by_scorer in prefix.items()}
        metrics = keys_of(measured for curve in curves.values() for measured in curve)
        for metric in metrics:
            if metric == "tokens":
                continue
            points = {
                name: {measured["tokens"]: measured.get(metric) for measured in curve}
                for name, curve in curves.items()
            }
            title = title_of(metric)
            chart = LineChart(
                series=lines_of(points), label=f"{title} by tokens kept", x_label="tokens kept"
            )
            choice = {"scorer": scorer, "metric": metric}
            is_main = scorer == "judge" and metric == "centred_cosine"
            table = points_table(
                points,
                title=f"{scorer}: {title} of the first tokens",
                head="verbalizer",
                choice=choice,
                only="" if is_main else "page",
            )
            blocks += [ChartGroup(charts=[chart], legend=list(prefix), choice=choice), table]
    return Section(
        id="prefix",
        name="Prefix",
        title="Score by number of tokens kept",
        intro="Descriptions cut after so many tokens: where the information stands.",
        blocks=blocks,
    )


def retrieval_section(report: Report) -> Section:
    """How often the right activation is nearest among k."""
    retrieval = report.get("retrieval", {})
    blocks: list[ReportBlock] = []
    for scorer in judge_first(keys_of(retrieval.values())):
        points = {}
        for name, by_scorer in retrieval.items():
            found = by_scorer.get(scorer, [])
            points[name] = {measured["k"]: measured["top1"] for measured in found}
        sizes = sorted({size for by_size in points.values() for size in by_size})
        chance = Series(name="chance", points=[to_point(k, {"value": 1 / k}) for k in sizes])
        chart = LineChart(
            series=lines_of(points),
            label="Top-1 among k activations",
            x_label="k, the number of activations",
            is_logarithmic=True,
            reference=chance,
        )
        table = points_table(
            points,
            title=f"{scorer}: top-1 among k activations",
            head="verbalizer",
            choice={"scorer": scorer},
            only="" if scorer == "judge" else "page",
        )
        group = ChartGroup(charts=[chart], legend=list(retrieval), choice={"scorer": scorer})
        blocks += [group, table]
    return Section(
        id="retrieval",
        name="Retrieval",
        title="Finding the activation among k",
        intro=(
            "Share of descriptions whose reconstruction is nearest to the right one of k"
            " activations, by centred cosine."
        ),
        blocks=blocks,
    )


def best_of_section(report: Report) -> Section:
    """What the best of N samples by the reward scorer is worth, by every scorer."""
    best_of = report.get("best_of", [])
    scorers = judge_first(name for name in keys_of(best_of) if name != "samples")
    blocks: list[ReportBlock] = []
    for metric in keys_of(best[scorer] for best in best_of for scorer in scorers):
        points = {
            scorer: {best["samples"]: (best[scorer] or {}).get(metric) for best in best_of}
            for scorer in scorers
        }
        title = title_of(metric)
        chart = LineChart(
            series=lines_of(points),
            label=f"{title} by samples",
            x_label="samples",
            is_logarithmic=True,
        )
        table = points_table(
            points,
            title=f"{title} of the best of N",
            head="under the scorer",
            choice={"metric": metric},
        )
        group = ChartGroup(charts=[chart], legend=scorers, choice={"metric": metric})
        blocks += [group, table]
    return Section(
        id="best_of",
        name="Best of N",
        title="Best of N samples by the reward scorer",
        intro=(
            "The reward scorer chooses among N sampled descriptions; the others say what the choice"
            " was worth."
        ),
        blocks=blocks,
    )


def calibration_section(report: Report) -> Section:
    """What the judge finds for descriptions of rising confidence."""
    bins = report.get("calibration", [])
    figures = [name for name in keys_of(bins) if not name.startswith("confidence")]
    ends = [bin[key] for bin in bins for key in ("confidence_low", "confidence_high")]
    x_label = "confidence (middle of the bin)"
    charts = []
    for figure in figures:
        title = title_of(figure.replace("_", ".", 1))
        points = [_bin_point(bin, figure) for bin in bins]
        chart = LineChart(
            label=f"{title} by confidence",
            caption=title,
            series=[Series(name=title, points=points)],
            x_label=x_label,
            x_domain=[min(ends), max(ends)],
        )
        charts.append(chart)
    rows = []
    for bin in bins:
        title = f"{bin['confidence_low']:.3f} to {bin['confidence_high']:.3f}"
        rows.append(TableRow(name="", title=title, cells=[bin.get(figure) for figure in figures]))
    confidence = report.get("confidence")
    if bins and confidence:
        cells = [confidence["judge"].get(figure.removeprefix("judge_")) for figure in figures]
        title = "more confident half less the rest"
        rows.append(TableRow(name="", title=title, cells=cells))
    columns = [Column(name=name, title=title_of(name.replace("_", ".", 1))) for name in figures]
    table = Table(
        title="The greedy description by confidence",
        head="confidence",
        columns=columns,
        rows=rows,
        is_folded=True,
    )
    intro = (
        "What the judge finds for descriptions of rising confidence: how far"
        f" {_sample_count(confidence)} samples agree, which is no probability."
    )
    if confidence:
        correlation = number(confidence["rank_correlation"])
        intro += f" Its rank correlation with the judge's centred cosine is {correlation}."
    return Section(
        id="calibration",
        name="Calibration",
        title="Calibration",
        intro=intro,
        blocks=[ChartGroup(charts=charts, is_wide=True), table] if bins else [],
    )


def word_curve_section(report: Report) -> Section:
    """How many of a description's first claims are in the text, beside the words of a probe."""
    curve: Mapping[str, Any] = report.get("word_curve") or {}
    chart = ChartGroup(charts=[word_chart(report)], legend=list(curve), is_wide=True)
    table = points_table(
        {
            name: {number: point["found"] for number, point in enumerate(points, 1)}
            for name, points in curve.items()
        },
        title="Share of the first claims that is in the text",
        head="first claims",
        choice={},
    )
    return Section(
        id="word_curve",
        name="Words",
        title="Words in the text by their number",
        intro=(
            "A description's first claims, as they are said, and the best words of the linear"
            " probe, at most as many as GRPO's description claims: the share of them that is in the"
            " text. A line ends where descriptions hardly claim more."
        ),
        blocks=[chart, table] if curve else [],
    )


def word_chart(report: Report) -> LineChart:
    """The lines of that section; none of an earlier version's report."""
    curve: Mapping[str, Any] = report.get("word_curve") or {}
    return LineChart(
        series=lines_of(
            {name: {p["words"]: p["found"] for p in points} for name, points in curve.items()}
        ),
        label="Claims in the text by number of claims",
        caption="share of claims in the text",
        x_label="claims of a description, mean",
    )


def claim_confidence_section_of(report: Report) -> Section:
    """Whether claims are found as often as their confidence says, and what keeping some gives."""
    measured: Mapping[str, Any] = report.get("claim_confidence") or {}
    points = [to_point(bin["confidence"], bin["found"]) for bin in measured.get("bins", [])]
    reliability = LineChart(
        label="Claims in the text by confidence",
        caption="claims in the text",
        series=[Series(name="claims in the text", points=points)],
        x_label="confidence",
        x_domain=[0.0, 1.0],
        reference=Series(name="as it says", points=[{"x": x, "y": x} for x in (0.0, 1.0)]),
    )
    intro = "How likely each claim is in the text, by a regression fitted to validation."
    if measured:
        intro += (
            f" {measured['claims']} claims; calibration error"
            f" {number(measured['calibration_error'])}."
        )
    charts = ChartGroup(charts=[reliability], is_wide=True)
    return Section(
        id="claim_confidence",
        name="Claims kept",
        title="Confidence by claim",
        intro=intro,
        blocks=[charts, *_claim_tables(measured)] if measured else [NOT_MEASURED],
    )


def _claim_tables(measured: Mapping[str, Any]) -> list[Table]:
    """What is kept from a confidence on, the Brier score, and the points of the chart."""
    columns = [Column(name="share", title="share of claims")]
    columns += [Column(name="precision", title="of them in the text")]
    kept = [
        TableRow(
            name="",
            title=f"from {least}",
            cells=[measured[name].get(column.name) for column in columns],
        )
        for name, least in KEPT_FROM.items()
        if name in measured
    ]
    brier = [
        TableRow(name="", title=title, cells=[measured.get(name)])
        for name, title in (("brier", "of each claim"), ("brier_constant", "the same for all"))
    ]
    found = [
        TableRow(name="", title=number(bin["confidence"]), cells=[bin["claims"], bin["found"]])
        for bin in measured["bins"]
    ]
    return [
        Table(
            title="Claims kept",
            head="confidence",
            columns=columns,
            rows=kept,
            on_terminal=[column.name for column in columns],
        ),
        Table(
            title="Brier score",
            head="confidence",
            columns=plain_columns(["Brier score"]),
            rows=brier,
        ),
        Table(
            title="Claims in the text by confidence",
            head="mean confidence",
            columns=plain_columns(["claims", "in the text"]),
            rows=found,
            is_folded=True,
        ),
    ]


def _bin_point(bin: Mapping[str, Any], figure: str) -> dict[str, float | None]:
    return to_point((bin["confidence_low"] + bin["confidence_high"]) / 2, bin.get(figure))


def _sample_count(confidence: Mapping[str, Any] | None) -> str:
    return str(confidence["samples"]) if confidence else "several"
