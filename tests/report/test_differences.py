"""Differences of two activations: pairs, what is said of them, and what tells them from others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nla_ray.activation import vectors
from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations
from nla_ray.description.record import Description
from nla_ray.report.differences import Differences, difference_section, draw_differences
from nla_ray.report.evaluated import Evaluated
from nla_ray.report.readings import Readings
from nla_ray.report.rendering.differences import differences_section
from nla_ray.report.stage import check_corpus, evaluate, make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.readable import label_difference
from nla_ray.settings.config import EvaluationConfig, RunConfig

ROWS = 60
FAMILIES = [f"family{row // 2}" for row in range(ROWS)]
MEAN = torch.full((16,), 0.2)


def table() -> ActivationTable:
    names = [f"a{row}" for row in range(ROWS)]
    generator = torch.Generator().manual_seed(0)
    return ActivationTable(
        ids=names,
        text_ids=names,
        doc_ids=names,
        family_ids=FAMILIES,
        domains=["licence"] * ROWS,
        texts=[f"text {row}" for row in range(ROWS)],
        vectors=torch.randn(ROWS, 16, generator=generator) + 1.0,
    )


@pytest.fixture(scope="module")
def drawn() -> Differences:
    differences = draw_differences(table(), MEAN, 40, seed=3)
    assert differences is not None
    return differences


def judged(read: dict[str, torch.Tensor]) -> Readings:
    return Readings(list(read), {"judge": torch.stack(list(read.values()))})


def evaluated(drawn: Differences) -> Evaluated:
    """Sft says what the difference is; grpo says of a difference what it says of the first."""
    test = table()
    read: dict[str, torch.Tensor] = {}
    of_rows = {name: [f"{name} of {row}" for row in range(ROWS)] for name in ("gold", "sft")}
    of_rows["grpo"] = of_rows["sft"]
    for texts in of_rows.values():
        read |= dict(zip(texts, test.vectors, strict=True))
    said = {
        "gold": ["nothing"] * len(drawn),
        "sft": [f"sft of {name}" for name in drawn.ids],
        "grpo": [of_rows["sft"][row] for row in drawn.firsts],
        "shuffled": ["nothing"] * len(drawn),
    }
    placed = vectors.beside_mean(drawn.injected[:, 0], MEAN)
    of_two = {"nothing": MEAN + 0.01, **dict(zip(said["sft"], placed, strict=True))}
    of_two |= {text: read[text] for text in said["grpo"]}
    descriptions = {
        name: [Description.from_text(text, num_tokens=3) for text in texts]
        for name, texts in of_rows.items()
    }
    return Evaluated(
        doc_ids=test.doc_ids,
        family_ids=FAMILIES,
        domains=test.domains,
        texts=test.texts,
        salient=[[]] * ROWS,
        comparisons=Comparisons.draw(test.vectors, test.doc_ids, MEAN, 0, family_ids=FAMILIES),
        descriptions=descriptions,
        prefixes={},
        sampled="grpo",
        differences=dataclasses.replace(drawn, said=said, readings=judged(of_two)),
        readings=judged(read),
        domain_names={},
    )


def test_pairs_and_what_they_are_told_from_are_of_other_families(drawn: Differences) -> None:
    test, pool = table(), drawn.comparisons.pool
    assert len(drawn) == len(set(drawn.firsts)) == 40
    directions = vectors.direction(test.vectors)
    of_two = directions[:, None] - directions[None, :]
    for pair, (first, second) in enumerate(zip(drawn.firsts, drawn.seconds, strict=True)):
        assert FAMILIES[first] != FAMILIES[second] and drawn.family_ids[pair] == FAMILIES[first]
        assert drawn.ids[pair] == f"a{first} - a{second}"
        torch.testing.assert_close(drawn.injected[pair, 0], of_two[first, second])
        for other in drawn.comparisons.others[pair, :9].tolist():
            assert FAMILIES[drawn.firsts[other]] != FAMILIES[first]
        same_first = vectors.centre(pool[drawn.comparisons.hard_others[pair]], MEAN)
        found = vectors.cosine(same_first[:, None], of_two[first][None]) > 1 - 1e-5
        seconds = found.int().argmax(1).tolist()
        assert found.any(1).all() and len(set(seconds)) == 9
        assert {FAMILIES[first], FAMILIES[second]}.isdisjoint(FAMILIES[row] for row in seconds)
    again, other = (draw_differences(table(), MEAN, 40, seed) for seed in (3, 4))
    assert again is not None and other is not None
    assert again.ids == drawn.ids and other.ids != drawn.ids
    assert draw_differences(table(), MEAN, 0, seed=3) is None
    assert len(draw_differences(table(), MEAN, 99, seed=3) or []) == ROWS


def test_who_describes_the_first_alone_finds_the_pair_and_not_its_second(
    drawn: Differences,
) -> None:
    found = difference_section(evaluated(drawn), 200, 0)
    values = {
        name: {figure: interval.value for figure, interval in by_scorer["judge"].items()}
        for name, by_scorer in found["results"].items()
    }
    assert list(values) == [
        "gold",
        "gold_of_first",
        "sft",
        "sft_of_first",
        "grpo",
        "grpo_of_first",
        "shuffled",
    ]
    assert found["pairs"] == 40 and found["chance"] == {"right_pair": 0.1, "right_second": 0.1}
    assert values["sft"] == pytest.approx({"right_pair": 1, "right_second": 1, "pair_cosine": 1})
    assert values["grpo"] == values["grpo_of_first"] == values["sft_of_first"]
    assert values["grpo"]["right_pair"] > 0.8 and values["grpo"]["right_second"] < 0.3
    assert values["gold"]["right_pair"] < 0.3, "one text for all is at chance"
    interval = found["results"]["sft"]["judge"]["right_pair"]
    assert (interval.n, interval.families) == (40, len(set(drawn.family_ids)))
    assert list(found["paired"]) == [
        "gold-gold_of_first",
        "sft-gold",
        "sft-sft_of_first",
        "grpo-gold",
        "grpo-grpo_of_first",
        "grpo-sft",
    ]
    less = found["paired"]["sft-sft_of_first"]["judge"]["right_second"]
    assert less.value == pytest.approx(1 - values["sft_of_first"]["right_second"]) and less.low > 0


def test_the_right_pair_is_that_of_a_slow_count(drawn: Differences) -> None:
    """By plain cosines of what is read, less the mean, with the differences themselves."""
    everything = evaluated(drawn)
    texts = [f"sft of {row}" for row in drawn.firsts]
    read = vectors.direction(everything.read("judge", texts)) - MEAN
    right = 0
    for pair, others in enumerate(drawn.comparisons.others[:, :9].tolist()):
        cosines = vectors.cosine(read[pair], drawn.injected[[pair, *others], 0])
        right += int(cosines[0] > cosines[1:].max())
    found = difference_section(everything, 50, 0)["results"]["grpo"]["judge"]
    assert found["right_pair"].value == right / 40


def test_a_report_without_differences_has_no_such_section(drawn: Differences) -> None:
    without = dataclasses.replace(evaluated(drawn), differences=None)
    assert difference_section(without, 50, 0) == {} and differences_section({}).blocks == []


def test_too_few_pairs_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"evaluation.differences: got 3, expected 0, or at least"):
        EvaluationConfig(differences=3)


# The stage on a real run --------------------------------------------------------------------------


@pytest.fixture
def run_with(published_run: RunConfig, tmp_path: Path) -> Callable[[int], Run]:
    """One copy of a run that is ready to be evaluated, with another number of differences."""
    folder = tmp_path / "run"
    shutil.copytree(published_run.run_dir, folder)

    def make(differences: int) -> Run:
        evaluation = dataclasses.replace(
            published_run.evaluation,
            samples=0,
            patch_rows=0,
            bootstrap_resamples=50,
            differences=differences,
        )
        return Run(dataclasses.replace(published_run, run_dir=str(folder), evaluation=evaluation))

    return make


def test_a_complete_report_gets_differences_from_the_same_descriptions(
    run_with: Callable[[int], Run],
) -> None:
    plain = run_with(0)
    evaluate(plain)
    first, folder = read_report(plain), Path(plain.config.run_dir) / "report"
    assert "differences" not in first and "Of two" not in (folder / "report.html").read_text()
    written = (folder / "descriptions/sft.jsonl").stat().st_mtime_ns
    run = run_with(20)
    manifest = evaluate(run)
    report = read_report(run)
    found = report.pop("differences")
    assert report == first, "no other figure changes"
    assert (folder / "descriptions/sft.jsonl").stat().st_mtime_ns == written
    assert set(found["results"]["sft"]) == {"reward", "judge", "linear"}
    assert list(found["results"])[::2] == ["gold", "sft", "grpo", "shuffled"]
    assert "## Differences of two activations" in (folder / "report.md").read_text()
    assert "right second of ten" in (folder / "report.html").read_text()
    assert {f"descriptions/differences-20/{name}.jsonl" for name in ("sft", "grpo")} < set(
        manifest.files
    )
    protocol, *lines = (folder / "descriptions/differences-20/sft.jsonl").read_text().splitlines()
    assert json.loads(protocol)["protocol"]["decoding"]["temperature"] == 0.0 and len(lines) == 20
    assert evaluate(run) == manifest
    evaluate(plain)
    assert read_report(plain) == first


@pytest.mark.parametrize("name", ["sft_of_first", "gold_of_first", "theirs_of_first"])
def test_the_name_of_a_row_of_differences_is_refused_for_what_is_compared(
    run_with: Callable[[int], Run], name: str
) -> None:
    for differences in (0, 20):
        config = run_with(differences).config
        theirs = [f"{each}={config.run_dir}/sft" for each in ("theirs", name)]
        run = Run(dataclasses.replace(config, compare=tuple(theirs)))
        if not differences:
            check_corpus(run)
            continue
        with pytest.raises(ValueError, match=rf"--compare: got '{name}=.* none of .*{name}"):
            check_corpus(run)


def test_differences_are_described_as_the_verbalizer_describes_their_vectors(
    run_with: Callable[[int], Run],
) -> None:
    from nla_ray.activation.stage import load_stats
    from nla_ray.description.verbalizer import Verbalizer
    from nla_ray.label.stage import activation_subjects, drawn_labels

    run = run_with(20)
    make_report(run.config)
    test, mean = load_activations(run, "test"), torch.tensor(load_stats(run)["mean_direction"])
    drawn = draw_differences(test, mean, 20, run.config.evaluation.seed)
    assert drawn is not None
    folder = Path(run.config.run_dir)
    verbalizer = Verbalizer.load(run.config.base, folder / "sft/adapter")
    expected = verbalizer.describe(drawn.injected, max_new_tokens=8)
    kept = folder / "report/descriptions/differences-20/sft.jsonl"
    _, *lines = map(json.loads, kept.read_text().splitlines())
    assert [line["activation_id"] for line in lines] == list(drawn.ids)
    assert [line["description"] for line in lines] == [said.text for said in expected]
    labels, subjects = drawn_labels(run, "test"), activation_subjects(run, test)
    for example, first, second in zip(
        read_report(run)["differences"]["examples"], drawn.firsts, drawn.seconds, strict=False
    ):
        own, other = (labels.get(subjects[row], "") for row in (first, second))
        assert example["descriptions"]["gold"] == label_difference(own, other)
    make_report(dataclasses.replace(run.config, compare=(f"theirs={folder}/sft",)))
    again = folder / "report_theirs/descriptions/differences-20"
    assert (again / "sft.jsonl").read_bytes() == kept.read_bytes()
    assert (again / "theirs.jsonl").read_text().splitlines()[1:] == (
        kept.read_text().splitlines()[1:]
    )
