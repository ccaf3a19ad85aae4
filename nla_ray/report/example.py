"""Texts written for the cards, each with its description and score: what a run says, at a glance.

They are no test documents and prove nothing; no text of a corpus may stand in a card.
"""

from __future__ import annotations

from typing import Any

import torch

from nla_ray.activation.capture import ActivationReader
from nla_ray.activation.positions import TextEncoder
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.scorer import compare
from nla_ray.settings.config import CaptureConfig

TEXTS = (
    "def test_frame_index(self):\n    self.assertEqual(frame.index, 3)",
    "My order from May has not arrived, and nobody answers my letters. What can I do?",
)


def explain_examples(run: Run) -> list[dict[str, Any]]:
    """`text`, greedy `description`, and the judge's centred cosine with its own activation
    (`right`) and with the mean of the other texts' (`wrong`).

    The activation is the one at the end of the prompt, as in capture of `last`.
    """
    config, capture = run.config, CaptureConfig(positions="last")
    arm, model = config.grpo.artifact, load_backbone(config.base)
    encoder = TextEncoder(load_tokenizer(config.base), config.base, capture)
    reader = ActivationReader(model, [config.base.layer], capture.batch_tokens)
    encoded = [encoder.encode(f"example-{number}", text) for number, text in enumerate(TEXTS)]
    activations = torch.cat([torch.from_numpy(v) for v in reader.read(encoded)[config.base.layer]])
    with run.local_copy(arm, run.require(arm), "adapter") as folder:
        verbalizer = Verbalizer.load(config.base, folder, model=model)
    longest = config.grpo.max_new_tokens
    descriptions = [said.text for said in verbalizer.describe(activations, max_new_tokens=longest)]
    with run.local_copy("judge_scorer", run.require("judge_scorer")) as folder:
        judge = Reconstructor.load(config.base, folder)
    others = [[row for row in range(len(TEXTS)) if row != number] for number in range(len(TEXTS))]
    scores = compare(
        judge.reconstruct(descriptions),
        activations,
        activations[torch.tensor(others)],
        judge.mean.cpu(),
    )
    right, wrong = scores.centred_right.tolist(), scores.centred_wrong.mean(1).tolist()
    rows = zip(TEXTS, descriptions, right, wrong, strict=True)
    return [dict(zip(("text", "description", "right", "wrong"), row, strict=True)) for row in rows]
