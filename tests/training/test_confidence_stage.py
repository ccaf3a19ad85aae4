"""The stage that learns how likely a verbalizer's claims are, on a run of a tiny base."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from nla_ray.activation.stage import load_activations
from nla_ray.run.artifact import Run
from nla_ray.score import claims
from nla_ray.score.claim_confidence import INPUTS, Claim
from nla_ray.score.probe import words_of
from nla_ray.settings.config import ClaimConfidenceConfig, RunConfig
from nla_ray.training.claim_confidence import (
    CLAIM_CONFIDENCE,
    fit_claim_confidence,
    load_claim_confidence,
)


@pytest.fixture(scope="module")
def fitted(published_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("confidence") / "run"
    shutil.copytree(published_run.run_dir, folder)
    config = dataclasses.replace(
        published_run,
        run_dir=str(folder),
        claim_confidence=ClaimConfidenceConfig(max_activations=6, samples=2),
    )
    fit_claim_confidence(config)
    return config


def file_of(config: RunConfig, name: str) -> Path:
    return Path(config.run_dir) / CLAIM_CONFIDENCE / f"{name}.jsonl"


def lines(config: RunConfig, name: str) -> list[dict]:
    return [json.loads(line) for line in file_of(config, name).read_text().splitlines()[1:]]


def test_it_learns_from_validation_and_its_probe_from_train(fitted: RunConfig) -> None:
    run = Run(fitted)
    manifest = run.require(CLAIM_CONFIDENCE)
    assert set(manifest.parents) == {"activations", "grpo"}
    assert set(manifest.documents) == {"train", "validation"}
    validation = set(load_activations(run, "validation").doc_ids)
    assert set(manifest.documents["validation"]) <= validation
    assert set(manifest.documents["train"]) == set(load_activations(run, "train").doc_ids)
    assert manifest.metrics["activations"] == 6
    confidence = load_claim_confidence(run)
    assert confidence.weights.isfinite().all() and len(confidence.weights) == len(INPUTS)


def test_greedy_descriptions_are_kept_with_the_log_probability_of_their_claims(
    fitted: RunConfig,
) -> None:
    greedy, samples = lines(fitted, "greedy"), lines(fitted, "samples")
    assert len(greedy) == 6 and len(samples) == 12
    for line in greedy:
        assert set(line["claim_log_probs"]) == set(claims.claim_spans(line["description"]))
    assert not any("claim_log_probs" in line for line in samples)


def test_what_was_described_is_taken_as_it_is_and_its_claims_are_looked_up_in_the_texts(
    fitted: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(fitted.run_dir, tmp_path / "run")
    config = dataclasses.replace(fitted, run_dir=str(tmp_path / "run"))
    (tmp_path / "run" / CLAIM_CONFIDENCE / "manifest.json").unlink()
    samples = file_of(config, "samples").read_text()
    table = load_activations(Run(config), "validation")
    text_of = dict(zip(table.ids, table.texts, strict=True))
    said = []
    for line in lines(config, "greedy"):
        word = sorted(words_of(text_of[line["activation_id"]]))[0]
        said.append(
            {
                **line,
                "description": f"- tokens: {word}, quxly",
                "claim_log_probs": {word: -0.1, "quxly": -3.0},
            }
        )
    [head, *_] = file_of(config, "greedy").read_text().splitlines()
    file_of(config, "greedy").write_text(
        "".join(f"{line}\n" for line in [head, *map(json.dumps, said)])
    )
    fit_claim_confidence(config)
    assert lines(config, "greedy") == said and file_of(config, "samples").read_text() == samples
    metrics = Run(config).require(CLAIM_CONFIDENCE).metrics
    assert (metrics["claims"], metrics["found"]) == (12, 6)
    likely, unlikely = load_claim_confidence(Run(config)).probabilities(
        [
            Claim(word="frame", log_prob=-0.1, agreement=0.0, probability=0.9),
            Claim(word="quxly", log_prob=-3.0, agreement=0.0, probability=None),
        ]
    )
    assert likely > 0.8 > 0.2 > unlikely
