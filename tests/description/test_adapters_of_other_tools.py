"""Adapters that other tools have saved: peft's own forward pass is the oracle."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_state
from torch import Tensor

from nla_ray.activation.injection import activations_attached
from nla_ray.base.adapters import load_adapter
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import build_injection_prompt
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.settings.config import BaseConfig

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPUTED = {
    "rsLoRA": {"use_rslora": True},
    "rsLoRA of several ranks": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3, r"layers\.0\.self_attn\.q_proj": 24},
    },
    "several scales": {"alpha_pattern": {r"model\.layers\.[01]\.mlp\..*": 40}},
    "several ranks and scales": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 1, "o_proj": 64},
    },
    "two projections": {"target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "two of three blocks": {"layers_to_transform": [0, 2], "use_rslora": True},
}


def saved(base: BaseConfig, folder: Path, **settings) -> peft.PeftModel:
    """A random adapter as peft saves it; returns its model."""
    settings = {"r": 16, "lora_alpha": 16, "target_modules": SEVEN, **settings}
    model = peft.get_peft_model(
        load_backbone(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, random_state(state, scale=0.1))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", COMPUTED)
def test_an_adapter_computes_what_it_computes_in_peft_in_the_model_and_in_the_engine(
    kind: str, tiny_base: BaseConfig, tmp_path: Path
) -> None:
    oracle = saved(tiny_base, tmp_path, **COMPUTED[kind])
    ids = torch.arange(3, 36).view(3, 11)
    plain = load_backbone(tiny_base)(ids).logits
    expected = oracle(ids).logits
    assert (expected - plain).abs().max() > 0.1, "the adapter has no influence"
    loaded = load_adapter(load_backbone(tiny_base), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)

    activations = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    descriptions = Verbalizer.load(tiny_base, tmp_path).describe(activations, max_new_tokens=6)
    for row, description in enumerate(descriptions):
        scored = log_probs(oracle, tiny_base, activations, row, description.token_ids)
        torch.testing.assert_close(
            torch.tensor(description.log_probs), scored, atol=1e-3, rtol=0, check_dtype=False
        )


def log_probs(
    model: peft.PeftModel, base: BaseConfig, activations: Tensor, row: int, tokens: list[int]
) -> Tensor:
    """Of `tokens`, after the verbalizer's prompt with an activation, by peft's forward pass."""
    prompt = build_injection_prompt(load_tokenizer(base), base.marker)
    with activations_attached(model.get_base_model(), activations, base.injection_norm) as wrapper:
        ids = prompt.encode(row, wrapper.vocab_size)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"use_newlora": {"beta": 1}}, r"use_newlora=\{'beta': 1\}"),  # peft ignores it
    ],
)
def test_what_is_no_lora_of_weight_matrices_is_refused_by_name(
    settings: dict, named: str, tiny_base: BaseConfig, plain: Path
) -> None:
    configure(plain, settings)
    refuses(tiny_base, plain, rf"got {named}, expected a LoRA of weight matrices alone")


def configure(folder: Path, settings: dict) -> None:
    """Change what the adapter's configuration file says."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refuses(base: BaseConfig, folder: Path, message: str) -> None:
    """Both ways in refuse it: a scorer's adapter in peft, and a verbalizer's in the engine."""
    with pytest.raises(ValueError, match=message):
        load_adapter(load_backbone(base), folder)
    with pytest.raises(ValueError, match=message):
        Verbalizer.load(base, folder)


@pytest.fixture
def plain(tiny_base: BaseConfig, tmp_path: Path) -> Path:
    """The folder of a plain adapter."""
    saved(tiny_base, tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, rename) -> None:
    """Write the tensors again under other names; a name of None leaves the tensor out."""
    file = folder / "adapter_model.safetensors"
    renamed = {rename(key): value for key, value in load_file(file).items()}
    renamed.pop(None, None)
    save_file(renamed, file, metadata={"format": "pt"})


def test_names_of_another_architecture_are_refused_with_a_name_of_each_side(
    tiny_base: BaseConfig, plain: Path
) -> None:
    rewrite(plain, lambda key: key.replace("model.layers", "model.language_model.layers"))
    refuses(
        tiny_base,
        plain,
        r"42 (of 42 )?tensors without a place.*"
        r"'base_model\.model\.model\.language_model\.layers\.0\.mlp\.down_proj\.lora_A\.weight'.*"
        r"'base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight'",
    )


@pytest.mark.parametrize(
    "lost", ["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", ""], ids=["half", "all"]
)
def test_half_a_pair_and_an_empty_file_are_refused(
    lost: str, tiny_base: BaseConfig, plain: Path
) -> None:
    rewrite(plain, lambda key: None if lost in key else key)
    refuses(tiny_base, plain, r"expected pairs of \.\.\.\.lora_A\.weight")


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_refuses_half_a_pair_whoever_publishes_it(
    lost: str, dtype: str, tiny_base: BaseConfig, plain: Path
) -> None:
    model = load_backbone(tiny_base).to(getattr(torch, dtype))
    engine = Verbalizer.load(tiny_base, plain, model=model).engine
    state = load_file(plain / "adapter_model.safetensors")
    del state[f"base_model.model.model.layers.2.mlp.down_proj.{lost}.weight"]
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj: got one of two factors"):
        engine.load_weights(state, 1)


def test_a_module_without_its_tensors_is_refused_where_the_adapter_would_be_trained_further(
    tiny_base: BaseConfig, plain: Path
) -> None:
    rewrite(plain, lambda key: None if "layers.1.mlp.up_proj" in key else key)
    with pytest.raises(ValueError, match=r"got 2 tensors that do not fit.*layers\.1\.mlp\.up_proj"):
        load_adapter(load_backbone(tiny_base), plain)


def test_files_that_do_not_belong_together_are_refused(tiny_base: BaseConfig, plain: Path) -> None:
    configure(plain, {"r": 4})
    refuses(tiny_base, plain, r"got factors of rank 16 for model\.layers\.0.*expected rank 4")
    (plain / "adapter_model.safetensors").unlink()
    refuses(tiny_base, plain, r"without adapter_model\.safetensors, expected a saved adapter")


def test_a_verbalizers_adapter_loads_into_the_first_blocks_and_none_of_them_is_not_silence(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    ids = torch.arange(3, 36).view(3, 11)
    oracle = saved(tiny_base, tmp_path / "all")
    cut = load_adapter(load_backbone(tiny_base, num_blocks=2), tmp_path / "all")
    expected = oracle(ids, output_hidden_states=True).hidden_states[2]
    stream = cut.get_base_model().model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(stream, expected, atol=1e-5, rtol=0)

    saved(tiny_base, tmp_path / "last", layers_to_transform=[2])
    with pytest.raises(ValueError, match=r"got 0 of 14 tensors without.*in 2 blocks"):
        load_adapter(load_backbone(tiny_base, num_blocks=2), tmp_path / "last")
