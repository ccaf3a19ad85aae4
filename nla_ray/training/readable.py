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
from nla_ray.score.cross_fit import CrossFitted, cross_fit
from nla_ray.score.probe import words_of
from nla_ray.score.readable import LABEL_FORMS, offered_words, places_of, rewrite
from nla_ray.settings.config import RunConfig, require

READABLE_LABELS = "readable_labels"
_FILE = "labels.parquet"
_SPLITS = ("train", "validation")
_ALGORITHM = "3"
"""Version of what settings do not tell, part of the identity. Since 2 a line of prose is judged by
its specifics, since 3 none is followed by a word that cannot be read. What was made before has
none."""
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
    return run.open(READABLE_LABELS, algorithm=_ALGORITHM)


def write_readable_labels(config: RunConfig) -> None:
    """The whole of it, in this process."""
    torch.set_num_threads(config.compute.threads * config.compute.trainer_workers)
    run, settings = Run(config), config.readable_labels
    stage, mean = _open_stage(run), torch.tensor(load_stats(run)["mean_direction"])
    train = load_activations(run, "train")
    probes = cross_fit(train.vectors, train.texts, train.family_ids, mean, settings.seed)
    labels = {split: load_labels(run, split) for split in _SPLITS}
    places = places_of(row["label"] for row in labels["train"])
    rows: list[dict[str, Any]] = []
    for split in _SPLITS:
        table = train if split == "train" else load_activations(run, split)
        least = min(_UNLIKELY, settings.least)
        read = _read_words(probes, table, least, fitted=split == "train")
        rows += _rewritten(run, table, labels[split], read, places)
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


def _read_words(
    probes: CrossFitted, table: ActivationTable, least: float, *, fitted: bool
) -> Iterator[tuple[dict[str, float], list[str]]]:
    """Of each row the words that may be in its text, with their probability; and what to offer.

    `least`: probability of a word that is looked at. `fitted`: see `CrossFitted.blocks`.
    """
    words = probes.words
    share = dict(zip(words, torch.sigmoid(probes.whole.log_odds).tolist(), strict=True))
    for rows, block in probes.blocks(table.vectors, fitted=fitted):
        for row, probabilities in zip(rows, block, strict=True):
            likely = torch.nonzero(probabilities >= least).flatten().tolist()
            read = {words[number]: probabilities[number].item() for number in likely}
            yield read, offered_words(words_of(table.texts[row]), read, share)


def _rewritten(
    run: Run,
    table: ActivationTable,
    labels: Sequence[LabelRow],
    read: Iterable[tuple[Mapping[str, float], Sequence[str]]],
    places: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """The labels of a split's activations with their forms, label after label.

    `read`: of each row, see `_read_words`.
    """
    settings = run.config.readable_labels
    of_subject: dict[str, list[LabelRow]] = {}
    for label in labels:
        of_subject.setdefault(subject_of(label), []).append(label)
    for subject, (probability, offers) in zip(activation_subjects(run, table), read, strict=True):
        for label in of_subject.get(subject, ()):
            made = rewrite(
                label["label"],
                probability,
                offers,
                places,
                least=settings.least,
                seed=seed_of(settings.seed, "thinned", subject, label["teacher"]),
                fill_to=settings.fill_to,
            )
            yield {
                "split": label["split"],
                "subject": subject,
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
