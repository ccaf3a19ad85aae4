"""Contrastive GRPO of the verbalizer: the one module that imports TRL's GRPO.

schedule -> [publish adapter -> sample groups -> score (meanwhile: reference log-probs) -> TRL's
update] x steps, with a look at the judge every so often. TRL owns advantages, loss, optimiser,
checkpoints; rollouts and scores come from actors that the driver owns. Protects four rules: train
documents only; the KL is anchored to the SFT adapter, not to the base; batches are a function of
the configuration, so that a resumed run meets the same ones; the best checkpoint is the judge's.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations, load_stats
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import InjectionPrompt, build_injection_prompt
from nla_ray.cluster.actors import ActorPool, SharedArray, shared_tensor
from nla_ray.cluster.resources import demand, require_resources
from nla_ray.reinforce.live import live_view
from nla_ray.reinforce.monitor import JUDGE_COSINE, WARNED, Monitor, MonitorData
from nla_ray.reinforce.records import SECONDS, GRPOCallback, monitor_share
from nla_ray.reinforce.rewards import WrongActivations, reward_weights, schedule_rows
from nla_ray.reinforce.rollouts import RolloutWorker
from nla_ray.reinforce.scoring import ScorerWorker
from nla_ray.reinforce.steps import StepClock, StepSampler, TrainingData
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest, check_disjoint
from nla_ray.run.metrics import METRICS_NAME
from nla_ray.score.metrics import Comparisons, hard_rows
from nla_ray.settings.config import GRPOSettings, RunConfig, require
from nla_ray.training.checkpoints import Checkpoints
from nla_ray.training.verbalizer import TrainableVerbalizer
from nla_ray.training.workers import prepare_worker, run_training, trainer_arguments

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)


os.environ.setdefault(
    "TRL_EXPERIMENTAL_SILENCE", "1"
)  # `rollout_func` may change: TRL's minor version is pinned

_WARMUP_SHARE = 0.05
_NEAR_POOL = 32
"""Nearest activations of the same domain that the near ones are drawn from."""


# The driver's side --------------------------------------------------------------------------------


def train_grpo(run: Run) -> Manifest:
    """Sharpen the SFT verbalizer by the reward scorer. Skipped when complete; resumed from its last
    checkpoint.

    Raises ValueError for a missing artifact (naming its job), a cluster that is too small, or
    settings that do not fit.
    """
    name = run.config.grpo.artifact
    parents = run.parents_of("grpo")
    check_disjoint(parents["reward_scorer"], parents["judge_scorer"])
    info = base_info(run.config.base)
    for parent in parents.values():
        check_base(parent, info)
    check_settings(run.config)
    stage = run.open("grpo", parents=parents)
    if stage.manifest is not None:
        logger.info("%s: complete, skipped", name)
        return stage.manifest
    require_room(run.config)
    train, validation = load_activations(run, "train"), load_activations(run, "validation")
    with actor_pools(run, train, validation) as (bank, rollouts, scorers):
        data = training_data(run, train, validation, bank)
        with live_view(
            run.root / name / "scratch" / METRICS_NAME, name, run.config.grpo.steps
        ) as is_shown:
            told = run_training(
                run,
                name,
                train_worker,
                {
                    "data": data,
                    "rollouts": rollouts,
                    "scorers": scorers,
                    "tells_steps": not is_shown,
                },
            )
    records = [
        json.loads(line) for line in (stage.location / METRICS_NAME).read_text().splitlines()
    ]
    return stage.publish(
        documents={"train": train.doc_ids, "validation": data.monitor.doc_ids},
        model=info.to_dict(),
        metrics=summary(records, told["published_step"]),
    )


def check_settings(config: RunConfig) -> None:
    """Raise ValueError for settings under which batches could not be cut, or resumed, alike, and
    for an SFT that is only compared."""
    settings, workers = config.grpo, config.compute.trainer_workers
    require(
        config.sft.name is None,
        "sft.name",
        config.sft.name,
        "none",
        "GRPO starts from the SFT without a name; a named one is trained "
        "by jobs/sft.py, for --compare.",
    )
    require(
        settings.prompts_per_step % workers == 0,
        "grpo.prompts_per_step",
        settings.prompts_per_step,
        f"a multiple of compute.trainer_workers = {workers}",
        "A group may not be cut in two.",
    )
    for name in ("save_steps", "monitor_steps"):
        value = getattr(settings, name)
        require(
            value % settings.iterations == 0,
            f"grpo.{name}",
            value,
            f"a multiple of grpo.iterations = {settings.iterations}",
            "A batch of rollouts may not be cut in two.",
        )


def require_room(config: RunConfig) -> None:
    """Raise ValueError unless trainer, rollout actors and scorer actors find room in the cluster at
    once."""
    compute, settings = config.compute, config.grpo
    require_resources(
        [
            demand(compute, "trainer", compute.trainer_workers),
            demand(compute, "rollout", settings.num_rollout_actors),
            demand(compute, "scorer", settings.num_scorer_actors),
        ]
    )


@contextmanager
def actor_pools(
    run: Run, train: ActivationTable, validation: ActivationTable
) -> Iterator[tuple[SharedArray, ActorPool, ActorPool]]:
    """The train bank in the object store, rollout actors and scorer actors, for the length of a
    with-block."""
    config = (
        dataclasses.replace(run.config, run_dir=str(run.root)) if run.root.is_local else run.config
    )
    settings, compute = config.grpo, config.compute
    bank, validation_bank = (
        SharedArray(train.vectors.numpy()),
        SharedArray(validation.vectors.numpy()),
    )
    pools: list[ActorPool] = []
    try:
        pools.append(
            ActorPool(
                "rollout",
                RolloutWorker,
                (config.base, config.sft.lora, compute.threads, bank, validation_bank),
                count=settings.num_rollout_actors,
                compute=compute,
            )
        )
        pools.append(
            ActorPool(
                "scorer",
                ScorerWorker,
                (config, bank),
                count=settings.num_scorer_actors,
                compute=compute,
            )
        )
        yield bank, pools[0], pools[1]
    finally:
        for pool in pools:
            pool.close()


def training_data(
    run: Run, train: ActivationTable, validation: ActivationTable, bank: SharedArray
) -> TrainingData:
    """Schedule, source texts and the validation activations of the monitor. Raises ValueError when
    there are too few of any."""
    settings = run.config.grpo
    schedule = schedule_rows(
        len(train.ids),
        settings.prompts_per_step,
        -(-settings.steps // settings.iterations),
        settings.seed,
    )
    rows = sorted({row for batch in schedule for row in batch})
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "monitor"))
    watched = sorted(
        torch.randperm(len(validation.ids), generator=generator)[
            : settings.monitor_activations
        ].tolist()
    )
    vectors, doc_ids = (
        validation.vectors[watched].clone(),
        [validation.doc_ids[row] for row in watched],
    )
    mean = torch.tensor(load_stats(run)["mean_direction"])
    return TrainingData(
        schedule=schedule,
        sources={row: train.texts[row] for row in rows},
        bank=bank,
        wrong=wrong_activations(train, settings, mean) if settings.contrast == "wrong" else None,
        monitor=MonitorData(
            rows=watched,
            comparisons=Comparisons.draw(vectors, doc_ids, mean, settings.seed),
            doc_ids=doc_ids,
            texts=[validation.texts[row] for row in watched],
        ),
    )


def wrong_activations(
    train: ActivationTable, settings: GRPOSettings, mean: Tensor
) -> WrongActivations:
    """What the descriptions of a train activation must not fit, ready to be drawn from."""
    pool = min(_NEAR_POOL, len(train.ids) // 2)
    near = (
        hard_rows(train.vectors, train.doc_ids, train.domains, mean, pool).tolist()
        if settings.num_near
        else None
    )
    return WrongActivations(train.doc_ids, settings.num_wrong, near, settings.num_near)


def summary(records: Sequence[dict[str, Any]], published_step: int) -> dict[str, Any]:
    """For the manifest: the monitor's readings of the SFT verbalizer, of the published checkpoint
    and at the end; every warning; the mean seconds of a step, and the monitor's beside them."""
    readings = [record for record in records if JUDGE_COSINE in record]
    every_step = [record for record in records if SECONDS + "step" in record]
    steps = every_step[1:]  # the first one also waits for the actors to start
    return {
        "published_step": published_step,
        "published": next(one for one in readings if one["step"] == published_step),
        "sft": readings[0],
        "last": readings[-1],
        "warned_steps": [record["step"] for record in readings if record[WARNED]],
        "mean_seconds": {
            name.removeprefix(SECONDS): sum(record[name] for record in steps) / len(steps)
            for name in (steps[0] if steps else {})
            if name.startswith(SECONDS)
        },
        "monitor_share": monitor_share(every_step, readings),
    }


# A worker's side ----------------------------------------------------------------------------------


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The body of one Ray Train worker: build the policy and TRL's trainer, resume, train."""
    run_config: RunConfig = config["run"]
    data: TrainingData = config["data"]
    prepare_worker(run_config.compute)
    checkpoints = Checkpoints(run_config, config["name"])
    prompt = build_injection_prompt(load_tokenizer(run_config.base), run_config.base.marker)
    model, clock = load_policy(run_config, data, prompt), StepClock()
    sampler = StepSampler(
        run_config.grpo,
        data,
        prompt,
        model.get_input_embeddings().vocab_size,
        config["rollouts"],
        config["scorers"],
        clock,
    )
    monitor = Monitor(run_config.grpo, data.monitor, config["rollouts"], config["scorers"])
    trainer = build_trainer(run_config, checkpoints.folder, model, sampler, clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        GRPOCallback(
            checkpoints,
            run_config.grpo,
            trainer,
            sampler.publisher,
            monitor,
            clock,
            tells_steps=config["tells_steps"],
        )
    )
    trainer.train(resume_from_checkpoint=checkpoints.last())
    checkpoints.upload()
    return {"published_step": checkpoints.best["step"]}


def load_policy(
    run_config: RunConfig, data: TrainingData, prompt: InjectionPrompt
) -> TrainableVerbalizer:
    """The base with the SFT adapter, trainable, and an embedding that knows the train
    activations."""
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
    """TRL's trainer with our rollouts and rewards. Positional batches: the schedule is the data
    set, unshuffled."""
    weights = reward_weights(run_config.grpo)
    return VerbalizerTrainer(
        clock=clock,
        credit=run_config.grpo.credit,
        model=model,
        args=grpo_arguments(run_config, folder, list(weights.values())),
        rollout_func=sampler,
        reward_funcs=[sampler.reward_function(name) for name in weights],
        processing_class=load_tokenizer(run_config.base),
        train_dataset=schedule_dataset(sampler.data.schedule),
    )


def grpo_arguments(
    run_config: RunConfig, folder: Path, weights: list[float], **others: Any
) -> GRPOConfig:
    """Our settings in TRL's words; `others` are TRL's own, added or instead.

    The preset divides advantages by the batch's standard deviation, not by each group's, which
    would blow up groups that agree (Source: arXiv 2508.08221); the loss is summed over tokens and
    divided by a constant, without length bias (Dr. GRPO, arXiv 2503.20783). Truncated rollouts stay
    in the loss: stopping is trained. The rate falls to 0: a step of a hundred rollouts is mostly
    noise, which the last small ones average out.
    """
    settings, workers = run_config.grpo, run_config.compute.trainer_workers
    rollouts = settings.prompts_per_step * settings.group_size // workers
    micro_batch = max(
        size
        for size in range(1, min(settings.micro_batch_size, rollouts) + 1)
        if rollouts % size == 0
    )
    return GRPOConfig(
        **trainer_arguments(run_config, folder, seed=settings.seed),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rollouts // micro_batch,
        num_generations=settings.group_size,
        num_iterations=settings.iterations,
        shuffle_dataset=False,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(_WARMUP_SHARE * settings.steps),
        reward_weights=weights,
        scale_rewards=settings.scale_rewards,
        loss_type="dr_grpo",
        mask_truncated_completions=False,
        disable_dropout=True,
        logging_steps=1,
        logging_first_step=False,
        save_steps=settings.save_steps,
        **{"save_strategy": "steps", **others},
    )


def schedule_dataset(schedule: Sequence[Sequence[int]]) -> Dataset:
    """One example a prompt: the row of the bank, as text (which TRL carries through) and as a
    number."""
    from datasets import Dataset

    rows = [row for batch in schedule for row in batch]
    return Dataset.from_dict({"prompt": [str(row) for row in rows], "row": rows})


class VerbalizerTrainer(GRPOTrainer):
    """TRL's trainer with two measurements and credit by line added; its algorithm is left as it
    is."""

    def __init__(self, *, clock: StepClock, credit: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._clock, self._credit = clock, credit
        self._policy_log_probs: Tensor | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch; where credit goes to lines, with an advantage a token, which its loss takes
        as well."""
        batch = super()._generate_and_score_completions(inputs)
        if self._credit == "line":
            advantages = batch["advantages"]
            shared, explained = self.rollout_func.share_out(
                advantages.cpu(), batch["completion_ids"].shape[1]
            )
            batch["advantages"] = shared.to(advantages)
            self._metrics["train"]["credit/explained"].append(explained)
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        if torch.is_grad_enabled():
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._policy_log_probs = result[0].detach()
            return result
        with self._clock.measure("log_prob"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        own = inputs.get("old_per_token_logps", self._policy_log_probs)
        gap, k3 = log_prob_gap(own, inputs["sampling_per_token_logps"], inputs["completion_mask"])
        self._metrics["train"]["sampler_gap/mean"].append(
            self.accelerator.gather(gap).mean().item()
        )
        self._metrics["train"]["sampler_gap/k3"].append(self.accelerator.gather(k3).mean().item())
        return loss


def log_prob_gap(trainer: Tensor, sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How far the sampler's log-probs of its own tokens are from the trainer's: mean |difference|,
    and k3.

    k3 = mean (e^d - d - 1), d = trainer - sampler, estimates KL(sampler || trainer). All arguments
    [batch, seq].
    Source: Schulman, "Approximating KL divergence" (2020).
    """
    difference = (trainer - sampler)[mask.bool()]
    return difference.abs().mean(), (difference.exp() - difference - 1).mean()
