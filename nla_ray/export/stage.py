"""Exports a finished run: the one file here that knows its artifacts.

Protects the rule that an export is whole or not there: it is written beside its folder and renamed.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nla_ray.activation.bank import drawn_rows
from nla_ray.activation.stage import load_activations
from nla_ray.base.identity import BaseInfo, base_info, check_base
from nla_ray.base.load import load_tokenizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.export.adapter import CARD_NAME, export_adapter
from nla_ray.export.datasets import export_datasets
from nla_ray.export.models import export_reconstructor, export_verbalizer
from nla_ray.label.stage import activation_subjects, drawn_labels
from nla_ray.run.artifact import Run
from nla_ray.run.identity import Split
from nla_ray.settings.config import ExportConfig, require

_FITTED, _CHECKED = 2_048, 512
"""Most labels that the linear head is fitted to, and on which it is measured."""


def export_run(run: Run, settings: ExportConfig) -> list[str]:
    """Write what `settings` ask for; what was written, a line each.

    Raises ValueError for a folder that exists, and for an artifact that is missing, whose job the
    message names.
    """
    target = _target(run, settings)
    info = base_info(run.config.base)
    export = {"reference": _export_models, "peft": _export_adapter, "dataset": _export_datasets}
    with _whole(target) as folder:
        lines = export[settings.to](run, settings, info, folder)
    return [f"{target}: {settings.to}", *lines]


def _target(run: Run, settings: ExportConfig) -> Path:
    require(
        settings.output is not None or run.root.is_local,
        "export.output",
        settings.output,
        "a folder on this machine for a run that lies elsewhere",
        "Set --output FOLDER.",
    )
    name = settings.output or f"{run.root.path}/export_{settings.to}"
    target = Path(name).expanduser().absolute()
    require(
        not target.exists(),
        "export.output",
        str(target),
        "a folder that does not exist yet",
        "Delete it, or name another one with --output.",
    )
    return target


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends, and is gone when it fails."""
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _export_models(run: Run, settings: ExportConfig, info: BaseInfo, folder: Path) -> list[str]:
    base, arm, scorer = run.config.base, run.config.grpo.artifact, f"{settings.scorer}_scorer"
    verbalizer, judge = run.require(arm), run.require(scorer)
    for manifest in (verbalizer, judge):
        check_base(manifest, info)
    fitted, checked = _labels(run, "train", _FITTED), _labels(run, "validation", _CHECKED)
    with run.local_copy(arm, verbalizer, "adapter") as adapter:
        export_verbalizer(base, info, adapter, folder / "av", settings.dtype)
    with run.local_copy(scorer, judge) as files:
        facts = export_reconstructor(
            base, info, files, folder / "ar", settings.dtype, fitted=fitted, checked=checked
        )
    measured = facts.own["value_head"]
    return [
        f"av: {arm}, merged into {info.name}, layer {info.layer}",
        f"ar: {scorer}. Its linear head comes near the exact one beside it: cosine"
        f" {measured['mean_cosine']}, lowest {measured['lowest_cosine']}, over"
        f" {measured['descriptions']} validation labels",
    ]


def _labels(run: Run, split: Split, most: int) -> list[str]:
    """At most so many labels of a split, each once."""
    found = list(dict.fromkeys(drawn_labels(run, split).values()))
    require(
        bool(found),
        f"labels of {split}",
        0,
        "at least one",
        "The linear head of the layout is fitted to train labels and measured on validation.",
    )
    return [found[row] for row in drawn_rows(len(found), most, seed=0)]


def _export_adapter(run: Run, settings: ExportConfig, info: BaseInfo, folder: Path) -> list[str]:
    base, arm = run.config.base, run.config.grpo.artifact
    manifest, limit = run.require(arm), run.config.grpo.max_new_tokens
    check_base(manifest, info)
    example = load_activations(run, "test").vectors[:1]
    with run.local_copy(arm, manifest, "adapter") as adapter:
        verbalizer = Verbalizer.load(base, adapter)
        [said] = verbalizer.describe(example, max_new_tokens=limit)
        export_adapter(
            base,
            info,
            load_tokenizer(base),
            adapter,
            folder,
            activation=example[0],
            said=said.text,
            max_new_tokens=limit,
        )
    return [f"adapter of {arm}; {CARD_NAME} says how to inject"]


def _export_datasets(run: Run, settings: ExportConfig, info: BaseInfo, folder: Path) -> list[str]:
    check_base(run.require("activations"), info)
    table = load_activations(run, settings.split)
    by_subject = drawn_labels(run, settings.split)
    labels = [by_subject.get(subject, "") for subject in activation_subjects(run, table)]
    tokenizer = load_tokenizer(run.config.base)
    corpus = run.config.corpus.path or "the texts of installed Python packages"
    rows = export_datasets(folder, table, labels, info, tokenizer, corpus)
    return [f"{name}.parquet: {count} rows" for name, count in rows.items()]
