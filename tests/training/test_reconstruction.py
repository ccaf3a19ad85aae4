"""Training of a reconstructor: labels and documents, the loss by hand, what is saved, resuming."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_sft import COMPUTE, LABELS, StopAt
from tiny import plain_nano

from nla_ray.activation import vectors
from nla_ray.score import metrics
from nla_ray.score.comparisons import Comparisons
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.settings.config import BaseConfig, ComputeConfig, LoraSettings, ReconstructorConfig
from nla_ray.training.checkpoints import Checkpoints
from nla_ray.training.reconstruction import (
    Examples,
    choose_labels,
    make_optimizer,
    make_reconstruction_trainer,
    reconstruction_losses,
    validation_figures,
)

SETTINGS = ReconstructorConfig(
    lora=LoraSettings(rank=4, alpha=8), epochs=3, batch_size=8, learning_rate=1e-2, seed=3
)


def make_examples(count: int, seed: int) -> Examples:
    """Activations in four clusters around a common direction, described by the cluster's label."""
    generator = torch.Generator().manual_seed(0)
    common, centres = torch.randn(32, generator=generator), torch.randn(4, 32, generator=generator)
    noise = 0.05 * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    return Examples(
        descriptions=[LABELS[row % 4] for row in range(count)],
        doc_ids=[f"doc-{seed}-{row}" for row in range(count)],
        family_ids=[f"doc-{seed}-{row}" for row in range(count)],
        targets=5.0 * (3.0 * common + centres.repeat(count // 4 + 1, 1)[:count] + noise),
    )


def prepare(
    base: BaseConfig,
    folder: Path,
    settings: ReconstructorConfig = SETTINGS,
    compute: ComputeConfig = COMPUTE,
):
    """Trainer, validation examples and checkpoints of a small run, without Ray."""
    config = dataclasses.replace(plain_nano(), run_dir=str(folder), base=base, compute=compute)
    train, validation = make_examples(32, 1), make_examples(12, 2)
    reconstructor = Reconstructor.build(
        base, settings.lora, vectors.mean_direction(train.targets), seed=settings.seed
    )
    checkpoints = Checkpoints(config, "reward_scorer")
    return (
        make_reconstruction_trainer(
            reconstructor, train, validation, settings, config, checkpoints
        ),
        validation,
        checkpoints,
    )


def label_rows(count: int) -> list[dict[str, str]]:
    return [
        {"text_id": f"doc-{number}#0", "teacher": teacher, "label": f"{teacher} on {number}"}
        for number in range(count)
        for teacher in ("one", "two", "three")
    ]


def test_a_teachers_share_of_the_labels_is_the_configured_one_and_the_draw_is_each_texts_own() -> (
    None
):
    chosen = choose_labels(label_rows(2000), teachers=["one"], share=0.3, seed=1)
    shares = {
        teacher: sum(label.startswith(teacher) for label in chosen.values()) / 2000
        for teacher in ("one", "two", "three")
    }
    assert shares["one"] == pytest.approx(0.30, abs=0.03)
    assert shares["two"] == pytest.approx(0.35, abs=0.03) and shares["three"] == pytest.approx(
        0.35, abs=0.03
    )
    fewer = choose_labels(label_rows(50)[::-1], teachers=["one"], share=0.3, seed=1)
    assert fewer == {text_id: chosen[text_id] for text_id in fewer}
    assert fewer != choose_labels(label_rows(50), teachers=["one"], share=0.3, seed=2)


def test_a_text_that_one_side_has_labelled_gets_that_label() -> None:
    rows = [
        {"text_id": "a#0", "teacher": "one", "label": "A"},
        {"text_id": "b#0", "teacher": "two", "label": "B"},
    ]
    for share in (0.0, 1.0):
        assert choose_labels(rows, teachers=["one"], share=share, seed=0) == {
            "a#0": "A",
            "b#0": "B",
        }


def test_where_no_configured_teacher_wrote_a_label_the_first_by_name_has_the_share() -> None:
    chosen = choose_labels(label_rows(40), teachers=["offline"], share=1.0, seed=1)
    assert (
        all(label.startswith("one ") for label in chosen.values())
        and choose_labels([], teachers=["offline"], share=1.0, seed=1) == {}
    )


def test_the_loss_is_one_minus_cosine_of_every_row() -> None:
    reconstruction, target = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0]]),
        torch.tensor([[10.0, 0.0], [0.0, 7.0]]),
    )
    losses = reconstruction_losses(reconstruction, target, torch.zeros(2), 0.0)
    assert losses.tolist() == pytest.approx([0.4, 1.0])


def test_the_contrastive_term_is_the_cross_entropy_of_the_right_row_at_temperature_a_tenth() -> (
    None
):
    reconstruction, target = (
        torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        torch.tensor([[2.0, 0.0], [0.0, 3.0]]),
    )
    first = -math.log(math.exp(10) / (math.exp(10) + 1))  # cosines 1 and 0 over 0.1
    second = -math.log(math.exp(8) / (math.exp(8) + math.exp(6)))  # cosines 0.8 and 0.6
    expected = [0.5 * first, 0.2 + 0.5 * second]
    mean = torch.zeros(2)
    losses = reconstruction_losses(reconstruction, target, mean, 0.5)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    parts = [
        reconstruction_losses(
            reconstruction[row : row + 1], target[row : row + 1], mean, 0.5, target, row
        )
        for row in (0, 1)
    ]
    assert torch.cat(parts).tolist() == pytest.approx(expected, abs=1e-6), "each on a worker"


def test_validation_figures_are_those_of_the_report() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(40, 8, generator=generator) + 2.0
    reconstruction = target + torch.randn(40, 8, generator=generator)
    mean = vectors.mean_direction(target) * 0.9
    comparisons = Comparisons.draw(target, [f"doc-{row}" for row in range(40)], mean, seed=4)
    expected = metrics.figures(reconstruction, comparisons)
    found = validation_figures(reconstruction, target, mean, comparisons.wrong)
    for name, same in (
        ("cosine", "correct_cosine"),
        ("centred_cosine", "centred_cosine"),
        ("top1", "top1"),
        ("fve", "fve"),
    ):
        assert found[f"eval_{name}"] == pytest.approx(expected[same].value, abs=1e-5), name
    assert found["eval_loss"] == pytest.approx(1.0 - found["eval_cosine"])


def test_training_beats_the_mean_and_saves_the_best_epoch_without_touching_the_base(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    trainer, validation, checkpoints = prepare(
        tiny_base, tmp_path, dataclasses.replace(SETTINGS, epochs=12)
    )
    frozen = {
        name: parameter.clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    mean = trainer.model.mean.clone()
    trainer.train()
    assert all(
        torch.equal(parameter, frozen[name])
        for name, parameter in trainer.model.named_parameters()
        if name in frozen
    )
    saved = Reconstructor.load(tiny_base, checkpoints.folder / checkpoints.best["folder"])
    assert torch.equal(saved.mean, mean)
    right = (
        vectors.cosine(saved.reconstruct(validation.descriptions), validation.targets).mean().item()
    )
    assert right == pytest.approx(checkpoints.best["metrics"]["eval_cosine"], abs=1e-3)
    assert right > vectors.cosine(mean, validation.targets).mean().item() + 0.005
    assert checkpoints.best["metrics"]["eval_fve"] > 0.2


def test_a_trainer_that_computes_activations_twice_finds_the_blocks_and_the_same_gradients(
    tiny_base: BaseConfig,
) -> None:
    gradients = []
    for twice in (False, True):
        reconstructor = Reconstructor.build(tiny_base, SETTINGS.lora, torch.ones(32), seed=0)
        torch.nn.init.normal_(
            reconstructor.head.weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        if twice:
            # As transformers.Trainer calls it.
            reconstructor.activation_checkpointing_enable(
                activation_checkpointing_kwargs=None, every_n_layers=1, offload=False
            )
        reconstructor.train()
        reconstructor(
            *reconstructor.collate(reconstructor.encode(["- a licence", "- tokens: file"]))
        ).square().sum().backward()
        gradients.append(
            [parameter.grad for parameter in reconstructor.parameters() if parameter.requires_grad]
        )
        assert (
            any(
                getattr(module, "gradient_checkpointing", False)
                for module in reconstructor.modules()
            )
            == twice
        )
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpoints_hold_what_is_trained_and_no_more(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    trainer, _, checkpoints = prepare(tiny_base, tmp_path, dataclasses.replace(SETTINGS, epochs=1))
    trainer.train()
    folder = checkpoints.folder / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {"trained.safetensors", "trainer_state.json"}
    trained = {
        name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }
    assert {name.partition(":")[2] for name in load_file(folder / "trained.safetensors")} == trained
    assert all("lora" in name or name == "head.weight" for name in trained)


def test_a_resumed_run_ends_with_the_same_weights(tiny_base: BaseConfig, tmp_path: Path) -> None:
    whole, _, _ = prepare(tiny_base, tmp_path / "whole")
    whole.train()
    cut, _, _ = prepare(tiny_base, tmp_path / "cut")
    cut.add_callback(StopAt(6))  # in the middle of the second of three epochs of four steps
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed, _, checkpoints = prepare(tiny_base, tmp_path / "cut")
    assert checkpoints.last().endswith("checkpoint-4")
    resumed.train(resume_from_checkpoint=checkpoints.last())
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_the_head_learns_slower_than_the_adapter_by_the_root_of_the_width(
    tiny_base: BaseConfig,
) -> None:
    reconstructor = Reconstructor.build(tiny_base, SETTINGS.lora, torch.zeros(32))
    adapter, head = make_optimizer(reconstructor, 0.5).param_groups
    assert adapter["lr"] == 0.5 and head["lr"] == pytest.approx(0.5 * 3 / 32**0.5)
    assert sum(parameter.numel() for parameter in head["params"]) == 32 * 32
    assert all(
        parameter.requires_grad for group in (adapter, head) for parameter in group["params"]
    )
