"""Every description that a report is about: labels, controls, and what verbalizers write, kept line
by line.

Resumable description by description: `{verbalizer}.jsonl` files in the report's folder are appended
to and read back. The rule it protects: every test activation has exactly one description under
every verbalizer, in the same order, however bad.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import load_activations
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.description.record import Description
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.label.stage import drawn_labels
from nla_ray.report.compared import Compared, read_descriptions
from nla_ray.report.controls import (
    INJECTED,
    injected_vectors,
    label_descriptions,
    nearest_train_labels,
    trained_in,
)
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of
from nla_ray.run.log import stage_progress
from nla_ray.run.manifest import Manifest
from nla_ray.run.metrics import MetricsLog
from nla_ray.settings.config import RunConfig

_CHUNK_BATCHES = 8
"""Activations handed to the engine at once, in batches: enough that slots stay full, few enough
that little is lost."""

_SLOT_BATCHES = 4
"""Descriptions written at once, in batches: one step of decoding is one token of each. Measured
with nano on two threads: 256 at once take 0.74 of the time that 64 take."""


def describe_all(
    run: Run,
    manifests: Mapping[str, Manifest],
    test: ActivationTable,
    mean: Tensor,
    folder: Path,
    compared: Sequence[Compared],
) -> tuple[dict[str, list[Description]], list[list[Description]]]:
    """Descriptions of every test activation by verbalizer; and the samples of the arm of GRPO, N of
    each activation.

    All are written to `folder` as they come.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arm = run.config.grpo.artifact
    describer = Describer(run.config, decoding(manifests[arm]), test, folder)
    described = {
        name: describer.keep(name, texts)
        for name, texts in _label_controls(run, test, mean).items()
    }
    samples: list[list[Description]] = []
    for artifact in trained_in(manifests):
        injected = {artifact: test.vectors}
        if artifact == "sft":
            injected |= {
                name: injected_vectors(
                    name, test.ids, test.vectors, mean, run.config.evaluation.seed
                )
                for name in INJECTED
            }
        neighbours = manifests[artifact].model["neighbours"]
        with run.local_copy(artifact, manifests[artifact], "adapter") as adapter:
            described |= describer.describe(adapter, neighbours, injected)
            if artifact == arm and run.config.evaluation.samples:
                samples = describer.sample(adapter, neighbours, f"{artifact}_samples", test.vectors)
    for one in compared:
        if one.is_adapter:
            neighbours = one.manifest.model["neighbours"] if one.manifest else None
            described |= describer.describe(one.path, neighbours, {one.name: test.vectors})
        else:
            described[one.name] = describer.keep(one.name, read_descriptions(one.path, test.ids)[0])
    return described, samples


def decoding(arm: Manifest) -> Mapping[str, Any]:
    """How an arm of GRPO sampled, which is how a report on it decodes: `max_new_tokens`, and
    `temperature` of samples."""
    return arm.config["grpo"]


def _label_controls(run: Run, test: ActivationTable, mean: Tensor) -> dict[str, list[str]]:
    """What the controls that need no model say of every test activation."""
    gold = drawn_labels(run, run.config.evaluation.split)
    known = drawn_labels(run, "train")
    train = load_activations(run, "train")
    texts = {
        name: label_descriptions(
            name, test.text_ids, test.doc_ids, gold, run.config.evaluation.seed
        )
        for name in ("gold", "shuffled", "generic")
    }
    nearest = nearest_train_labels(test.vectors, train.vectors, train.text_ids, known, mean)
    return {**texts, "nearest_train_label": nearest}


class Describer:
    """Keeps `{verbalizer}.jsonl` files of descriptions, and makes what they lack with adapters over
    one loaded base."""

    def __init__(
        self, config: RunConfig, sampling: Mapping[str, Any], test: ActivationTable, folder: Path
    ) -> None:
        self._config, self._sampling, self._ids, self._folder = config, sampling, test.ids, folder
        self._tokenizer, self._model = load_tokenizer(config.base), None
        self._num_tokens: dict[str, int] = {}

    def keep(self, name: str, texts: Sequence[str]) -> list[Description]:
        """Write descriptions that cost nothing to make, one for each activation."""
        described = [self._described(text, closed=True) for text in texts]
        rows = (
            _row(activation_id, one)
            for activation_id, one in zip(self._ids, described, strict=True)
        )
        (self._folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return described

    def describe(
        self, adapter: Path, neighbours: Sequence[int] | None, injected: Mapping[str, Tensor]
    ) -> dict[str, list[Description]]:
        """What one adapter says, greedily, by name of what is injected: [rows, d_model], or [1,
        d_model] for all rows alike."""
        return {
            name: self._complete(adapter, neighbours, name, vectors, self._ids)
            for name, vectors in injected.items()
        }

    def sample(
        self, adapter: Path, neighbours: Sequence[int] | None, name: str, injected: Tensor
    ) -> list[list[Description]]:
        """`evaluation.samples` seeded samples of every row, drawn as GRPO drew them."""
        count = self._config.evaluation.samples
        ids = [activation_id for activation_id in self._ids for _ in range(count)]
        flat = self._complete(
            adapter,
            neighbours,
            name,
            injected,
            ids,
            samples=count,
            temperature=self._sampling["temperature"],
        )
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _complete(
        self,
        adapter: Path,
        neighbours: Sequence[int] | None,
        name: str,
        injected: Tensor,
        ids: Sequence[str],
        samples: int = 1,
        temperature: float = 0.0,
    ) -> list[Description]:
        """All descriptions of a file, of which the missing ones are made and appended, chunk by
        chunk."""
        log = MetricsLog(self._folder / f"{name}.jsonl")
        done = self._read(log, ids, samples)
        if len(done) == len(ids):
            return done
        verbalizer = self._load(adapter, neighbours)
        chunk = max(1, self._config.evaluation.batch_size * _CHUNK_BATCHES // samples)
        with stage_progress(f"describe: {name}", len(ids)) as advance:
            advance(len(done))
            while len(done) < len(ids):
                start = len(done) // samples
                rows = injected if len(injected) == 1 else injected[start : start + chunk]
                written = verbalizer.describe(
                    rows,
                    max_new_tokens=self._sampling["max_new_tokens"],
                    group_size=samples,
                    temperature=temperature,
                    seed=seed_of(self._config.evaluation.seed, "samples"),
                    rows=list(range(start, start + len(rows))),
                )
                copies = len(ids) - len(done) if len(injected) == 1 else 1
                fresh = [self._described(one.text, one.closed) for one in written] * copies
                for activation_id, one in zip(ids[len(done) :], fresh):
                    log.append(_row(activation_id, one))
                done += fresh
                advance(len(fresh))
        return done

    def _load(self, adapter: Path, neighbours: Sequence[int] | None) -> Verbalizer:
        self._model = load_backbone(self._config.base) if self._model is None else self._model
        slots = _SLOT_BATCHES * self._config.evaluation.batch_size
        return Verbalizer.load(
            self._config.base, adapter, neighbours=neighbours, model=self._model, max_slots=slots
        )

    def _read(self, log: MetricsLog, ids: Sequence[str], samples: int) -> list[Description]:
        """What is there already, in whole groups of samples. Raises ValueError when it describes
        other activations."""
        rows = log.read()
        if begun := len(rows) % samples:
            rows = rows[:-begun]
            log.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if [row["activation_id"] for row in rows] != list(ids[: len(rows)]):
            raise ValueError(
                f"{log.path}: got descriptions of other activations than the report's, expected the"
                " same in order. The file is damaged; delete it and evaluate again."
            )
        return [
            Description.from_text(
                row["description"], num_tokens=row["num_tokens"], closed=row["closed"]
            )
            for row in rows
        ]

    def _described(self, text: str, closed: bool) -> Description:
        """With its length in tokens; labels and controls repeat, so each text is counted once."""
        if text not in self._num_tokens:
            self._num_tokens[text] = len(self._tokenizer.encode(text, add_special_tokens=False))
        return Description.from_text(text, num_tokens=self._num_tokens[text], closed=closed)


def _row(activation_id: str, one: Description) -> dict[str, Any]:
    return {
        "activation_id": activation_id,
        "description": one.text,
        "closed": one.closed,
        "num_tokens": one.num_tokens,
    }
