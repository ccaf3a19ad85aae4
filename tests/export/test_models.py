"""Exported models, loaded as anybody's: they say and score what the run's adapters do."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from plain_models import PlainModel
from safetensors.torch import load_file
from tiny import MARKER, build_tokenizer, make_tiny_base, random_state

from nla_ray.activation import vectors
from nla_ray.base.adapters import adapter_state, add_lora, save_adapter, set_adapter_state
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.reference import read_reference
from nla_ray.description.reference import load_verbalizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.export.models import (
    _without_unused_beginning,
    export_reconstructor,
    export_verbalizer,
    linear_head,
)
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.reference import load_reconstructor
from nla_ray.settings.config import BaseConfig, LoraSettings

LORA = LoraSettings(rank=4, alpha=8)
LABELS = [f"- a licence: {word}\n- tokens: copy" for word in ("frame", "index", "rows", "file")]
OTHERS = ["- code: a test", "- unit test: \u320e path\n- next: another check"]


@pytest.fixture(scope="module", params=["qwen2", "gemma3_text"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    return make_tiny_base(tmp_path_factory.mktemp("base"), architecture=request.param)


def save_verbalizer(base: BaseConfig, folder: Path) -> Path:
    model = add_lora(load_backbone(base), LORA)
    set_adapter_state(model, random_state(adapter_state(model), scale=0.3))
    save_adapter(model, folder)
    return folder


def save_scorer(base: BaseConfig, folder: Path) -> Path:
    draw = torch.Generator().manual_seed(2)
    mean = vectors.direction(torch.randn(32, generator=draw))
    scorer = Reconstructor.build(base, LORA, mean)
    set_adapter_state(scorer.model, random_state(adapter_state(scorer.model)))
    torch.nn.init.normal_(scorer.head.weight, std=0.05, generator=draw)
    scorer.save(folder)
    return folder


def test_a_verbalizer_says_the_same_as_a_whole_model(base: BaseConfig, tmp_path: Path) -> None:
    adapter = save_verbalizer(base, tmp_path / "adapter")
    export_verbalizer(base, base_info(base), adapter, tmp_path / "av", "float32")
    activations = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * 9
    ours = Verbalizer.load(base, adapter).describe(activations, max_new_tokens=10)
    loaded = load_verbalizer(tmp_path / "av")
    theirs = loaded.describe(activations, max_new_tokens=10)
    assert len({tuple(said.log_probs) for said in ours}) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert other == mine  # texts, ids, whether it was closed
        torch.testing.assert_close(
            torch.tensor(other.log_probs), torch.tensor(mine.log_probs), atol=1e-4, rtol=1e-4
        )
    facts = loaded.facts
    assert (facts.layer, facts.base_name, facts.marker) == (base.layer, base.model, MARKER)
    assert facts.own["base_digest"] == base_info(base).digest


def test_a_scorer_scores_the_same_and_its_linear_head_as_near_as_it_says(
    base: BaseConfig, tmp_path: Path
) -> None:
    scorer = save_scorer(base, tmp_path / "scorer")
    facts = export_reconstructor(
        base, base_info(base), scorer, tmp_path / "ar", "float32", fitted=LABELS, checked=OTHERS
    )
    assert read_reference(tmp_path / "ar", "reconstructor") == facts
    ours, theirs = Reconstructor.load(base, scorer), load_reconstructor(tmp_path / "ar")
    torch.testing.assert_close(theirs.mean, ours.mean)
    right = torch.randn(len(OTHERS), 32, generator=torch.Generator().manual_seed(1))
    read, expected = theirs.reconstruct(OTHERS), ours.reconstruct(OTHERS)
    torch.testing.assert_close(
        vectors.centred_cosine(read, right, theirs.mean),
        vectors.centred_cosine(expected, right, ours.mean),
        atol=1e-4,
        rtol=0,
    )
    # As a tool reads it that knows the layout alone.
    model, head = PlainModel(tmp_path / "ar"), load_file(tmp_path / "ar" / "value_head.safetensors")
    assert list(head) == ["weight"]
    streams = torch.stack(
        [model.stream(model.embed(ids), base.layer + 1)[-1] for ids in ours.encode(OTHERS)]
    )
    cosines = torch.cosine_similarity(streams @ head["weight"].T.double(), expected.double())
    measured = facts.own["value_head"]
    assert measured["descriptions"] == len(OTHERS)
    assert measured["mean_cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert measured["lowest_cosine"] == pytest.approx(cosines.min().item(), abs=1e-5)
    assert measured["lowest_cosine"] > 0.9


def test_the_linear_head_has_the_direction_of_the_exact_one_where_it_is_fitted() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, mean = torch.randn(16, 16, generator=draw) / 4, torch.randn(16, generator=draw)
    streams = torch.randn(10, 16, generator=draw) * 7
    head = linear_head(weight, mean, streams)
    exact = mean + streams * (4 / streams.norm(dim=1, keepdim=True)) @ weight.T
    torch.testing.assert_close(
        torch.cosine_similarity(streams @ head.T, exact), torch.ones(10), atol=1e-4, rtol=0
    )


def test_a_template_that_cannot_open_a_description_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template += "\n  "  # spaces before a block are dropped
    base = make_tiny_base(tmp_path / "base", tokenizer=tokenizer)
    adapter = save_verbalizer(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"prompt of .*av: got \[.*as the verbalizer was trained"):
        export_verbalizer(base, base_info(base), adapter, tmp_path / "av", "float32")


def test_a_prompt_of_several_vectors_has_no_place_in_the_layout(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    base = dataclasses.replace(tiny_base, injected=("activation", "activation"))
    with pytest.raises(ValueError, match=r"base.injected: got .*, expected the activation alone"):
        export_verbalizer(base, base_info(base), tmp_path, tmp_path / "av", "float32")


def test_a_prompt_that_tells_its_layer_has_no_place_in_the_layout(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    base = dataclasses.replace(tiny_base, further_layers=(0,))
    with pytest.raises(ValueError, match=r"base.further_layers: got \(0,\), expected none"):
        export_verbalizer(base, base_info(base), tmp_path, tmp_path / "av", "float32")
    assert not (tmp_path / "av").exists()


def test_a_token_that_the_tokenizer_never_begins_with_is_not_named(tiny_base: BaseConfig) -> None:
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.bos_token = "<|im_start|>"
    assert _without_unused_beginning(tokenizer).bos_token_id is None


def test_weights_may_be_written_in_half_the_room(tiny_base: BaseConfig, tmp_path: Path) -> None:
    adapter = save_verbalizer(tiny_base, tmp_path / "adapter")
    export_verbalizer(tiny_base, base_info(tiny_base), adapter, tmp_path / "av", "bfloat16")
    tensors = load_file(tmp_path / "av" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert read_reference(tmp_path / "av", "verbalizer").dtype == "bfloat16"
    manifest = yaml.safe_load((tmp_path / "av" / "nla_meta.yaml").read_text())
    assert manifest["role"] == "av" and manifest["extraction"]["injection_scale"] == 4.0
