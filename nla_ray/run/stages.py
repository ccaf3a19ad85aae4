"""The stages of a run: what each makes, from what, under which settings, and by which job.

This table is the one place that lists them. Jobs, `--dry-run`, error messages that say "make it
with", the report's ancestors and serving all read it. A new stage is one row and one function.
"""

from __future__ import annotations

import json
import operator
import pkgutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nla_ray.run.log import get_logger

if TYPE_CHECKING:
    from nla_ray.run.artifact import Run
    from nla_ray.settings.config import RunConfig

INSPECTION_JOB, INSPECTION_NAME = "inspect_base", "inspection.json"
"""The job that looks at a base before anything is trained, and what it found, inside the run."""
INSPECTION_FORMAT = 2
"""Its version: since 2 ceilings are intervals."""
PROPOSAL_NAME = "preset.toml"
"""The preset that the same job proposes, inside the run."""
BENCHMARK_NAME = "benchmark.json"
"""What `jobs/benchmark.py` measured, inside the run."""
TIMINGS_NAME = "timings.json"
"""Seconds of every artifact that a job has completed in the run."""
PIPELINE_JOB, PIPELINE_TARGET = "pipeline", "report"
"""`jobs/pipeline.py` makes the report, and so everything before it."""

ArtifactKind = Literal["data", "scorer", "verbalizer", "reader", "report"]
"""A `scorer` reads everything in a report; a `reader` some of it."""

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table.

    Example: Stage(name="activations", job="capture", kind="data", parents=("corpus",),
    sections=("base", "capture"), function="nla_ray.activation.stage:capture_activations")
    """

    name: str
    """The stage, and the artifact that it publishes unless `named_by` says otherwise."""
    job: str
    """`jobs/{job}.py` makes it."""
    function: str
    """`module:function` of a Run, which returns the artifact's manifest. It skips an artifact that
    is complete and raises ValueError when that artifact was made under other settings."""
    kind: ArtifactKind | None = None
    """What the artifact is. None: the stage publishes no artifact, and its function returns what
    it found."""
    parents: tuple[str, ...] = ()
    """Stages whose artifacts it is made from."""
    optional_parents: tuple[str, ...] = ()
    """Stages whose artifacts it is made from as well, where it does not exist without them yet: an
    artifact that was made before such a stage existed stays what it is."""
    optional_when: str | None = None
    """Property of RunConfig that says whether it is made from all its optional parents; None: when
    they exist, or another parent was made from them."""
    sections: tuple[str, ...] = ()
    """Configuration sections that shape the artifact: its identity, with its parents."""
    named_by: str | None = None
    """Property of RunConfig that names the artifact, where one run may hold several of them."""
    passes_name_on: bool = False
    """True: later stages are made from the variant that `named_by` names. False: they are always
    made from the artifact with the stage's own name."""

    seeded_by: Literal["sft", "grpo"] | None = None
    """The section with its seed, where `--seeds` makes it once for each."""

    def artifact(self, config: RunConfig) -> str:
        """The artifact's name under a configuration: `grpo_no_contrast` of stage `grpo`."""
        return operator.attrgetter(self.named_by)(config) if self.named_by else self.name

    def is_wanted(self, config: RunConfig) -> bool:
        """Whether anything is made from it under a configuration."""
        takers = [stage for stage in STAGES if self.name in stage.optional_parents]
        choosing = [stage for stage in takers if stage.optional_when is not None]
        return not choosing or any(stage.takes_optional(config) for stage in choosing)

    def takes_optional(self, config: RunConfig) -> bool:
        """Whether the configuration asks for its optional parents by itself."""
        return self.optional_when is not None and operator.attrgetter(self.optional_when)(config)

    def parent_artifact(self, config: RunConfig) -> str:
        """The artifact that stages with this parent are made from."""
        return self.artifact(config) if self.passes_name_on else self.name

    def is_target(self, job: str) -> bool:
        """Whether a job is there to make it, and not only to have it for what it makes."""
        return self.job == job or (job == PIPELINE_JOB and self.name == PIPELINE_TARGET)

    def artifact_of_job(self, job: str, config: RunConfig) -> str:
        """The artifact that a job makes of the stage, or takes as a parent."""
        return self.artifact(config) if self.is_target(job) else self.parent_artifact(config)

    def make(self, run: Run) -> Any:
        """Call the stage's function."""
        return pkgutil.resolve_name(self.function)(run)


STAGES = (
    Stage(
        name="base",
        job="pretrain",
        kind="data",
        sections=("pretrain",),
        function="nla_ray.nano.pretrain.stage:pretrain",
    ),
    Stage(
        name="corpus",
        job="corpus",
        kind="data",
        sections=("corpus",),
        function="nla_ray.text.stage:build_corpus",
    ),
    Stage(
        name="answers",
        job="capture",
        kind="data",
        parents=("corpus",),
        sections=("base", "capture"),
        function="nla_ray.activation.stage:answer_texts",
    ),
    Stage(
        name="activations",
        job="capture",
        kind="data",
        parents=("corpus",),
        optional_parents=("answers",),
        optional_when="capture.needs_answers",
        sections=("base", "capture"),
        function="nla_ray.activation.stage:capture_activations",
    ),
    Stage(
        name="labels",
        job="label",
        kind="data",
        parents=("corpus",),
        optional_parents=("answers",),
        optional_when="capture.needs_answers",
        sections=("label",),
        function="nla_ray.label.stage:label_texts",
    ),
    Stage(
        name="readable_labels",
        job="sft",
        kind="data",
        parents=("activations", "labels"),
        sections=("readable_labels",),
        function="nla_ray.training.readable:make_readable_labels",
    ),
    Stage(
        name="reward_scorer",
        job="sft",
        kind="scorer",
        parents=("activations", "labels"),
        optional_parents=("readable_labels",),
        optional_when="reward_scorer.needs_readable_labels",
        sections=("base", "reward_scorer"),
        function="nla_ray.training.reconstruction:train_reward_scorer",
    ),
    Stage(
        name="judge_scorer",
        job="sft",
        kind="scorer",
        parents=("activations", "labels"),
        optional_parents=("readable_labels",),
        optional_when="judge_scorer.needs_readable_labels",
        sections=("base", "judge_scorer"),
        function="nla_ray.training.reconstruction:train_judge_scorer",
    ),
    Stage(
        name="linear_scorer",
        job="sft",
        kind="scorer",
        parents=("activations", "labels"),
        optional_parents=("readable_labels",),
        optional_when="judge_scorer.needs_readable_labels",
        sections=("base", "judge_scorer", "linear_scorer"),
        function="nla_ray.training.linear:fit_linear_scorer",
    ),
    Stage(
        name="sft",
        job="sft",
        kind="verbalizer",
        parents=("activations", "labels"),
        optional_parents=("readable_labels",),
        optional_when="sft.needs_readable_labels",
        sections=("base", "sft"),
        named_by="sft.artifact",
        seeded_by="sft",
        function="nla_ray.training.sft:train_sft",
    ),
    Stage(
        name="grpo",
        job="grpo",
        kind="verbalizer",
        parents=("activations", "sft", "reward_scorer", "judge_scorer"),
        sections=("base", "grpo"),
        named_by="grpo.artifact",
        seeded_by="grpo",
        passes_name_on=True,
        function="nla_ray.reinforce.stage:train_grpo",
    ),
    Stage(
        name="reward_scorer_refreshed",
        job="evaluate",
        kind="reader",
        parents=("activations", "labels", "reward_scorer", "sft"),
        optional_parents=("readable_labels",),
        optional_when="reward_scorer.needs_readable_labels",
        sections=("base", "reward_scorer", "reward_scorer_refreshed"),
        function="nla_ray.training.refreshed:refresh_reward_scorer",
    ),
    Stage(
        name="claim_confidence",
        job="evaluate",
        kind="data",
        parents=("activations", "grpo"),
        sections=("base", "claim_confidence"),
        named_by="claim_confidence_artifact",
        passes_name_on=True,
        function="nla_ray.training.claim_confidence:make_claim_confidence",
    ),
    Stage(
        name="report",
        job="evaluate",
        kind="report",
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
        optional_parents=("readable_labels", "reward_scorer_refreshed", "claim_confidence"),
        sections=("base", "evaluation"),
        named_by="report_artifact",
        function="nla_ray.report.stage:evaluate",
    ),
    Stage(
        name="inspection",
        job=INSPECTION_JOB,
        parents=("corpus", "labels"),
        function="nla_ray.score.stage:inspect_base",
    ),
    Stage(
        name="benchmark",
        job="benchmark",
        parents=("corpus",),
        function="nla_ray.bench.stage:run_benchmarks",
    ),
    Stage(name="serve", job="serve", function="nla_ray.serve.application:serve_run"),
)
"""Parents stand before what is made from them."""


def stage_named(name: str) -> Stage:
    """The row of a stage. Raises KeyError for another name."""
    return {stage.name: stage for stage in STAGES}[name]


def closure(names: Collection[str]) -> tuple[Stage, ...]:
    """The stages of these names and all their ancestors, parents first.

    >>> [stage.name for stage in closure(["labels"])]
    ['corpus', 'answers', 'labels']
    """
    wanted = set(names)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update((*stage.parents, *stage.optional_parents))
    return tuple(stage for stage in STAGES if stage.name in wanted)


def stages_of_job(job: str) -> tuple[Stage, ...]:
    """The stages that a job is named after and, before them, the closure of their parents.

    The pipeline makes the report; a job that no stage names makes nothing.

    >>> [stage.name for stage in stages_of_job("label")]
    ['corpus', 'answers', 'labels']
    """
    return closure([stage.name for stage in STAGES if stage.is_target(job)])


def job_of(artifact: str) -> str:
    """The job that makes an artifact, also one with a name of its own.

    Raises KeyError for a name that belongs to no stage.

    >>> job_of("labels"), job_of("grpo_kl0")
    ('label', 'grpo')
    """
    for stage in STAGES:
        is_variant = stage.named_by is not None and artifact.startswith(f"{stage.name}_")
        if artifact == stage.name or is_variant:
            return stage.job
    raise KeyError(artifact)


def artifacts_of_kind(kind: ArtifactKind) -> tuple[str, ...]:
    """The artifacts of a kind, in the order of the table, without variants.

    >>> artifacts_of_kind("verbalizer")
    ('sft', 'grpo')
    """
    return tuple(stage.name for stage in STAGES if stage.kind == kind)


def seed_variants(config: RunConfig, stage: Stage) -> list[RunConfig]:
    """The configurations that `--seeds` asks for of a stage, beside the one that is given.

    >>> from dataclasses import replace
    >>> from nla_ray.settings.presets import nano
    >>> variants = seed_variants(replace(nano(), seeds=(0, 1, 2)), stage_named("grpo"))
    >>> [variant.grpo.artifact for variant in variants]
    ['grpo_seed1', 'grpo_seed2']
    """
    if stage.seeded_by is None:
        return []
    own = getattr(config, stage.seeded_by).seed
    return [config.with_seed(stage.seeded_by, seed) for seed in config.seeds if seed != own]


def steps_of_job(run: Run, job: str) -> list[tuple[Stage, Run]]:
    """The stages of a job that the run wants, each with the run that it is made for.

    `--seeds` adds variants of the last training among them: of SFT in its own job, else of GRPO.
    """
    stages = [stage for stage in stages_of_job(job) if stage.is_wanted(run.config)]
    trainings = [stage for stage in stages if stage.seeded_by]
    steps: list[tuple[Stage, Run]] = []
    for stage in stages:
        steps.append((stage, run))
        if stage in trainings[-1:]:
            variants = seed_variants(run.config, stage)
            steps += [(stage, type(run)(variant)) for variant in variants]
    return steps


def make_stages(run: Run, job: str, *, strict: bool = False) -> Iterator[tuple[Stage, Any]]:
    """Make what a job makes, stage by stage; yields each with what its function returned.

    That is the manifest of a complete artifact, or what a stage without one found. A stage that is
    superfluous is left out. The targets of the job are opened always, and so compared with the
    configuration. The artifact of a parent is taken as it is when it is complete; with `strict` it
    is compared too. Seconds of what was completed here are written to TIMINGS_NAME.
    """
    steps = steps_of_job(run, job)
    stages = stages_of_job(job)
    for number, (stage, made_for) in enumerate(steps, 1):
        artifact, started = stage.artifact_of_job(job, made_for.config), time.monotonic()
        title = f"[{number}/{len(steps)}] {stage.name if made_for is run else artifact}"
        if is_superfluous(run, stage, stages):
            logger.info("%s: left out, because what is made from it exists already", title)
            continue
        result = run.find(artifact)
        is_made = stage.kind is None or artifact == stage.artifact(made_for.config)
        if result is None and not is_made:
            run.require(artifact)  # the function would make the one with a name of its own
        if result is None:
            logger.info("%s", title)
            result = stage.make(made_for)
            seconds = round(time.monotonic() - started, 1)
            logger.info("%s: %.1f s", title, seconds)
            if stage.kind is not None:
                _record_seconds(run, artifact, seconds)
        else:
            logger.info("%s: complete", title)
            if strict or stage.is_target(job):
                result = stage.make(made_for)
        yield stage, result


def is_superfluous(run: Run, stage: Stage, stages: Sequence[Stage]) -> bool:
    """Whether nothing is to be made from an optional parent: what takes it exists without it."""
    takers = [other for other in stages if stage.name in other.optional_parents]
    if not takers or any(stage.name in other.parents for other in stages):
        return False
    recorded = [run.recorded(other.artifact(run.config)) for other in takers]
    name = stage.parent_artifact(run.config)
    return all(made is not None and name not in made[1] for made in recorded)


def pipeline_timings(run: Run) -> dict[str, float]:
    """Seconds of what the pipeline makes, by artifact: trials and other reports are left out."""
    artifacts = {
        stage.artifact_of_job(PIPELINE_JOB, made_for.config)
        for stage, made_for in steps_of_job(run, PIPELINE_JOB)
    }
    return {name: seconds for name, seconds in read_timings(run).items() if name in artifacts}


def read_timings(run: Run) -> dict[str, float]:
    """Seconds by artifact; of an interrupted stage those of the attempt that completed it."""
    location = run.root / TIMINGS_NAME
    return json.loads(location.read_text()) if location.exists() else {}


def _record_seconds(run: Run, artifact: str, seconds: float) -> None:
    timings = {**read_timings(run), artifact: seconds}
    (run.root / TIMINGS_NAME).write_text(json.dumps(timings, indent=1) + "\n")
