"""Supervised training of the verbalizer, label given activation, by TRL in Ray Train workers.

Examples are token ids already: the prompt with the virtual id of an activation in place of the
marker, then the drawn label, closing tag and end of sequence, which alone carry loss. So an
activation travels through padding and shuffling as a token, and no text is made of a virtual id
anywhere. Validation compares the loss with the right activation and with another document's: the
gap is the information the verbalizer takes from its activation.

Where one verbalizer learns several layers (`base.further_layers`), every example comes once a
layer: the activation of the same token there, under the prompt that tells the layer, with the same
label. The losses are then means over the layers, and stand beside those of each. What can be read
of a label (`sft.claims`) is what a probe of `base.layer` reads; differences are of that layer
alone, as is all that GRPO does afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from nla_ray.activation.stage import activations_at, load_activations
from nla_ray.activation.vectors import direction_difference
from nla_ray.base.adapters import save_adapter
from nla_ray.base.encoding import encode_texts, written_text
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import CLOSING_TAG, InjectionPrompt, injection_prompt
from nla_ray.label.stage import activation_subjects, all_labels, drawn_labels
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.comparisons import derangement, family_pairs
from nla_ray.score.readable import label_difference
from nla_ray.settings.config import BaseConfig, RunConfig
from nla_ray.settings.fit import worker_batch
from nla_ray.training.batches import LengthBatches
from nla_ray.training.callbacks import follow
from nla_ray.training.checkpoints import Checkpoints, trainable_parameters
from nla_ray.training.readable import readable_labels
from nla_ray.training.resuming import ResumableTrainer
from nla_ray.training.unlikelihood import IGNORED, draw_repeats, refusal_loss, refuse, token_labels
from nla_ray.training.verbalizer import TrainableVerbalizer
from nla_ray.training.workers import prepare_worker, train_on_labels, trainer_arguments

MAX_VALIDATION = 512
"""Most validation activations, chosen by seed: enough to choose an epoch."""
_WARMUP_SHARE = 0.05
_EVALUATION_BATCH = 64

logger = get_logger(__name__)


def train_sft(run: Run) -> Manifest:
    """Train the verbalizer on labels of train documents, unless it is complete; its manifest."""
    return train_on_labels(run, "sft", _train)


# Examples -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Activations with the labels they are to be described by.

    Example: rows=[0], labels=["- A Python test"], doc_ids=["pytest/x.py"],
    family_ids=["pytest/x.py"], vectors of shape [1, 1, d_model]
    """

    rows: list[int]
    """Rows of the activation bank."""
    labels: list[str]
    doc_ids: list[str]
    family_ids: list[str]
    vectors: Tensor
    """[rows, vectors, d_model] float32, raw: what is injected for each."""


def load_pairs(
    run: Run,
    split: Literal["train", "validation"],
    *,
    limit: int | None,
    seed: int,
    first_row: int,
    every_label: bool = False,
    layer: int | None = None,
) -> Pairs:
    """The split's activations with the label drawn for their text, or each with every label of it.

    At most `limit` activations, chosen by seed. Bank rows count from `first_row`. `layer`: which
    one their activations are taken of, None: the base's. Raises ValueError when there is none, and
    for labels of other positions than the activations'.
    """
    labels = _labels_by_subject(run, split, every_label)
    table = load_activations(run, split)
    kept = [
        (index, label)
        for index, subject in enumerate(activation_subjects(run, table))
        for label in labels.get(subject, ())
    ]
    if limit is not None:
        kept = sorted(
            sorted(kept, key=lambda pair: seed_of(seed, "example", table.ids[pair[0]]))[:limit]
        )
    if not kept:
        raise ValueError(
            f"{split} examples: got 0 activations with a label, expected at least one. Label the"
            " texts of this corpus: run jobs/label.py."
        )
    table = table.select([index for index, _ in kept])
    return Pairs(
        rows=list(range(first_row, first_row + len(kept))),
        labels=[label for _, label in kept],
        doc_ids=table.doc_ids,
        family_ids=table.family_ids,
        vectors=table.injected
        if layer is None
        else activations_at(run, split, table, layer)[:, None],
    )


def with_differences(pairs: Pairs, share: float, seed: int) -> Pairs:
    """The pairs and, behind them, `share` as many differences of two of them.

    Each is the direction of one activation less that of another of another family, drawn by seed,
    with `label_difference` of their labels. The documents are those of the first ones.
    """
    count = round(share * len(pairs.rows))
    if not count:
        return pairs
    firsts, seconds = family_pairs(pairs.family_ids, count, seed)
    differences = direction_difference(pairs.vectors[firsts], pairs.vectors[seconds])
    start = pairs.rows[-1] + 1
    return Pairs(
        rows=[*pairs.rows, *range(start, start + count)],
        labels=[
            *pairs.labels,
            *(
                label_difference(pairs.labels[first], pairs.labels[second])
                for first, second in zip(firsts, seconds, strict=True)
            ),
        ],
        doc_ids=[*pairs.doc_ids, *(pairs.doc_ids[first] for first in firsts)],
        family_ids=[*pairs.family_ids, *(pairs.family_ids[first] for first in firsts)],
        vectors=torch.cat([pairs.vectors, differences]),
    )


def _labels_by_subject(run: Run, split: str, every_label: bool) -> dict[str, list[str]]:
    """Subject id -> what of its labels is taught: of the one drawn for it, or of every one."""
    form = run.config.sft.claims
    if form == "all":
        if every_label:
            return all_labels(run, split)
        return {subject: [label] for subject, label in drawn_labels(run, split).items()}
    labels: dict[str, list[str]] = {}
    for row in readable_labels(run, split, form):
        if every_label or row["drawn"]:
            labels.setdefault(row["subject"], []).append(row["label"])
    return labels


def encode_pairs(
    pairs: Pairs,
    tokenizer,
    prompt: InjectionPrompt,
    vocab_size: int,
    rows: Sequence[int] | None = None,
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of every pair; `rows` puts other activations into the prompts.

    Example: prompt [1, 40, 8, M, 2, 3, 1], row 5, vocab_size 100, completion [60, 61, 0] (0: end of
    sequence) gives input_ids [1, 40, 8, 105, 2, 3, 1, 60, 61, 0] and labels [-100] * 7 + [60, 61,
    0].
    """
    labels = [label.strip() for label in pairs.labels]
    written = encode_texts(tokenizer, labels, after=CLOSING_TAG)
    examples = []
    for row, ids in zip(pairs.rows if rows is None else rows, written, strict=True):
        completion = [*ids, tokenizer.eos_token_id]
        examples.append(
            {
                "input_ids": prompt.encode(row, vocab_size) + completion,
                "labels": [IGNORED] * len(prompt) + completion,
            }
        )
    return examples


def encode_repeats(
    pairs: Pairs, tokenizer, prompt: InjectionPrompt, vocab_size: int, *, share: float, seed: int
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of beginnings of labels, where an item is not to be said again.

    `share`: how many for each pair, drawn by seed.
    """
    repeats = draw_repeats([label.strip() for label in pairs.labels], share, seed)
    encode, decode = partial(encode_texts, tokenizer), partial(written_text, tokenizer)
    return [
        {
            "input_ids": prompt.encode(pairs.rows[number], vocab_size) + ids,
            "labels": [IGNORED] * len(prompt) + labels,
        }
        for number, ids, labels in refuse(repeats, encode, decode)
    ]


def blanks(examples: Sequence[Mapping[str, list[int]]], count: int) -> list[dict[str, list[int]]]:
    """`count` copies of the shortest example that carry no loss: they fill up the last batch."""
    shortest = min(examples, key=lambda example: len(example["input_ids"]))
    blank = {**shortest, "labels": [IGNORED] * len(shortest["labels"])}
    return [blank] * count


# Loss ---------------------------------------------------------------------------------------------


def completion_loss(model, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss of the labelled tokens, cross entropy or `refusal_loss`, and their number.

    `model`: one that knows `fused_lm_head`. `inputs`: input_ids, attention_mask and labels, all
    [batch, seq], labels -100 where there is no loss, lower where a token is refused.
    """
    labels, is_refused = token_labels(inputs["labels"])
    log_probs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=labels,
        fused_lm_head=True,
    ).log_probs
    losses = torch.where(is_refused[:, 1:], refusal_loss(log_probs), -log_probs)
    return losses.sum(), (labels[:, 1:] != IGNORED).sum()


@torch.no_grad()
def validation_loss(
    model, examples: Sequence[Mapping[str, list[int]]], collate, device: torch.device
) -> float:
    """Mean cross entropy a labelled token, in nats, over all examples."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    summed, count = 0.0, 0
    for start in range(0, len(order), _EVALUATION_BATCH):
        batch = collate([examples[index] for index in order[start : start + _EVALUATION_BATCH]])
        part, tokens = completion_loss(
            model, {key: value.to(device) for key, value in batch.items()}
        )
        summed, count = summed + part.item(), count + int(tokens)
    return summed / count


# The worker ---------------------------------------------------------------------------------------


def _train(config: dict[str, Any]) -> dict[str, Any]:
    """The body of one Ray Train worker: build and train.

    Returns the documents, the base and the best figures.
    """
    run_config = config["run"]
    prepare_worker(run_config.compute)
    run, settings = Run(run_config), run_config.sft
    train = _pairs_by_layer(
        run, "train", first_row=0, limit=settings.max_examples, every_label=settings.labels == "all"
    )
    examples = sum(len(pairs.rows) for pairs in train.values())
    validation = _pairs_by_layer(run, "validation", first_row=examples, limit=MAX_VALIDATION)
    tokenizer, base = load_tokenizer(run_config.base), run_config.base
    parts = [*train.items(), *validation.items()]
    model = TrainableVerbalizer.build(
        base,
        settings.lora,
        torch.cat([pairs.vectors for _, pairs in parts]),
        injection_prompt(tokenizer, base),
        seed=settings.seed,
        norms=_norms_of(base, parts) if base.further_layers else None,
    )
    with Checkpoints(run_config, config["name"]) as checkpoints:
        trainer = make_sft_trainer(model, tokenizer, train, validation, run_config, checkpoints)
        held_out = sum(len(pairs.rows) for pairs in validation.values())
        logger.info("sft: %d labels, %d for validation", examples, held_out)
        trainer.train(resume_from_checkpoint=checkpoints.last())
    return {
        "documents": {
            "train": sorted(set(train[base.layer].doc_ids)),
            "validation": sorted(set(validation[base.layer].doc_ids)),
        },
        "model": base_info(run_config.base, tokenizer).to_dict(),
        "metrics": {
            **checkpoints.best["metrics"],
            "best_step": checkpoints.best["step"],
            "examples": examples,
        },
    }


def _pairs_by_layer(
    run: Run,
    split: Literal["train", "validation"],
    *,
    first_row: int,
    limit: int | None,
    every_label: bool = False,
) -> dict[int, Pairs]:
    """The examples of a split, and the same ones at each further layer, rows behind one another.

    Those of train at the base's layer hold the differences too.
    """
    base, settings, found = run.config.base, run.config.sft, dict[int, Pairs]()
    for layer in base.described_layers:
        pairs = load_pairs(
            run,
            split,
            limit=limit,
            seed=settings.seed,
            first_row=first_row,
            every_label=every_label,
            layer=None if layer == base.layer else layer,
        )
        if split == "train" and layer == base.layer:
            pairs = with_differences(pairs, settings.difference_share, settings.seed)
        found[layer] = pairs
        first_row += len(pairs.rows)
    return found


def _norms_of(base: BaseConfig, parts: Sequence[tuple[int, Pairs]]) -> Tensor:
    """The injection norm of every row of the bank that holds these parts: [rows]."""
    return torch.cat(
        [torch.full((len(pairs.rows),), base.norm_of(layer)) for layer, pairs in parts]
    )


# The trainer --------------------------------------------------------------------------------------


class SupervisedTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer with our order of batches, loss and validation figures.

    The loss is TRL's, without the figures it computes beside it.
    """

    def __init__(
        self,
        *,
        batches: LengthBatches,
        held_out: Mapping[str, Mapping[int, Sequence[Mapping[str, list[int]]]]],
        checkpoints: Checkpoints,
        **arguments: Any,
    ) -> None:
        """`held_out`: the examples of each validation loss, by its name and their layer.

        `arguments` are TRL's.
        """
        super().__init__(**arguments)
        self._batches, self._held_out, self._checkpoints = batches, held_out, checkpoints

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthBatches:
        return self._batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        summed, count = completion_loss(model, inputs)
        if num_items_in_batch is None:
            return summed / count
        # a count over all workers, whose gradients are averaged
        return summed / num_items_in_batch * self.accelerator.num_processes

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The losses of what was held out, and the adapter offered by the first of them.

        A loss is the mean over layers, which have the same labels; of several each has its own too.
        """
        self.model.eval()
        figures: dict[str, float] = {}
        for name, by_layer in self._held_out.items():
            losses = {
                layer: validation_loss(
                    self.model_wrapped, examples, self.data_collator, self.args.device
                )
                for layer, examples in by_layer.items()
            }
            figures[name] = sum(losses.values()) / len(losses)
            if len(losses) > 1:
                figures |= {f"{name}_layer{layer}": loss for layer, loss in losses.items()}
        figures["eval_information"] = figures["eval_loss_shuffled"] - figures["eval_loss"]
        self.log(dict(figures))
        self._checkpoints.offer(
            self.state.global_step,
            figures["eval_loss"],
            self._save_adapter,
            parameters=trainable_parameters(self.model),
            metrics=figures,
        )
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures

    def _save_adapter(self, folder: Path) -> None:
        save_adapter(self.model, folder / "adapter")


def _encoded(
    train: Mapping[int, Pairs],
    validation: Mapping[int, Pairs],
    tokenizer,
    run_config: RunConfig,
    vocab_size: int,
) -> tuple[list[dict[str, list[int]]], dict[str, dict[int, Any]]]:
    """All train examples, and those of each validation loss by layer."""
    settings = run_config.sft
    examples: list[dict[str, list[int]]] = []
    held_out: dict[str, dict[int, Any]] = {"eval_loss": {}, "eval_loss_shuffled": {}}
    for layer, pairs in train.items():
        prompt = injection_prompt(tokenizer, run_config.base, layer=layer)
        examples += encode_pairs(pairs, tokenizer, prompt, vocab_size)
        examples += encode_repeats(
            pairs,
            tokenizer,
            prompt,
            vocab_size,
            share=settings.unlikelihood_share,
            seed=settings.seed,
        )
        kept = validation[layer]
        wrong = derangement(kept.family_ids, settings.seed).tolist()
        shuffled = [kept.rows[number] for number in wrong]
        for name, rows in zip(held_out, (kept.rows, shuffled), strict=True):
            held_out[name][layer] = encode_pairs(kept, tokenizer, prompt, vocab_size, rows)
    return examples, held_out


def make_sft_trainer(
    model: TrainableVerbalizer,
    tokenizer,
    train: Mapping[int, Pairs],
    validation: Mapping[int, Pairs],
    run_config: RunConfig,
    checkpoints: Checkpoints,
) -> SupervisedTrainer:
    """The trainer of this verbalizer, whose best validated adapter goes to `checkpoints`.

    `train`, `validation`: the examples of each layer.
    """
    settings = run_config.sft
    vocab_size = model.get_input_embeddings().num_embeddings
    examples, held_out = _encoded(train, validation, tokenizer, run_config, vocab_size)
    lengths = [len(example["input_ids"]) for example in examples]
    batches = LengthBatches(lengths, settings.batch_size, settings.seed)
    rows = worker_batch(run_config.compute, settings.batch_size)
    arguments = SFTConfig(
        router_aux_loss_coef=0.0,  # routers of experts are frozen
        **trainer_arguments(
            run_config,
            checkpoints.folder,
            seed=settings.seed,
            blocks=model.config.num_hidden_layers,
            tokens=rows * max(lengths),
        ),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=rows,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=_WARMUP_SHARE,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=20,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SupervisedTrainer(
        batches=batches,
        held_out=held_out,
        checkpoints=checkpoints,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([*examples, *blanks(examples, batches.num_blanks)]),
        eval_dataset=Dataset.from_list(held_out["eval_loss"][run_config.base.layer]),
        processing_class=tokenizer,
    )
    follow(trainer, checkpoints, "sft")
    return trainer
