"""Refused tokens: which they are, what they cost, and that a verbalizer unlearns a repeat."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nla_ray.cpu.log_probs import TokenLogProbs
from nla_ray.training.sft import completion_loss
from nla_ray.training.unlikelihood import (
    IGNORED,
    refuse_repeats,
    refused,
    token_labels,
    unlikelihood,
)

SPELLED = ("- tokens:", " frame", ",", " index", " assert", "\n- test:", "\n- next:", "</x>")
FRAME, COMMA, INDEX, ASSERT, TEST, NEXT = 1, 2, 3, 4, 5, 6


def decode(ids) -> str:
    return "".join(SPELLED[index] for index in ids)


def example(*completion: int) -> dict[str, list[int]]:
    return {"input_ids": [9, 9, *completion], "labels": [IGNORED, IGNORED, *completion]}


def test_an_item_refuses_how_an_earlier_one_of_any_list_began() -> None:
    listed = example(0, FRAME, COMMA, INDEX, TEST, ASSERT, NEXT, FRAME)
    drawn = set()
    for seed in range(20):
        [made] = refuse_repeats([listed], 1.0, decode, seed)
        assert made["input_ids"] == listed["input_ids"]
        labels = made["labels"]
        where = [number for number, label in enumerate(labels) if label != IGNORED]
        assert where == [5, 7]  # " index" and " assert"; " frame" after `next:` is a forecast
        assert labels[5] == refused(FRAME)
        drawn.add(labels[7])
    assert drawn == {refused(FRAME), refused(INDEX)}


def test_what_is_to_be_written_is_never_refused() -> None:
    twice = example(0, FRAME, COMMA, FRAME)
    assert refuse_repeats([twice], 1.0, decode, 0) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.5])
def test_the_share_counts_labels_and_passes_over_those_without_a_second_item(share: float) -> None:
    short = example(0, FRAME, NEXT, INDEX)
    lists = [example(0, FRAME, COMMA, INDEX), example(0, INDEX, COMMA, ASSERT)]
    made = refuse_repeats([short, *lists, short], share, decode, 3)
    assert len(made) == round(share * 4)
    assert all(row["input_ids"] != short["input_ids"] for row in made)
    assert refuse_repeats([short], share, decode, 0) == []


def test_unlikelihood_is_the_paper_s_and_stays_finite() -> None:
    log_probs = torch.tensor([math.log(0.25), math.log(1e-4), 0.0], requires_grad=True)
    loss = unlikelihood(log_probs)
    assert loss[:2].tolist() == pytest.approx([-math.log(0.75), -math.log(1 - 1e-4)], rel=1e-5)
    assert math.isfinite(loss[2].item())
    loss.sum().backward()
    assert torch.isfinite(log_probs.grad).all() and (log_probs.grad[:2] > 0).all()


class Unigram(nn.Module):
    """Says every token with the same probability everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))

    def forward(self, input_ids, attention_mask, labels, fused_lm_head) -> TokenLogProbs:
        wanted = labels[:, 1:] != IGNORED
        log_probs = self.logits.log_softmax(-1)[labels[:, 1:].clamp(min=0)]
        return TokenLogProbs(log_probs=log_probs * wanted)


def test_a_batch_of_both_kinds_costs_the_sum_of_both_and_unlearns_what_is_refused() -> None:
    model = Unigram()
    labels = torch.tensor([[IGNORED, 1, IGNORED], [IGNORED, refused(0), IGNORED]])
    batch = {"input_ids": labels.clamp(min=0), "attention_mask": labels * 0 + 1, "labels": labels}
    likely = model.logits.softmax(-1)
    summed, count = completion_loss(model, batch)
    assert count == 2
    assert summed.item() == pytest.approx((-likely[1].log() - (1 - likely[0]).log()).item())
    only = {**batch, "labels": torch.where(labels < IGNORED, labels, IGNORED)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        completion_loss(model, only)[0].backward()
        optimizer.step()
    assert model.logits.softmax(-1)[0] < 0.1 < likely[0]


def test_labels_come_back_as_they_were() -> None:
    labels = torch.tensor([[IGNORED, 0, refused(0), 7, refused(7)]])
    ids, is_refused = token_labels(labels)
    assert ids.tolist() == [[IGNORED, 0, 0, 7, 7]]
    assert is_refused.tolist() == [[False, False, True, False, True]]
