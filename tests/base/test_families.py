"""Every row of the table of architectures, against the models that transformers builds.

What is computed from a base's parts must be what the whole model computes, for each family: a layer
read, rows packed or behind a common prefix, a stream overwritten, an adapter's places.
"""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_base
from torch import Tensor, nn
from transformers import AutoConfig, GemmaConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from nla_ray.activation.injection import activations_attached
from nla_ray.activation.patching import Patcher, at_norm_of
from nla_ray.base.adapters import adapter_state, add_lora, set_adapter_state
from nla_ray.base.config_files import as_config
from nla_ray.base.families import (
    FAMILIES,
    blocks_of,
    check_context,
    decoder_of,
    family_of,
    longest_context,
)
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, random_backbone
from nla_ray.base.self_check import check_reading
from nla_ray.bench.families import small_sizes
from nla_ray.cpu.shared_prefix import decode_sharing_prefix
from nla_ray.plan.sizes import sizes_in
from nla_ray.score.packing import pack, share_beginnings
from nla_ray.settings.config import LoraSettings
from nla_ray.training.verbalizer import TrainableVerbalizer

BLOCKS, WIDTH, VOCABULARY = 4, 32, 60
IDS = torch.arange(3, 25).view(2, 11)
LORA = LoraSettings(rank=2, alpha=4)


def config_of(family: str):
    return AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        **small_sizes(family, BLOCKS, WIDTH, 4, 2),
    )


def random_model(family: str) -> nn.Module:
    """With other norms and biases than it starts with, so that one left out shows."""
    model = random_backbone(config_of(family), device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return random_model(request.param)


def adapted(model: nn.Module, wrap=None) -> nn.Module:
    """A fresh model of the same weights with an adapter that changes it."""
    copy = random_backbone(model.config, device="cpu")
    copy.load_state_dict(model.state_dict())
    wrapped = add_lora(copy, LORA, **({} if wrap is None else {"wrap": wrap}))
    generator = torch.Generator().manual_seed(2)
    state = {
        name: 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in adapter_state(wrapped).items()
    }
    set_adapter_state(wrapped, state)
    return wrapped


# parts --------------------------------------------------------------------------------------------


def test_every_part_of_a_family_is_where_the_table_says(model: nn.Module) -> None:
    family, decoder = family_of(model), decoder_of(model)
    assert decoder is model.get_decoder()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert decoder.get_submodule(family.embedding) is model.get_input_embeddings()
    assert decoder.get_submodule(family.final_norm).weight.shape == (WIDTH,)
    blocks = blocks_of(model)
    assert len(blocks) == BLOCKS
    if family.positions is not None:
        assert decoder.get_submodule(family.positions).weight.shape == (64, WIDTH)
    if (parts := family.parts) is not None:
        assert decoder.get_submodule(family.rotary).inv_freq.ndim == 1
        for name in (parts.attention_norm, parts.mlp_norm):
            assert blocks[1].get_submodule(name).weight.shape == (WIDTH,)
        norms = {name for name, _ in blocks[1].named_modules() if name.endswith("_norm")}
        assert norms == {parts.query_norm, parts.key_norm} - {None}


def test_adapters_go_to_all_matrices_of_a_block_but_experts_and_routers(model: nn.Module) -> None:
    family = family_of(model)
    matrices = {
        name
        for name, module in blocks_of(model)[1].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    assert matrices == set(family.paths)
    assert family.projections == tuple(dict.fromkeys(p.split(".")[-1] for p in family.paths))
    has_bias = {p for p in family.paths if blocks_of(model)[1].get_submodule(p).bias is not None}
    expected = {"none": set(), "qkv": set(family.paths[:3]), "all": set(family.paths)}
    assert has_bias == expected[family.biases]


def test_an_adapter_that_sits_elsewhere_than_its_family_says_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """peft adds it to every module whose name ends alike."""
    row = dataclasses.replace(FAMILIES["gpt2"], paths=("attn.c_attn", "attn.c_proj", "mlp.c_fc"))
    monkeypatch.setitem(FAMILIES, "gpt2", row)
    with pytest.raises(ValueError, match=r"got 16 matrices, expected the 12 .*h\.0\.mlp\.c_proj"):
        add_lora(random_model("gpt2"), LORA)


def test_a_model_wrapped_by_adapters_is_of_the_family_of_its_base(model: nn.Module) -> None:
    wrapped = adapted(model)
    assert family_of(wrapped) is family_of(model)
    assert decoder_of(wrapped) is wrapped.get_base_model().get_decoder()


def test_another_architecture_is_refused_by_name() -> None:
    config = GemmaConfig(**small_sizes("gemma"), vocab_size=50)
    for refused in (config, random_backbone(config)):
        with pytest.raises(ValueError, match=r"got model type 'gemma', expected one of llama, qw"):
            family_of(refused)
    with pytest.raises(ValueError, match=r"got model type 'gemma', expected"):
        ResidualReader(random_backbone(config), [1])


# what is computed from parts ----------------------------------------------------------------------


def outputs_of_blocks(model: nn.Module, ids: Tensor = IDS) -> list[Tensor]:
    """What every block gives, by hooks on the whole model: [batch, seq, d_model] each."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda module, inputs, output: outputs.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return outputs


def test_a_layer_is_the_output_of_its_block_the_last_one_too(model: nn.Module) -> None:
    expected = outputs_of_blocks(model)
    for layers in ([0, 2], [BLOCKS - 1], range(BLOCKS)):
        streams = ResidualReader(model, layers).read(IDS)
        for layer in layers:
            torch.testing.assert_close(streams[layer], expected[layer])
    normed = model(IDS, output_hidden_states=True).hidden_states[BLOCKS]
    assert (expected[-1] - normed).abs().max() > 0.1, "the last block's output is a normed one"
    hidden = model(IDS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(ResidualReader(model, [1]).read(IDS)[1], hidden)


def test_an_adapter_changes_what_is_read_and_goes_when_it_is_off(model: nn.Module) -> None:
    wrapped = adapted(model)
    reader = ResidualReader(wrapped, [2])
    expected = outputs_of_blocks(model)[2]
    assert (reader.read(IDS)[2] - expected).abs().max() > 1e-2
    with wrapped.disable_adapter():
        torch.testing.assert_close(reader.read(IDS)[2], expected)


def test_rows_of_several_sequences_are_read_as_each_by_itself(model: nn.Module) -> None:
    sequences = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 30, 31, 32], [5, 6, 7, 40]]
    rows = share_beginnings(sequences)
    assert len(rows) < len(sequences)
    batch, last = pack(sequences, rows, 0, torch.float32)
    packed = ResidualReader(model, [2]).read(**batch)[2]
    for number, place in last.items():
        alone = ResidualReader(model, [2]).read(torch.tensor([sequences[number]]))[2]
        torch.testing.assert_close(packed[place], alone[0, -1], atol=1e-5, rtol=1e-5)


def test_a_common_prefix_computed_once_gives_the_same_and_the_same_gradients(
    model: nn.Module,
) -> None:
    prefix = (5, 9, 11, 7)
    ids = torch.cat([torch.tensor([prefix, prefix]), IDS[:, :5]], dim=1)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    results = []
    for shared in (prefix, ()):
        wrapped = adapted(model)
        stream = decode_sharing_prefix(decoder_of(wrapped), shared, ids, mask)[mask.bool()]
        stream.square().sum().backward()
        gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
        results.append((stream.detach(), gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)


def test_log_probs_of_training_are_those_of_the_models_logits(model: nn.Module) -> None:
    """A family that caps its logits is one whose log-probs are capped too."""
    wrapped = adapted(model, wrap=partial(TrainableVerbalizer, temperature=0.7)).eval()
    labels = IDS.clone()
    labels[:, :4] = -100
    found = wrapped(input_ids=IDS, labels=labels, fused_lm_head=True).log_probs[:, 3:]
    with torch.no_grad():
        logits = wrapped(input_ids=IDS).logits[:, 3:-1].float() / 0.7
    expected = logits.log_softmax(-1).gather(-1, IDS[:, 4:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def overwritten(model: nn.Module, layer: int, ids: list[int], vector: Tensor) -> Tensor:
    """Log-probs of the next token when the stream after a block is overwritten at the end."""

    def overwrite(block, inputs, output):
        stream = (output[0] if isinstance(output, tuple) else output).clone()
        stream[:, -1] = vector
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = blocks_of(model)[layer].register_forward_hook(overwrite)
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [1, 2])
def test_a_stream_put_back_gives_what_the_whole_model_gives(model: nn.Module, layer: int) -> None:
    ids = IDS[0].tolist()
    activation = outputs_of_blocks(model, IDS[:1])[layer][0, -1]
    draw = torch.Generator().manual_seed(layer)
    others = at_norm_of(torch.randn(3, WIDTH, generator=draw), activation)
    found = Patcher(model, layer).patch(ids, activation, torch.cat([activation[None], others]))
    with torch.no_grad():
        clean = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    expected = [
        nn.functional.kl_div(
            overwritten(model, layer, ids, vector), clean, log_target=True, reduction="sum"
        )
        for vector in others
    ]
    torch.testing.assert_close(found.divergence[1:], torch.stack(expected), atol=1e-4, rtol=1e-3)
    assert found.divergence[0] < 1e-5 and found.divergence[1:].min() > 1e-4


def test_an_injected_vector_is_not_scaled_as_tokens_are(model: nn.Module) -> None:
    """What reaches the first block, less positions: a token's embedding as it is, a vector at its
    norm."""
    seen: list[Tensor] = []
    hook = blocks_of(model)[0].register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    try:
        model(IDS)
        with activations_attached(model, torch.randn(3, WIDTH), 4.0):
            model(torch.cat([IDS[:, :-1], torch.full((2, 1), VOCABULARY + 1)], dim=1))
    finally:
        hook.remove()
    torch.testing.assert_close(seen[1][:, :-1], seen[0][:, :-1])
    vector, positions = seen[1][:, -1], family_of(model).positions
    if positions is not None:
        vector = vector - decoder_of(model).get_submodule(positions).weight[IDS.shape[1] - 1]
    torch.testing.assert_close(vector.norm(dim=-1), torch.tensor([4.0, 4.0]))


# lengths and sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields, longest",
    [
        ("mistral", {}, 8),
        ("mistral", {"sliding_window": None}, 64),
        ("llama", {}, 64),
        ("qwen2", {}, 64),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, 8),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, 64),
        ("gemma3_text", {}, 8),
        ("gpt2", {}, 64),
    ],
)
def test_prompts_that_a_window_would_cut_are_refused(family: str, fields: dict, longest) -> None:
    values = {**config_of(family).to_dict(), "sliding_window": 8, **fields}
    values.pop("layer_types", None)
    for config in (as_config(values), AutoConfig.for_model(**values)):
        assert longest_context(config) == longest
        check_context(config, longest)
        if longest == 64 and family != "gpt2":  # no windows, and positions without end
            check_context(config, 65)
            continue
        with pytest.raises(ValueError, match=rf"max_tokens: got 65, expected at most {longest}"):
            check_context(config, 65)


def test_the_plan_counts_the_parameters_that_a_model_has(model: nn.Module) -> None:
    config = model.config
    for known in (config, as_config(config.to_dict())):
        sizes = sizes_in(known)
        assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
        wrapped = adapted(model)
        assert sizes.lora_parameters(LORA, BLOCKS) == sum(
            parameter.numel() for name, parameter in wrapped.named_parameters() if "lora_" in name
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_is_filled_in_as_transformers_does(family: str) -> None:
    ours, theirs = as_config({"model_type": family}), AutoConfig.for_model(family)
    assert sizes_in(ours) == sizes_in(theirs)
    assert longest_context(ours) == longest_context(theirs)


def test_of_experts_those_that_compute_a_token_count_for_its_time() -> None:
    sizes = sizes_in(config_of("qwen3_moe"))
    expert = 3 * WIDTH * 16
    # One of the four blocks has a dense layer in the experts' place; two of four experts compute.
    assert sizes.parameters - sizes.active_parameters == 3 * 2 * expert


def test_a_row_that_names_no_norm_of_the_model_is_an_error_and_not_a_normed_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", dataclasses.replace(FAMILIES["gpt2"], final_norm="norm"))
    config = GPT2Config(**small_sizes("gpt2"), vocab_size=50)
    with pytest.raises(AttributeError, match="norm"):
        ResidualReader(random_backbone(config, device="cpu"), [1])


def test_a_frozen_base_is_the_same_in_training_as_in_reading(tmp_path: Path) -> None:
    """GPT-2 and GPT-NeoX come with dropouts of their own."""
    config = config_of("gpt2")
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.1
    base = make_tiny_base(tmp_path, architecture="gpt2")
    model = load_backbone(base)
    expected = model(IDS).logits
    torch.testing.assert_close(model.train()(IDS).logits, expected)


# self-check ---------------------------------------------------------------------------------------


def test_a_base_that_is_read_as_the_library_computes_it_passes_its_check(model: nn.Module) -> None:
    check_reading(model, range(BLOCKS))
    check_reading(adapted(model), [1, BLOCKS - 1])


def test_an_error_at_one_token_is_seen_beside_another_token_of_a_hundred_times_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama")
    read = ResidualReader.read

    def wrong(self, ids: Tensor) -> dict[int, Tensor]:
        streams = read(self, ids)
        streams[1][:, 3] *= 1.1
        return streams

    monkeypatch.setattr(ResidualReader, "read", wrong)
    decoder_of(model).embed_tokens.weight.data[1] *= 1_000.0  # the first id of the check
    with pytest.raises(ValueError, match=r"block 1 of which 0\.1 is off at a token"):
        check_reading(model, [1])


def test_a_base_that_is_read_otherwise_is_refused_with_both_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The row names the norm inside the first block: the last block's stream is then a normed
    one."""
    row = dataclasses.replace(FAMILIES["gemma2"], final_norm="layers.0.input_layernorm")
    monkeypatch.setitem(FAMILIES, "gemma2", row)
    with pytest.raises(ValueError, match=r"self-check of base 'gemma2' .*got a stream after block"):
        check_reading(random_model("gemma2"), [1, BLOCKS - 1])
