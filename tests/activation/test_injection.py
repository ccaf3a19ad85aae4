"""An activation is a token: encoding, the wrapper, and the slow obvious way as oracle."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MARKER, build_tokenizer, make_tiny_base
from transformers import LogitsProcessor, LogitsProcessorList

from nla_ray.activation.injection import (
    ActivationEmbedding,
    activations_attached,
    attach_activations,
    detach_activations,
)
from nla_ray.base import prompts
from nla_ray.base.adapters import add_lora, save_adapter
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import InjectionPrompt, build_injection_prompt, find_marker
from nla_ray.settings.config import BaseConfig, LoraSettings

NORM = 4.0


@pytest.fixture(scope="module")
def bank() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[0.1], [1], [10], [100], [1000]]
    )


def obvious_logits(model, ids: list[list[int]], bank: torch.Tensor) -> torch.Tensor:
    """One loop per token: look up ids; beyond the vocabulary, put the rescaled activation."""
    table = model.get_input_embeddings().weight
    rows = []
    for sequence in ids:
        row = []
        for token in sequence:
            if token < len(table):
                row.append(table[token])
            else:
                vector = bank[token - len(table)].double()
                row.append((vector / vector.square().sum().sqrt() * NORM).float())
        rows.append(torch.stack(row))
    return model(inputs_embeds=torch.stack(rows)).logits


@pytest.mark.parametrize(
    "architecture, tied", [("qwen2", True), ("qwen2", False), ("llama", False)]
)
def test_virtual_tokens_give_the_logits_of_the_slow_obvious_way(
    tmp_path: Path, bank: torch.Tensor, architecture: str, tied: bool
) -> None:
    base = make_tiny_base(tmp_path, architecture=architecture, tied=tied)
    model = load_backbone(base)
    prompt = build_injection_prompt(load_tokenizer(base), base.marker)
    vocab_size = model.config.vocab_size
    ids = [prompt.encode(row, vocab_size) for row in (3, 0, 4, 4)]
    expected = obvious_logits(model, ids, bank)
    with activations_attached(model, bank, NORM):
        actual = model(input_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual[0, -1], actual[1, -1], atol=1e-3), (
        "the activation has no influence"
    )


def test_two_activations_fit_in_one_prompt(tiny_base: BaseConfig, bank: torch.Tensor) -> None:
    model = load_backbone(tiny_base)
    vocab_size = model.config.vocab_size
    ids = [[5, vocab_size + 1, 7, vocab_size + 2, 9]]
    expected = obvious_logits(model, ids, bank)
    with activations_attached(model, bank, NORM):
        torch.testing.assert_close(
            model(input_ids=torch.tensor(ids)).logits, expected, atol=1e-5, rtol=1e-5
        )


def test_an_injected_row_has_exactly_the_injection_norm_whatever_its_own(
    bank: torch.Tensor,
) -> None:
    wrapper = ActivationEmbedding(torch.nn.Embedding(10, 32), bank, 150.0)
    norms = wrapper(torch.tensor([[10, 11, 12, 13, 14]])).square().sum(-1).sqrt()
    torch.testing.assert_close(norms, torch.full((1, 5), 150.0))


def test_plain_ids_pass_the_wrapper_unchanged_and_gradients_flow_to_the_table(
    bank: torch.Tensor,
) -> None:
    table = torch.nn.Embedding(10, 32)
    wrapper = ActivationEmbedding(table, bank, NORM)
    assert torch.equal(wrapper(torch.tensor([[1, 2]])), table(torch.tensor([[1, 2]])))
    wrapper(torch.tensor([[1, 10]])).sum().backward()
    assert table.weight.grad[1].abs().sum() > 0
    assert table.weight.grad[0].abs().sum() == 0, (
        "the id that stands in for a virtual one got a gradient"
    )


def test_a_row_that_the_bank_lacks_is_an_error_that_names_it(bank: torch.Tensor) -> None:
    wrapper = ActivationEmbedding(torch.nn.Embedding(10, 32), bank, NORM)
    with pytest.raises(IndexError, match="got row 5, expected below 5"):
        wrapper(torch.tensor([[15]]))


def test_a_bank_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[rows, 32\]"):
        ActivationEmbedding(torch.nn.Embedding(10, 32), torch.zeros(3, 16), NORM)


def test_generate_keeps_its_contract_and_no_logits_processor_ever_sees_a_virtual_id_as_a_candidate(
    tiny_base: BaseConfig, bank: torch.Tensor
) -> None:
    model, tokenizer = load_backbone(tiny_base), load_tokenizer(tiny_base)
    prompt = build_injection_prompt(tokenizer, tiny_base.marker)
    widths, seen = set(), []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            widths.add(scores.shape[-1])
            seen.append(input_ids[:, len(prompt) :])
            return scores

    with activations_attached(model, bank, NORM) as wrapper:
        ids = torch.tensor([prompt.encode(row, wrapper.vocab_size) for row in range(5)])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            logits_processor=LogitsProcessorList([Watch()]),
        )
    assert torch.equal(output[:, : len(prompt)], ids)
    assert widths == {model.config.vocab_size}
    assert (
        max(int(part.max()) for part in [*seen, output[:, len(prompt) :]] if part.numel())
        < model.config.vocab_size
    )


def test_attaching_twice_keeps_one_wrapper_and_detaching_gives_the_table_back(
    tiny_base: BaseConfig, bank: torch.Tensor
) -> None:
    model = load_backbone(tiny_base)
    table = model.get_input_embeddings()
    first = attach_activations(model, bank, NORM)
    assert attach_activations(model, bank[:2], NORM) is first
    assert len(first.bank) == 2
    detach_activations(model)
    assert model.get_input_embeddings() is table


def test_neither_the_bank_nor_the_wrapper_is_part_of_what_is_saved(
    tiny_base: BaseConfig, bank: torch.Tensor, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LoraSettings(rank=2, alpha=4))
    with activations_attached(model, bank, NORM) as wrapper:
        assert [name for name, _ in wrapper.named_buffers()] == []
        assert [name for name, _ in wrapper.named_parameters()] == ["embedding.weight"]
        save_adapter(model, tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_the_prompt_is_encoded_with_the_virtual_id_at_the_marker_and_nowhere_else() -> None:
    prompt = InjectionPrompt(prefix_ids=(1, 40, 8), marker_id=7, suffix_ids=(2, 3, 1))
    assert prompt.encode(5, 100) == [1, 40, 8, 105, 2, 3, 1]
    assert prompt.neighbours == (8, 2)
    assert len(prompt) == 7


def test_a_marker_of_several_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one token"):
        build_injection_prompt(build_tokenizer(), "\u320f")


def test_a_template_that_repeats_the_users_turn_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="got 2 markers"):
        build_injection_prompt(tokenizer, MARKER)


def test_other_neighbours_than_the_recorded_ones_are_refused() -> None:
    tokenizer = build_tokenizer()
    left, right = build_injection_prompt(tokenizer, MARKER).neighbours
    assert build_injection_prompt(tokenizer, MARKER, [left, right]).neighbours == (left, right)
    with pytest.raises(ValueError, match="neighbours of the marker"):
        build_injection_prompt(tokenizer, MARKER, [left, right + 1])


def test_a_marker_can_be_found_and_passes_every_check() -> None:
    tokenizer = build_tokenizer()
    assert find_marker(tokenizer) == MARKER
    assert (
        prompts.marker_token(tokenizer, MARKER)
        == build_injection_prompt(tokenizer, MARKER).marker_id
    )


def test_a_tokenizer_without_any_rare_character_has_no_marker() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "nothing of the user's turn"
    with pytest.raises(ValueError, match="expected at least one"):
        find_marker(tokenizer)
