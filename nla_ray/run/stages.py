"""The stages of a run: what each makes, from what, under which settings, and by which job.

The one place that lists them. Jobs, `--dry-run`, error messages that say "make it with", the
report's ancestors and serving all read this table. A new stage is one row and one function.
"""

from __future__ import annotations

import json
import operator
import pkgutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nla_ray.run.log import get_logger

if TYPE_CHECKING:
    from nla_ray.run.artifact import Run
    from nla_ray.run.manifest import Manifest
    from nla_ray.settings.config import RunConfig

INSPECTION_NAME = "inspection.json"
"""What `jobs/inspect_base.py` found, inside the run."""
INSPECTION_FORMAT = 2
"""Its version: since 2 ceilings are intervals."""
BENCHMARK_NAME = "benchmark.json"
"""What `jobs/benchmark.py` measured, inside the run."""
TIMINGS_NAME = "timings.json"
"""Seconds of every stage that a job has completed in the run, by artifact."""

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One row of the table.

    Example: StageRow(name="activations", job="capture", sections=("base", "capture"),
    parents=("corpus",), function="nla_ray.activation.stage:capture_activations")
    """

    name: str
    """The stage, and the artifact that it publishes unless `named_by` says otherwise."""
    job: str
    """`jobs/{job}.py` makes it."""
    function: str
    """`module:function` of a Run. It skips an artifact that is complete and raises ValueError when
    that artifact was made under other settings."""
    parents: tuple[str, ...] = ()
    """Stages whose artifacts it is made from."""
    sections: tuple[str, ...] = ()
    """Configuration sections that shape the artifact: its identity, with its parents."""
    named_by: str | None = None
    """Property of RunConfig that names the artifact, where one run may hold several of them."""
    is_arm: bool = False
    """Whether what is made from the stage is made from the artifact that `named_by` says; else it
    is made from the one without a name of its own."""
    kind: Literal["data", "scorer", "verbalizer", "report", "none"] = "data"
    """What the artifact is; `none`: the stage publishes no artifact."""

    def artifact(self, config: RunConfig) -> str:
        """The artifact's name under a configuration: `grpo_no_contrast` of stage `grpo`."""
        return operator.attrgetter(self.named_by)(config) if self.named_by else self.name

    def parent_artifact(self, config: RunConfig) -> str:
        """The artifact that stages with this parent are made from."""
        return self.artifact(config) if self.is_arm else self.name

    def make(self, run: Run) -> Manifest:
        """Call the stage's function."""
        return pkgutil.resolve_name(self.function)(run)


STAGES = (
    StageRow(
        name="base",
        job="pretrain",
        sections=("pretrain",),
        function="nla_ray.nano.pretrain.stage:pretrain",
    ),
    StageRow(
        name="corpus",
        job="corpus",
        sections=("corpus",),
        function="nla_ray.text.stage:build_corpus",
    ),
    StageRow(
        name="activations",
        job="capture",
        parents=("corpus",),
        sections=("base", "capture"),
        function="nla_ray.activation.stage:capture_activations",
    ),
    StageRow(
        name="labels",
        job="label",
        parents=("corpus",),
        sections=("label",),
        function="nla_ray.label.stage:label_texts",
    ),
    StageRow(
        name="reward_scorer",
        job="sft",
        parents=("activations", "labels"),
        sections=("base", "reward_scorer"),
        kind="scorer",
        function="nla_ray.training.reconstruction:train_reward_scorer",
    ),
    StageRow(
        name="judge_scorer",
        job="sft",
        parents=("activations", "labels"),
        sections=("base", "judge_scorer"),
        kind="scorer",
        function="nla_ray.training.reconstruction:train_judge_scorer",
    ),
    StageRow(
        name="linear_scorer",
        job="sft",
        parents=("activations", "labels"),
        sections=("base", "judge_scorer", "linear_scorer"),
        kind="scorer",
        function="nla_ray.training.linear:fit_linear_scorer",
    ),
    StageRow(
        name="sft",
        job="sft",
        parents=("activations", "labels"),
        sections=("base", "sft"),
        named_by="sft.artifact",
        kind="verbalizer",
        function="nla_ray.training.sft:train_sft",
    ),
    StageRow(
        name="grpo",
        job="grpo",
        parents=("activations", "sft", "reward_scorer", "judge_scorer"),
        sections=("base", "grpo"),
        named_by="grpo.artifact",
        is_arm=True,
        kind="verbalizer",
        function="nla_ray.reinforce.grpo:train_grpo",
    ),
    StageRow(
        name="report",
        job="evaluate",
        parents=(
            "corpus",
            "activations",
            "labels",
            "reward_scorer",
            "judge_scorer",
            "linear_scorer",
            "sft",
            "grpo",
        ),
        sections=("base", "evaluation"),
        named_by="report_artifact",
        kind="report",
        function="nla_ray.report.stage:evaluate",
    ),
    StageRow(
        name="inspection",
        job="inspect_base",
        parents=("corpus", "labels"),
        kind="none",
        function="nla_ray.score.stage:inspect_base",
    ),
    StageRow(
        name="benchmark",
        job="benchmark",
        parents=("corpus",),
        kind="none",
        function="nla_ray.bench.stage:run_benchmarks",
    ),
    StageRow(
        name="serve", job="serve", kind="none", function="nla_ray.serve.application:serve_run"
    ),
)
"""Parents stand before what is made from them."""

PIPELINE_JOB = "pipeline"
"""`jobs/pipeline.py` makes the report and everything before it."""


def stage_row(name: str) -> StageRow:
    """The row of a stage. Raises KeyError for another name."""
    return {row.name: row for row in STAGES}[name]


def closure(names: Collection[str]) -> tuple[StageRow, ...]:
    """The stages of these names and all their ancestors, parents first."""
    wanted = set(names)
    for row in reversed(STAGES):
        if row.name in wanted:
            wanted.update(row.parents)
    return tuple(row for row in STAGES if row.name in wanted)


def stages_of_job(job: str) -> tuple[StageRow, ...]:
    """What a job makes: the stages it is named after and, before them, the closure of their
    parents.

    Example: stages_of_job("label") is the rows of corpus and labels. An unknown job makes what the
    pipeline makes.
    """
    targets = [row.name for row in STAGES if row.job == job]
    return closure(targets or ["report"])


def job_of(artifact: str) -> str:
    """The job that makes an artifact, also one with a name of its own: `grpo_kl0` -> `grpo`.

    Raises KeyError for a name that belongs to no stage.
    """
    for row in STAGES:
        if artifact == row.name or (row.named_by and artifact.startswith(f"{row.name}_")):
            return row.job
    raise KeyError(artifact)


def artifacts_of_kind(kind: str) -> tuple[str, ...]:
    """Names of the stages whose artifact is of a kind, in the order of the table."""
    return tuple(row.name for row in STAGES if row.kind == kind)


def make(run: Run, job: str, *, strict: bool = False) -> Iterator[tuple[StageRow, Manifest]]:
    """Make what a job makes, stage by stage; yields each with its manifest when it is complete.

    The job's own stages are opened always, and so compared with the configuration. A parent that is
    complete is taken as it is; with `strict` it is compared too. Seconds of the stages that were
    completed here are written to TIMINGS_NAME.
    """
    rows = stages_of_job(job)
    for number, row in enumerate(rows, 1):
        artifact, started = row.artifact(run.config), time.monotonic()
        complete = run.find(artifact)
        state = ": complete" if complete else ""
        logger.info("[%d/%d] %s%s", number, len(rows), row.name, state)
        if complete and row.job != job and not strict:
            yield row, complete
            continue
        manifest = row.make(run)
        if not complete:
            seconds = _record_seconds(run, artifact, time.monotonic() - started)
            logger.info("[%d/%d] %s: %.1f s", number, len(rows), row.name, seconds)
        yield row, manifest


def read_timings(run: Run) -> dict[str, float]:
    """Seconds by artifact; of an interrupted stage those of the attempt that completed it."""
    location = run.root / TIMINGS_NAME
    return json.loads(location.read_text()) if location.exists() else {}


def _record_seconds(run: Run, artifact: str, seconds: float) -> float:
    timings = {**read_timings(run), artifact: round(seconds, 1)}
    (run.root / TIMINGS_NAME).write_text(json.dumps(timings, indent=1) + "\n")
    return timings[artifact]
