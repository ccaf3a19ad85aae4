"""The report for people: Markdown for the file, rich tables for the terminal, both from the same rows.

Knows the report's dictionary and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRIC_TITLES = {
    "top1": "2-way top-1", "top1_10way": "10-way top-1", "top1_10way_hard": "10-way hard", "mrr_10way": "10-way MRR",
    "centred_cosine": "centred cosine", "correct_cosine": "cosine, correct", "garbage_cosine": "cosine, garbage",
    "delta": "delta", "fve": "FVE",
}
CLAIM_TITLES = {
    "precision": "words in text", "precision_shuffled": "in a shuffled text", "recall": "gold words named",
    "domain": "domain right", "repeats": "repeats an item", "distinct": "distinct", "unclosed": "unclosed",
    "empty": "empty", "tokens": "tokens",
}
_PLAIN_WIDTH = 150
"""Columns where output goes to a file or a log."""
_SHORT_METRICS = ("top1", "top1_10way", "centred_cosine", "delta", "fve")
_SHORT_CLAIMS = ("precision", "domain", "repeats", "tokens")


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def interval(figure: Mapping[str, float] | None) -> str:
    """`0.943 [0.925, 0.960]`; a dash for a figure that is not there."""
    return "-" if figure is None else f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def geometry_tables(report: Mapping[str, Any], metrics: Sequence[str] = tuple(METRIC_TITLES)) -> list[Table]:
    """One table for each scorer: a row for each verbalizer."""
    results = report["results"]
    scorers = list(next(iter(results.values())))
    return [Table(f"Under the {scorer} scorer", ["verbalizer", *(METRIC_TITLES[metric] for metric in metrics)],
                  [[name, *(interval(by_scorer[scorer][metric]) for metric in metrics)]
                   for name, by_scorer in results.items()])
            for scorer in scorers]


def claims_table(report: Mapping[str, Any], names: Sequence[str] = tuple(CLAIM_TITLES)) -> Table:
    """What descriptions claim, by verbalizer."""
    return Table("What the descriptions claim", ["verbalizer", *(CLAIM_TITLES[name] for name in names)],
                 [[verbalizer, *(interval(said[name]) for name in names)]
                  for verbalizer, said in report["claims"].items()])


def paired_table(report: Mapping[str, Any]) -> Table:
    """Differences on the same activations and resamples."""
    rows = [[pair, scorer, *(interval(figure) for figure in figures.values())]
            for pair, by_scorer in report["paired"].items() for scorer, figures in by_scorer.items()]
    metrics = next((figures for by_scorer in report["paired"].values() for figures in by_scorer.values()), {})
    return Table("Paired differences", ["difference", "scorer", *(METRIC_TITLES[metric] for metric in metrics)], rows)


def gates_table(report: Mapping[str, Any]) -> Table:
    """One row for each gate; `bound` is the end of the 95% interval that is worse for the claim."""
    rows = [[gate["name"], "-" if gate["value"] is None else f"{gate['value']:.4f}",
             f"{gate['relation']} {gate['threshold']:g}", "PASS" if gate["passed"] else "FAIL"]
            for gate in report["gates"]]
    return Table("Gates", ["figure", "bound", "wanted", "verdict"], rows)


def domains_table(report: Mapping[str, Any]) -> Table:
    """Words found in the text and domain named rightly, by domain."""
    verbalizers = list(next(iter(report["domains"].values())))
    titles = [f"{name}: {title}" for name in verbalizers for title in ("words in text", "domain right")]
    rows = [[domain, str(next(iter(by_name.values()))["precision"]["n"]),
             *(interval(by_name[name][figure]) for name in verbalizers for figure in ("precision", "domain"))]
            for domain, by_name in report["domains"].items()]
    return Table("By domain", ["domain", "n", *titles], rows)


def agreement_table(report: Mapping[str, Any]) -> Table:
    """How far the two scorers say the same of single activations."""
    rows = [[name, f"{both['top1']:.3f}", "-" if both["centred_cosine"] is None else f"{both['centred_cosine']:.3f}"]
            for name, both in report["agreement"].items()]
    heads = ["verbalizer", "same 2-way outcome", "correlation of centred cosines"]
    return Table("Agreement of the two scorers", heads, rows)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    tables = [gates_table(report), *geometry_tables(report), paired_table(report), claims_table(report),
              domains_table(report), agreement_table(report), _lineage_table(report)]
    parts = [_opening(report), *(_markdown(table) for table in tables if table.rows), *_markdown_examples(report)]
    return "\n\n".join([*parts, _DEFINITIONS]) + "\n"


def _opening(report: Mapping[str, Any]) -> str:
    base = report["base"]
    passed = sum(gate["passed"] for gate in report["gates"])
    return "\n".join([
        f"# Report of `{report['preset']}`", "",
        f"- Base model: {base['name']} (digest {base['digest'][:12]}), layer {base['layer']} of {base['num_layers']}, "
        f"d_model {base['d_model']}, injection norm {base['injection_norm']:g}",
        f"- Evaluated: {report['n']} activations of {report['documents']} test documents; no ancestor learned from or "
        "chose on any of them",
        "- Test documents left out, by choice of number or because they nearly repeat one that the base was pretrained on: "
        f"{report['documents_left_out']}",
        f"- Every figure: value [95% interval], bootstrap over documents, {report['resamples']:,} resamples",
        "- Failed, truncated and empty descriptions are scored as they are; greedy decoding",
        "- The judge scorer shares no train document with the reward scorer; its scores never train the verbalizer",
        f"- Gates: {passed} of {len(report['gates'])} passed",
    ])


def _lineage_table(report: Mapping[str, Any]) -> Table:
    rows = [[name, one["fingerprint"], one["config_hash"], one["created"],
             ", ".join(f"{use} {count}" for use, count in one["documents"].items()) or "-"]
            for name, one in report["lineage"].items()]
    return Table("Lineage", ["artifact", "fingerprint", "configuration", "made", "documents"], rows)


def _markdown(table: Table) -> str:
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join([f"## {table.title}", "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def _markdown_examples(report: Mapping[str, Any]) -> Iterable[str]:
    """Texts in fences longer than any run of backticks in them."""
    for number, example in enumerate(report["examples"], 1):
        fence = "`" * (3 + max((len(run) for run in _backtick_runs(example)), default=0))
        parts = [f"## Example {number}: {example['domain']}", "", f"`{example['activation_id']}`", "",
                 fence + "text", example["text"], fence]
        for name, description in example["descriptions"].items():
            parts += ["", f"{name}:", "", fence + "text", description, fence]
        yield "\n".join(parts)


def _backtick_runs(example: Mapping[str, Any]) -> list[str]:
    import re

    return re.findall(r"`+", "\n".join([example["text"], *example["descriptions"].values()]))


_DEFINITIONS = """## Definitions

v original, r reconstruction from a description, n(x) = x/|x|, mu = mean n(v) over train, c(x) = n(x) - mu.

- cosine, correct: mean cos(r_i, v_i); garbage: mean cos(r_i, v_j), j a fixed random derangement; delta: correct-garbage
- 2-way top-1: share of cos(r_i, v_i) > cos(r_i, v_j), chance 0.5; a tie counts against
- centred cosine: mean cos(c(r_i), c(v_i))
- 10-way: v_i ranked among 9 activations of other documents by centred cosine, chance 0.1; hard: among the 9 nearest
  activations of its domain
- FVE: 1 - sum |n(r)-n(v)|^2 / sum |n(v) - mean n(v)|^2
- words in text: share of a description's salient words that occur in its text; a description that claims nothing has 0
- gold: the label of the text (ceiling); nearest_train_label: label of the nearest train activation; shuffled: another
  document's label; generic: one fixed sentence; mean_activation, random_vector: the SFT verbalizer given these instead
  of the activation"""


def print_report(report: Mapping[str, Any]) -> None:
    """The report's tables, gates and examples on the terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    for table in (*geometry_tables(report, _SHORT_METRICS), claims_table(report, _SHORT_CLAIMS), gates_table(report)):
        if table.rows:
            console.print(_rich(table))
    console.print(f"{report['n']} activations of {report['documents']} test documents; 95% intervals over documents")
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
