"""Which verbalizers a report may compare: those of one generation protocol."""

from __future__ import annotations

import dataclasses

import pytest

from nla_ray.description.protocol import NOT_GENERATED, GenerationProtocol
from nla_ray.report.pairing import comparable_pairs, protocol_notes, protocol_records
from nla_ray.report.rendering.protocols import protocols_section

GREEDY = GenerationProtocol(
    prompt={"ids": "3f"},
    decoding={"temperature": 0.0},
    limits={"max_new_tokens": 64},
    engine={"name": "compact"},
    weights={"adapter": "sft"},
)
LONGER = dataclasses.replace(GREEDY, limits={"max_new_tokens": 200})


def test_a_pair_of_two_protocols_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"theirs .*grpo.*max_new_tokens: there 200, here 64"):
        comparable_pairs(["grpo", "theirs"], {"grpo": GREEDY, "theirs": LONGER}, ["theirs"])


def test_pairs_within_one_protocol_and_with_what_nobody_generated_are_made() -> None:
    protocols = {"nearest_train_label": NOT_GENERATED, "grpo": GREEDY, "theirs": GREEDY}
    assert comparable_pairs(list(protocols), protocols, ["theirs"]) == [
        ("grpo", "nearest_train_label"),
        ("theirs", "grpo"),
        ("theirs", "nearest_train_label"),
    ]


def test_without_a_record_the_runs_own_are_compared_and_others_are_not() -> None:
    names = ["sft", "grpo", "theirs"]
    protocols = {"sft": None, "grpo": GREEDY, "theirs": None}
    assert comparable_pairs(names, protocols, ["theirs"]) == [("grpo", "sft")]
    assert comparable_pairs(names, protocols | {"theirs": GREEDY}, ["theirs"]) == [
        ("grpo", "sft"),
        ("theirs", "grpo"),
    ]
    first, second = protocol_notes(protocols, ["theirs"])
    assert (
        first == "theirs: how it was generated is not recorded, so it is in no paired difference."
    )
    assert second.startswith("sft: an earlier version described them")


def test_the_report_shows_the_protocol_of_every_verbalizer_and_what_a_comparison_asks() -> None:
    protocols = {"gold": NOT_GENERATED, "sft": GREEDY, "theirs": None}
    report = {"protocols": protocol_records(protocols)}
    [table] = protocols_section(report).blocks
    cells = {row.name: row.cells for row in table.rows}
    assert cells["gold"][0] == "not generated" and cells["theirs"][0] == "not recorded"
    assert cells["sft"] == [
        GREEDY.hash,
        GREEDY.comparison_hash,
        "temperature 0.0",
        "max new tokens 64",
        "name compact",
        "ids 3f",
        "adapter sft",
    ]
    assert protocols_section({}).blocks == [], "a report of an earlier version has none"
