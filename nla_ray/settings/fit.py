"""Which settings of several sections must fit together: asked by a stage and by its plan."""

from __future__ import annotations

from nla_ray.settings.config import ComputeConfig, RunConfig, require


def check_stage(config: RunConfig, stage: str) -> None:
    """Raise ValueError where a stage's settings do not fit each other or the trainer's workers."""
    if stage in ("reward_scorer", "judge_scorer", "sft"):
        worker_batch(config.compute, getattr(config, stage).batch_size)
    elif stage == "reward_scorer_refreshed":
        worker_batch(config.compute, config.reward_scorer.batch_size)
    elif stage == "grpo":
        _check_grpo(config)


def worker_batch(compute: ComputeConfig, batch_size: int) -> int:
    """One worker's share of an optimizer step's examples.

    Raises ValueError when they cannot be shared out evenly.
    """
    require(
        batch_size % compute.trainer_workers == 0,
        "batch_size",
        batch_size,
        f"a multiple of compute.trainer_workers = {compute.trainer_workers}",
        "A step is the same whatever the number of workers: take another number of them.",
    )
    return batch_size // compute.trainer_workers


def _check_grpo(config: RunConfig) -> None:
    """Batches are cut, and on a resume cut again, into whole groups; GRPO starts from plain SFT."""
    settings, workers = config.grpo, config.compute.trainer_workers
    require(
        config.sft.name is None,
        "sft.name",
        config.sft.name,
        "none",
        "GRPO starts from the SFT without a name; a named one is trained by jobs/sft.py, for"
        " --compare.",
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
