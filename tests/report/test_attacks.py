"""Verbalizers that cheat, and what in the report gives each away.

A small world in which everything can be known: an activation is the sum of its domain's vector and
those of the words of its text; a scorer reads a description as the sum of the vectors of its words,
each scorer with errors of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nla_ray.description.record import Description
from nla_ray.report.controls import SCORERS
from nla_ray.report.evaluated import Evaluated, texts_to_read
from nla_ray.report.readings import Readings
from nla_ray.report.summary import summarise
from nla_ray.score import claims
from nla_ray.score.comparisons import Comparisons
from nla_ray.settings.presets import nano

ROWS, D_MODEL, WORDS_IN_TEXT = 400, 64, 6
DOMAINS = (
    "licence",
    "python test",
    "type stub",
    "shell script",
    "c header",
    "web page",
    "change log",
    "manual page",
)
WORDS = [
    first + second
    for first in ("bar", "lam", "tor", "fen", "gul", "nis", "pek", "sod")
    for second in ("ander", "elin", "imo", "ost", "upa", "arek", "etic", "ilon", "orum", "usty")
]
JUNK = [f"zz{first}{second}" for first in "abcdefghkl" for second in "mnopqrstuvwx"]
"""Words of no text, which a scorer was never trained on: what it reads in them is its own."""

Say = Callable[[int], str]


def vectors_of(words: list[str] | tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {word: torch.randn(D_MODEL, generator=generator) for word in words}


class World:
    """Texts, activations, scorers, and what a verbalizer's words are worth under them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.domains = [DOMAINS[row % len(DOMAINS)] for row in range(ROWS)]
        self.words = []
        for _ in range(ROWS):
            order = torch.randperm(len(WORDS), generator=generator).tolist()
            self.words.append([WORDS[index] for index in order[:WORDS_IN_TEXT]])
        self.texts = [f"{' '.join(words)}" for words in self.words]
        self.meaning = {
            word: 2.0 * vector for word, vector in vectors_of(DOMAINS, 1).items()
        } | vectors_of(WORDS, 2)
        self.scorers = {}
        for number, scorer in enumerate(SCORERS):
            error = vectors_of([*self.meaning], 10 + number)
            self.scorers[scorer] = {
                word: vector + 0.3 * error[word] for word, vector in self.meaning.items()
            } | vectors_of(JUNK, 20 + number)
        noise = torch.randn(ROWS, D_MODEL, generator=generator)
        deviation = torch.stack(
            [
                self.meaning[domain] + sum(self.meaning[word] for word in words)
                for domain, words in zip(self.domains, self.words, strict=True)
            ]
        )
        self.mean = torch.full((D_MODEL,), 0.1)
        self.activations = self.mean * 20 + deviation + noise

    def read(self, scorer: str, text: str) -> torch.Tensor:
        """What a scorer reads in a description: the mean, and the vectors of the words it knows."""
        vector_of = self.scorers[scorer]
        heard = [vector_of[name] for name in DOMAINS if name in text] + [
            vector_of[piece] for piece in claims.word_pieces(text) if piece in vector_of
        ]
        return self.mean * 20 + (sum(heard) if heard else torch.zeros(D_MODEL))

    def report(self, say: Say) -> dict:
        """The report of a verbalizer, called grpo.

        With gold labels and an honest SFT that knows half of the words.
        """
        verbalizers = {
            "gold": self.label,
            "nearest_train_label": lambda row: self.label((row + len(DOMAINS)) % ROWS),
            "sft": lambda row: f"- {self.domains[row]}: {', '.join(self.words[row][:3])}",
            "grpo": say,
        }
        descriptions = {
            name: [Description.from_text(describe(row), num_tokens=8) for row in range(ROWS)]
            for name, describe in verbalizers.items()
        }
        doc_ids = [f"doc{row}" for row in range(ROWS)]
        texts = sorted(texts_to_read(descriptions, [], {}))
        evaluated = Evaluated(
            doc_ids=doc_ids,
            family_ids=doc_ids,
            domains=self.domains,
            texts=self.texts,
            salient=self.words,
            descriptions=descriptions,
            prefixes={},
            sampled="grpo",
            comparisons=Comparisons.draw(self.activations, doc_ids, self.mean, 0, self.domains),
            readings=Readings(
                texts,
                {
                    scorer: torch.stack([self.read(scorer, text) for text in texts])
                    for scorer in SCORERS
                },
            ),
            domain_names={name: name for name in DOMAINS},
        )
        return summarise(evaluated, nano().evaluation.gates, resamples=400, seed=0)

    def label(self, row: int) -> str:
        return f"- {self.domains[row]}: {', '.join(self.words[row])}"


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def failed(report: dict) -> set[str]:
    return {gate["name"] for gate in report["gates"] if not gate["passed"]}


def test_an_oracle_that_says_the_gold_label_equals_the_ceiling(world: World) -> None:
    report = world.report(world.label)
    assert (
        report["results"]["grpo"] == report["results"]["gold"]
        and report["claims"]["grpo"] == report["claims"]["gold"]
    )
    assert (
        report["claims"]["grpo"]["precision"]["value"] == 1.0
        and report["results"]["grpo"]["judge"]["top1_10way"]["low"] > 0.95
    )
    assert not report["warnings"] and not {
        "grpo.claims.distinct",
        "grpo-sft.judge.centred_cosine",
    } & failed(report)


def test_a_template_is_at_chance_under_every_scorer_and_fails_the_collapse_gate(
    world: World,
) -> None:
    report = world.report(lambda row: f"- {DOMAINS[0]}: {', '.join(WORDS[:5])}")
    for scorer in SCORERS:
        figures = report["results"]["grpo"][scorer]
        assert figures["top1"]["low"] < 0.5 < figures["top1"]["high"]
        assert figures["top1_10way"]["low"] < 0.1 < figures["top1_10way"]["high"]
    assert (
        report["claims"]["grpo"]["top_line"]["value"] == 1.0
        and report["claims"]["grpo"]["similarity"]["value"] == 1.0
    )
    assert {"grpo.claims.distinct", "grpo.judge.top1", "grpo.claims.precision"} <= failed(report)


def test_a_hallucinator_keeps_the_scores_of_its_domain_and_is_caught_by_its_claims(
    world: World,
) -> None:
    report = world.report(
        lambda row: (
            f"- {world.domains[row]}\n- tokens: {world.words[row][0]},"
            f" {', '.join(f'made{word}' for word in world.words[row - 1][:4])}"
        )
    )
    assert (
        report["results"]["grpo"]["judge"]["top1"]["low"] > 0.8
        and report["claims"]["grpo"]["domain"]["value"] == 1.0
    )
    assert report["claims"]["grpo"]["hallucinated"]["low"] > 0.7
    assert {"grpo.claims.precision", "grpo-sft.claims.precision_excess"} <= failed(report)


def test_a_quote_parrot_loses_everything_when_its_quotes_are_stripped(world: World) -> None:
    report = world.report(lambda row: f'- mentions "{world.texts[row]}"')
    assert report["results"]["grpo"]["judge"]["top1_10way"]["low"] > 0.9
    lost = report["quotes"]["grpo"]
    assert (
        lost["quoting"]["value"] == 1.0
        and lost["judge"]["top1_10way"]["low"] > 0.8
        and lost["judge"]["centred_cosine"]["low"] > 0.5
    )
    assert "gold" not in report["quotes"]


def test_the_domain_alone_is_far_above_chance_among_any_and_near_it_among_the_nearest(
    world: World,
) -> None:
    report = world.report(lambda row: f"- {world.domains[row]}")
    for scorer in SCORERS:
        assert report["results"]["grpo"][scorer]["top1_10way"]["low"] > 0.3
        assert report["results"]["grpo"][scorer]["top1_10way_hard"]["high"] < 0.2
    assert {"grpo-sft.judge.top1_10way_hard", "grpo.claims.distinct"} <= failed(report)


def test_strings_found_by_search_against_the_reward_scorer_are_warned_of(world: World) -> None:
    junk = torch.stack([world.scorers["reward"][word] for word in JUNK])
    centred = torch.nn.functional.normalize(world.activations, dim=1) - world.mean

    def search(row: int) -> str:
        """Greedily the five junk words whose sum is nearest to the activation.

        By the reward scorer.
        """
        chosen: list[int] = []
        for _ in range(5):
            sums = junk + junk[chosen].sum(0) if chosen else junk
            scores = torch.nn.functional.cosine_similarity(sums, centred[row][None])
            scores[chosen] = -1.0
            chosen.append(int(scores.argmax()))
        return "- " + ", ".join(JUNK[index] for index in chosen)

    report = world.report(search)
    reward, judge = (report["results"]["grpo"][scorer]["top1"] for scorer in ("reward", "judge"))
    assert reward["low"] > 0.9 and judge["low"] < 0.5 < judge["high"]
    [warning] = report["warnings"]
    assert (
        warning.startswith("grpo: the reward scorer's centred cosine exceeds the judge's")
        and "Reward hacking is likely" in warning
    )
    assert "grpo.judge.top1" in failed(report)
