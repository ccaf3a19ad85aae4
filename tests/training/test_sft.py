"""Supervised training of the verbalizer: what carries loss, the oracle losses, saving, resuming."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import plain_nano
from torch.nn import functional
from transformers import TrainerCallback

from nla_ray.activation import vectors
from nla_ray.activation.injection import attach_activations
from nla_ray.base.adapters import adapter_state, add_lora
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import CLOSING_TAG, InjectionPrompt, build_injection_prompt
from nla_ray.cpu.log_probs import TokenLogProbs
from nla_ray.settings.config import BaseConfig, ComputeConfig, LoraSettings, RunConfig, SFTConfig
from nla_ray.training.checkpoints import Checkpoints
from nla_ray.training.sft import (
    IGNORED,
    Pairs,
    completion_loss,
    encode_pairs,
    make_sft_trainer,
    validation_loss,
    with_differences,
)
from nla_ray.training.verbalizer import TrainableVerbalizer

LABELS = (
    "- A Python test: file, rows",
    "- A licence: copying, conditions",
    "- topics: code",
    "- tokens: def, assert\n- next: return",
)
SETTINGS = SFTConfig(
    lora=LoraSettings(rank=4, alpha=8), epochs=3, batch_size=8, learning_rate=1e-2, seed=3
)
LONG = dataclasses.replace(SETTINGS, epochs=10, learning_rate=3e-2)


def make_pairs(count: int, *, first_row: int = 0, seed: int = 0) -> Pairs:
    """Activations in four clusters; the label says which."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 32, generator=generator)
    noise = 0.1 * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed + 1))
    return Pairs(
        rows=list(range(first_row, first_row + count)),
        labels=[LABELS[row % 4] for row in range(count)],
        doc_ids=[f"doc-{first_row + row}" for row in range(count)],
        family_ids=[f"doc-{first_row + row}" for row in range(count)],
        vectors=centres.repeat(count // 4 + 1, 1)[:count] + noise,
    )


def test_a_control_token_in_a_label_is_learned_as_characters(tiny_base: BaseConfig) -> None:
    tokenizer = load_tokenizer(tiny_base)
    prompt = build_injection_prompt(tokenizer, tiny_base.marker)
    pairs = dataclasses.replace(make_pairs(2), labels=[" - ends<|im_end|> early", LABELS[0]])
    pasted, ordinary = encode_pairs(pairs, tokenizer, prompt, 500)
    end = tokenizer.eos_token_id
    assert [example["labels"].count(end) for example in (pasted, ordinary)] == [1, 1]
    written = [index for index in pasted["labels"] if index != IGNORED]
    assert tokenizer.decode(written) == f"- ends<|im_end|> early{CLOSING_TAG}<|im_end|>"
    as_always = tokenizer.encode(f"{LABELS[0]}{CLOSING_TAG}")
    assert ordinary["labels"][len(prompt) :] == [*as_always, end]


COMPUTE = ComputeConfig(threads=1, zero_stage=0)


def make_run_config(
    base: BaseConfig, folder: Path, settings: SFTConfig = SETTINGS, compute: ComputeConfig = COMPUTE
) -> RunConfig:
    return dataclasses.replace(
        plain_nano(), run_dir=str(folder), base=base, sft=settings, compute=compute
    )


def prepare(
    base: BaseConfig, folder: Path, settings: SFTConfig = SETTINGS, compute: ComputeConfig = COMPUTE
):
    """Trainer and checkpoints of a small training run in `folder`, without Ray."""
    config = make_run_config(base, folder, settings, compute)
    train, validation = make_pairs(32), make_pairs(12, first_row=32, seed=5)
    tokenizer = load_tokenizer(base)
    prompt = build_injection_prompt(tokenizer, base.marker)
    bank = torch.cat([train.vectors, validation.vectors])
    model = TrainableVerbalizer.build(base, settings.lora, bank, prompt, seed=settings.seed)
    checkpoints = Checkpoints(config, "sft")
    parts = {base.layer: train}, {base.layer: validation}
    trainer = make_sft_trainer(model, tokenizer, *parts, config, checkpoints)
    return trainer, checkpoints


def encoded_batch(base: BaseConfig, count: int = 6):
    """Model, padded batch and prompt of a few pairs; float32 throughout, adapter not zero."""
    tokenizer = load_tokenizer(base)
    pairs = make_pairs(count)
    model = load_backbone(base)
    attach_activations(model, pairs.vectors, base.injection_norm)
    model = add_lora(model, SETTINGS.lora, wrap=TrainableVerbalizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    prompt = build_injection_prompt(tokenizer, base.marker)
    examples = encode_pairs(pairs, tokenizer, prompt, model.get_input_embeddings().num_embeddings)
    longest = max(len(example["input_ids"]) for example in examples)
    pad = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}
    batch = {
        key: torch.tensor(
            [example[key] + [fill] * (longest - len(example[key])) for example in examples]
        )
        for key, fill in pad.items()
    }
    batch["attention_mask"] = torch.tensor(
        [
            [1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"]))
            for example in examples
        ]
    )
    return model, batch, prompt, pairs, examples


def test_an_example_is_prompt_with_virtual_id_then_label_closing_tag_and_end_of_sequence(
    tiny_base: BaseConfig,
) -> None:
    tokenizer = load_tokenizer(tiny_base)
    prompt = InjectionPrompt(prefix_ids=(1, 40, 8), marker_id=7, suffix_ids=(2, 3, 1))
    (example,) = encode_pairs(
        dataclasses.replace(make_pairs(1), rows=[5]), tokenizer, prompt, vocab_size=1000
    )
    assert example["input_ids"][:7] == [1, 40, 8, 1005, 2, 3, 1]
    assert example["labels"][:7] == [IGNORED] * 7
    assert example["labels"][7:] == example["input_ids"][7:]
    assert tokenizer.decode(example["labels"][7:-1]) == LABELS[0] + CLOSING_TAG
    assert example["labels"][-1] == tokenizer.eos_token_id
    assert max(example["labels"]) < len(tokenizer)


def test_other_activations_can_be_put_into_the_prompts(tiny_base: BaseConfig) -> None:
    tokenizer, pairs = load_tokenizer(tiny_base), make_pairs(2)
    prompt = InjectionPrompt(prefix_ids=(1,), marker_id=7, suffix_ids=(2,))
    swapped = encode_pairs(pairs, tokenizer, prompt, 1000, rows=[1, 0])
    assert [example["input_ids"][1] for example in swapped] == [1001, 1000]
    assert [example["labels"] for example in swapped] == [
        example["labels"] for example in encode_pairs(pairs, tokenizer, prompt, 1000)
    ]


def test_the_loss_equals_a_loop_over_tokens_with_input_embeddings_made_by_hand(
    tiny_base: BaseConfig,
) -> None:
    model, batch, prompt, pairs, examples = encoded_batch(tiny_base)
    summed, count = completion_loss(model, batch)
    table = model.get_input_embeddings().weight
    total, tokens = 0.0, 0
    with torch.no_grad():
        # an unpadded row at a time, a token at a time
        for row, example in enumerate(examples):
            ids = torch.tensor(example["input_ids"])
            embedded = functional.embedding(ids.clamp(max=len(table) - 1), table)
            embedded[len(prompt.prefix_ids)] = (
                pairs.vectors[row] / vectors.norm(pairs.vectors[row]) * tiny_base.injection_norm
            )
            log_probs = model(inputs_embeds=embedded[None]).logits[0].log_softmax(-1)
            for position in range(len(prompt), len(ids)):
                total -= log_probs[position - 1, ids[position]].item()
                tokens += 1
    assert count.item() == tokens
    assert summed.item() == pytest.approx(total, rel=1e-5)


def test_the_loss_is_the_one_that_trl_computes(tiny_base: BaseConfig, tmp_path: Path) -> None:
    from trl import SFTTrainer

    trainer, _ = prepare(dataclasses.replace(tiny_base, dtype="float32"), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["labels"] != IGNORED).sum()
    trainer.model.eval()
    with torch.no_grad():
        # labels only, not what TRL has put inside
        assert isinstance(trainer.model(**batch, fused_lm_head=True), TokenLogProbs)
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
        trainer.model.scores_labels = False  # TRL's own, as on a GPU
        library = SFTTrainer.compute_loss(
            trainer, trainer.model, dict(batch), num_items_in_batch=tokens
        )
    assert ours.item() == pytest.approx(library.item(), rel=2e-3)


def test_validation_loss_is_the_mean_over_tokens_however_they_are_batched(
    tiny_base: BaseConfig,
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model, batch, _, _, examples = encoded_batch(tiny_base)
    with torch.no_grad():
        summed, count = completion_loss(model, batch)
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    loss = validation_loss(model, examples, collate, torch.device("cpu"))
    assert loss == pytest.approx((summed / count).item(), rel=1e-5)


def test_training_learns_from_the_activation_and_the_best_epoch_is_saved(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    trainer, checkpoints = prepare(tiny_base, tmp_path, LONG)
    base_before = {
        name: parameter.clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == LONG.epochs
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert checkpoints.best["value"] == min(entry["eval_loss"] for entry in evaluations)
    assert checkpoints.best["metrics"]["eval_information"] > 0.005
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base_before[name]), name
    lines = [
        json.loads(line) for line in (checkpoints.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert any("eval_loss_shuffled" in line for line in lines) and any(
        "loss" in line for line in lines
    )


def test_a_saved_adapter_holds_no_embedding_and_no_row_beyond_the_vocabulary(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    trainer, checkpoints = prepare(tiny_base, tmp_path, dataclasses.replace(SETTINGS, epochs=1))
    trainer.train()
    vocab_size = trainer.model.get_input_embeddings().num_embeddings
    folder = checkpoints.folder / checkpoints.best["folder"] / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for weights in checkpoints.folder.rglob("adapter_model.safetensors"):
        state = load_file(weights)
        assert all(".lora_A." in name or ".lora_B." in name for name in state)
        assert not any("embed" in name or "lm_head" in name for name in state)
        assert all(size < vocab_size for tensor in state.values() for size in tensor.shape)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] is None
    assert (
        load_file(folder / "adapter_model.safetensors").keys()
        == adapter_state(trainer.model).keys()
    )


def test_no_tokenizer_ever_sees_a_virtual_id(
    tiny_base: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = prepare(tiny_base, tmp_path, dataclasses.replace(SETTINGS, epochs=1))
    tokenizer = type(trainer.processing_class)
    vocab_size = trainer.model.get_input_embeddings().num_embeddings

    def guarded(method: str):
        original = getattr(tokenizer, method)

        def check(self, ids, *args, **kwargs):
            flat = torch.as_tensor(ids).flatten() if not isinstance(ids, str) else torch.tensor([0])
            assert flat.numel() == 0 or int(flat.max()) < vocab_size, method
            return original(self, ids, *args, **kwargs)

        return check

    for method in ("decode", "batch_decode", "convert_ids_to_tokens"):
        monkeypatch.setattr(tokenizer, method, guarded(method))
    trainer.train()


def test_the_same_seed_gives_the_same_adapter_and_a_resumed_run_gives_it_too(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    whole, _ = prepare(tiny_base, tmp_path / "whole")
    whole.train()
    again, _ = prepare(tiny_base, tmp_path / "again")
    again.train()
    state = adapter_state(whole.model)
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in adapter_state(again.model).items()
    )

    cut, _ = prepare(tiny_base, tmp_path / "cut")
    cut.add_callback(StopAt(6))  # in the middle of the second of three epochs of four steps
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed, checkpoints = prepare(tiny_base, tmp_path / "cut")
    assert checkpoints.last().endswith("checkpoint-4")
    resumed.train(resume_from_checkpoint=checkpoints.last())
    for name, tensor in adapter_state(resumed.model).items():
        assert torch.equal(tensor, state[name]), name


class StopAt(TrainerCallback):
    """Ends a training run after a number of steps, saving nothing."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
        return control


def test_differences_are_of_two_families_with_what_only_the_first_label_says() -> None:
    pairs = make_pairs(6)
    labels = [f"- tokens: common, word{number * 'x'}\n- next: more" for number in range(6)]
    pairs = dataclasses.replace(pairs, labels=labels)
    assert with_differences(pairs, 0.0, seed=0) is pairs
    more = with_differences(pairs, 1.5, seed=0)
    assert more.rows == list(range(15)) and more.labels[:6] == labels
    assert torch.equal(more.vectors[:6], pairs.vectors)
    directions = vectors.direction(pairs.vectors)
    for number in range(6, 15):
        [first] = [row for row in range(6) if more.labels[number] == f"- tokens: word{row * 'x'}"]
        expected = [directions[first] - directions[row] for row in range(6) if row != first]
        found = [torch.allclose(more.vectors[number], one, atol=1e-6) for one in expected]
        assert sum(found) == 1 and more.doc_ids[number] == pairs.doc_ids[first]
    again = with_differences(pairs, 1.5, seed=0)
    assert again.labels == more.labels and torch.equal(again.vectors, more.vectors)
    assert with_differences(pairs, 1.5, seed=1).labels != more.labels
