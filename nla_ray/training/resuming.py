"""The library's trainer with checkpoints that any number of workers can go on from.

A checkpoint is what is trained and nothing else: float32 weights, AdamW's moments and its step, by
the parameter's name and whole, however ZeRO spreads them; and the state of schedule and loop. Every
rank helps to gather, the first one writes. The order of examples and every random draw follow from
seed and step, so they are in no checkpoint.

It protects the rule that a stage goes on with more or fewer workers as if nothing had happened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from nla_ray.run.location import Location
from nla_ray.training.checkpoints import TRAINED_NAME, checkpoint_name
from nla_ray.training.zero import (
    MOMENTS,
    begin_at,
    link_moments,
    read_moment,
    read_weight,
    steps_taken,
    write_moment,
    write_weight,
)

_WEIGHT = "weight"
_STEP, _SCHEDULE = "optimizer_step", "schedule"


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are free of the number of workers; mixed into TRL's trainers."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """In place of the library's: it keeps a state for each rank, and frozen weights with it."""
        optimizer = self.optimizer.optimizer
        tensors = read_trained(self.model, optimizer)
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir) / checkpoint_name(self.state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        facts = {
            _STEP: str(steps_taken(optimizer)),
            _SCHEDULE: json.dumps(self.lr_scheduler.state_dict()),
        }
        Location.of(folder / TRAINED_NAME).write_bytes(save(tensors, metadata=facts))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: weights are loaded with what belongs to them, by `_prepare_for_training`."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        """The library's preparation; then the checkpoint goes into model, optimizer, schedule."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint) / TRAINED_NAME)
        return prepared

    def _restore(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        write_trained(self.model, self.optimizer.optimizer, tensors, int(facts[_STEP]))
        schedule = json.loads(facts[_SCHEDULE])
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = rate


def read_trained(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Everything that training has changed, whole, on the CPU, on every rank; all must call it.

    Names are `weight:NAME`, `exp_avg:NAME` and `exp_avg_sq:NAME` for the model's parameter NAME.
    `optimizer`: torch's AdamW, or what DeepSpeed has made of it, after at least one step.
    """
    link_moments(optimizer)
    tensors = {}
    for name, parameter in _trained(model):
        parts = {_WEIGHT: read_weight(parameter)}
        parts |= {moment: read_moment(optimizer, parameter, moment) for moment in MOMENTS}
        for part, value in parts.items():
            tensors[f"{part}:{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return tensors


def write_trained(
    model: nn.Module, optimizer: Any, tensors: dict[str, Tensor], optimizer_step: int
) -> None:
    """Put what `read_trained` gave into a model and an optimizer that has not stepped.

    Every rank takes from the whole tensors what it holds. Raises RuntimeError for tensors of
    another adapter.
    """
    parameters = dict(_trained(model))
    expected = {f"{part}:{name}" for part in (_WEIGHT, *MOMENTS) for name in parameters}
    if expected != set(tensors):
        raise RuntimeError(
            f"checkpoint: got {len(tensors)} tensors, first {min(expected ^ set(tensors))!r} on one"
            f" side alone, expected the {len(expected)} of what is trained. It was written by"
            " another training; delete the stage's scratch folder and run the job again."
        )
    begin_at(optimizer, optimizer_step)
    for name, parameter in parameters.items():
        write_weight(parameter, tensors[f"{_WEIGHT}:{name}"])
        for moment in MOMENTS:
            write_moment(optimizer, parameter, moment, tensors[f"{moment}:{name}"])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [pair for pair in model.named_parameters() if pair[1].requires_grad]
