"""Repeats that are refused: where, which token, what it costs, and that it is unlearned."""

from __future__ import annotations

import math
from unicodedata import normalize

import pytest
import torch
from torch import nn

from nla_ray.cpu.log_probs import TokenLogProbs
from nla_ray.training.sft import completion_loss
from nla_ray.training.unlikelihood import (
    IGNORED,
    Repeat,
    draw_repeats,
    refusal_loss,
    refuse,
    refused,
    token_labels,
)

LABEL = "- tokens: frame, index\n- unit test: frame, equal\n- next: more, frame"


def test_an_item_is_refused_wherever_a_later_one_could_stand() -> None:
    drawn = {
        (repeat.written.rsplit("\n", 1)[-1], repeat.item, repeat.expected)
        for seed in range(200)
        for repeat in draw_repeats([LABEL], 1.0, seed)
    }
    assert drawn == {
        ("- tokens: frame, ", "frame", "index"),
        ("- tokens: frame, index, ", "frame", ""),
        ("- tokens: frame, index, ", "index", ""),
        ("- unit test: ", "index", "frame"),  # never what is to be written: frame, frame
        ("- unit test: frame, ", "frame", "equal"),
        ("- unit test: frame, ", "index", "equal"),
        ("- unit test: frame, equal, ", "frame", ""),
        ("- unit test: frame, equal, ", "index", ""),
        ("- unit test: frame, equal, ", "equal", ""),
    }


def test_prose_placeholders_and_forecasts_refuse_nothing() -> None:
    label = "- It explains ownership, borrowing, and lifetimes to a learner\n- next: a, b"
    assert draw_repeats([label, "- tokens: no word stands out"], 1.0, 0) == []


@pytest.mark.parametrize(
    "label", ["- A snippet follows:", "- tokens:", "- topics: ,", "- tokens: , ,"]
)
def test_a_heading_without_items_refuses_nothing(label: str) -> None:
    assert draw_repeats([label], 1.0, 0) == []
    assert draw_repeats([f"{label}\n- tokens: frame"], 1.0, 0)[0].item == "frame"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.5])
def test_the_share_counts_labels_and_draws_each_before_any_twice(share: float) -> None:
    labels = ["- prose", "- tokens: a", "- tokens: b", "- next: more"]
    repeats = draw_repeats(labels, share, 3)
    numbers = [repeat.number for repeat in repeats]
    assert len(repeats) == round(share * 4) and set(numbers) <= {1, 2}
    assert numbers.count(1) - numbers.count(2) in (-1, 0, 1)
    assert draw_repeats(labels, share, 3) == repeats


SPELLED = ["- tokens:", " frame", ",", " ", "in", "dex", "put"]


def encode(texts) -> list[list[int]]:
    """The longest piece first, as a tokenizer would."""
    found = []
    for text in texts:
        ids = []
        while text:
            best = max((piece for piece in SPELLED if text.startswith(piece)), key=len)
            ids.append(SPELLED.index(best))
            text = text[len(best) :]
        found.append(ids)
    return found


def decode(ids) -> str:
    return "".join(SPELLED[index] for index in ids)


def test_the_label_stands_at_the_token_with_the_item_s_first_character() -> None:
    repeat = Repeat(number=4, written="- tokens: frame, ", item="frame", expected="index")
    [(number, ids, labels)] = refuse([repeat], encode, decode)
    assert (number, decode(ids)) == (4, "- tokens: frame, frame")
    assert labels == [IGNORED] * 3 + [refused(1)]
    apart = Repeat(number=0, written="- tokens: index, ", item="index", expected="frame")
    [(_, ids, labels)] = refuse([apart], encode, decode)
    assert decode(ids) == "- tokens: index, in" and labels == [IGNORED] * 6 + [refused(4)]


def test_an_item_that_begins_as_the_expected_one_is_not_refused() -> None:
    same = Repeat(number=0, written="- tokens: index, ", item="index", expected="input")
    ended = Repeat(number=1, written="- tokens: index, ", item="index", expected="")
    assert [number for number, *_ in refuse([same, ended], encode, decode)] == [1]


def test_items_are_found_where_a_tokenizer_composes_characters() -> None:
    """As tokenizers with the normal form NFC do: what is decoded is shorter than the label."""

    def composed(texts) -> list[list[int]]:
        return [[ord(character) for character in normalize("NFC", text)] for text in texts]

    def spelled(ids) -> str:
        return "".join(map(chr, ids))

    written = "- tokens: e\u0301te\u0301, "
    whole = Repeat(number=0, written=written, item="e\u0301te\u0301", expected="frame")
    [(_, ids, labels)] = refuse([whole], composed, spelled)
    assert spelled(ids) == "- tokens: \u00e9t\u00e9, \u00e9" and labels[-1] == refused(
        ord("\u00e9")
    )
    one = Repeat(number=0, written=written, item="ab", expected="")
    [(_, ids, labels)] = refuse([one], composed, spelled)
    assert spelled(ids) == "- tokens: \u00e9t\u00e9, a" and labels[-1] == refused(ord("a"))


def test_the_loss_is_the_paper_s_and_stays_finite() -> None:
    log_probs = torch.tensor([math.log(0.25), math.log(1e-4), 0.0], requires_grad=True)
    loss = refusal_loss(log_probs)
    expected = [-math.log(0.75), -math.log(1 - 1e-4)]
    assert loss[:2].tolist() == pytest.approx(expected, rel=1e-5)
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
    likely = model.logits.softmax(-1).detach()
    summed, count = completion_loss(model, batch)
    assert count == 2
    expected = -likely[1].log() - (1 - likely[0]).log()
    assert summed.item() == pytest.approx(expected.item())
    only = {**batch, "labels": torch.where(labels < IGNORED, labels, IGNORED)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        completion_loss(model, only)[0].backward()
        optimizer.step()
    assert model.logits.softmax(-1)[0] < 0.1 < likely[0]


def test_a_batch_without_refusals_costs_exactly_the_cross_entropy() -> None:
    model = Unigram()
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED], [IGNORED, 0, 0, 1]])
    batch = {"input_ids": labels.clamp(min=0), "attention_mask": labels * 0 + 1, "labels": labels}
    summed, count = completion_loss(model, batch)
    [gradient] = torch.autograd.grad(summed, [model.logits])
    plain = -model(**batch, fused_lm_head=True).log_probs.sum()
    assert count == 5 and torch.equal(summed, plain)
    assert torch.equal(gradient, *torch.autograd.grad(plain, [model.logits]))


def test_labels_come_back_as_they_were() -> None:
    labels = torch.tensor([[IGNORED, 0, refused(0), 7, refused(7)]])
    ids, is_refused = token_labels(labels)
    assert ids.tolist() == [[IGNORED, 0, 0, 7, 7]]
    assert is_refused.tolist() == [[False, False, True, False, True]]
