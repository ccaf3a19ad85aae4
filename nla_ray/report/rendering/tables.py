"""The report for people: Markdown for the file, rich tables for the terminal, both from the same
rows.

Knows the report's dictionary and which verbalizers are controls, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nla_ray.report.controls import CONTROLS

METRIC_TITLES = {
    "top1": "2-way top-1",
    "top1_2way": "2-way centred",
    "top1_10way": "10-way top-1",
    "top1_10way_hard": "10-way hard",
    "top1_100way": "100-way top-1",
    "top1_document": "in its document",
    "mrr_10way": "10-way MRR",
    "centred_cosine": "centred cosine",
    "correct_cosine": "cosine, correct",
    "garbage_cosine": "cosine, garbage",
    "delta": "delta",
    "fve": "FVE",
}
CLAIM_TITLES = {
    "precision": "words in text",
    "precision_shuffled": "in a shuffled text",
    "precision_excess": "in text, less shuffled",
    "hallucinated": "specifics not in text",
    "recall": "gold words named",
    "source_recall": "text's words named",
    "source_recall_shuffled": "a shuffled text's",
    "domain": "domain right",
    "repeats": "repeats an item",
    "distinct": "distinct",
    "similarity": "alike",
    "top_line": "commonest line",
    "non_ascii": "beyond ASCII",
    "unclosed": "unclosed",
    "empty": "empty",
    "tokens": "tokens",
}
DEFINITIONS = {
    "top1": (
        "share of cos(r, v) above cos(r, v'), v' a fixed activation of another document; a tie"
        " counts against; chance 0.5"
    ),
    "top1_2way": (
        "the same choice by centred cosine: raw, an activation that lies nearer to the mean fits"
        " every description better"
    ),
    "top1_10way": (
        "share of v ranked first among itself and 9 activations of other documents by centred"
        " cosine; chance 0.1"
    ),
    "top1_10way_hard": "the same among the 9 nearest activations of its domain",
    "top1_100way": "the same among 99 activations of other documents; chance 0.01",
    "top1_document": (
        "the same among the other positions of its document, over activations that have some"
    ),
    "mrr_10way": "mean of 1/rank in the 10-way choice; chance 0.29",
    "centred_cosine": (
        "mean cos(c(r), c(v)): what is left when the mean direction, which every activation shares,"
        " is taken away"
    ),
    "correct_cosine": "mean cos(r, v), raw: mostly the mean direction",
    "garbage_cosine": "mean cos(r, v'), raw",
    "delta": "correct - garbage",
    "fve": (
        "1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2: fraction of variance explained, not"
        " renormalised"
    ),
    "precision": (
        "share of a description's salient words that occur in its text; 0 for a description that"
        " claims nothing"
    ),
    "precision_shuffled": "the same against the text of another document",
    "precision_excess": "the difference of the two",
    "hallucinated": (
        "share of quoted strings, numbers, names and listed tokens that the text does not have"
    ),
    "recall": "share of the gold label's salient words that the description names too",
    "source_recall": (
        "share of the text's twelve most salient words (tf-idf over train texts) that the"
        " description names"
    ),
    "source_recall_shuffled": "the same for the words of another document's text",
    "domain": "share of descriptions that name the true domain before any other",
    "repeats": "share that list an item twice or say a word twice in a row",
    "distinct": "distinct descriptions over descriptions",
    "similarity": (
        "mean word overlap (Jaccard) with the description of another document's activation"
    ),
    "top_line": "share of the descriptions that have the line which most of them have",
    "non_ascii": "share of characters beyond ASCII",
    "unclosed": "share cut off before their end",
    "empty": "share without a word",
    "tokens": "mean length of a description",
    "gold": "the label of the text: the ceiling",
    "nearest_train_label": (
        "the label of the nearest train activation: what a verbalizer must beat to be worth"
        " training"
    ),
    "sft, grpo, grpo_no_contrast": (
        "the verbalizer after supervised training, after contrastive GRPO, and after GRPO rewarded"
        " with the plain cosine"
    ),
    "shuffled, generic": "another document's label; one fixed sentence",
    "mean_activation, random_vector": "the SFT verbalizer given these instead of the activation",
    "reward, judge, linear": (
        "scorers: the one that GRPO is paid by; one trained on other documents; ridge regression"
        " from features of the plain base"
    ),
    "confidence": (
        "agreement of several samples: mean centred cosine between what the reward scorer reads in"
        " them; no probability"
    ),
}
"""What every figure, verbalizer and scorer is. v original, r reconstruction from a description,
n(x) = x/|x|, mu = mean n(v) over train, c(x) = n(x) - mu."""
_PLAIN_WIDTH = 150
"""Columns where output goes to a file or a log."""
_SHORT_METRICS = ("top1", "top1_2way", "top1_10way", "top1_10way_hard", "centred_cosine", "delta")
_SHORT_CLAIMS = ("precision", "precision_excess", "domain", "repeats", "tokens")
_PAIRED_METRICS = ("centred_cosine", "delta", "top1", "top1_2way", "top1_10way", "top1_10way_hard")
_PAIRED_CLAIMS = ("precision", "precision_excess", "hallucinated", "recall", "domain", "repeats")


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def interval(figure: Mapping[str, float] | None) -> str:
    """`0.943 [0.925, 0.960]`; the value alone where there is no interval, a dash where there is no
    figure."""
    if figure is None:
        return "-"
    return f"{figure['value']:.3f}" + (
        f" [{figure['low']:.3f}, {figure['high']:.3f}]" if "low" in figure else ""
    )


def geometry_tables(
    report: Mapping[str, Any], metrics: Sequence[str] = tuple(METRIC_TITLES)
) -> list[Table]:
    """One table for each scorer: a row for each verbalizer."""
    results = report["results"]
    scorers = list(next(iter(results.values())))
    return [
        Table(
            f"Under the {scorer} scorer",
            ["verbalizer", *(METRIC_TITLES[metric] for metric in metrics)],
            [
                [name, *(interval(by_scorer[scorer].get(metric)) for metric in metrics)]
                for name, by_scorer in results.items()
            ],
        )
        for scorer in scorers
    ]


def claims_table(report: Mapping[str, Any], names: Sequence[str] = tuple(CLAIM_TITLES)) -> Table:
    """What descriptions claim, by verbalizer."""
    return Table(
        "What the descriptions claim",
        ["verbalizer", *(CLAIM_TITLES[name] for name in names)],
        [
            [verbalizer, *(interval(said.get(name)) for name in names)]
            for verbalizer, said in report["claims"].items()
        ],
    )


def paired_tables(report: Mapping[str, Any]) -> list[Table]:
    """Differences on the same activations and resamples: of scores, of claims, and the ratios of
    the deltas."""
    scores, said = [], []
    for pair, by_scorer in report["paired"].items():
        ratios = report["ratios"].get(pair.replace("-", "/"), {})
        for scorer, figures in by_scorer.items():
            if scorer == "claims":
                said.append([pair, *(interval(figures.get(name)) for name in _PAIRED_CLAIMS)])
            else:
                scores.append(
                    [
                        pair,
                        scorer,
                        *(interval(figures.get(metric)) for metric in _PAIRED_METRICS),
                        interval(ratios.get(scorer, {}).get("delta")),
                    ]
                )
    return [
        Table(
            "Paired differences",
            [
                "difference",
                "scorer",
                *(METRIC_TITLES[metric] for metric in _PAIRED_METRICS),
                "ratio of deltas",
            ],
            scores,
        ),
        Table(
            "Paired differences of claims",
            ["difference", *(CLAIM_TITLES[name] for name in _PAIRED_CLAIMS)],
            said,
        ),
    ]


def gates_table(report: Mapping[str, Any]) -> Table:
    """One row for each gate; `bound` is the end of the 95% interval that is worse for the claim."""
    rows = [
        [
            gate["name"],
            "-" if gate["value"] is None else f"{gate['value']:.4f}",
            f"{gate['relation']} {gate['threshold']:g}",
            "PASS" if gate["passed"] else "FAIL",
        ]
        for gate in report["gates"]
    ]
    return Table("Gates", ["figure", "bound", "wanted", "verdict"], rows)


def domains_table(report: Mapping[str, Any]) -> Table:
    """Words found in the text, domain named rightly and the judge's centred cosine, by domain;
    controls are in report.json."""
    shown = {
        "precision": "words in text",
        "domain": "domain right",
        "judge.centred_cosine": "judge's centred cosine",
    }
    verbalizers = [name for name in next(iter(report["domains"].values())) if name not in CONTROLS]
    rows = [
        [
            domain,
            str(next(iter(by_name.values()))["precision"]["n"]),
            *(interval(by_name[name].get(figure)) for name in verbalizers for figure in shown),
        ]
        for domain, by_name in report["domains"].items()
    ]
    return Table(
        "By domain",
        ["domain", "n", *(f"{name}: {title}" for name in verbalizers for title in shown.values())],
        rows,
    )


def curves_tables(report: Mapping[str, Any]) -> list[Table]:
    """The judge's figures by number of tokens kept, by number of choices, and what quoted strings
    carry."""
    prefix = [
        [
            name,
            *(
                f"{point['tokens']}: {interval(point['centred_cosine'])}"
                for point in by_scorer["judge"]
            ),
        ]
        for name, by_scorer in report["prefix"].items()
    ]
    width = max((len(row) for row in prefix), default=1)
    found = [
        [name, *(interval(point["top1"]) for point in by_scorer["judge"])]
        for name, by_scorer in report["retrieval"].items()
    ]
    sizes = [str(point["k"]) for point in next(iter(report["retrieval"].values()))["judge"]]
    quoted = [
        [name, interval(told["quoting"]), interval(told["judge"]["centred_cosine"])]
        for name, told in report["quotes"].items()
    ]
    return [
        Table(
            "Judge's centred cosine of the first tokens",
            ["verbalizer", *["tokens: figure"] * (width - 1)],
            [row + ["-"] * (width - len(row)) for row in prefix],
        ),
        Table("Judge's top-1 among k activations", ["verbalizer", *sizes], found),
        Table(
            "Lost when quoted strings are stripped",
            ["verbalizer", "descriptions that quote", "judge's centred cosine"],
            quoted,
        ),
    ]


def samples_tables(report: Mapping[str, Any]) -> list[Table]:
    """Best of N by the reward scorer, and what confidence is worth, under the judge."""
    if "best_of" not in report:
        return []
    metrics = list(report["best_of"][0]["judge"])
    best = [
        [str(one["samples"]), *(interval(one["judge"][metric]) for metric in metrics)]
        for one in report["best_of"]
    ]
    tables = [
        Table(
            "Best of N samples by the reward scorer, under the judge",
            ["N", *(METRIC_TITLES[metric] for metric in metrics)],
            best,
        )
    ]
    if "calibration" in report:
        bins = [
            [
                f"{one['confidence_low']:.3f} to {one['confidence_high']:.3f}",
                *(interval(one[f"judge_{metric}"]) for metric in metrics),
            ]
            for one in report["calibration"]
        ]
        halves = [
            [
                "more confident half less the rest",
                *(interval(report["confidence"]["judge"][metric]) for metric in metrics),
            ]
        ]
        tables.append(
            Table(
                "The greedy description by confidence (agreement of"
                f" {report['confidence']['samples']} samples), under the judge",
                ["confidence", *(METRIC_TITLES[metric] for metric in metrics)],
                bins + halves,
            )
        )
    return tables


def growth_tables(report: Mapping[str, Any]) -> list[Table]:
    """How figures grow with labels (of this report, by scorer), with steps of GRPO (on validation)
    and with the layer (the gold ceiling)."""
    titles = {
        "labels": ("Growth with the labels that SFT learned from", "labels"),
        "steps": ("Growth with the steps of GRPO, on validation", "step"),
        "layers": ("The gold ceiling by layer, on validation", "layer"),
    }
    tables = []
    for axis, by_name in report["growth"].items():
        title, head = titles[axis]
        names = list(
            dict.fromkeys(
                name
                for points in by_name.values()
                for point in points
                for name in point
                if name != "at"
            )
        )
        rows = [
            [series, str(point["at"]), *(interval(point.get(name)) for name in names)]
            for series, points in by_name.items()
            for point in points
        ]
        tables.append(
            Table(
                title,
                ["of", head, *(METRIC_TITLES.get(name, name.replace("_", " ")) for name in names)],
                rows,
            )
        )
    return tables


def agreement_table(report: Mapping[str, Any]) -> Table:
    """How far two scorers say the same of single activations."""
    rows = [
        [
            name,
            pair,
            f"{both['top1']:.3f}",
            "-" if both["centred_cosine"] is None else f"{both['centred_cosine']:.3f}",
        ]
        for name, by_pair in report["agreement"].items()
        for pair, both in by_pair.items()
    ]
    return Table(
        "Agreement of the scorers",
        ["verbalizer", "scorers", "same 2-way outcome", "correlation of centred cosines"],
        rows,
    )


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    tables = [
        gates_table(report),
        *geometry_tables(report),
        *paired_tables(report),
        claims_table(report),
        *samples_tables(report),
        *curves_tables(report),
        *growth_tables(report),
        domains_table(report),
        agreement_table(report),
        selection_table(report),
        experiments_table(report),
        _lineage_table(report),
    ]
    parts = [
        _opening(report),
        *(_markdown(table) for table in tables if table.rows),
        *_markdown_examples(report),
    ]
    return "\n\n".join([*parts, _definitions()]) + "\n"


def _opening(report: Mapping[str, Any]) -> str:
    base = report["base"]
    passed = sum(gate["passed"] for gate in report["gates"])
    return "\n".join(
        [
            f"# Report of `{report['preset']}`",
            "",
            (
                f"- Base model: {base['name']} (digest {base['digest'][:12]}), layer"
                f" {base['layer']} of {base['num_layers']}, d_model {base['d_model']}, injection"
                f" norm {base['injection_norm']:g}"
            ),
            f"- Evaluated: {report['n']} activations of {report['documents']} {report['split']}"
            " documents; "
            + (
                "no ancestor learned from or chose on any of them"
                if report["split"] == "test"
                else "settings and checkpoints are chosen on them, so this is no evidence"
            ),
            (
                "- Documents left out, by choice of number or because they nearly repeat one that"
                f" the base was pretrained on: {report['documents_left_out']}"
            ),
            (
                "- Every figure: value [95% interval], bootstrap over documents,"
                f" {report['resamples']:,} resamples"
            ),
            "- Failed, truncated and empty descriptions are scored as they are; greedy decoding",
            (
                "- The judge scorer shares no train document with the reward scorer; its scores"
                " never train the verbalizer"
            ),
            f"- Gates: {passed} of {len(report['gates'])} passed",
            *(f"- WARNING: {warning}" for warning in report["warnings"]),
            *(f"- {note}" for note in report["notes"]),
        ]
    )


def _lineage_table(report: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            one["fingerprint"],
            one["config_hash"],
            one["created"],
            ", ".join(f"{use} {count}" for use, count in one["documents"].items()) or "-",
        ]
        for name, one in report["lineage"].items()
    ]
    return Table("Lineage", ["artifact", "fingerprint", "configuration", "made", "documents"], rows)


def selection_table(report: Mapping[str, Any]) -> Table:
    """What was chosen on validation documents, and by which figure there."""
    shown = ("eval_loss", "eval_centred_cosine", "penalty")
    rows = []
    for name, metrics in report["selection"].items():
        published = metrics.get("published", {})
        told = {key: metrics[key] for key in shown if key in metrics} | {
            key: published[key] for key in ("monitor/judge_centred_cosine",) if key in published
        }
        step = metrics.get("best_step", metrics.get("published_step", "-"))
        rows.append(
            [
                name,
                f"{step:.0f}" if isinstance(step, float) else str(step),
                ", ".join(f"{key} {value:.4g}" for key, value in told.items()) or "-",
            ]
        )
    return Table("Chosen on validation", ["artifact", "step", "figures there"], rows)


def experiments_table(report: Mapping[str, Any]) -> Table:
    """What was tried on validation before the preset's settings were chosen: paired differences
    with the SFT verbalizer."""
    tried = report["experiments"]
    names = list(dict.fromkeys(name for one in tried for name in one["minus_sft"]))
    return Table(
        "Tried on validation for this preset, less SFT",
        ["changed", *names, "n", "kept"],
        [
            [
                one["changed"],
                *(interval(one["minus_sft"].get(name)) for name in names),
                str(one["n"]),
                one["kept"],
            ]
            for one in tried
        ],
    )


def _markdown(table: Table) -> str:
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join(
        [f"## {table.title}", "", *("| " + " | ".join(cells) + " |" for cells in lines)]
    )


def _markdown_examples(report: Mapping[str, Any]) -> Iterable[str]:
    """Texts in fences longer than any run of backticks in them."""
    for number, example in enumerate(report["examples"], 1):
        fence = "`" * (3 + max((len(run) for run in _backtick_runs(example)), default=0))
        parts = [
            f"## Example {number}: {example['domain']}",
            "",
            f"`{example['activation_id']}`",
            "",
            fence + "text",
            example["text"],
            fence,
        ]
        for name, description in example["descriptions"].items():
            parts += ["", f"{name}:", "", fence + "text", description, fence]
        yield "\n".join(parts)


def _backtick_runs(example: Mapping[str, Any]) -> list[str]:
    import re

    return re.findall(r"`+", "\n".join([example["text"], *example["descriptions"].values()]))


def _definitions() -> str:
    titles = METRIC_TITLES | CLAIM_TITLES
    return "\n".join(
        [
            "## Definitions",
            "",
            (
                "v original, r reconstruction from a description, n(x) = x/|x|, mu = mean n(v) over"
                " train, c(x) = n(x) - mu."
            ),
            "",
            *(f"- {titles.get(name, name)}: {meaning}" for name, meaning in DEFINITIONS.items()),
        ]
    )


def print_report(report: Mapping[str, Any]) -> None:
    """The report's tables, gates and examples on the terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    for table in (
        *geometry_tables(report, _SHORT_METRICS),
        claims_table(report, _SHORT_CLAIMS),
        gates_table(report),
    ):
        if table.rows:
            console.print(_rich(table))
    for warning in report["warnings"]:
        console.print(f"WARNING: {warning}", style="bold red", markup=False)
    console.print(
        f"{report['n']} activations of {report['documents']} {report['split']} documents; 95%"
        " intervals over documents"
    )
    for example in report["examples"]:
        console.rule(escape(f"{example['domain']}  {example['activation_id']}"))
        console.print(example["text"], markup=False, highlight=False)
        for name, description in example["descriptions"].items():
            style = "bold" if name.startswith("grpo") else None
            console.print(f"\n{name}:\n{description}", markup=False, highlight=False, style=style)


def _rich(table: Table):
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    rich = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for place, head in enumerate(table.heads):
        rich.add_column(head, no_wrap=place == 0)
    for row in table.rows:
        rich.add_row(*map(escape, row))
    return rich
