"""GRPO on the tiny base: the KL's anchor, whose log-probs are whose, batches across a resume."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from grpo_run import LORA, SETTINGS, grpo_config, prepare_run, random_adapter

from nla_ray.activation.injection import attach_activations
from nla_ray.activation.stage import load_activations
from nla_ray.base.adapters import save_adapter
from nla_ray.base.families import causal_model
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import build_injection_prompt
from nla_ray.reinforce import grpo, stage
from nla_ray.reinforce.credit import cut_lines
from nla_ray.reinforce.grpo import VerbalizerTrainer
from nla_ray.reinforce.monitor import (
    JUDGE_COSINE,
    JUDGE_GAIN,
    KEPT,
    WARNED,
    best_reading,
    kept_reading,
)
from nla_ray.reinforce.rewards import beginning_worth, reward_weights, schedule_rows
from nla_ray.reinforce.rollouts import RolloutWorker, train_request
from nla_ray.reinforce.scoring import ScoringRequest, submit_scores
from nla_ray.reinforce.steps import StepClock, StepSampler
from nla_ray.run.artifact import Run
from nla_ray.run.metrics import MetricsLog
from nla_ray.settings.config import BaseConfig, RunConfig
from nla_ray.settings.fit import check_stage
from nla_ray.settings.presets import override
from nla_ray.training.verbalizer import TrainableVerbalizer

BANK_ROWS = 24


@pytest.fixture(scope="module")
def prepared(tiny_base: BaseConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything GRPO needs, over the tiny base."""
    return prepare_run(grpo_config(tiny_base, tmp_path_factory.mktemp("grpo") / "run"))


class InProcessSampler:
    """A real rollout worker in this process, whose rewards are the token ids' remainders."""

    def __init__(self, base: BaseConfig, bank: torch.Tensor) -> None:
        self.worker = RolloutWorker(base, LORA, 1, bank.numpy(), bank.numpy())
        self.prompt, self.vocab_size = (
            build_injection_prompt(load_tokenizer(base), base.marker),
            self.worker.engine.decoder.shape.vocab_size,
        )

    def load(self, model: torch.nn.Module) -> None:
        from nla_ray.base.adapters import adapter_state

        self.worker.load_weights(adapter_state(model), 0)

    def __call__(self, prompts: list[str], trainer) -> dict[str, list]:
        rollouts = self.worker.sample(
            train_request(SETTINGS, [int(prompt) for prompt in prompts[:: SETTINGS.group_size]], 0)
        )
        return {
            "prompt_ids": [
                self.prompt.encode(rollout.row, self.vocab_size) for rollout in rollouts
            ],
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.log_probs for rollout in rollouts],
        }

    def reward_function(self, name: str):
        def term(completion_ids: list[list[int]], **_) -> list[float]:
            return [float(sum(ids) % 7) for ids in completion_ids]

        term.__name__ = name
        return term


@pytest.fixture
def scored_batch(tiny_base: BaseConfig, tmp_path: Path):
    """Trainer, its batch of rollouts with reference log-probs, and the bank.

    Training has moved the policy away from SFT.
    """
    config = grpo_config(tiny_base, tmp_path)
    bank = torch.randn(BANK_ROWS, 32, generator=torch.Generator().manual_seed(1))
    save_adapter(random_adapter(tiny_base), tmp_path / "adapter")
    prompt = build_injection_prompt(load_tokenizer(tiny_base), tiny_base.marker)
    model = TrainableVerbalizer.load(
        tiny_base, tmp_path / "adapter", bank, prompt, temperature=config.grpo.temperature
    )
    sampler = InProcessSampler(tiny_base, bank)
    sampler.data = grpo.TrainingData(
        schedule=schedule_rows(BANK_ROWS, 2, 4, seed=0),
        sources={},
        wrong=None,
        bank=None,
        monitor=None,
    )
    trainer = grpo.build_trainer(config, tmp_path, model, sampler, StepClock())
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name:
            parameter.data += 0.05
    sampler.load(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(batch), bank


def plain_log_probs(
    model, bank: torch.Tensor, norm: float, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of the completions by the library's forward, the slow way: [batch, completion]."""
    attach_activations(model, bank, norm)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    shifted = ids[:, 1:].masked_fill(ids[:, 1:] >= logits.shape[-1], 0)
    return (
        logits.log_softmax(-1)
        .gather(-1, shifted.unsqueeze(-1))
        .squeeze(-1)[:, -batch["completion_ids"].shape[1] :]
    )


def test_the_kl_is_anchored_to_the_sft_adapter_and_not_to_the_base(
    scored_batch, tiny_base: BaseConfig
) -> None:
    _, batch, bank = scored_batch
    mask = batch["completion_mask"].bool()
    reference = batch["ref_per_token_logps"][mask]
    sft = plain_log_probs(random_adapter(tiny_base), bank, tiny_base.injection_norm, batch)[mask]
    base = plain_log_probs(load_backbone(tiny_base), bank, tiny_base.injection_norm, batch)[mask]
    torch.testing.assert_close(reference, sft, atol=1e-4, rtol=0)
    assert (reference - base).abs().mean() > 0.1


def test_the_samplers_log_probs_are_the_trainers(scored_batch, tiny_base: BaseConfig) -> None:
    trainer, batch, _ = scored_batch
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, batch["completion_ids"].shape[1]
    )
    mask = batch["completion_mask"]
    torch.testing.assert_close(
        (log_probs * mask).detach(), batch["sampling_per_token_logps"] * mask, atol=1e-4, rtol=0
    )
    gap, k3 = grpo.log_prob_gap(log_probs.detach(), batch["sampling_per_token_logps"], mask)
    assert gap < 1e-4 and k3.abs() < 1e-6


def test_computing_only_what_is_needed_changes_neither_log_probs_nor_entropies_nor_gradients(
    scored_batch, tiny_base: BaseConfig
) -> None:
    trainer, batch, _ = scored_batch
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    weights = batch["completion_mask"] * torch.linspace(-1, 1, batch["completion_mask"].shape[1])
    answers = []
    for on_cpu in (True, False):
        trainer.model.scores_labels = on_cpu  # False: TRL's forward, as on a GPU
        trainer.model.zero_grad()
        log_probs, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, batch["completion_ids"].shape[1], compute_entropy=True
        )
        (log_probs * weights).sum().backward()
        gradients = [
            parameter.grad.clone()
            for parameter in trainer.model.parameters()
            if parameter.requires_grad
        ]
        answers.append(
            (
                log_probs.detach() * batch["completion_mask"],
                entropy * batch["completion_mask"],
                gradients,
            )
        )
    torch.testing.assert_close(answers[0], answers[1], atol=1e-4, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in answers[0][2]) > 0.1


def test_the_log_prob_gap_counts_real_tokens_only() -> None:
    trainer, sampler = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.0, 9.0]])
    gap, k3 = grpo.log_prob_gap(trainer, sampler, torch.tensor([[1, 1, 0]]))
    assert gap.item() == pytest.approx(0.25)
    assert k3.item() == pytest.approx((1.6487213 - 0.5 - 1.0) / 2)


def test_the_gradient_of_the_kl_is_that_of_the_reverse_kl(scored_batch) -> None:
    """grad KL(policy || SFT) = E_policy[grad log p (log p - log p_SFT)], token by token."""
    trainer, batch, _ = scored_batch
    batch = {**batch, "advantages": torch.zeros_like(batch["advantages"])}
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.current_gradient_accumulation_steps = 1
    gradients = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), trained)

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    rows, length = batch["completion_ids"].shape
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, length
    )
    distance = (log_probs - batch["ref_per_token_logps"]).detach()
    estimate = (log_probs * distance * batch["completion_mask"]).sum()
    share = SETTINGS.beta / (rows * SETTINGS.max_new_tokens)
    expected = torch.autograd.grad(share * estimate, trained)
    assert max(gradient.abs().max() for gradient in expected) > 1e-4
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-3)


def test_ratios_are_taken_against_the_samplers_log_probs(scored_batch) -> None:
    """A sampler that is off by 0.1 a token has rollouts of a ratio of e^0.1."""
    trainer, batch, _ = scored_batch
    torch.testing.assert_close(batch["old_per_token_logps"], batch["sampling_per_token_logps"])
    trainer.current_gradient_accumulation_steps, trainer.beta = 1, 0.0
    gradients = {}
    for shift in (0.0, 0.1):
        shifted = {
            **batch,
            "old_per_token_logps": batch["old_per_token_logps"] - shift,
            "advantages": torch.ones_like(batch["advantages"]),
        }
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, shifted).backward()
        gradients[shift] = torch.cat(
            [
                parameter.grad.flatten()
                for parameter in trainer.model.parameters()
                if parameter.requires_grad
            ]
        )
    torch.testing.assert_close(gradients[0.1], math.exp(0.1) * gradients[0.0], rtol=1e-3, atol=1e-6)


def test_a_sampler_that_is_another_model_is_told_and_then_ends_the_run(caplog) -> None:
    gap = grpo.SamplerGap()
    with caplog.at_level("WARNING"):
        for k3 in [0.002, *[0.5] * 9, 0.05, *[0.5] * 9]:
            gap.watch(k3)
    assert len(caplog.records) == 1 and "k3 of their log-probs is 0.5" in caplog.text
    with pytest.raises(
        ValueError, match=r"differ from the policy's by a k3 of 0.5, expected below 0.1"
    ):
        gap.watch(0.5)


def test_trl_meets_the_batches_of_the_schedule_in_order_and_in_whole_groups(scored_batch) -> None:
    trainer, _, _ = scored_batch
    schedule = schedule_rows(BANK_ROWS, 2, 4, seed=0)
    generations = list(trainer.get_train_dataloader())[:: trainer.args.steps_per_generation]
    met = [[int(example["prompt"]) for example in batch] for batch in generations]
    assert met == [[row for row in batch for _ in range(SETTINGS.group_size)] for batch in schedule]


def test_dropout_is_off_and_only_the_policy_has_gradients(scored_batch) -> None:
    trainer, _, _ = scored_batch
    assert all(
        module.p == 0 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)
    )
    assert all(
        ".default." in name
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    )


def test_products_in_bfloat16_stay_near_float32_and_leave_weights_and_gradients_in_it(
    prepared: Run,
) -> None:
    prompt = build_injection_prompt(
        load_tokenizer(prepared.config.base), prepared.config.base.marker
    )
    data = grpo.TrainingData(
        schedule=[],
        sources={},
        wrong=None,
        monitor=None,
        bank=load_activations(prepared, "train").vectors.numpy(),
    )
    ids = torch.tensor(
        [
            prompt.encode(row, causal_model(random_adapter(prepared.config.base)).config.vocab_size)
            for row in range(3)
        ]
    )
    log_probs = []
    for dtype in ("float32", "bfloat16"):
        base = dataclasses.replace(prepared.config.base, training_dtype=dtype)
        policy = grpo.load_policy(dataclasses.replace(prepared.config, base=base), data, prompt)
        logits = policy(input_ids=ids).logits
        logits.float().square().mean().backward()
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        assert trained and all(
            parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in trained
        )
        log_probs.append(logits.detach().float().log_softmax(-1))
    difference = (log_probs[0] - log_probs[1]).abs()
    assert 0 < difference.max() < 0.2


def test_settings_under_which_a_group_or_a_batch_would_be_cut_are_refused(
    tiny_base: BaseConfig,
) -> None:
    config = grpo_config(tiny_base, "unused", prompts_per_step=3)
    with pytest.raises(
        ValueError,
        match=r"grpo.prompts_per_step: got 3, expected a multiple of compute.trainer_workers = 2",
    ):
        check_stage(
            dataclasses.replace(
                config, compute=dataclasses.replace(config.compute, trainer_workers=2)
            ),
            "grpo",
        )
    with pytest.raises(
        ValueError, match=r"grpo.save_steps: got 3, expected a multiple of grpo.iterations = 2"
    ):
        check_stage(grpo_config(tiny_base, "unused", iterations=2, save_steps=3), "grpo")


def test_a_missing_artifact_is_named_with_the_job_that_makes_it(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"artifact 'activations': got none.*python jobs/capture.py"
    ):
        stage.train_grpo(Run(grpo_config(tiny_base, tmp_path)))


def test_micro_batches_divide_the_rollouts_of_a_step_whatever_size_is_asked(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    config = grpo_config(tiny_base, tmp_path, prompts_per_step=3, group_size=4, micro_batch_size=5)
    arguments = grpo.grpo_arguments(config, tmp_path, [1.0] * 6)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 3)
    assert arguments.generation_batch_size == 12


def test_a_training_that_an_earlier_algorithm_began_is_refused_and_one_it_completed_is_taken(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    run = prepare_run(grpo_config(tiny_base, tmp_path / "run"))
    earlier = run.open("grpo")
    with pytest.raises(ValueError, match=r"inputs: there nothing, here {'algorithm': '2'}"):
        stage.train_grpo(run)
    completed = earlier.publish()
    assert stage.train_grpo(run) == completed


def test_the_manifest_tells_where_the_seconds_went_and_which_step_was_published() -> None:
    reading = {JUDGE_COSINE: 0.5, WARNED: 0.0}
    records = [
        {"step": 0, **reading, "seconds/monitor": 7.0},
        {"step": 1, "loss": 0.1, "seconds/step": 9.0},
        {"step": 2, "loss": 0.1, "seconds/step": 2.0},
        {"step": 2, JUDGE_COSINE: 0.6, WARNED: 0.0, "seconds/monitor": 1.0},
        {"step": 3, "loss": 0.1, "seconds/step": 4.0},
        {"step": 4, JUDGE_COSINE: 0.3, WARNED: 1.0, "seconds/monitor": 0.5},
    ]
    summary = stage.summary(records, 2)
    assert summary["published_step"] == 2 and summary["published"][JUDGE_COSINE] == 0.6
    assert summary["sft"]["step"] == 0
    assert summary["warned_steps"] == [4] and summary["mean_seconds"] == {"step": 3.0}
    assert summary["monitor_share"] == pytest.approx(1.5 / 15.0)


# With actors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arena(prepared: Run, ray_cluster: None) -> Iterator[dict]:
    """Actors and training data, shared by the tests below.

    Each test trains in this process, in a folder that no other test uses.
    """
    train, validation = (
        load_activations(prepared, "train"),
        load_activations(prepared, "validation"),
    )
    with stage.actor_pools(prepared, train, validation) as (bank, rollouts, scorers):
        yield {
            "data": stage.training_data(prepared, train, validation, bank),
            "rollouts": rollouts,
            "scorers": scorers,
            "tells_steps": True,
        }


def train_here(arena: dict, config: RunConfig, name: str) -> tuple[Path, list[dict]]:
    """Run the worker's body in this process; returns its scratch folder and its metrics."""
    grpo.grpo_worker({**arena, "run": config, "name": name})
    scratch = Path(config.run_dir) / name / "scratch"
    return scratch, MetricsLog(scratch / "metrics.jsonl").read()


@pytest.fixture(scope="module")
def undisturbed(arena: dict, prepared: Run) -> tuple[Path, list[dict]]:
    return train_here(arena, prepared.config, "undisturbed")


def comparable(records: list[dict]) -> list[dict]:
    """Metrics without clocks."""
    return [
        {
            key: value
            for key, value in record.items()
            if not key.startswith("seconds/") and key != "step_time"
        }
        for record in records
    ]


def test_every_step_is_recorded_with_its_terms_and_its_seconds(undisturbed) -> None:
    _, records = undisturbed
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        terms = ("score", "unclosed", "empty", "over_length", "repeated", "evidence")
        assert {f"rewards/{term}/mean" for term in terms} <= record.keys()
        assert {
            f"seconds/{part}"
            for part in ("publication", "rollout", "log_prob", "score", "update", "rollout_idle")
        } <= record.keys()
        assert record["sampler_gap/mean"] < 1e-4
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6) and steps[-1]["kl"] > 0
    weighted = (
        steps[0]["rewards/score/mean"]
        - 0.3 * steps[0]["rewards/unclosed/mean"]
        - 0.3 * steps[0]["rewards/empty/mean"]
        - 0.01 * steps[0]["rewards/over_length/mean"]
        - 0.2 * steps[0]["rewards/repeated/mean"]
    )
    assert steps[0]["reward"] == pytest.approx(weighted, abs=1e-5)


def test_the_judge_is_asked_before_during_and_after(undisturbed) -> None:
    _, records = undisturbed
    readings = [record for record in records if JUDGE_COSINE in record]
    assert [record["step"] for record in readings] == [0, 2, 4]
    assert all(
        record[JUDGE_COSINE + "_low"] <= record[JUDGE_COSINE] <= record[JUDGE_COSINE + "_high"]
        for record in readings
    )
    assert all(record["seconds/monitor"] > 0 for record in readings)


def test_what_is_kept_is_the_checkpoint_that_the_judges_readings_choose(undisturbed) -> None:
    scratch, records = undisturbed
    readings = [record for record in records if JUDGE_COSINE in record]
    for count, reading in enumerate(readings, 1):
        assert reading[KEPT] == float(kept_reading(readings[:count]) is reading)
    kept = json.loads((scratch / "best.json").read_text())
    assert kept["step"] == kept_reading(readings)["step"]
    assert (scratch / kept["folder"] / "adapter" / "adapter_model.safetensors").is_file()


def test_a_reading_is_compared_with_the_best_before_on_the_same_activations(undisturbed) -> None:
    scratch, records = undisturbed
    judged = json.loads((scratch / "judged.json").read_text())
    readings = [record for record in records if JUDGE_COSINE in record]
    assert JUDGE_GAIN not in readings[0]
    for count, reading in enumerate(readings[1:], 1):
        best = best_reading(readings[:count])
        now, before = (torch.tensor(judged[str(of["step"])]) for of in (reading, best))
        assert len(now) == SETTINGS.monitor_activations
        assert reading[JUDGE_COSINE] == pytest.approx(now.mean().item(), abs=1e-6)
        assert reading[JUDGE_GAIN] == pytest.approx((now - before).mean().item(), abs=1e-6)


def first_batch(
    arena: dict, prepared: Run, **settings: object
) -> tuple[VerbalizerTrainer, StepSampler, dict]:
    """Trainer and sampler under these settings, and their first batch, long enough for lines."""
    config = override(prepared.config, grpo={"max_new_tokens": 48, **settings})
    data, folder = arena["data"], Path(config.run_dir) / "first_batch"
    prompt = build_injection_prompt(load_tokenizer(config.base), config.base.marker)
    policy = grpo.load_policy(config, data, prompt)
    vocab_size = policy.get_input_embeddings().vocab_size
    actors = arena["rollouts"], arena["scorers"]
    sampler = StepSampler(config.grpo, data, prompt, vocab_size, *actors, StepClock())
    trainer = grpo.build_trainer(config, folder, policy, sampler, StepClock())
    trainer.model.train()
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    return trainer, sampler, batch


@pytest.fixture(scope="module")
def paid_by_line(arena: dict, prepared: Run) -> tuple[VerbalizerTrainer, StepSampler, dict]:
    """The first batch with credit by line."""
    trainer, sampler, batch = first_batch(arena, prepared, credit="line")
    assert max(map(len, sampler.rewards_by_line())) > 1, "some description has two lines"
    return trainer, sampler, batch


@pytest.mark.parametrize("credit", ["description", "line"])
def test_claims_are_paid_to_their_tokens_beside_the_advantage(
    arena: dict, prepared: Run, credit: str
) -> None:
    _, _, plain = first_batch(arena, prepared, credit=credit)
    trainer, sampler, paid = first_batch(arena, prepared, credit=credit, claim_weight=2.0)
    torch.testing.assert_close(paid["completion_ids"], plain["completion_ids"])
    shared = plain["advantages"].reshape(len(paid["advantages"]), -1)
    added = (paid["advantages"] - shared) / 2.0
    for of_tokens, values in zip(added, sampler.claim_values(), strict=True):
        torch.testing.assert_close(
            of_tokens[: len(values)], torch.tensor(values), atol=1e-5, rtol=0
        )
        assert not of_tokens[len(values) :].abs().gt(1e-5).any()
    assert added.abs().max() > 0.01, "something was claimed"
    earned = [sum(values) for values in sampler.claim_values()]
    mean = sum(earned) / len(earned)
    assert trainer._metrics["train"]["claims/value"] == [pytest.approx(mean, abs=1e-5)]


def test_lines_share_the_advantage_that_trl_gives_to_the_whole_description(paid_by_line) -> None:
    trainer, sampler, batch = paid_by_line
    weights = reward_weights(sampler.settings)
    terms = {name: torch.tensor(list(values)) for name, values in trainer._logs["rewards"].items()}
    rewards = sum(weights[name] * values for name, values in terms.items())
    whole = torch.tensor([earned[-1] for earned in sampler.rewards_by_line()])
    torch.testing.assert_close(whole, rewards)
    groups = rewards.view(-1, sampler.settings.group_size)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten() / (rewards.std() + 1e-4)
    for paid, lines, advantage in zip(
        batch["advantages"], sampler.line_of_token(), advantages, strict=True
    ):
        first_tokens = [lines.index(line) for line in set(lines)]
        assert paid[first_tokens].sum() == pytest.approx(advantage.item(), abs=1e-4)
        assert not paid[len(lines) :].any()


def test_beginnings_are_rewarded_as_descriptions_of_their_row(paid_by_line, arena: dict) -> None:
    trainer, sampler, batch = paid_by_line
    settings, data, pool = sampler.settings, arena["data"], arena["scorers"]
    rows = [row for row in data.schedule[0] for _ in range(settings.group_size)]
    for index, (row, earned) in enumerate(zip(rows, sampler.rewards_by_line(), strict=True)):
        ids = batch["completion_ids"][index][batch["completion_mask"][index].bool()].tolist()
        decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
        beginnings = cut_lines(ids, decode).beginnings
        assert len(earned) == len(beginnings) + 1
        wrong = data.wrong.draw(row, settings.seed, 0)
        for text, reward in zip(beginnings, earned, strict=False):
            request = ScoringRequest(descriptions=[text], rows=[row], wrong_rows=[wrong])
            [scores] = pool.collect(submit_scores(pool, request))
            contrasted = scores.centred_right - scores.centred_wrong.mean()
            worth = beginning_worth(text, data.sources[row], settings)
            assert reward == pytest.approx(contrasted.item() + worth, abs=1e-5)


class CutOff(grpo.GRPOCallback):
    """Ends a training in its fourth step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_that_was_cut_off_goes_on_with_the_same_batches_in_smaller_pieces(
    arena: dict, prepared: Run, undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    scratch, records = undisturbed
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        # as if killed during the fourth step, after the third was recorded
        patch.setattr(grpo, "GRPOCallback", CutOff)
        train_here(arena, prepared.config, "resumed")
    fewer = dataclasses.replace(
        prepared.config,
        grpo=dataclasses.replace(prepared.config.grpo, micro_batch_size=2, save_steps=1),
    )
    resumed, again = train_here(arena, fewer, "resumed")
    assert [record["step"] for record in again] == [record["step"] for record in records]
    for record, resumed_record in zip(comparable(records), comparable(again), strict=True):
        # TRL reports the KL averaged over the tokens of each piece, then over pieces.
        for key, abs_tolerance in ((key, 5e-3 if "kl" in key else 1e-4) for key in record):
            expected = pytest.approx(record[key], abs=abs_tolerance)
            assert resumed_record[key] == expected, (record["step"], key)
    first, second = (
        load_file(folder / "checkpoint-4" / "trained.safetensors") for folder in (scratch, resumed)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=0)
