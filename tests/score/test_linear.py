"""The linear reconstructor: features equal the plain sum over tokens, ridge equals the formula."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from nla_ray.activation.stage import load_activations
from nla_ray.base.adapters import adapter_state, add_lora, set_adapter_state
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import OPENING_TAG
from nla_ray.run.artifact import Run
from nla_ray.run.identity import document_half
from nla_ray.score.linear import PENALTIES, DescriptionFeatures, LinearReconstructor, fit, predict
from nla_ray.settings.config import BaseConfig, LoraSettings, RunConfig

TEXTS = [
    "- A Python test that opens a file",
    "- A licence",
    "",
    "- tokens: def, assert, return, function, rows",
]


@pytest.fixture(scope="module")
def features(tiny_base: BaseConfig) -> DescriptionFeatures:
    return DescriptionFeatures(
        load_backbone(tiny_base), load_tokenizer(tiny_base), layer=1, max_tokens=12
    )


def test_features_are_the_mean_over_the_descriptions_own_tokens_one_text_at_a_time(
    features: DescriptionFeatures, tiny_base: BaseConfig
) -> None:
    model, tokenizer = load_backbone(tiny_base), load_tokenizer(tiny_base)
    prefix = tokenizer.encode(OPENING_TAG)
    texts = [*TEXTS, "- a<|im_end|>"]
    found = features(texts, batch_size=2)
    for text, row in zip(texts, found, strict=True):
        own = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)[:12]
        if not own:
            assert not row.any()
            continue
        stream = model(torch.tensor([prefix + own]), output_hidden_states=True).hidden_states[2][
            0, len(prefix) :
        ]
        torch.testing.assert_close(row, stream.mean(0), atol=1e-5, rtol=0)


def test_features_are_the_plain_bases_whatever_adapter_the_model_carries(
    features: DescriptionFeatures, tiny_base: BaseConfig
) -> None:
    adapted = add_lora(load_backbone(tiny_base), LoraSettings(rank=2, alpha=4), seed=0)
    set_adapter_state(
        adapted, {name: torch.ones_like(tensor) for name, tensor in adapter_state(adapted).items()}
    )
    with_adapter = DescriptionFeatures(adapted, load_tokenizer(tiny_base), layer=1, max_tokens=12)
    torch.testing.assert_close(with_adapter(TEXTS), features(TEXTS))


def test_ridge_equals_the_formula_worked_out_by_hand() -> None:
    # phi - mean phi = -1, 1; unit targets (1, 0), (0, 1), mu = 0: deviation -+(1/2) around b =
    # (1/2, 1/2); gram 2, penalty 0.5 * 2 = 1
    tensors = fit(
        torch.tensor([[1.0], [3.0]]),
        torch.tensor([[2.0, 0.0], [0.0, 5.0]]),
        torch.zeros(2),
        penalty=0.5,
    )
    torch.testing.assert_close(tensors["offset"], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(
        tensors["weight"], torch.tensor([[-1 / 3], [1 / 3]])
    )  # -1 / (2 + 1) and 1 / (2 + 1)
    torch.testing.assert_close(
        predict(torch.tensor([[3.0], [0.0]]), tensors), torch.tensor([[1 / 6, 5 / 6], [0.5, 0.5]])
    )


def test_without_a_penalty_it_finds_a_linear_map_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(200, 6, generator=generator), torch.randn(4, 6, generator=generator)
    targets = inputs @ truth.T
    targets = targets / targets.norm(dim=1, keepdim=True)
    mean = targets.mean(0)
    read = mean + predict(inputs, fit(inputs, targets, mean, 1e-12))
    assert torch.nn.functional.cosine_similarity(read - mean, targets - mean).mean() > 0.9
    worse = mean + predict(inputs, fit(inputs, targets, mean, 100.0))
    assert (worse - mean).norm() < 0.2 * (read - mean).norm()


def test_a_saved_one_loads_into_a_shared_base_and_reads_the_same(
    features: DescriptionFeatures, tiny_base: BaseConfig, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = fit(
        torch.randn(20, 32, generator=generator),
        torch.randn(20, 32, generator=generator),
        torch.zeros(32),
        0.1,
    )
    own = LinearReconstructor(features, tensors)
    own.save(tmp_path)
    torch.testing.assert_close(
        LinearReconstructor.load(tiny_base, tmp_path).reconstruct(TEXTS), own.reconstruct(TEXTS)
    )
    torch.testing.assert_close(
        LinearReconstructor.load(tiny_base, tmp_path, model=own.model).reconstruct(TEXTS[::-1]),
        own.reconstruct(TEXTS).flip(0),
    )


def test_the_stage_learns_from_the_judges_half_and_chooses_its_penalty_on_validation(
    published_run: RunConfig,
) -> None:
    run = Run(published_run)
    manifest = run.find("linear_scorer")
    judge_half = published_run.judge_scorer.document_half
    assert manifest.documents["train"] and all(
        document_half(doc_id) == judge_half for use in manifest.documents.values() for doc_id in use
    )
    assert set(manifest.documents["validation"]) <= set(load_activations(run, "validation").doc_ids)
    assert (
        manifest.metrics["penalty"] in PENALTIES
        and manifest.metrics["layer"] == published_run.base.layer // 2
    )


def test_too_few_labelled_documents_are_refused(published_run: RunConfig, tmp_path: Path) -> None:
    from nla_ray.training.linear import make_linear_scorer

    shutil.copytree(published_run.run_dir, tmp_path / "run")
    (tmp_path / "run" / "linear_scorer" / "manifest.json").unlink()
    few = dataclasses.replace(
        published_run,
        run_dir=str(tmp_path / "run"),
        linear_scorer=dataclasses.replace(published_run.linear_scorer, max_examples=1),
    )
    with pytest.raises(
        ValueError, match="train examples of the linear scorer: got 1, expected at least two"
    ):
        make_linear_scorer(few)
