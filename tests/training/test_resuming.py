"""Checkpoints free of the number of workers: what they hold, and who can go on from them."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler

from nla_ray.run.location import Location
from nla_ray.run.metrics import MetricsLog
from nla_ray.settings.config import BaseConfig, ComputeConfig
from nla_ray.training.batches import LengthBatches
from nla_ray.training.checkpoints import last_checkpoint
from nla_ray.training.resuming import read_trained, write_trained
from nla_ray.training.zero import steps_taken

STEPS_IN_EPOCH = 6
"""32 examples in batches of six: five whole ones, and one of two examples and four blanks."""


# The order of examples ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_examples", [30, 31, 32, 34, 35])
def test_every_number_of_workers_shares_out_the_same_batches(num_examples: int) -> None:
    sampler = LengthBatches([(row * 7) % 11 for row in range(num_examples)], 6, seed=3)
    assert sorted(sampler) == list(range(len(sampler))) and len(sampler) % 6 == 0
    steps = {
        workers: [
            sorted(row for part in parts for row in part)
            for parts in zip(
                *(
                    BatchSamplerShard(
                        BatchSampler(sampler, 6 // workers, drop_last=False), workers, rank
                    )
                    for rank in range(workers)
                ),
                strict=True,
            )
        ]
        for workers in (1, 2, 3, 6)
    }
    order = list(sampler)
    assert steps[1] == [sorted(order[start : start + 6]) for start in range(0, len(order), 6)]
    assert steps[1] == steps[2] == steps[3] == steps[6]
    blanks = [row for row in order if row >= num_examples]
    assert len(blanks) == -num_examples % 6 and order[len(order) - len(blanks) :] == blanks


# One process --------------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    model[0].requires_grad_(False)
    return model


def adamw_of(model: nn.Module) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        (model(batch) - 1.0).square().sum().backward()
        optimizer.step()


def test_an_optimizer_that_is_read_and_written_goes_on_as_if_it_had_not_stopped() -> None:
    whole = small_model()
    whole_adamw = adamw_of(whole)
    take_steps(whole, whole_adamw, range(5))
    tensors = read_trained(whole, whole_adamw)
    assert set(tensors) == {"weight:1.weight", "exp_avg:1.weight", "exp_avg_sq:1.weight"}
    assert steps_taken(whole_adamw) == 5
    take_steps(whole, whole_adamw, range(5, 9))

    resumed = small_model()
    adamw = adamw_of(resumed)
    write_trained(resumed, adamw, tensors, 5)
    take_steps(resumed, adamw, range(5, 9))
    assert torch.equal(resumed[1].weight, whole[1].weight)
    assert not torch.equal(tensors["weight:1.weight"], whole[1].weight), "a copy"


def test_the_checkpoint_of_another_adapter_is_refused() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match=r"checkpoint: got 1 tensors, first 'exp_avg:1\.weight'"):
        write_trained(model, adamw_of(model), {"weight:1.weight": torch.zeros(2, 4)}, 1)


# Several processes --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """One attempt at a training: with how many workers, and after which step it is cut off."""

    workers: int
    stop: int | None = None


def make_trainer(kind: str, base: BaseConfig, folder: Path, compute: ComputeConfig):
    """Trainer and checkpoints of a small SFT or scorer in three epochs of six steps."""
    import test_reconstruction
    import test_sft

    if kind == "sft":
        settings = dataclasses.replace(test_sft.SETTINGS, batch_size=6)
        trainer, checkpoints = test_sft.prepare(base, folder, settings, compute)
    else:
        settings = dataclasses.replace(
            test_reconstruction.SETTINGS, batch_size=6, contrastive_weight=0.5
        )
        trainer, _, checkpoints = test_reconstruction.prepare(base, folder, settings, compute)
    trainer.args.logging_steps = 1
    return trainer, checkpoints


def work(rank: int, part: Part, port: int, arguments: dict[str, Any]) -> None:
    """One worker of an attempt, as Ray Train starts them."""
    from test_sft import StopAt

    from nla_ray.training.workers import prepare_worker

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(part.workers),
        "LOCAL_WORLD_SIZE": str(part.workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    compute = ComputeConfig(
        threads=1, trainer_workers=part.workers, zero_stage=arguments["zero_stage"]
    )
    prepare_worker(compute)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=part.workers)
    trainer, checkpoints = make_trainer(
        arguments["kind"], arguments["base"], arguments["folder"], compute
    )
    if part.stop is not None:
        trainer.add_callback(StopAt(part.stop))
    try:
        trainer.train(resume_from_checkpoint=checkpoints.last())
    except KeyboardInterrupt:
        os._exit(0)  # as a kill: nothing is tidied up
    torch.distributed.barrier()
    os._exit(0)


def attempt(part: Part, **arguments: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (part, port, arguments), nprocs=part.workers)


@pytest.mark.slow  # six processes a case import DeepSpeed: a minute on two cores
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("kind", ["sft", "reward_scorer"])
def test_two_workers_then_one_then_three_have_the_losses_of_one_undisturbed(
    tiny_base: BaseConfig, tmp_path: Path, kind: str, zero_stage: int
) -> None:
    plan = {"whole": [Part(1)], "parts": [Part(2, stop=8), Part(1, stop=14), Part(3)]}
    for name, parts in plan.items():
        for part in parts:
            attempt(part, kind=kind, base=tiny_base, folder=tmp_path / name, zero_stage=zero_stage)
    scratch = {name: tmp_path / name / kind / "scratch" for name in plan}
    records = {name: MetricsLog(path / "metrics.jsonl").read() for name, path in scratch.items()}
    assert [record["step"] for record in records["whole"]] == [
        record["step"] for record in records["parts"]
    ]
    for whole, parts in zip(records["whole"], records["parts"], strict=True):
        for key in whole.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), (whole["step"], key)
    expected, found = (
        load_file(last_checkpoint(path) / "trained.safetensors") for path in scratch.values()
    )
    assert expected.keys() == found.keys()
    assert all("lora" in name or "head.weight" in name for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    for path in scratch.values():
        assert json.loads((path / "best.json").read_text())["step"] % STEPS_IN_EPOCH == 0
        assert len(list(path.glob("checkpoint-*"))) == len(list(path.glob("best-*"))) == 1


@pytest.mark.slow  # five processes import DeepSpeed
def test_several_workers_of_a_remote_run_leave_what_is_trained_and_nothing_superseded(
    tiny_base: BaseConfig, s3_uri
) -> None:
    folder = s3_uri("several-workers")
    for part in (Part(2, stop=8), Part(3)):
        attempt(part, kind="reward_scorer", base=tiny_base, folder=folder, zero_stage=2)
    scratch = Location.of(folder) / "reward_scorer" / "scratch"
    best = json.loads((scratch / "best.json").read_text())["folder"]
    assert scratch.list_files() == [
        f"{best}/adapter/adapter_config.json",
        f"{best}/adapter/adapter_model.safetensors",
        f"{best}/head.safetensors",
        "best.json",
        "checkpoint-18/trained.safetensors",
        "checkpoint-18/trainer_state.json",
        "metrics.jsonl",
    ]
    steps = [
        json.loads(line)["step"] for line in (scratch / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps) and steps[-1] == 18 and set(steps) == set(range(1, 19))
