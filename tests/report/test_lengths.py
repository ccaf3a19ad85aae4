"""Differences at equal length: a verbalizer must not win by saying more."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from tiny import build_tokenizer

from nla_ray.description.record import Description
from nla_ray.report.evaluated import Evaluated, texts_to_read
from nla_ray.report.lengths import cut_pairs, cut_texts, length_section
from nla_ray.report.readings import Readings
from nla_ray.report.rendering.lengths import lengths_section
from nla_ray.score.bootstrap import FamilyBootstrap
from nla_ray.score.comparisons import Comparisons

ROWS = 12
LETTERS = "abcdefghijkl"


class Words:
    """A tokenizer with a token a word."""

    added_tokens_decoder: ClassVar[dict] = {}

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[str]]]:
        return {"input_ids": [text.split() for text in texts]}

    def decode(self, ids: list[str], skip_special_tokens: bool) -> str:
        return " ".join(ids)


def said(texts: list[str]) -> list[Description]:
    return [Description.from_text(text, num_tokens=len(text.split())) for text in texts]


@pytest.fixture(scope="module")
def evaluated() -> Evaluated:
    """A text is `word{row} more{row}`; the sft names the first word, grpo both in every other row.

    A scorer reads of a description as much of the activation as it names words of the text.
    """
    originals = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    words = [(f"word{letter * 2}x", f"more{letter * 2}x") for letter in LETTERS]
    descriptions = {
        "gold": said([" ".join(pair) for pair in words]),
        "sft": said([first for first, _ in words]),
        "grpo": said([" ".join(pair) if row % 2 else pair[0] for row, pair in enumerate(words)]),
        "generic": said(["nothing in particular"] * ROWS),
    }
    pairs = [("grpo", "sft"), ("grpo", "generic")]
    cut = cut_pairs(Words(), descriptions, pairs)
    texts = sorted(texts_to_read(descriptions, [], {}, cut.values()))
    noise = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))

    def read(text: str) -> torch.Tensor:
        total = torch.full((8,), 0.01)
        for row, pair in enumerate(words):
            named = sum(word in text for word in pair)
            if named:
                total = total + originals[row] + (2 - named) * noise[row]
        return total

    doc_ids = [f"doc{row}" for row in range(ROWS)]
    return Evaluated(
        doc_ids=doc_ids,
        family_ids=doc_ids,
        domains=["licence"] * ROWS,
        texts=[" ".join(pair) for pair in words],
        salient=[list(pair) for pair in words],
        comparisons=Comparisons.draw(originals, doc_ids, torch.zeros(8), 0, ["licence"] * ROWS),
        descriptions=descriptions,
        prefixes={},
        cut=cut,
        sampled="grpo",
        readings=Readings(texts, {"judge": torch.stack([read(text) for text in texts])}),
        domain_names={"licence": "licence"},
    )


def test_both_descriptions_of_a_row_are_cut_to_the_shorter_and_controls_are_not(
    evaluated: Evaluated,
) -> None:
    assert list(evaluated.cut) == [("grpo", "sft")]
    grpo, sft = evaluated.cut["grpo", "sft"]
    assert [cut.text for cut in grpo] == [cut.text for cut in sft]
    assert [cut.num_tokens for cut in grpo] == [1] * ROWS
    longer = {"grpo": said(["one two three", ""]), "sft": said(["four five", "six"])}
    [(first, second)] = cut_pairs(Words(), longer, [("grpo", "sft")]).values()
    assert [cut.text for cut in first] == ["one two", ""]
    assert [cut.text for cut in second] == ["four five", ""]


def test_a_character_that_the_cut_goes_through_is_left_out() -> None:
    tokenizer = build_tokenizer()
    text = "é def"
    [ids] = tokenizer([text], add_special_tokens=False)["input_ids"]
    assert len(ids) > 2, "é alone is two tokens"
    assert cut_texts(tokenizer, [text] * 3, [1, 2, len(ids)]) == ["", "é", text]
    assert cut_texts(tokenizer, [], []) == []


def test_what_is_won_by_length_alone_is_gone_at_equal_length(evaluated: Evaluated) -> None:
    section = length_section(FamilyBootstrap(evaluated.doc_ids, 200, 0), evaluated)
    by_view = section["grpo-sft"]
    whole, cut, matched = by_view["whole"], by_view["cut"], by_view["matched"]
    assert [figure.value for figure in whole["tokens"]] == [1.5, 1.0]
    assert whole["judge"]["centred_cosine"].value > 0.05
    assert whole["claims"]["source_recall"].value == pytest.approx(0.25)
    for view in (cut, matched):
        assert [figure.value for figure in view["tokens"]] == [1.0, 1.0]
        for figure in (*view["judge"].values(), *view["claims"].values()):
            assert (figure.value, figure.low, figure.high) == (0.0, 0.0, 0.0)
    assert (cut["tokens"][0].n, matched["tokens"][0].n) == (ROWS, ROWS // 2)


def test_lengths_match_within_a_tenth_and_where_none_do_nothing_is_said_of_it(
    evaluated: Evaluated,
) -> None:
    def section(lengths: list[tuple[int, int]]) -> dict:
        changed = {"gold": evaluated.descriptions["gold"]}
        for side, name in enumerate(("grpo", "sft")):
            changed[name] = [
                dataclasses.replace(description, num_tokens=lengths[row % len(lengths)][side])
                for row, description in enumerate(evaluated.descriptions[name])
            ]
        resized = dataclasses.replace(evaluated, descriptions=changed)
        return length_section(FamilyBootstrap(resized.doc_ids, 50, 0), resized)["grpo-sft"]

    assert section([(20, 22), (20, 23), (3, 3), (3, 4)])["matched"]["tokens"][0].n == ROWS // 2
    assert "matched" not in section([(20, 40)])


def test_the_report_shows_every_view_with_its_lengths(evaluated: Evaluated) -> None:
    found = length_section(FamilyBootstrap(evaluated.doc_ids, 50, 0), evaluated)
    as_json = {
        pair: {
            view: {
                name: [figure.to_dict() for figure in figures]
                if name == "tokens"
                else {metric: figure.to_dict() for metric, figure in figures.items()}
                for name, figures in of_view.items()
            }
            for view, of_view in by_view.items()
        }
        for pair, by_view in found.items()
    }
    judge, claims = lengths_section({"lengths": as_json}).blocks
    assert [row.cells[0] for row in judge.rows] == [
        "as they are",
        "both cut to the shorter",
        "lengths that match",
    ]
    assert judge.rows[0].title == "grpo − sft" and judge.rows[2].cells[3] == ROWS // 2
    assert claims.rows[0].cells[-1]["value"] == pytest.approx(0.25)
    assert lengths_section({}).blocks == [], "a report of an earlier version has none"
