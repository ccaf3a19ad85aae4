"""The attention for training on a CPU: the library's numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nla_ray.cpu.attention import register_grouped
from nla_ray.cpu.shared_prefix import decode_sharing_prefix


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_it_gives_the_librarys_logits_and_gradients(key_heads: int, with_prefix: bool) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=key_heads,
    )
    ids = torch.randint(5, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, :5] = torch.arange(5)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    answers = []
    for attention in ("eager", register_grouped()):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
        prefix = [0, 1, 2, 3, 4] if with_prefix else []
        logits = model.lm_head(decode_sharing_prefix(model.model, prefix, ids, mask))
        (logits * mask[..., None]).square().sum().backward()
        answers.append(
            (
                logits.detach() * mask[..., None],
                [parameter.grad for parameter in model.parameters()],
            )
        )
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=1e-4)
    assert answers[0][0].std() > 0.01
