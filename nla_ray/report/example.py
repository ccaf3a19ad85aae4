"""Texts written for the cards, each with its description and score: what a run says, at a glance.

They are no test documents and prove nothing; no text of a corpus may stand in a card.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.activation.stage import view_mean
from nla_ray.activation.views import read_layers, read_prompt
from nla_ray.base.encoding import ChatEncoder
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.scorer import compare

TEXTS = (
    "def test_frame_index(self):\n    self.assertEqual(frame.index, 3)",
    "My order from May has not arrived, and nobody answers my letters. What can I do?",
)


def explain_examples(run: Run) -> list[dict[str, Any]]:
    """A row a text: `text`, its greedy `description`, and the judge's centred cosines.

    `right` is the cosine with the text's activation, `wrong` the mean cosine with those of the
    other texts. The activation is at the end of the prompt, as in capture of `last`.
    """
    config = run.config
    arm, model = config.grpo.artifact, load_backbone(config.base)
    activations, injected = _read_ends(run, model)
    with run.local_copy(arm, run.require(arm), "adapter") as folder:
        verbalizer = Verbalizer.load(config.base, folder, model=model)
    longest = config.grpo.max_new_tokens
    written = verbalizer.describe(injected, max_new_tokens=longest)
    descriptions = [description.text for description in written]
    with run.local_copy("judge_scorer", run.require("judge_scorer")) as folder:
        judge = Reconstructor.load(config.base, folder)
    every = range(len(TEXTS))
    wrong_rows = torch.tensor([[row for row in every if row != number] for number in every])
    reconstruction = judge.reconstruct(descriptions)
    scores = compare(reconstruction, activations, activations[wrong_rows], judge.mean.cpu())
    right, wrong = scores.centred_right.tolist(), scores.centred_wrong.mean(1).tolist()
    return [
        {
            "text": TEXTS[row],
            "description": descriptions[row],
            "right": right[row],
            "wrong": wrong[row],
        }
        for row in every
    ]


@torch.no_grad()
def _read_ends(run: Run, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The texts' activations [n, d_model], and what is injected for them [n, vectors, d_model]."""
    base, mean = run.config.base, view_mean(run)
    chat = ChatEncoder(load_tokenizer(base), base.model)
    reader = ResidualReader(model, read_layers(base))
    encoded = [chat.encode(text) for text in TEXTS]
    read = [read_prompt(base, reader, each, [len(each.ids) - 1], mean) for each in encoded]
    return torch.cat([rows for rows, _ in read]), torch.cat([injected for _, injected in read])
