"""Training of a reconstructor (description -> activation): the reward scorer or the judge scorer.

The two learn from disjoint documents, each in its own mix of teachers' styles; validation documents
are halved alike. The loop is transformers' Trainer inside Ray Train; the epoch with the best
centred cosine on validation is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments

from nla_ray.activation import vectors
from nla_ray.activation.stage import activations_at, load_activations, load_stats
from nla_ray.base.identity import base_info
from nla_ray.label.rows import LabelRow, subject_of
from nla_ray.label.stage import activation_subjects, labels_by_subject, load_labels
from nla_ray.run.artifact import Run
from nla_ray.run.identity import document_half, seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.comparisons import derangement
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.scorer import ScorerName
from nla_ray.settings.config import ReconstructorConfig, RunConfig
from nla_ray.settings.fit import worker_batch
from nla_ray.training.attention import training_attention
from nla_ray.training.batches import LengthBatches
from nla_ray.training.callbacks import follow
from nla_ray.training.checkpoints import Checkpoints, trainable_parameters
from nla_ray.training.readable import readable_labels
from nla_ray.training.resuming import ResumableTrainer
from nla_ray.training.workers import prepare_worker, train_on_labels, trainer_arguments

TEMPERATURE = 0.1
"""Of the in-batch contrastive term: centred cosines are divided by it."""
_HEAD_RATE = 3.0
"""See `make_optimizer`."""
_WARMUP_SHARE = 0.06
_WEIGHT_DECAY = 0.01
_EVALUATION_BATCH = 128

logger = get_logger(__name__)


def train_scorer(run: Run, name: ScorerName) -> Manifest:
    """Train one scorer from activations and labels, unless it is complete; return its manifest."""
    return train_on_labels(run, name, _train)


def train_reward_scorer(run: Run) -> Manifest:
    """The stage `reward_scorer`."""
    return train_scorer(run, "reward_scorer")


def train_judge_scorer(run: Run) -> Manifest:
    """The stage `judge_scorer`."""
    return train_scorer(run, "judge_scorer")


# Examples -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Descriptions with the activations they describe.

    Example: descriptions=["- A Python test"], targets=tensor([[0.3, ...]]) of shape [1, d_model],
    doc_ids=["pytest/x.py"], family_ids=["pytest/x.py"]
    """

    descriptions: list[str]
    targets: Tensor
    """[rows, d_model] float32, raw."""
    doc_ids: list[str]
    family_ids: list[str]


def choose_labels(
    rows: Sequence[Mapping[str, Any]], *, teachers: Sequence[str], share: float, seed: int
) -> dict[str, str]:
    """One teacher's label for every subject: the first teacher's with probability `share`.

    The draw is seeded by the subject's id. The first teacher is the first of `teachers` who wrote a
    label; of imported labels, whose teachers have names of their own, the first by name. The other
    labels come from the other teachers. A subject that only one of them labelled gets that label.
    The result maps subject ids to labels as cleaned.
    """
    writers = sorted({row["teacher"] for row in rows})
    first_teacher = next((name for name in (*teachers, *writers) if name in writers), "")
    labels: dict[str, dict[str, str]] = {}
    for row in rows:
        labels.setdefault(subject_of(row), {})[row["teacher"]] = row["label"]
    chosen = {}
    for subject, by_teacher in labels.items():
        draw = seed_of(seed, "teacher", subject)
        rest = [by_teacher[teacher] for teacher in sorted(by_teacher) if teacher != first_teacher]
        takes_first = (draw % 10**6) / 10**6 < share
        if first_teacher in by_teacher and (takes_first or not rest):
            chosen[subject] = by_teacher[first_teacher]
        else:
            chosen[subject] = rest[(draw // 10**6) % len(rest)]
    return chosen


def scorer_labels(
    run: Run, split: Literal["train", "validation"], settings: ReconstructorConfig
) -> dict[str, list[str]]:
    """Subject id -> the labels of the split that a scorer learns from, or is validated on.

    Train labels follow the scorer's teacher mix or are all there are, validation labels are the
    drawn ones. A share of either, drawn by seed, are in their replaced form.
    """
    rows = load_labels(run, split)
    if settings.needs_readable_labels:
        rows = partly_replaced(rows, readable_labels(run, split, "replaced"), settings)
    if split == "train" and settings.labels == "one":
        chosen = choose_labels(
            rows,
            teachers=run.config.label.teachers,
            share=settings.teacher_share,
            seed=settings.seed,
        )
        return {subject: [label] for subject, label in chosen.items()}
    return labels_by_subject(row for row in rows if split == "train" or row["drawn"])


def partly_replaced(
    rows: Sequence[LabelRow], replaced: Iterable[Mapping[str, Any]], settings: ReconstructorConfig
) -> list[LabelRow]:
    """The rows of labels, of which `replaced_share` have their replaced form."""
    forms = {(row["subject"], row["teacher"]): row["label"] for row in replaced}
    mixed = []
    for row in rows:
        key = (subject_of(row), row["teacher"])
        draw = seed_of(settings.seed, "replaced", *key) % 10**6 / 10**6
        is_replaced = draw < settings.replaced_share and key in forms
        mixed.append({**row, "label": forms[key]} if is_replaced else row)
    return mixed


def load_examples(
    run: Run,
    split: Literal["train", "validation"],
    settings: ReconstructorConfig,
    layer: int | None = None,
) -> Examples:
    """The split's activations of the scorer's half of the families, each with a label.

    `layer`: which one they are taken of; None: the base's. Raises ValueError when none is left, and
    for labels of other positions than the activations'.
    """
    labels = scorer_labels(run, split, settings)
    table = load_activations(run, split)
    kept = [
        (index, label)
        for index, subject in enumerate(activation_subjects(run, table))
        if document_half(table.family_ids[index]) == settings.document_half
        for label in labels.get(subject, ())
    ]
    if split == "train" and settings.max_examples is not None:
        kept = sorted(
            sorted(kept, key=lambda pair: seed_of(settings.seed, "example", table.ids[pair[0]]))[
                : settings.max_examples
            ]
        )
    if not kept:
        raise ValueError(
            f"{split} examples: got 0 labelled activations in the {settings.document_half} half of"
            " the families, expected at least one. Use a larger corpus or label more texts."
        )
    table = table.select([index for index, _ in kept])
    return Examples(
        descriptions=[label for _, label in kept],
        targets=table.vectors if layer is None else activations_at(run, split, table, layer),
        doc_ids=table.doc_ids,
        family_ids=table.family_ids,
    )


# Loss and figures ---------------------------------------------------------------------------------


def reconstruction_losses(
    reconstruction: Tensor,
    target: Tensor,
    mean: Tensor,
    contrastive_weight: float,
    candidates: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """1 - cos(r, v) + weight * InfoNCE of every row: [rows].

    r, v [rows, d_model], mean mu [d_model]. InfoNCE: cross entropy of row i among all `candidates`
    [n, d_model] under cos(c(r_i), c(v_j)) / 0.1. They are the targets of the whole batch, those of
    other workers too, and this part's own stand in it from `first` on; None: of these rows. Source:
    van den Oord et al. 2018, arXiv 1807.03748.
    """
    losses = 1.0 - vectors.cosine(reconstruction, target)
    if contrastive_weight:
        centred = (
            vectors.direction(vectors.centre(reconstruction, mean))
            @ vectors.direction(
                vectors.centre(target if candidates is None else candidates, mean)
            ).T
        )
        right = first + torch.arange(len(centred), device=centred.device)
        losses = losses + contrastive_weight * functional.cross_entropy(
            centred / TEMPERATURE, right, reduction="none"
        )
    return losses


def validation_figures(
    reconstruction: Tensor, target: Tensor, mean: Tensor, wrong: Tensor
) -> dict[str, float]:
    """Loss (1 - cosine), cosine, centred cosine, 2-way top-1, and variance explained.

    `reconstruction` and `target` [rows, d_model], `mean` [d_model]; top-1 is against the target in
    row `wrong` [rows].
    """
    right = vectors.cosine(reconstruction, target)
    return {
        "eval_loss": (1.0 - right).mean().item(),
        "eval_cosine": right.mean().item(),
        "eval_centred_cosine": vectors.centred_cosine(reconstruction, target, mean).mean().item(),
        "eval_top1": (right > vectors.cosine(reconstruction, target[wrong])).float().mean().item(),
        "eval_fve": vectors.variance_explained(reconstruction, target).item(),
    }


# The worker ---------------------------------------------------------------------------------------


def _train(config: dict[str, Any]) -> dict[str, Any]:
    """The body of one Ray Train worker: build and train."""
    run_config, name = config["run"], config["name"]
    prepare_worker(run_config.compute)
    run, settings = Run(run_config), getattr(run_config, name)
    examples = {split: load_examples(run, split, settings) for split in ("train", "validation")}
    mean = torch.tensor(load_stats(run)["mean_direction"])
    reconstructor = Reconstructor.build(
        run_config.base,
        settings.lora,
        mean,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        attention=training_attention(run_config.base),
    )
    return train_reconstructor(run_config, name, reconstructor, examples, settings)


def train_reconstructor(
    run_config: RunConfig,
    name: str,
    reconstructor: Reconstructor,
    examples: Mapping[str, Examples],
    settings: ReconstructorConfig,
) -> dict[str, Any]:
    """Train in this worker on the examples by split, from the weights that there are.

    `name`: of the artifact, whose best weights are offered. Returns the documents, the base and the
    best figures.
    """
    with Checkpoints(run_config, name) as checkpoints:
        trainer = make_reconstruction_trainer(
            reconstructor,
            examples["train"],
            examples["validation"],
            settings,
            run_config,
            checkpoints,
        )
        logger.info(
            "%s: %d descriptions, %d for validation",
            name,
            len(examples["train"].doc_ids),
            len(examples["validation"].doc_ids),
        )
        trainer.train(resume_from_checkpoint=checkpoints.last())
    return {
        "documents": {split: sorted(set(part.doc_ids)) for split, part in examples.items()},
        "model": base_info(run_config.base).to_dict(),
        "metrics": {
            **checkpoints.best["metrics"],
            "best_step": checkpoints.best["step"],
            "examples": len(examples["train"].doc_ids),
        },
    }


# The trainer --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a scorer is validated on."""

    examples: Examples
    mean: Tensor
    """[d_model], on the CPU."""
    wrong: Tensor
    """[rows] the row whose activation each description must not fit."""


class ReconstructionTrainer(ResumableTrainer):
    """The library's trainer with our loss, order of batches, optimizer and validation figures."""

    def __init__(
        self,
        *,
        batches: LengthBatches,
        validation: Validation,
        settings: ReconstructorConfig,
        checkpoints: Checkpoints,
        **arguments: Any,
    ) -> None:
        """`arguments` are the library's."""
        super().__init__(**arguments)
        self._batches, self._validation = batches, validation
        self._settings, self._checkpoints = settings, checkpoints

    def _get_train_sampler(self, train_dataset=None) -> LengthBatches:
        return self._batches

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self._settings.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """The mean over the rows of the whole batch, of which this worker has a part.

        Blank rows stand last in a part. Gradients are averaged over the workers.
        """
        output = model(inputs["input_ids"], inputs["attention_mask"])
        target, weight = inputs["target"].to(output.device), self._settings.contrastive_weight
        rows = int(inputs["num_rows"])
        counts = self.accelerator.gather(inputs["num_rows"].to(output.device)).tolist()
        before = sum(counts[: self.accelerator.process_index])
        candidates = None
        if weight and len(counts) > 1:
            parts = self.accelerator.gather(target).split(len(target))
            candidates = torch.cat(
                [part[:count] for part, count in zip(parts, counts, strict=True)]
            )
        losses = reconstruction_losses(
            output[:rows], target[:rows], self.model.mean, weight, candidates, before
        )
        return losses.sum() / sum(counts) * len(counts)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of the validation examples; the weights are offered to be published.

        They are compared by the centred cosine, because the loss is mostly the mean direction.
        """
        held_out = self._validation
        reconstruction = _reconstruct(
            self.model, self.model_wrapped, held_out.examples.descriptions
        )
        figures = validation_figures(
            reconstruction, held_out.examples.targets, held_out.mean, held_out.wrong
        )
        self.log(dict(figures))
        self._checkpoints.offer(
            self.state.global_step,
            -figures["eval_centred_cosine"],
            self.model.save,
            parameters=trainable_parameters(self.model),
            metrics=figures,
        )
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures


@dataclass(frozen=True, kw_only=True)
class ExampleCollator:
    """Makes a batch of rows: the prompts' ids, and the `target` activations [batch, d_model].

    Blanks, rows beyond the last, repeat row 0; they stand last and are not counted in `num_rows`.
    """

    reconstructor: Reconstructor
    encoded: Sequence[Sequence[int]]
    """The prompts of all rows."""
    targets: Tensor
    """[rows, d_model]"""

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        real = [row for row in rows if row < len(self.encoded)]
        rows = [*real, *[0] * (len(rows) - len(real))]
        input_ids, attention_mask = self.reconstructor.collate([self.encoded[row] for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "target": self.targets[rows],
            "num_rows": torch.tensor([len(real)]),
        }


def make_reconstruction_trainer(
    reconstructor: Reconstructor,
    train: Examples,
    validation: Examples,
    settings: ReconstructorConfig,
    run_config: RunConfig,
    checkpoints: Checkpoints,
) -> ReconstructionTrainer:
    """The trainer of this reconstructor, whose best validated weights go to `checkpoints`."""
    encoded = reconstructor.encode(train.descriptions)
    lengths = [len(ids) for ids in encoded]
    batches = LengthBatches(lengths, settings.batch_size, settings.seed)
    rows = worker_batch(run_config.compute, settings.batch_size)
    arguments = TrainingArguments(
        **trainer_arguments(
            run_config,
            checkpoints.folder,
            seed=settings.seed,
            blocks=reconstructor.layer + 1,
            tokens=rows * max(lengths),
        ),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=rows,
        learning_rate=settings.learning_rate,
        warmup_steps=_WARMUP_SHARE,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=20,
    )
    trainer = ReconstructionTrainer(
        batches=batches,
        validation=Validation(
            examples=validation,
            mean=reconstructor.mean.cpu(),
            wrong=derangement(validation.family_ids, settings.seed),
        ),
        settings=settings,
        checkpoints=checkpoints,
        model=reconstructor,
        args=arguments,
        data_collator=ExampleCollator(
            reconstructor=reconstructor, encoded=encoded, targets=train.targets
        ),
        train_dataset=range(len(batches)),
        eval_dataset=range(len(validation.doc_ids)),
    )
    follow(trainer, checkpoints, checkpoints.name)
    return trainer


def make_optimizer(reconstructor, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over adapter and head, the head's rate multiplied by 3 / sqrt(d_model).

    A step of rate e moves every output of the head by up to e * d_model (its inputs have unit mean
    square), and outputs are coordinates of a direction, of size d_model ** -0.5. Measured with
    d_model 256, three epochs, validation centred cosine for 1, 0.2, 0.03 and 0.004 of the adapter's
    rate: 0.69, 0.72, 0.65, 0.40.
    """
    head = list(reconstructor.head.parameters())
    adapter = [
        parameter for parameter in reconstructor.model.parameters() if parameter.requires_grad
    ]
    share = min(1.0, _HEAD_RATE / reconstructor.mean.shape[0] ** 0.5)
    return torch.optim.AdamW(
        [{"params": adapter}, {"params": head, "lr": learning_rate * share}],
        lr=learning_rate,
        weight_decay=_WEIGHT_DECAY,
    )


@torch.no_grad()
def _reconstruct(
    reconstructor, forward: Callable[[Tensor, Tensor], Tensor], descriptions: Sequence[str]
) -> Tensor:
    """Reconstructions [n, d_model] in the order given.

    `forward`: the model, or what DeepSpeed has made of it.
    """
    encoded = reconstructor.encode(descriptions)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    result = torch.empty(len(encoded), reconstructor.mean.shape[0])
    was_training = reconstructor.training
    reconstructor.eval()
    for start in range(0, len(order), _EVALUATION_BATCH):
        rows = order[start : start + _EVALUATION_BATCH]
        result[rows] = forward(*reconstructor.collate([encoded[row] for row in rows])).float().cpu()
    reconstructor.train(was_training)
    return result
