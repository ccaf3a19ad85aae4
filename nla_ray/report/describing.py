"""Every description that a report is about: labels, controls, and what verbalizers write.

They are kept in `{verbalizer}.jsonl` files of the report's folder, which are appended to and read
back: an interrupted report goes on description by description. It computes no figure. Protects the
rule that every test activation has exactly one description under every verbalizer, in the same
order, however bad.
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
"""Activations handed to the engine at once, in batches.

Enough that its slots stay full, few enough that an interruption loses little.
"""

_SLOT_BATCHES = 4
"""Descriptions written at once, in batches: a step of decoding is a token of each.

Measured with nano on two threads: 256 at once take 0.74 of the time that 64 take.
"""


def describe_all(
    run: Run,
    manifests: Mapping[str, Manifest],
    test: ActivationTable,
    mean: Tensor,
    folder: Path,
    compared: Sequence[Compared],
) -> tuple[dict[str, list[Description]], list[list[Description]]]:
    """Descriptions of every test activation by verbalizer; and the samples of each.

    Samples are drawn by the arm of GRPO, `evaluation.samples` of each activation. All descriptions
    are written to `folder` as they come.
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
    for verbalizer in compared:
        name, path, manifest = verbalizer.name, verbalizer.path, verbalizer.manifest
        if verbalizer.is_adapter:
            neighbours = manifest.model["neighbours"] if manifest else None
            described |= describer.describe(path, neighbours, {name: test.vectors})
        else:
            texts, _ = read_descriptions(path, test.ids)
            described[name] = describer.keep(name, texts)
    return described, samples


def decoding(arm: Manifest) -> Mapping[str, Any]:
    """How a report on an arm of GRPO decodes, which is how the arm sampled.

    Has `max_new_tokens`, and the `temperature` of samples.
    """
    return arm.config["grpo"]


def _label_controls(run: Run, test: ActivationTable, mean: Tensor) -> dict[str, list[str]]:
    """What the controls that need no model say of every test activation."""
    gold = drawn_labels(run, run.config.evaluation.split)
    train_labels = drawn_labels(run, "train")
    train = load_activations(run, "train")
    texts = {
        name: label_descriptions(
            name, test.text_ids, test.doc_ids, gold, run.config.evaluation.seed
        )
        for name in ("gold", "shuffled", "generic")
    }
    nearest = nearest_train_labels(test.vectors, train.vectors, train.text_ids, train_labels, mean)
    return {**texts, "nearest_train_label": nearest}


class Describer:
    """Keeps files of descriptions, and makes what they lack with adapters over one loaded base."""

    def __init__(
        self, config: RunConfig, sampling: Mapping[str, Any], test: ActivationTable, folder: Path
    ) -> None:
        self._config, self._sampling, self._ids, self._folder = config, sampling, test.ids, folder
        self._tokenizer, self._model = load_tokenizer(config.base), None
        self._num_tokens: dict[str, int] = {}

    def keep(self, name: str, texts: Sequence[str]) -> list[Description]:
        """Write descriptions that cost nothing to make, one for each activation."""
        described = [self._described(text, closed=True) for text in texts]
        _write_rows(self._folder / f"{name}.jsonl", _rows(self._ids, described))
        return described

    def describe(
        self, adapter: Path, neighbours: Sequence[int] | None, injected: Mapping[str, Tensor]
    ) -> dict[str, list[Description]]:
        """What an adapter says, greedily, by the name of what is injected.

        `injected`: [rows, d_model], or [1, d_model] for all rows alike.
        """
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
        """All descriptions of a file; what is missing is made and appended, chunk by chunk."""
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
                fresh = [self._described(new.text, new.closed) for new in written] * copies
                for row in _rows(ids[len(done) : len(done) + len(fresh)], fresh):
                    log.append(row)
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
        """What a file holds already, in whole groups of samples; a begun group is cut off.

        Raises ValueError when it describes other activations.
        """
        rows = log.read()
        if begun := len(rows) % samples:
            rows = rows[:-begun]
            _write_rows(log.path, rows)
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
        """A description with its length in tokens.

        Labels and controls repeat: the tokens of each text are counted once.
        """
        if text not in self._num_tokens:
            self._num_tokens[text] = len(self._tokenizer.encode(text, add_special_tokens=False))
        return Description.from_text(text, num_tokens=self._num_tokens[text], closed=closed)


def _rows(ids: Sequence[str], descriptions: Sequence[Description]) -> list[dict[str, Any]]:
    """The lines of a file, one for each activation."""
    return [
        {
            "activation_id": activation_id,
            "description": description.text,
            "closed": description.closed,
            "num_tokens": description.num_tokens,
        }
        for activation_id, description in zip(ids, descriptions, strict=True)
    ]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
