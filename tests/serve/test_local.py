"""A loaded run answers as the jobs and the endpoint do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_artifacts import publish_verbalizer

import nla_ray
from nla_ray.activation.stage import load_activations
from nla_ray.activation.vectors import centred_cosine
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.score import claims
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.serve.local import LoadedRun
from nla_ray.serve.schema import DescribeRequest, DescriptionBody, Refusal
from nla_ray.settings.config import ClaimConfidenceConfig, RunConfig
from nla_ray.settings.presets import PRESETS
from nla_ray.training.claim_confidence import fit_claim_confidence


@pytest.fixture(scope="module")
def loaded(published_run: RunConfig) -> LoadedRun:
    return nla_ray.load(published_run.run_dir)


def test_the_settings_are_those_the_artifacts_were_made_with(
    loaded: LoadedRun, published_run: RunConfig
) -> None:
    for section in ("base", "capture", "sft", "grpo", "reward_scorer", "judge_scorer"):
        assert getattr(loaded.config, section) == getattr(published_run, section)


def test_it_describes_activations_and_texts_as_the_verbalizer_does(
    loaded: LoadedRun, published_run: RunConfig
) -> None:
    test = load_activations(Run(published_run), "test")
    verbalizer = Verbalizer.load(
        published_run.base, Path(published_run.run_dir) / "grpo" / "adapter"
    )
    expected = [answer.text for answer in verbalizer.describe(test.vectors[:3], max_new_tokens=8)]
    assert [answer.description for answer in loaded.describe(test.vectors[:3])] == expected
    assert [answer.description for answer in loaded.describe(test.texts[:3])] == expected
    assert [answer.description for answer in loaded.describe(test.vectors[:3].numpy())] == expected


def test_it_reads_texts_for_arithmetic_and_describes_several_vectors_in_a_prompt(
    loaded: LoadedRun, published_run: RunConfig, tmp_path: Path
) -> None:
    test = load_activations(Run(published_run), "test")
    rows = loaded.activations(test.texts[:4])
    torch.testing.assert_close(rows, test.vectors[:4], atol=1e-4, rtol=1e-4)
    verbalizer = Verbalizer.load(
        published_run.base, Path(published_run.run_dir) / "grpo" / "adapter"
    )
    pairs = rows.view(2, 2, -1)
    expected = verbalizer.describe(pairs, max_new_tokens=8)
    sampled = loaded.describe(pairs, max_new_tokens=8)
    assert [answer.description for answer in sampled] == [answer.text for answer in expected]
    whole = loaded.describe(rows[0] - rows[1][None], max_new_tokens=8)
    assert whole[0].typicality is not None
    torch.save({"steer": rows[0] - rows[1]}, tmp_path / "steer.pt")
    steering = loaded.directions(tmp_path / "steer.pt")
    assert torch.equal(steering["steer"], rows[0] - rows[1])
    assert loaded.describe(list(steering.values()), max_new_tokens=8) == whole
    mixed = DescribeRequest(vectors=[rows[:2].tolist(), [rows[2].tolist()], rows[2:].tolist()])
    answers = loaded._answer(loaded._endpoint.describe(mixed)).descriptions
    assert [answer.description for answer in answers] == [
        sampled[0].description,
        loaded.describe(rows[2:3])[0].description,
        sampled[1].description,
    ], "prompts of different numbers keep their order"
    with pytest.raises(Refusal, match="samples: got 2, expected none of it beside vectors"):
        loaded.describe(pairs, samples=2)
    with pytest.raises(Refusal, match=r"vectors\[0\]: got 0 vectors, expected 1 to 16"):
        loaded.describe(pairs[:, :0])
    longest = loaded.models.base.max_new_tokens
    with pytest.raises(Refusal, match=f"max_new_tokens: got {longest}, expected .*{longest - 1}"):
        loaded.describe(pairs, max_new_tokens=longest)


def test_it_scores_as_the_judge_does_whatever_was_asked_before(
    loaded: LoadedRun, published_run: RunConfig
) -> None:
    test = load_activations(Run(published_run), "test")
    described = [answer.description for answer in loaded.describe(test.texts[:3])]
    scores = loaded.score(described, test.vectors[:3])
    assert [set(score) for score in scores] == [{"reward", "judge"}] * 3
    judge = Reconstructor.load(published_run.base, Path(published_run.run_dir) / "judge_scorer")
    expected = centred_cosine(judge.reconstruct(described), test.vectors[:3], judge.mean)
    found = torch.tensor([score["judge"].centred_cosine for score in scores])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_it_explains_positions_and_chooses_among_samples(
    loaded: LoadedRun, published_run: RunConfig
) -> None:
    text = load_activations(Run(published_run), "test").texts[0]
    explained = loaded.explain(text, (-1, -2), samples=3, scorers=["judge"])
    assert [explanation.position for explanation in explained.explanations] == [
        explained.num_tokens - 1,
        explained.num_tokens - 2,
    ]
    assert all(
        explanation.samples == 3 and set(explanation.scores) == {"judge"}
        for explanation in explained.explanations
    )


@pytest.fixture(scope="module")
def sure(published_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """A loaded run that knows how likely a claim of its verbalizer is, which says words."""
    folder = tmp_path_factory.mktemp("sure") / "run"
    shutil.copytree(published_run.run_dir, folder)
    shutil.rmtree(folder / "grpo")
    publish_verbalizer(Run(dataclasses.replace(published_run, run_dir=str(folder))), "grpo", 0, 0.3)
    config = dataclasses.replace(
        published_run,
        run_dir=str(folder),
        claim_confidence=ClaimConfidenceConfig(max_activations=6, samples=2),
    )
    fit_claim_confidence(config)
    return nla_ray.load(str(folder))


def test_claims_are_left_out_below_the_confidence_that_is_asked_for(
    sure: LoadedRun, published_run: RunConfig
) -> None:
    rows = load_activations(Run(published_run), "test").vectors[:8]

    def described(least: float | None, first: int = 8) -> list[DescriptionBody]:
        return sure.describe(rows[:first], min_claim_confidence=least, max_new_tokens=48)

    plain, every, none = (described(least) for least in (None, 0.0, 1.0))
    assert all(answer.claims is None for answer in plain)
    assert [answer.description for answer in every] == [answer.description for answer in plain]
    likely = [claim.confidence for answer in every for claim in answer.claims or ()]
    assert likely and all(0.0 < confidence < 1.0 for confidence in likely)
    middle = sorted(likely)[len(likely) // 2]
    for whole, half, empty in zip(every, described(middle), none, strict=True):
        said = list(claims.claim_spans(whole.description or ""))
        assert [claim.claim for claim in whole.claims or ()] == said
        assert not claims.claim_spans(empty.description or "")
        assert not any(claim.kept for claim in empty.claims or ())
        kept = {claim.claim for claim in half.claims or () if claim.kept}
        assert kept == set(claims.claim_spans(half.description or ""))
        assert all(claim.confidence >= middle for claim in half.claims or () if claim.kept)
    assert described(0.0, first=1) == every[:1]


def test_confidence_by_claim_is_refused_where_it_was_not_learned(
    loaded: LoadedRun, sure: LoadedRun
) -> None:
    told = {model.name: model.claim_confidence for model in sure.models.verbalizers}
    assert told == {"grpo": True, "sft": False}
    with pytest.raises(Refusal, match=r"min_claim_confidence: got 0\.5 of grpo, expected"):
        loaded.describe(["a text"], min_claim_confidence=0.5)
    with pytest.raises(Refusal, match=r"min_claim_confidence: got 0\.5 of sft, expected"):
        sure.describe(["a text"], min_claim_confidence=0.5, verbalizer="sft")
    with pytest.raises(Refusal, match="min_claim_confidence: got min_confidence beside it"):
        sure.describe(["a text"], min_claim_confidence=0.5, min_confidence=0.5, samples=4)
    for sampling in ({"samples": 2}, {"temperature": 0.7}):
        with pytest.raises(Refusal, match="expected 1 sample at temperature 0"):
            sure.describe(["a text"], min_claim_confidence=0.5, **sampling)
    with pytest.raises(Refusal, match=r"min_claim_confidence: got 1\.5, expected"):
        sure.explain("a text", min_claim_confidence=1.5)
    explained = sure.explain("a text", min_claim_confidence=0.5)
    assert explained.explanations[0].claims is not None


def test_what_the_endpoint_refuses_is_a_value_error(loaded: LoadedRun) -> None:
    with pytest.raises(ValueError, match="inputs: got one text, expected a list"):
        loaded.describe("one text")
    with pytest.raises(ValueError, match="inputs: got None, expected a list"):
        loaded.describe(None)
    with pytest.raises(ValueError, match=r"activations: got shape \[32\], expected \[n, d_model\]"):
        loaded.describe(torch.ones(32))
    with pytest.raises(ValueError, match="samples: got 0, expected"):
        loaded.describe(["a text"], samples=0)
    with pytest.raises(ValueError, match="sample: got 2, expected"):
        loaded.describe(["a text"], sample=2)
    with pytest.raises(ValueError, match="activations: got 2 rows, expected 1, one for each"):
        loaded.score(["- licence"], torch.ones(2, 32))
    with pytest.raises(Refusal, match=r"items\.0\.description: got None, expected"):
        loaded.score([None], torch.ones(1, 32))
    with pytest.raises(Refusal, match="scorers: got judge, expected"):
        loaded.score(["- licence"], torch.ones(1, 32), scorers="judge")
    with pytest.raises(ValueError, match="descriptions: got - licence, expected a list"):
        loaded.score("- licence", torch.ones(1, 32))
    with pytest.raises(ValueError, match="verbalizer: got other, expected one of"):
        loaded.describe(["a text"], verbalizer="other")
    with pytest.raises(ValueError, match=r"activations\[0\]: got 3 numbers, expected 32 numbers"):
        loaded.describe(torch.ones(1, 3))


def test_a_run_without_a_verbalizer_names_the_job_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a finished run\. Make it with: python jobs/pipeline\.py"
    ):
        nla_ray.load(str(tmp_path))


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_its_plain_form(name: str) -> None:
    from nla_ray.settings.config import from_dict, to_dict

    config = PRESETS[name]()
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
