"""A decoding step as a CUDA graph: recorded once, then replayed with one launch.

A step is some hundreds of small operations; launched one by one they take longer than the card
needs to compute them. Knows no model: whoever records a step sees to it that its tensors stay where
they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

StepAnswer = tuple[Tensor, Tensor]


class GraphedStep:
    """`step`, replayed: it reads and writes the tensors that it was recorded with."""

    def __init__(self, step: Callable[[], StepAnswer]) -> None:
        """Runs `step` once before recording it, because libraries allocate at their first call."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._answer = step()

    def __call__(self) -> StepAnswer:
        """The step's answer, in the same two tensors every time."""
        self._graph.replay()
        return self._answer
