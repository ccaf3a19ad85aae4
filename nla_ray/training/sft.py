"""Supervised training of the verbalizer, label given activation, by TRL in Ray Train workers.

Examples are token ids already: the prompt with the virtual id of an activation in place of the
marker, then the drawn label, closing tag and end of sequence, which alone carry loss. So an
activation travels through padding and shuffling as a token, and no text is made of a virtual id
anywhere. Validation compares the loss with the right activation and with another document's: the
gap is the information the verbalizer takes from its activation.
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

from nla_ray.activation.stage import load_activations
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
from nla_ray.settings.config import RunConfig
from nla_ray.settings.fit import worker_batch
from nla_ray.training.batches import LengthBatches
from nla_ray.training.callbacks import follow
from nla_ray.training.checkpoints import Checkpoints, trainable_parameters
from nla_ray.training.readable import readable_labels
from nla_ray.training.resuming import ResumableTrainer
from nla_ray.training.unlikelihood import (
    IGNORED,
    Repeat,
    draw_repeats,
    refusal_loss,
    refuse,
    token_labels,
)
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
) -> Pairs:
    """The split's activations with the label drawn for their text, or each with every label of it.

    At most `limit` activations, chosen by seed. Bank rows count from `first_row`. Raises ValueError
    when there is none, and for labels of other positions than the activations'.
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
        vectors=table.injected,
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
    pairs: Pairs, repeats: Sequence[Repeat], tokenizer, prompt: InjectionPrompt, vocab_size: int
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of beginnings of the pairs' labels that must not be repeated."""
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
    is_refused = is_refused[:, 1:]
    summed = refusal_loss(log_probs[is_refused]).sum() - log_probs[~is_refused].sum()
    return summed, (labels[:, 1:] != IGNORED).sum()


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
    train = load_pairs(
        run,
        "train",
        limit=settings.max_examples,
        seed=settings.seed,
        first_row=0,
        every_label=settings.labels == "all",
    )
    train = with_differences(train, settings.difference_share, settings.seed)
    validation = load_pairs(
        run, "validation", limit=MAX_VALIDATION, seed=settings.seed, first_row=len(train.rows)
    )
    tokenizer = load_tokenizer(run_config.base)
    prompt = injection_prompt(tokenizer, run_config.base)
    bank = torch.cat([train.vectors, validation.vectors])
    model = TrainableVerbalizer.build(
        run_config.base, settings.lora, bank, prompt, seed=settings.seed
    )
    with Checkpoints(run_config, config["name"]) as checkpoints:
        trainer = make_sft_trainer(model, tokenizer, train, validation, run_config, checkpoints)
        logger.info("sft: %d labels, %d for validation", len(train.rows), len(validation.rows))
        trainer.train(resume_from_checkpoint=checkpoints.last())
    return {
        "documents": {
            "train": sorted(set(train.doc_ids)),
            "validation": sorted(set(validation.doc_ids)),
        },
        "model": base_info(run_config.base, tokenizer).to_dict(),
        "metrics": {
            **checkpoints.best["metrics"],
            "best_step": checkpoints.best["step"],
            "examples": len(train.rows),
        },
    }


# The trainer --------------------------------------------------------------------------------------


class SupervisedTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer with our order of batches, loss and validation figures.

    The loss is TRL's, without the figures it computes beside it.
    """

    def __init__(
        self,
        *,
        batches: LengthBatches,
        held_out: Mapping[str, Sequence[Mapping[str, list[int]]]],
        checkpoints: Checkpoints,
        **arguments: Any,
    ) -> None:
        """`held_out`: the examples of each validation loss, by its name; `arguments` are TRL's."""
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
        """The losses of what was held out, and the adapter offered by the first of them."""
        self.model.eval()
        figures = {
            name: validation_loss(
                self.model_wrapped, examples, self.data_collator, self.args.device
            )
            for name, examples in self._held_out.items()
        }
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


def make_sft_trainer(
    model: TrainableVerbalizer,
    tokenizer,
    train: Pairs,
    validation: Pairs,
    run_config: RunConfig,
    checkpoints: Checkpoints,
) -> SupervisedTrainer:
    """The trainer of this verbalizer, whose best validated adapter goes to `checkpoints`."""
    settings = run_config.sft
    prompt = injection_prompt(tokenizer, run_config.base)
    vocab_size = model.get_input_embeddings().num_embeddings
    wrong = derangement(validation.family_ids, settings.seed).tolist()
    shuffled = [validation.rows[number] for number in wrong]
    examples = encode_pairs(train, tokenizer, prompt, vocab_size)
    labels = [label.strip() for label in train.labels]
    repeats = draw_repeats(labels, settings.unlikelihood_share, settings.seed)
    examples += encode_repeats(train, repeats, tokenizer, prompt, vocab_size)
    lengths = [len(example["input_ids"]) for example in examples]
    batches = LengthBatches(lengths, settings.batch_size, settings.seed)
    held_out = {
        "eval_loss": encode_pairs(validation, tokenizer, prompt, vocab_size),
        "eval_loss_shuffled": encode_pairs(validation, tokenizer, prompt, vocab_size, shuffled),
    }
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
        eval_dataset=Dataset.from_list(held_out["eval_loss"]),
        processing_class=tokenizer,
    )
    follow(trainer, checkpoints, "sft")
    return trainer
