"""GRPO as a Ray Train worker runs it: the one module of the stages that imports TRL's GRPO.

Each step: publish the adapter -> sample groups -> score (meanwhile: reference log-probs) -> TRL's
update; every so often a reading of the monitor. TRL owns advantages, loss, optimiser and
checkpoints; rollouts and scores come from actors that the driver owns. Protects two rules: the KL
is anchored to the SFT adapter and not to the base; the batches are those of the schedule, in its
order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from nla_ray.base.load import load_model_config, load_tokenizer
from nla_ray.base.prompts import InjectionPrompt, injection_prompt
from nla_ray.cluster.actors import shared_tensor
from nla_ray.plan.facts import PROMPT_TOKENS
from nla_ray.reinforce.credit import share_foretold, token_advantages
from nla_ray.reinforce.monitor import Monitor
from nla_ray.reinforce.records import GRPOCallback
from nla_ray.reinforce.rewards import reward_weights
from nla_ray.reinforce.steps import StepClock, StepSampler, TrainingData, values_of_all_workers
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.settings.config import RunConfig
from nla_ray.training.checkpoints import Checkpoints
from nla_ray.training.resuming import ResumableTrainer
from nla_ray.training.verbalizer import TrainableVerbalizer
from nla_ray.training.workers import prepare_worker, trainer_arguments

if TYPE_CHECKING:
    from datasets import Dataset


# `rollout_func` may change: TRL's minor version is pinned.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

_WARMUP_SHARE = 0.05
_K3_WARNS, _K3_STOPS = 0.01, 0.1
"""Of the sampler against the policy, see `SamplerGap`."""
_STOPS_AFTER = 10
"""Batches in a row."""

logger = get_logger(__name__)


def grpo_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """The body of a worker: build the policy and TRL's trainer, resume, train.

    `arguments`: run (RunConfig), name, data (TrainingData), rollouts and scorers (ActorPool),
    tells_steps. Returns the step that is published.
    """
    config: RunConfig = arguments["run"]
    data: TrainingData = arguments["data"]
    rollouts, scorers = arguments["rollouts"], arguments["scorers"]
    prepare_worker(config.compute)
    prompt = injection_prompt(load_tokenizer(config.base), config.base)
    policy, clock = load_policy(config, data, prompt), StepClock()
    vocab_size = policy.get_input_embeddings().vocab_size
    sampler = StepSampler(config.grpo, data, prompt, vocab_size, rollouts, scorers, clock)
    with Checkpoints(config, arguments["name"]) as checkpoints:
        trainer = build_trainer(config, checkpoints.folder, policy, sampler, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(
            GRPOCallback(
                checkpoints,
                config.grpo,
                trainer,
                sampler.publisher,
                Monitor(config.grpo, data.monitor, rollouts, scorers),
                clock,
                tells_steps=arguments["tells_steps"],
            )
        )
        trainer.train(resume_from_checkpoint=checkpoints.last())
        return {"published_step": checkpoints.best["step"]}


def load_policy(
    run_config: RunConfig, data: TrainingData, prompt: InjectionPrompt
) -> TrainableVerbalizer:
    """The SFT verbalizer, trainable, with an embedding that knows the train activations."""
    run = Run(run_config)
    with run.local_copy("sft", run.require("sft")) as folder:
        return TrainableVerbalizer.load(
            run_config.base,
            folder / "adapter",
            shared_tensor(data.bank),
            prompt,
            temperature=run_config.grpo.temperature,
        )


def build_trainer(
    run_config: RunConfig,
    folder: Path,
    model: TrainableVerbalizer,
    sampler: StepSampler,
    clock: StepClock,
) -> VerbalizerTrainer:
    """TRL's trainer with our rollouts and rewards; the schedule is its data set, unshuffled."""
    weights = reward_weights(run_config.grpo)
    return VerbalizerTrainer(
        clock=clock,
        credit=run_config.grpo.credit,
        claim_weight=run_config.grpo.claim_weight,
        model=model,
        args=grpo_arguments(run_config, folder, list(weights.values())),
        rollout_func=sampler,
        reward_funcs=[sampler.reward_function(name) for name in weights],
        processing_class=load_tokenizer(run_config.base),
        train_dataset=schedule_dataset(sampler.data.schedule),
    )


def grpo_arguments(
    run_config: RunConfig, folder: Path, weights: list[float], **overrides: Any
) -> GRPOConfig:
    """Our settings in TRL's words; `overrides` are fields of TRL's, added or instead.

    `weights`: of the reward terms. The preset divides advantages by the standard deviation of the
    batch. That of each group would blow up groups that agree (Source: arXiv 2508.08221). The loss
    is summed over tokens and divided by a constant, without length bias (Dr. GRPO, arXiv
    2503.20783). The KL is weighted by the importance ratio, so that its gradient is that of the
    reverse KL: without the ratio the gradient is that of another divergence, even where the ratio
    is 1 (Source: arXiv 2512.02556). Truncated rollouts stay in the loss: stopping is trained.
    The rate falls to 0: a step of a hundred rollouts is mostly noise, which the last small steps
    average out.
    """
    settings, workers = run_config.grpo, run_config.compute.trainer_workers
    rollouts = settings.prompts_per_step * settings.group_size // workers
    largest = min(settings.micro_batch_size, rollouts)
    micro_batch = max(size for size in range(1, largest + 1) if rollouts % size == 0)
    return GRPOConfig(
        **trainer_arguments(
            run_config,
            folder,
            seed=settings.seed,
            blocks=load_model_config(run_config.base).num_hidden_layers,
            tokens=micro_batch * (PROMPT_TOKENS + settings.max_new_tokens),
        ),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rollouts // micro_batch,
        num_generations=settings.group_size,
        num_iterations=settings.iterations,
        shuffle_dataset=False,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.beta,
        use_bias_correction_kl=True,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(_WARMUP_SHARE * settings.steps),
        reward_weights=weights,
        scale_rewards=settings.scale_rewards,
        loss_type="dr_grpo",
        router_aux_loss_coef=0.0,  # routers of experts are frozen
        mask_truncated_completions=False,
        disable_dropout=True,
        logging_steps=1,
        logging_first_step=False,
        save_steps=settings.save_steps,
        **{"save_strategy": "steps", **overrides},
    )


def schedule_dataset(schedule: Sequence[Sequence[int]]) -> Dataset:
    """An example a prompt: the row of the bank, as a number and as text, which TRL hands on."""
    from datasets import Dataset

    rows = [row for batch in schedule for row in batch]
    return Dataset.from_dict({"prompt": [str(row) for row in rows], "row": rows})


class VerbalizerTrainer(ResumableTrainer, GRPOTrainer):
    """TRL's trainer; ratios are taken against the sampler, and credit may go to lines.

    Where the policy computes in bfloat16 the sampler cannot be the policy to the last bit. So
    `old_per_token_logps`, by which TRL divides, are the sampler's own log-probs: what its clipping
    then bounds is the step away from what was sampled from. Logits are float32 on both sides.
    """

    def __init__(
        self, *, clock: StepClock, credit: str, claim_weight: float = 0.0, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._clock, self._credit, self._gap = clock, credit, SamplerGap()
        self._claim_weight = claim_weight
        self._policy_log_probs: Tensor | None = None
        policy: TrainableVerbalizer = arguments["model"]
        float32_head(policy, temperature=self.temperature)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with the sampler's log-probs; with an advantage for every token of lines.

        TRL's loss takes advantages of both forms.
        """
        batch = super()._generate_and_score_completions(inputs)
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
        if self._credit == "line":
            length = batch["completion_ids"].shape[1]
            batch["advantages"] = self._share_out(batch["advantages"], length)
        if self._claim_weight:
            batch["advantages"] = self._with_claims(batch["advantages"], batch["completion_ids"])
        return batch

    def _with_claims(self, advantages: Tensor, completion_ids: Tensor) -> Tensor:
        """Advantages of descriptions [n] or of tokens [n, length] as those of tokens, with claims.

        Values of claims are not divided by any deviation: what a claim earns does not depend on the
        others of the batch.
        """
        sampler: StepSampler = self.rollout_func
        paid = torch.zeros(completion_ids.shape)
        for row, values in enumerate(sampler.claim_values()):
            paid[row, : len(values)] = torch.tensor(values)
        # Of a description, over its tokens, before the weight.
        earned = self.accelerator.gather(paid.sum(1).mean().to(advantages.device))
        self._metrics["train"]["claims/value"].append(earned.mean().item())
        shared = advantages if advantages.dim() == 2 else advantages[:, None]
        return shared + self._claim_weight * paid.to(advantages)

    def _share_out(self, advantages: Tensor, length: int) -> Tensor:
        """Advantages of this worker's descriptions [n] as those of their tokens [n, length]."""
        sampler: StepSampler = self.rollout_func
        values = values_of_all_workers(
            advantages,
            sampler.rewards_by_line(),
            self.num_generations,
            scaled_by_group=self.scale_rewards == "group",
        )
        self._metrics["train"]["credit/explained"].append(share_foretold(values))
        first = self.accelerator.process_index * len(advantages)
        local = values[first : first + len(advantages)]
        return token_advantages(local, sampler.line_of_token(), length).to(advantages)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        """TRL's log-probs: the policy's are kept for `sampler_gap`, others are timed."""
        if torch.is_grad_enabled():
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._policy_log_probs = result[0].detach()
            return result
        with self._clock.measure("log_prob"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; records how far the sampler's log-probs are from the policy's.

        Of the first pass over a batch: after it the policy has moved on.
        """
        loss = super()._compute_loss(model, inputs)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) >= steps:
            return loss
        sampler, mask = inputs["sampling_per_token_logps"], inputs["completion_mask"]
        gaps = dict(
            zip(("mean", "k3"), log_prob_gap(self._policy_log_probs, sampler, mask), strict=True)
        )
        for name, value in gaps.items():
            gaps[name] = self.accelerator.gather(value).mean().item()
            self._metrics["train"][f"sampler_gap/{name}"].append(gaps[name])
        self._gap.watch(gaps["k3"])
        return loss


def float32_head(policy: TrainableVerbalizer, *, temperature: float) -> None:
    """Make TRL's own log-probs, which a GPU computes, come from logits in float32.

    TRL computes them in the type of the rest; its setting for it does not know wrapped models.
    """
    if policy.in_bf16 and not policy.scores_labels:
        add_fused_lm_head(
            policy.get_base_model(),
            temperature=temperature,
            cast_lm_head_to_fp32=True,
            outputs=("log_probs", "entropy"),
        )


class SamplerGap:
    """Ends a run whose sampler is not its policy.

    Of bfloat16 alone k3 was 0.0015 to 0.003 (SmolLM2-135M, 32 tokens of 32 rollouts, adapters of
    all sizes), and 1e-10 of float32. Ten times that is told, once; a hundred times is another
    model: ten batches in a row of it end the run.
    """

    def __init__(self) -> None:
        self._warned, self._beyond = False, 0

    def watch(self, k3: float) -> None:
        """Take note of a batch's k3. Raises ValueError when there is no use in going on."""
        if k3 > _K3_WARNS and not self._warned:
            self._warned = True
            logger.warning(
                "the sampler is far from the policy: k3 of their log-probs is %.3g, expected below"
                " %g; above %g for %d batches the run stops",
                k3,
                _K3_WARNS,
                _K3_STOPS,
                _STOPS_AFTER,
            )
        self._beyond = self._beyond + 1 if k3 > _K3_STOPS else 0
        if self._beyond >= _STOPS_AFTER:
            raise ValueError(
                f"grpo: got rollouts whose log-probs differ from the policy's by a k3 of {k3:.3g},"
                f" expected below {_K3_STOPS}. The sampler is another model than the one that is"
                " trained: set --base.dtype float32, or lower --grpo.learning-rate, in a new"
                " --run-dir."
            )


def log_prob_gap(trainer: Tensor, sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How far the sampler's log-probs of its tokens are from the trainer's: mean |d|, and k3.

    k3 = mean (e^d - d - 1), d = trainer - sampler, estimates KL(sampler || trainer). All arguments
    [batch, seq]. Source: Schulman, "Approximating KL divergence" (2020).
    """
    difference = (trainer - sampler)[mask.bool()]
    return difference.abs().mean(), (difference.exp() - difference - 1).mean()
