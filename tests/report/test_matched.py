"""Ceilings and the probe: as long as what a verbalizer says, and words counted beside words."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sample_report import full_report, minimal_report
from test_report import DOC_IDS, ROWS, described, evaluated

from nla_ray.base.load import load_tokenizer
from nla_ray.report.matched import TrainWords, matched_descriptions, probe_section, word_curve
from nla_ray.report.rendering.markdown import to_markdown
from nla_ray.report.summary import summarise
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.settings.config import RunConfig
from nla_ray.text.words import WordStatistics


def test_a_ceiling_is_as_long_as_the_description_and_the_probe_says_as_many_words(
    published_run: RunConfig,
) -> None:
    tokenizer = load_tokenizer(published_run.base)
    texts = ["The frame opens. A rows file: index!", "assert number == 3"]
    said = described(["- tokens: frame, index\n- next: more", ""])
    said = [dataclasses.replace(said[0], num_tokens=4), dataclasses.replace(said[1], num_tokens=0)]
    words = TrainWords(
        statistics=WordStatistics.fit(texts),
        probed=[["one", "two", "three"], ["one"]],
        frames=[("Python test", "a check"), ("Python test", "")],
    )
    matched = matched_descriptions(words, tokenizer, texts, said)
    assert matched["source_text"] == texts
    assert matched["linear_probe"] == ["- tokens: one, two", ""]
    assert matched["linear_label"] == [
        "- tokens: two\n- Python test: one\n- next: a check",
        "- Python test: nothing in particular",
    ]
    first, second = matched["source_summary"]
    assert len(tokenizer.encode(first, add_special_tokens=False)) == 4 and second == ""
    assert any(first in part for part in (*texts[0].split(". "), texts[0]))


def test_true_words_of_a_verbalizer_are_counted_beside_as_many_of_the_probe() -> None:
    # every text has "assert" and "index"; grpo claims index, "row" and a number, sft index or
    # nothing, gold frame, index and assert, of which "frame" is in no text
    probed = [["assert", "absent", "index"]] * ROWS
    section = probe_section(
        FamilyBootstrap(DOC_IDS, 100, 0), dataclasses.replace(evaluated(), probed=probed)
    )
    values = {
        name: {figure: interval.value for figure, interval in named.items()}
        for name, named in section.items()
    }
    assert values["grpo"] == pytest.approx(
        {
            "words": 3.0,
            "precision": 1 / 3,
            "probe_precision": 2 / 3,
            "difference": -1 / 3,
            "true_words": 1.0,
            "probe_true_words": 2.0,
        }
    )
    assert values["sft"] == pytest.approx(
        {
            "words": 0.5,
            "precision": 0.5,
            "probe_precision": 0.5,
            "difference": 0.0,
            "true_words": 0.5,
            "probe_true_words": 0.5,
        }
    )
    assert values["gold"]["probe_precision"] == pytest.approx(2 / 3)
    assert probe_section(FamilyBootstrap(DOC_IDS, 100, 0), evaluated()) == {}


def test_a_verbalizer_below_its_probe_is_told_before_any_figure_and_fails_its_gate() -> None:
    probed = [["assert", "index"]] * ROWS
    gates = (("grpo.probe.difference", ">=", 0.0), ("sft.probe.difference", ">=", 0.0))
    summary = summarise(dataclasses.replace(evaluated(), probed=probed), gates, 100, seed=0)
    [warning] = summary["warnings"]
    assert warning.startswith("grpo: of the words it claims 0.333 are in the text")
    assert [gate["passed"] for gate in summary["gates"]] == [False, True]


def test_every_form_of_wording_is_told_with_what_it_loses() -> None:
    made = evaluated()
    rows = list(made.prefix_rows)
    said = [made.descriptions["gold"][row].text for row in rows]
    reworded = {"gold": {"bullets_reversed": said, "synonyms": [""] * len(rows)}}
    made = dataclasses.replace(made, reworded=reworded, reworded_rows=rows)
    wording = summarise(made, (), 100, seed=0)["wording"]
    same, emptied = wording["gold"]["bullets_reversed"], wording["gold"]["synonyms"]
    assert same["changed"]["value"] == 0.0 and emptied["changed"]["value"] == 1.0
    assert same["judge"]["centred_cosine"] == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "n": 12,
        "families": 12,
    }
    # an empty description is read as the mean
    originals, mean = made.comparisons.originals[rows], made.comparisons.mean
    centred = originals / originals.norm(dim=1, keepdim=True) - mean
    as_empty = torch.nn.functional.cosine_similarity(mean / mean.norm() - mean, centred).mean()
    as_said = made.geometry["gold"]["judge"]["centred_cosine"].numerator[rows].mean()
    assert emptied["judge"]["centred_cosine"]["value"] == pytest.approx(
        (as_said - as_empty).item(), abs=1e-6
    )


def test_a_report_of_an_earlier_version_says_what_was_not_measured() -> None:
    markdown = to_markdown(minimal_report())
    titles = ("Beside a linear probe", "Put back into the base", "Lost in other words")
    for title in (*titles, "Confidence by claim"):
        assert f"## {title}" in markdown
    assert markdown.count("- Not measured.") == 4
    assert "Not measured" not in to_markdown(full_report())


def test_the_curve_of_words_counts_first_claims_as_they_are_said() -> None:
    # of every text "assert" and "index" are true; "frame" and "absent" are not
    probed = [["assert", "absent", "index"]] * ROWS
    said = described(["- tokens: index, frame, assert, assert", "- tokens: frame"] * (ROWS // 2))
    given = dataclasses.replace(evaluated(), probed=probed)
    given = dataclasses.replace(given, descriptions={**given.descriptions, "sft": said})
    curve = word_curve(FamilyBootstrap(DOC_IDS, 100, 0), given)
    assert set(curve) == {"linear_probe", "gold", "sft", "grpo"}
    found = [[point["words"], point["found"].value] for point in curve["linear_probe"]]
    assert found == [[1.0, 1.0], [2.0, 0.5], [3.0, pytest.approx(2 / 3)]]
    found = [[point["words"], point["found"].value] for point in curve["sft"]]
    assert found == [[1.0, 0.5], [1.5, pytest.approx(1 / 3)], [2.0, 0.5]]
    assert word_curve(FamilyBootstrap(DOC_IDS, 100, 0), evaluated()) == {}
