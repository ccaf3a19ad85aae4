"""The stage that takes from labels what cannot be read, and the SFT that is taught what is left."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from nla_ray.activation.stage import load_activations
from nla_ray.label.stage import activation_subjects, all_labels, drawn_labels
from nla_ray.run.artifact import Run
from nla_ray.score import claims
from nla_ray.settings.config import ReconstructorConfig, RunConfig
from nla_ray.training.readable import (
    READABLE_LABELS,
    make_readable_labels,
    readable_labels,
    write_readable_labels,
)
from nla_ray.training.reconstruction import partly_replaced, scorer_labels
from nla_ray.training.sft import load_pairs


@pytest.fixture(scope="module")
def made(published_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("readable") / "run"
    shutil.copytree(published_run.run_dir, folder)
    config = with_claims(dataclasses.replace(published_run, run_dir=str(folder)), "replaced")
    write_readable_labels(config)
    return config


def with_claims(config: RunConfig, claims: str) -> RunConfig:
    return dataclasses.replace(config, sft=dataclasses.replace(config.sft, claims=claims))


def labels_of(config: RunConfig, claims: str, split: str = "train", **options: bool) -> list[str]:
    run = Run(with_claims(config, claims))
    return load_pairs(run, split, limit=None, seed=0, first_row=0, **options).labels


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_label_of_an_activation_has_its_forms_and_says_nothing_that_is_not_so(
    made: RunConfig, split: str
) -> None:
    run = Run(made)
    table = load_activations(run, split)
    texts = dict(zip(activation_subjects(run, table), table.texts, strict=True))
    originals = all_labels(run, split)
    for form in ("readable", "replaced", "thinned"):
        rows = list(readable_labels(run, split, form))
        assert [row["subject"] for row in rows] == [
            subject for subject in texts for _ in originals[subject]
        ]
        for row in rows:
            [original] = originals[row["subject"]]
            said = claims.claimed_words(row["label"])
            assert row["drawn"] and row["teacher"] == "offline"
            assert len(said) <= len(claims.claimed_words(original))
            if form == "replaced":
                assert claims.claim_counts(row["label"], texts[row["subject"]])[0] == len(said)
            else:
                assert said <= claims.claimed_words(original)


def test_the_probes_learned_from_train_documents_alone(made: RunConfig) -> None:
    manifest = Run(made).require(READABLE_LABELS)
    assert set(manifest.documents) == {"train"}
    assert set(manifest.documents["train"]) == set(load_activations(Run(made), "train").doc_ids)
    assert set(manifest.parents) == {"activations", "labels"}
    assert 0.0 <= manifest.metrics["unreadable_share"] <= 1.0
    assert manifest.metrics["items"] > 0


def test_labels_say_which_rule_made_them_and_those_of_an_earlier_one_are_taken(
    made: RunConfig, tmp_path: Path
) -> None:
    assert Run(made).require(READABLE_LABELS).config["inputs"] == {"algorithm": "3"}
    shutil.copytree(made.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / READABLE_LABELS)
    run = Run(dataclasses.replace(made, run_dir=str(tmp_path / "run")))
    earlier = run.open(READABLE_LABELS)
    with pytest.raises(ValueError, match=r"inputs: there nothing, here {'algorithm': '3'}"):
        make_readable_labels(run)
    completed = earlier.publish()
    assert make_readable_labels(run) == completed


def test_at_a_probability_of_nothing_every_word_of_a_label_is_readable(
    made: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(made.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / READABLE_LABELS)
    config = dataclasses.replace(
        made,
        run_dir=str(tmp_path / "run"),
        readable_labels=dataclasses.replace(made.readable_labels, least=0.0, fill_to=5),
    )
    write_readable_labels(config)
    assert Run(config).require(READABLE_LABELS).metrics["unreadable_share"] == 0.0
    originals = drawn_labels(Run(config), "train")
    for row in readable_labels(Run(config), "train", "readable"):
        assert row["label"] == originals[row["subject"]]
    said = {
        row["subject"]: claims.claimed_words(row["label"])
        for row in readable_labels(Run(config), "train", "replaced")
    }
    before = {subject: claims.claimed_words(label) for subject, label in originals.items()}
    assert all(said[subject] >= before[subject] for subject in said)
    assert all(len(said[subject] - before[subject]) <= 5 for subject in said)
    assert any(said[subject] > before[subject] for subject in said), "words of the text are added"


def test_sft_is_taught_the_form_that_its_settings_name(made: RunConfig) -> None:
    originals = [*drawn_labels(Run(made), "train").values()]
    assert labels_of(made, "all") == originals
    for form in ("readable", "replaced", "thinned"):
        expected = [row["label"] for row in readable_labels(Run(made), "train", form)]
        assert labels_of(made, form) == labels_of(made, form, every_label=True) == expected
    held_out = [row["label"] for row in readable_labels(Run(made), "validation", "replaced")]
    assert labels_of(made, "replaced", "validation") == held_out
    assert labels_of(made, "thinned") != originals


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_scorer_learns_its_share_of_the_replaced_labels(made: RunConfig, split: str) -> None:
    run = Run(made)
    originals = scorer_labels(run, split, ReconstructorConfig(labels="all"))
    replaced = {row["subject"]: [row["label"]] for row in readable_labels(run, split, "replaced")}
    assert originals != replaced and set(originals) >= set(replaced)
    for labels in ("one", "all"):
        at = {
            share: scorer_labels(
                run, split, ReconstructorConfig(labels=labels, replaced_share=share, seed=1)
            )
            for share in (0.0, 0.5, 1.0)
        }
        assert at[0.0] == originals and at[1.0] == {**originals, **replaced}
        # Labels that are the same in both forms say nothing about the share.
        differing = [subject for subject in replaced if replaced[subject] != originals[subject]]
        taken = sum(at[0.5][subject] == replaced[subject] for subject in differing)
        assert 0.2 < taken / len(differing) < 0.8
        assert all(
            at[0.5][subject] in (originals[subject], replaced[subject]) for subject in differing
        )


def test_a_share_of_labels_is_none_or_all_at_most() -> None:
    with pytest.raises(ValueError, match=r"replaced_share of a scorer: got 1\.5, expected"):
        ReconstructorConfig(replaced_share=1.5)


def test_every_teachers_label_has_a_draw_and_a_form_of_its_own() -> None:
    names = [(f"doc-{number}#0", teacher) for number in range(400) for teacher in ("one", "two")]
    rows = [{"text_id": text, "teacher": who, "label": f"{who} on {text}"} for text, who in names]
    replaced = [
        {"subject": text, "teacher": who, "label": f"replaced by {who} on {text}"}
        for text, who in names
    ]
    settings = ReconstructorConfig(replaced_share=0.3, seed=1)
    mixed = partly_replaced(rows, replaced, settings)
    taken = [row["label"] != mine["label"] for row, mine in zip(mixed, rows, strict=True)]
    for row, mine in zip(mixed, rows, strict=True):
        assert row["label"].removeprefix("replaced by ") == mine["label"]
    assert sum(taken) / len(taken) == pytest.approx(0.3, abs=0.05)
    assert sum(a != b for a, b in zip(taken[::2], taken[1::2], strict=True)) > 0
    assert partly_replaced(rows[:2], replaced, settings) == mixed[:2]
