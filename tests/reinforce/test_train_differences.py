"""GRPO on differences of two activations: their rows, their wrong rows, their scores, a resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from grpo_run import SETTINGS, grpo_config, prepare_run

from nla_ray.activation import vectors
from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import injection_prompt
from nla_ray.reinforce import grpo, stage
from nla_ray.reinforce.differences import TrainDifferences, WrongRows, draw_train_differences
from nla_ray.reinforce.rewards import WrongActivations
from nla_ray.reinforce.scoring import ScoringRequest, reconstruct, submit_scores
from nla_ray.reinforce.steps import StepClock, StepSampler
from nla_ray.run.artifact import Run
from nla_ray.run.metrics import MetricsLog
from nla_ray.settings.config import BaseConfig

ROWS = 40
FAMILIES = [f"family{row // 2}" for row in range(ROWS)]
MEAN = torch.full((8,), 0.2)
HALF = dataclasses.replace(SETTINGS, prompts_per_step=4, steps=100, difference_share=0.5)


def train_table() -> ActivationTable:
    names = [f"a{row}" for row in range(ROWS)]
    rows = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)) + 1.0
    return ActivationTable(
        ids=names,
        text_ids=names,
        doc_ids=names,
        family_ids=FAMILIES,
        domains=names,
        texts=[f"text {row}" for row in range(ROWS)],
        vectors=rows,
        views=torch.stack([rows, rows.flip(0)], dim=1),
    )


@pytest.fixture(scope="module")
def drawn() -> TrainDifferences:
    differences = draw_train_differences(train_table(), HALF, MEAN)
    assert differences is not None
    return differences


def test_a_row_of_the_bank_is_the_difference_and_what_scorers_compare_lies_its_way(
    drawn: TrainDifferences,
) -> None:
    train = train_table()
    assert drawn.first_row == ROWS and len(drawn.firsts) == 4 * 64
    for number, (first, second) in enumerate(zip(drawn.firsts, drawn.seconds, strict=True)):
        assert FAMILIES[first] != FAMILIES[second] and drawn.family_ids[number] == FAMILIES[first]
    expected = vectors.direction(train.views[drawn.firsts])
    expected = expected - vectors.direction(train.views[drawn.seconds])
    torch.testing.assert_close(drawn.injected, expected)
    difference = vectors.direction(train.vectors[drawn.firsts])
    difference = difference - vectors.direction(train.vectors[drawn.seconds])
    read = torch.randn(len(drawn.firsts), 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        vectors.centred_cosine(read, drawn.compared, MEAN),
        vectors.cosine(vectors.centre(read, MEAN), difference),
        atol=1e-5,
        rtol=0,
    )
    again = draw_train_differences(train, HALF, MEAN)
    other = draw_train_differences(train, dataclasses.replace(HALF, seed=1), MEAN)
    assert again is not None and other is not None
    assert again.seconds == drawn.seconds and other.seconds != drawn.seconds
    assert draw_train_differences(train, SETTINGS, MEAN) is None


def test_every_step_has_differences_that_no_other_step_has(drawn: TrainDifferences) -> None:
    batches = drawn.schedule([[number, number + 1] for number in range(100)], 2)
    assert batches[0] == [0, 1, ROWS, ROWS + 1] and batches[99] == [99, 100, ROWS + 198, ROWS + 199]
    first, second = drawn.texts_of([3, ROWS + 5], train_table().texts)
    assert first == {ROWS + 5: f"text {drawn.firsts[5]}"}
    assert second == {ROWS + 5: f"text {drawn.seconds[5]}"}


def test_wrong_rows_of_a_difference_are_differences_half_of_them_with_its_first(
    drawn: TrainDifferences,
) -> None:
    settings = dataclasses.replace(HALF, num_wrong=3, num_near=1)
    wrong = WrongRows(WrongActivations(FAMILIES, 4), drawn, settings)
    assert all(other < ROWS for other in wrong.draw(7, seed=0, step=0))
    seen = set()
    for number in (0, 70, 255):
        first, second = drawn.firsts[number], drawn.seconds[number]
        chosen = wrong.draw(ROWS + number, seed=0, step=3)
        assert chosen == wrong.draw(ROWS + number, seed=0, step=3) and len(set(chosen)) == 4
        others = [other - ROWS for other in chosen]
        assert number not in others and all(0 <= other < 256 for other in others)
        assert [drawn.family_ids[other] == FAMILIES[first] for other in others] == [False] * 2 + [
            True
        ] * 2
        for other in others[2:]:
            assert drawn.firsts[other] == first and drawn.seconds[other] != second
        seen.add(tuple(wrong.draw(ROWS + number, seed=0, step=4)) == tuple(chosen))
    assert seen == {False}, "every step draws anew"


@pytest.mark.parametrize("share", [0.1, 1.0, -0.5])
def test_a_share_that_leaves_no_prompt_of_either_kind_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"grpo.difference_share: got"):
        dataclasses.replace(SETTINGS, difference_share=share)


# With actors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tiny_base: BaseConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("differences") / "run"
    return prepare_run(grpo_config(tiny_base, folder, difference_share=0.5, claim_weight=1.0))


class CutOff(grpo.GRPOCallback):
    """Ends a training in its third step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_differences_are_sampled_and_scored_as_such_and_a_resume_meets_the_same(
    prepared: Run, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared.config
    train, validation = (
        load_activations(prepared, "train"),
        load_activations(prepared, "validation"),
    )
    mean = stage.mean_direction_of(prepared)
    differences = draw_train_differences(train, config.grpo, mean)
    assert differences is not None
    with stage.actor_pools(prepared, train, validation, differences) as (bank, rollouts, scorers):
        data = stage.training_data(prepared, train, validation, bank, differences)
        row = data.schedule[0][-1]
        assert [[row >= len(train) for row in batch] for batch in data.schedule] == [
            [False, True]
        ] * 4
        assert data.sources[row] == data.without[row], "all texts of this run are one"

        text, wrong = "- tokens: rows", data.wrong.draw(row, 0, 0)
        request = ScoringRequest(descriptions=[text], rows=[row], wrong_rows=[wrong])
        [scores] = scorers.collect(submit_scores(scorers, request))
        read = vectors.centre(reconstruct(scorers, "reward_scorer", [text]), mean)[0]
        expected = vectors.cosine(read, differences.injected[[row - len(train)], 0])
        torch.testing.assert_close(scores.centred_right, expected, atol=1e-4, rtol=0)
        of_wrong = differences.injected[[other - len(train) for other in wrong], 0]
        torch.testing.assert_close(
            scores.centred_wrong[0], vectors.cosine(read, of_wrong), atol=1e-4, rtol=0
        )

        actors = {"data": data, "rollouts": rollouts, "scorers": scorers, "tells_steps": False}
        records = []
        for name in ("whole", "resumed"):
            arguments = {**actors, "run": config, "name": name}
            if name == "resumed":
                with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
                    patch.setattr(grpo, "GRPOCallback", CutOff)
                    grpo.grpo_worker(arguments)
            grpo.grpo_worker(arguments)
            log = MetricsLog(Path(config.run_dir) / name / "scratch/metrics.jsonl").read()
            records.append([record for record in log if "loss" in record])
        for record, again in zip(*records, strict=True):
            for key in ("reward", "rewards/score/mean", "completions/mean_length", "score/right"):
                assert again[key] == pytest.approx(record[key], abs=1e-4)
        assert sampler_claims(prepared, data, rollouts, scorers)


def sampler_claims(prepared: Run, data, rollouts, scorers) -> bool:
    """Whether the claims of a difference are never paid as found, where both texts are one."""
    config = prepared.config
    prompt = injection_prompt(load_tokenizer(config.base), config.base)
    policy = grpo.load_policy(config, data, prompt)
    vocab_size = policy.get_input_embeddings().vocab_size
    sampler = StepSampler(config.grpo, data, prompt, vocab_size, rollouts, scorers, StepClock())
    folder = Path(config.run_dir) / "first_batch"
    trainer = grpo.build_trainer(config, folder, policy, sampler, StepClock())
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    of_difference = sampler.claim_values()[config.grpo.group_size :]
    return all(value <= 0.0 for values in of_difference for value in values)
