"""Makes the artifact `readable_labels`: every label without what its activation does not hold.

activations, labels -> probability of each word in each text, cross-fitted -> each label in three
forms. Train rows are read by probes that were not fitted to their families, validation rows by a
probe of the train rows. One process, no Ray Train: seconds for ten thousand activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations, load_stats
from nla_ray.base.identity import base_info, check_base
from nla_ray.cluster.resources import run_placed
from nla_ray.label.rows import LabelRow, subject_of
from nla_ray.label.stage import activation_subjects, load_labels
from nla_ray.run.artifact import Artifact, Run
from nla_ray.run.identity import seed_of
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.score.cross_fit import cross_fit
from nla_ray.score.probe import words_of
from nla_ray.score.readable import LABEL_FORMS, LabelWords, rewrite
from nla_ray.settings.config import RunConfig, require

READABLE_LABELS = "readable_labels"
_FILE = "labels.parquet"
_SPLITS = ("train", "validation")
_UNLIKELY = 0.02
"""A less likely word is not looked at."""

logger = get_logger(__name__)


def make_readable_labels(run: Run) -> Manifest:
    """The stage: the artifact's manifest. Skipped when complete."""
    if _open_stage(run).manifest is None:
        run_placed(run.config, "scorer", write_readable_labels)
    return run.require(READABLE_LABELS)


def _open_stage(run: Run) -> Artifact:
    check_base(run.require("activations"), base_info(run.config.base))
    return run.open(READABLE_LABELS)


def write_readable_labels(config: RunConfig) -> None:
    """The whole of it, in this process."""
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run, settings = Run(config), config.readable_labels
    stage, mean = _open_stage(run), torch.tensor(load_stats(run)["mean_direction"])
    train = load_activations(run, "train")
    probes = cross_fit(train.vectors, train.texts, train.family_ids, mean, settings.seed)
    labels = {split: load_labels(run, split) for split in _SPLITS}
    words = LabelWords.of(row["label"] for row in labels["train"])
    rows: list[dict[str, Any]] = []
    for split in _SPLITS:
        table = train if split == "train" else load_activations(run, split)
        blocks = probes.blocks(table.vectors, fitted=split == "train")
        rows += _rewritten(run, table, labels[split], probes.words, blocks, words)
    require(
        len(rows) > 0,
        "labels of train or validation activations",
        0,
        "at least one",
        "Label the texts of this corpus: run jobs/label.py.",
    )
    items, unreadable = (sum(row[name] for row in rows) for name in ("items", "unreadable"))
    metrics = {
        "words": len(probes.words),
        "labels": len(rows),
        "items": items,
        "unreadable_share": unreadable / max(1, items),
    }
    logger.info(
        "%s: %d labels, of what they say of their texts a probe reads all but %.0f %%",
        READABLE_LABELS,
        len(rows),
        100 * metrics["unreadable_share"],
    )
    with stage.local_folder() as folder:
        pq.write_table(pa.Table.from_pylist(rows), folder / _FILE)
    stage.publish(documents={"train": train.doc_ids}, metrics=metrics)


def _rewritten(
    run: Run,
    table: ActivationTable,
    labels: Sequence[LabelRow],
    probed: Sequence[str],
    blocks: Iterable[tuple[range, Tensor]],
    words: LabelWords,
) -> Iterator[dict[str, Any]]:
    """The labels of a split's activations with their forms, label after label.

    `blocks`: rows of the table, and the probability of each word of `probed` in their texts.
    """
    settings = run.config.readable_labels
    least = min(_UNLIKELY, settings.least)
    of_subject: dict[str, list[LabelRow]] = {}
    for label in labels:
        of_subject.setdefault(subject_of(label), []).append(label)
    subjects = activation_subjects(run, table)
    for rows, block in blocks:
        for row, probabilities in zip(rows, block, strict=True):
            likely = torch.nonzero(probabilities >= least).flatten().tolist()
            found = {probed[number]: probabilities[number].item() for number in likely}
            in_text = words_of(table.texts[row])
            offers = sorted(in_text & found.keys(), key=lambda word: (-found[word], word))
            for label in of_subject.get(subjects[row], ()):
                drawn_by = seed_of(settings.seed, "thinned", subjects[row], label["teacher"])
                made = rewrite(label["label"], found, offers, words, settings.least, drawn_by)
                yield {
                    "split": label["split"],
                    "subject": subjects[row],
                    "teacher": label["teacher"],
                    "drawn": label["drawn"],
                    **{form: getattr(made, form) for form in LABEL_FORMS},
                    "items": made.items,
                    "unreadable": made.unreadable,
                }


def readable_labels(run: Run, split: str, form: str) -> Iterator[Mapping[str, Any]]:
    """The labels of a split in one of LABEL_FORMS: rows with subject, teacher, drawn and label."""
    location = run.verified(READABLE_LABELS, run.require(READABLE_LABELS), _FILE)
    with location.filesystem.open_input_file(location.path) as file:
        columns = ["subject", "teacher", "drawn", form]
        table = pq.read_table(file, columns=columns, filters=[("split", "=", split)])
    yield from table.rename_columns(["subject", "teacher", "drawn", "label"]).to_pylist()
