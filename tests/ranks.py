"""Processes of one training, without Ray: for tests of what they have to agree on."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import plain_nano
from torch.multiprocessing.spawn import spawn


def on_ranks(function: Callable[..., Any], folder: Path, arguments: Sequence[tuple]) -> list:
    """What `function(*arguments[rank])` returns on each rank; the ranks talk by gloo."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    spawn(_run, (port, function, folder, arguments), nprocs=len(arguments))
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(len(arguments))]


def _run(
    rank: int, port: int, function: Callable, folder: Path, arguments: Sequence[tuple]
) -> None:
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(arguments)),
    }
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState(cpu=True)
    torch.save(function(*arguments[rank]), folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def offer_losses(run_dir: str, losses: Sequence[float]) -> list[bool]:
    """Whether each of the losses that this rank computed was the best so far."""
    from nla_ray.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(dataclasses.replace(plain_nano(), run_dir=run_dir), "sft")

    def save(folder: Path) -> None:
        (folder / "adapter").write_text("whole")

    return [checkpoints.offer(step, loss, save) for step, loss in enumerate(losses)]


def value_lines(advantages: torch.Tensor, rewards: list[list[float]]) -> list[torch.Tensor]:
    """The values of every description of the batch, of which this rank has a part."""
    from nla_ray.reinforce.steps import values_of_all_workers

    return values_of_all_workers(advantages, rewards, group_size=4, scaled_by_group=False)
