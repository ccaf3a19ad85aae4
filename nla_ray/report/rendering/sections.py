"""The report, section by section: what is shown, under which title, in which order.

It chooses and names figures of the report's dictionary and computes none. What belongs to charts
along an axis is in `curves.py`, what belongs to domains in `domains.py`. The rule it protects: what
one renderer shows, all can show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla_ray.report.rendering import (
    checks,
    curves,
    differences,
    domains,
    layers,
    lengths,
    protocols,
    refreshed,
    seeds,
)
from nla_ray.report.rendering.content import (
    Bullets,
    Cell,
    ChartGroup,
    Column,
    Definitions,
    DrawnExamples,
    Gallery,
    IntervalChart,
    IntervalMark,
    IntervalRow,
    ReportBlock,
    Section,
    Table,
    TableRow,
    Warnings,
    interval,
    shows_nothing,
)
from nla_ray.report.rendering.rows import (
    Report,
    figure_columns,
    judge_first,
    keys_of,
    plain_columns,
    scored_figures,
    scorer_tables,
    verbalizer_rows,
)
from nla_ray.report.rendering.vocabulary import (
    DEFINITIONS,
    MAIN_METRICS,
    PATCH_TITLES,
    SIGNS,
    TITLES,
    spaced,
    title_of,
)

_TERMINAL_METRICS = (
    "top1",
    "top1_2way",
    "top1_10way",
    "top1_10way_hard",
    "centred_cosine",
    "delta",
)
_TERMINAL_CLAIMS = ("precision", "precision_excess", "domain", "repeats", "tokens")
_SELECTION_FIGURES = ("eval_loss", "eval_centred_cosine", "penalty")
_PUBLISHED_FIGURES = (
    "monitor/judge_centred_cosine",
    *(f"monitor/judge_gain{end}" for end in ("", "_low", "_high")),
)
"""Of the reading whose checkpoint is published; the gain is on the best reading before it."""
_RELATIONS = {">=": "≥", "<=": "≤"}


def sections(
    report: Report,
    training: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    gallery: Sequence[Mapping[str, Any]] = (),
) -> list[Section]:
    """Every section that there is something to show in, in the order of reading.

    `training`: records of metrics.jsonl by artifact. `gallery`: one row for each activation.
    """
    written = [
        _warnings_section(report),
        _results_section(report),
        _gates_section(report),
        _paired_section(report),
        seeds.seeds_section(report),
        _claims_section(report),
        layers.layers_section(report),
        checks.probe_section_of(report),
        curves.word_curve_section(report),
        curves.claim_confidence_section_of(report),
        checks.patch_back_section(report),
        _agreement_section(report),
        refreshed.refreshed_section(report),
        differences.differences_section(report),
        curves.training_section(training or {}),
        curves.growth_section(report),
        domains.domains_section(report),
        domains.confusion_section(report),
        curves.prefix_section(report),
        lengths.lengths_section(report),
        curves.retrieval_section(report),
        _quotes_section(report),
        checks.wording_section_of(report),
        curves.best_of_section(report),
        curves.calibration_section(report),
        _examples_section(report),
        _gallery_section(gallery),
        _selection_section(report),
        _experiments_section(report),
        _lineage_section(report),
        protocols.protocols_section(report),
        _notes_section(report),
        _definitions_section(),
    ]
    return [section for section in written if section.blocks]


def opening(report: Report) -> list[str]:
    """What the report is about, a sentence a line."""
    base = report["base"]
    evidence = (
        "no ancestor learned from or chose on any of them"
        if report["split"] == "test"
        else "settings and checkpoints are chosen on them, so this is no evidence"
    )
    return [
        f"Base model: {base['name']} (digest {base['digest'][:12]}), layer {base['layer']} of"
        f" {base['num_layers']}, d_model {base['d_model']}, injection norm"
        f" {base['injection_norm']:g}",
        f"Evaluated: {report['n']} activations of {report['documents']} {report['split']}"
        f" documents in {report.get('families', report['documents'])} families; {evidence}",
        _families_sentence(report.get("corpus", {})),
        "Documents left out, by choice of number or because they nearly repeat one that the base"
        f" was pretrained on: {report['documents_left_out']}",
        "Every figure: value [95% interval], bootstrap over families,"
        f" {report['resamples']:,} resamples",
        "Failed, truncated and empty descriptions are scored as they are; greedy decoding",
        "The judge scorer shares no train document with the reward scorer; its scores never train"
        " the verbalizer",
    ]


def _families_sentence(corpus: Mapping[str, Any]) -> str:
    if not corpus:
        return (
            "Families: each document, since the corpus was made before shared text was looked for"
        )
    covered = corpus["held_out_in_train"]
    return (
        f"Families: of the corpus {corpus['joined_documents']:,} documents that share text are"
        f" joined in {corpus['joined_families']:,}, each in one split; held-out texts of which half"
        f" or more is in train texts: {covered['validation']} of validation, {covered['test']} of"
        " test"
    )


def gates_passed(report: Report) -> tuple[int, int]:
    """How many gates passed, and how many there are."""
    return sum(gate["passed"] for gate in report["gates"]), len(report["gates"])


# Sections of figures ------------------------------------------------------------------------------


def _results_section(report: Report) -> Section:
    """A table for each scorer: a row for each verbalizer."""
    metrics = [name for name in scored_figures(report) if name not in PATCH_TITLES]
    metrics = list(dict.fromkeys([name for name in MAIN_METRICS if name in metrics] + metrics))
    tables = scorer_tables(
        report,
        metrics,
        title="Under the {} scorer",
        main=MAIN_METRICS,
        on_terminal=lambda scorer: _TERMINAL_METRICS,
    )
    return Section(
        id="results",
        name="Results",
        title="What the descriptions are worth",
        intro=(
            "A scorer reads a description and reconstructs the activation it was made from. The"
            " judge pays no verbalizer; on validation it chose the checkpoint of GRPO."
        ),
        how_to_read=(
            "Bars are 95% intervals over families; the dashed tick is chance. Controls are set in"
            " grey."
        ),
        blocks=tables,
    )


def _gates_section(report: Report) -> Section:
    """One row for each gate; `bound` is the end of the 95% interval that is worse for the claim."""
    rows = []
    for gate in report["gates"]:
        relation = _RELATIONS.get(gate["relation"], gate["relation"])
        bound = "–" if gate["value"] is None else f"{gate['value']:.4f}"
        cells: list[Cell] = [bound, f"{relation} {gate['threshold']:g}", gate["passed"]]
        rows.append(TableRow(name=gate["name"], title=gate["name"], cells=cells))
    table = Table(
        title="Gates",
        head="figure",
        columns=plain_columns(["bound", "wanted", "verdict"]),
        rows=rows,
        look="gates",
        on_terminal=("bound", "wanted", "verdict"),
    )
    return Section(
        id="gates",
        name="Gates",
        title="Gates",
        intro=(
            "Each compares the end of a 95% interval that is worse for the claim with a threshold"
            " fixed beforehand."
        ),
        blocks=[table] if rows else [],
    )


def _paired_section(report: Report) -> Section:
    """Differences on the same activations and resamples, by scorer and of what is claimed."""
    paired = report.get("paired", {})
    blocks: list[ReportBlock] = []
    for scorer in judge_first(keys_of(paired.values())):
        blocks += [_paired_charts(paired, scorer), _paired_table(report, scorer)]
    return Section(
        id="paired",
        name="Differences",
        title="Paired differences",
        intro="The same activations and the same resamples for both.",
        how_to_read=(
            "Right of the line the first is better for figures where more is better; a hollow mark"
            " means that the interval holds zero."
        ),
        blocks=blocks,
    )


def _paired_table(report: Report, scorer: str) -> Table:
    paired = report["paired"]
    metrics = keys_of(by_scorer.get(scorer) for by_scorer in paired.values())
    metrics = list(dict.fromkeys([name for name in MAIN_METRICS if name in metrics] + metrics))
    columns = figure_columns({}, metrics, metrics)
    ratios = {}
    for pair, by_scorer in report.get("ratios", {}).items():
        ratios[pair.replace("/", "-")] = by_scorer.get(scorer, {}).get("delta")
    rows = []
    for pair, by_scorer in paired.items():
        if scorer in by_scorer:
            cells: list[Cell] = [by_scorer[scorer].get(metric) for metric in metrics]
            if scorer != "claims":
                cells.append(ratios.get(pair))
            rows.append(TableRow(name=pair, title=_difference(pair), cells=cells))
    if scorer != "claims":
        columns += plain_columns(["ratio of deltas"])
    return Table(
        title="Of claims" if scorer == "claims" else f"Under the {scorer} scorer",
        head="difference",
        columns=columns,
        rows=rows,
        look="figures",
        choice={"scorer": scorer},
        is_folded=True,
    )


def _paired_charts(paired: Mapping[str, Any], scorer: str) -> ChartGroup:
    charts = []
    for metric in keys_of(by_scorer.get(scorer) for by_scorer in paired.values()):
        rows = []
        for pair, by_scorer in paired.items():
            figure = by_scorer.get(scorer, {}).get(metric)
            if shows_nothing(figure):
                continue
            mark = IntervalMark(
                title=_difference(pair),
                series=pair.split("-")[0],
                figure=figure,
                is_hollow=figure["low"] <= 0 <= figure["high"],
            )
            rows.append(IntervalRow(label=_difference(pair), note=interval(figure), marks=[mark]))
        title = title_of(metric)
        label = f"{title}: paired differences"
        charts.append(IntervalChart(label=label, caption=title, rows=rows, has_zero=True))
    return ChartGroup(charts=charts, choice={"scorer": scorer})


def _difference(pair: str) -> str:
    return " − ".join(spaced(name) for name in pair.split("-"))


def _claims_section(report: Report) -> Section:
    """What descriptions claim, by verbalizer."""
    claims = report["claims"]
    figures = keys_of(claims.values())
    cells = {
        name: [by_figure.get(figure) for figure in figures] for name, by_figure in claims.items()
    }
    table = Table(
        title="What the descriptions claim",
        head="verbalizer",
        columns=figure_columns(report, figures, figures),
        rows=verbalizer_rows(cells),
        look="figures",
        on_terminal=_TERMINAL_CLAIMS,
    )
    return Section(
        id="claims",
        name="Claims",
        title=table.title,
        intro="Read from the words alone, without a scorer.",
        blocks=[table] if claims else [],
    )


def _agreement_section(report: Report) -> Section:
    """How far two scorers say the same of single activations."""
    rows = []
    for name, by_pair in report.get("agreement", {}).items():
        for pair, both in by_pair.items():
            cells = [pair, both["top1"], both["centred_cosine"]]
            rows.append(TableRow(name=name, title=spaced(name), cells=cells))
    table = Table(
        title="Agreement of the scorers",
        head="verbalizer",
        columns=plain_columns(["scorers", "same 2-way outcome", "correlation of centred cosines"]),
        rows=rows,
    )
    return Section(
        id="agreement",
        name="Agreement",
        title=table.title,
        intro="How far two scorers say the same of single activations.",
        blocks=[table] if rows else [],
    )


# Texts, choices and origins -----------------------------------------------------------------------


def _warnings_section(report: Report) -> Section:
    """What a reader must know before any figure."""
    lines = report.get("warnings", [])
    blocks: list[ReportBlock] = [Warnings(lines)] if lines else []
    return Section(id="warnings", name="Warnings", title="Warnings", blocks=blocks)


def _quotes_section(report: Report) -> Section:
    """What quoted strings carry: what every scorer loses when they are stripped."""
    quotes = report.get("quotes", {})
    scorers = judge_first(name for name in keys_of(quotes.values()) if name != "quoting")
    columns = plain_columns(["descriptions that quote"])
    cells: dict[str, list[Cell]] = {name: [lost["quoting"]] for name, lost in quotes.items()}
    for scorer in scorers:
        for metric in keys_of(lost[scorer] for lost in quotes.values()):
            name = f"{scorer}.{metric}"
            columns.append(Column(name=name, title=title_of(name)))
            for verbalizer, lost in quotes.items():
                cells[verbalizer].append(lost[scorer].get(metric))
    table = Table(
        title="Lost when quoted strings are stripped",
        head="verbalizer",
        columns=columns,
        rows=verbalizer_rows(cells),
    )
    return Section(id="quotes", name="Quotes", title=table.title, blocks=[table] if cells else [])


def _examples_section(report: Report) -> Section:
    """Texts with what was said of them: rows of different domains, drawn by seed."""
    examples = report.get("examples", [])
    return Section(
        id="drawn",
        name="Examples",
        title="Examples",
        intro="Drawn by seed from different domains, not chosen by hand or by score.",
        blocks=[DrawnExamples(examples)] if examples else [],
    )


def _gallery_section(gallery: Sequence[Mapping[str, Any]]) -> Section:
    """Every text beside everything that was said of it."""
    blocks: list[ReportBlock] = [Gallery(len(gallery))] if gallery else []
    return Section(id="examples", name="Gallery", title="Texts and descriptions", blocks=blocks)


def _selection_section(report: Report) -> Section:
    """What was chosen on validation documents, and by which figure there."""
    rows = []
    for name, metrics in report.get("selection", {}).items():
        published = metrics.get("published", {})
        figures = {key: metrics[key] for key in _SELECTION_FIGURES if key in metrics}
        figures |= {key: published[key] for key in _PUBLISHED_FIGURES if key in published}
        step = metrics.get("best_step", metrics.get("published_step", "-"))
        step = f"{step:.0f}" if isinstance(step, float) else str(step)
        listed = ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) or "-"
        rows.append(TableRow(name=name, title=name, cells=[step, listed]))
    table = Table(
        title="Chosen on validation",
        head="artifact",
        columns=plain_columns(["step", "figures there"]),
        rows=rows,
    )
    return Section(id="selection", name="Chosen", title=table.title, blocks=[table] if rows else [])


def _experiments_section(report: Report) -> Section:
    """What was tried on validation before the preset's settings were chosen."""
    tried = report.get("experiments", [])
    figures = keys_of(experiment["minus_sft"] for experiment in tried)
    rows = []
    for experiment in tried:
        spread = experiment.get("spread", {})
        cells: list[Cell] = [experiment["minus_sft"].get(figure) for figure in figures]
        cells += [experiment["n"], experiment.get("seeds", 1)]
        cells += [spread.get(figures[0]), experiment["kept"]]
        rows.append(TableRow(name="", title=experiment["changed"], cells=cells))
    table = Table(
        title="Settings tried on validation: difference from SFT",
        head="changed",
        columns=plain_columns([*figures, "n", "seeds", "spread of the first", "kept"]),
        rows=rows,
    )
    return Section(
        id="experiments",
        name="Experiments",
        title=table.title,
        intro=(
            "Differences with the SFT verbalizer on the same validation activations, paired, with"
            " 95% intervals. Settings were chosen by these. An interval holds one training fixed;"
            " the spread is the standard deviation of the first figure over seeds, where several"
            " were trained."
        ),
        blocks=[table] if rows else [],
    )


def _lineage_section(report: Report) -> Section:
    """What the report was made from."""
    rows = []
    for name, artifact in report.get("lineage", {}).items():
        uses = ", ".join(f"{use} {count:,}" for use, count in artifact["documents"].items())
        origin = [artifact[key] for key in ("fingerprint", "config_hash", "created")]
        rows.append(TableRow(name=name, title=name, cells=[*origin, uses or "–"]))
    table = Table(
        title="Lineage",
        head="artifact",
        columns=plain_columns(["fingerprint", "configuration", "made", "documents"]),
        rows=rows,
    )
    return Section(
        id="lineage",
        name="Lineage",
        title="Lineage",
        intro=(
            "What the report was made from. No ancestor learned from a test document or was chosen"
            " on one."
        ),
        blocks=[table] if rows else [],
    )


def _notes_section(report: Report) -> Section:
    """What is missing, and what a reader of the descriptions wrote down."""
    lines = report.get("notes", [])
    blocks: list[ReportBlock] = [Bullets(lines)] if lines else []
    return Section(id="notes", name="Notes", title="Notes", blocks=blocks)


def _definitions_section() -> Section:
    """What every figure, verbalizer and scorer is."""
    entries = [(TITLES.get(name, spaced(name)), meaning) for name, meaning in DEFINITIONS.items()]
    return Section(
        id="definitions",
        name="Definitions",
        title="Definitions",
        intro=(
            f"{SIGNS} Every figure: value [95% interval], bootstrap over families. Failed,"
            " truncated and empty descriptions are scored as they are."
        ),
        blocks=[Definitions(entries)],
    )
