"""The table of stages: what jobs make from it, and that every name in it exists."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
from pathlib import Path

import pytest
from tiny import plain_nano

from nla_ray.plan.formulas import FORMULAS
from nla_ray.plan.text import describe_plan
from nla_ray.run import stages
from nla_ray.run.artifact import Run
from nla_ray.run.manifest import Manifest
from nla_ray.run.stages import (
    STAGES,
    Stage,
    artifacts_of_kind,
    closure,
    job_of,
    make_stages,
    pipeline_timings,
    read_timings,
    stage_named,
    stages_of_job,
)
from nla_ray.settings.config import PretrainRunConfig, RunConfig
from nla_ray.settings.presets import override

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
DATA = ("corpus", "activations", "labels")
OPTIONAL = ("answers", "readable_labels")
"""Stages that some settings ask for."""
SCORERS = ("reward_scorer", "judge_scorer", "linear_scorer")
LAST = ("reward_scorer_refreshed", "claim_confidence", "report")
PIPELINE = ("corpus", "answers", *DATA[1:], "readable_labels", *SCORERS, "sft", "grpo", *LAST)


def names(rows: tuple[Stage, ...]) -> tuple[str, ...]:
    return tuple(stage.name for stage in rows)


# The table ----------------------------------------------------------------------------------------


def test_every_function_section_parent_job_and_plan_that_the_table_names_exists() -> None:
    sections = {field.name for field in dataclasses.fields(PretrainRunConfig)}
    config = PretrainRunConfig.of(plain_nano())
    for number, stage in enumerate(STAGES):
        function = pkgutil.resolve_name(stage.function)
        assert next(iter(inspect.signature(function).parameters)) == "run"
        assert set(stage.sections) <= sections
        parents = {*stage.parents, *stage.optional_parents}
        assert parents <= set(names(STAGES[:number])), "parents stand before"
        assert stage.job in JOBS
        assert stage.artifact(config) == stage.name, "a preset names no artifact of its own"
    assert set(FORMULAS) == set(names(STAGES))
    assert len(set(names(STAGES))) == len(STAGES)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("pretrain", ("base",)),
        ("corpus", ("corpus",)),
        ("capture", ("corpus", "answers", "activations")),
        ("label", ("corpus", "answers", "labels")),
        ("sft", PIPELINE[:9]),
        ("grpo", (*PIPELINE[:7], *PIPELINE[8:10])),
        ("evaluate", PIPELINE),
        ("pipeline", PIPELINE),
        ("inspect_base", ("corpus", "answers", "labels", "inspection")),
        ("benchmark", ("corpus", "benchmark")),
        ("serve", ("serve",)),
        ("tour", ()),
        ("export", ()),
    ],
)
def test_a_job_makes_the_closure_of_its_stages_parents_first_and_plans_just_that(
    job: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert names(stages_of_job(job)) == expected
    config = dataclasses.replace(plain_nano(), run_dir=str(tmp_path))
    lines = describe_plan(config, job).splitlines()
    wanted = tuple(name for name in expected if name not in OPTIONAL)
    assert tuple(line for line in lines[1:] if not line.startswith(" ")) == wanted


def test_readable_labels_are_made_where_sft_is_taught_them(tmp_path: Path) -> None:
    plain, taught = (
        run_at(tmp_path, plain_nano()),
        run_at(tmp_path, plain_nano(), sft={"claims": "replaced"}),
    )
    for run, is_made in ((plain, False), (taught, True)):
        steps = [stage.name for stage, _ in stages.steps_of_job(run, "sft")]
        assert ("readable_labels" in steps) == is_made
    for name in ("activations", "labels", "readable_labels"):
        taught.open_artifact(name).publish()
    assert set(plain.parents_of("sft")) == {"activations", "labels"}
    assert set(taught.parents_of("sft")) == {"activations", "labels", "readable_labels"}


def test_answers_are_made_where_positions_are_in_them_and_labels_need_no_activations(
    tmp_path: Path,
) -> None:
    asked = run_at(tmp_path, plain_nano(), capture={"positions": "generated:2"})
    plain = run_at(tmp_path / "plain", plain_nano())
    for run, is_made in ((plain, False), (asked, True)):
        for job in ("capture", "label", "pipeline"):
            steps = [stage.name for stage, _ in stages.steps_of_job(run, job)]
            assert ("answers" in steps) == is_made
    asked.open_artifact("corpus").publish()
    with pytest.raises(ValueError, match=r"artifact 'answers': got none .* jobs/capture\.py"):
        asked.open("labels")
    asked.open("answers").publish()
    for name in ("activations", "labels"):
        assert set(asked.open(name).publish().parents) == {"corpus", "answers"}
    # Later jobs take what is there, whatever they are told of positions.
    unaware = run_at(tmp_path, plain_nano())
    assert "answers" not in [stage.name for stage, _ in stages.steps_of_job(unaware, "sft")]
    assert set(unaware.parents_of("sft")) == {"activations", "labels"}


def test_each_stage_is_made_from_readable_labels_where_its_own_settings_ask(tmp_path: Path) -> None:
    run = run_at(tmp_path, plain_nano(), judge_scorer={"replaced_share": 0.5})
    assert "readable_labels" in [stage.name for stage, _ in stages.steps_of_job(run, "grpo")]
    for name in ("activations", "labels", "readable_labels"):
        run.open_artifact(name).publish()
    for name in (*SCORERS, "sft", "reward_scorer_refreshed"):
        is_asked = name in ("judge_scorer", "linear_scorer")
        assert ("readable_labels" in run.parents_of(name)) == is_asked, name
        run.open(name).publish()


def test_a_report_is_made_from_readable_labels_where_its_sft_was(tmp_path: Path) -> None:
    """Whatever the flags say: an artifact that exists is taken as it is."""
    plain, taught = (
        run_at(tmp_path, plain_nano()),
        run_at(tmp_path, plain_nano(), sft={"claims": "replaced"}),
    )
    for name in (*DATA, *SCORERS, "readable_labels", "grpo"):
        taught.open_artifact(name).publish()
    with pytest.raises(ValueError, match=r"artifact 'sft': got none"):
        taught.parents_of("report")
    taught.open("sft").publish()
    for run in (plain, taught):
        assert "readable_labels" in run.parents_of("report")
    (taught.root / "sft").delete()
    plain.open("sft").publish()
    for run in (plain, taught):
        assert "readable_labels" not in run.parents_of("report")


def test_the_report_of_an_arm_has_the_confidence_of_that_arms_claims(tmp_path: Path) -> None:
    main, arm = run_at(tmp_path, plain_nano()), run_at(tmp_path, plain_nano(), grpo={"name": "kl0"})
    for name in (*DATA, *SCORERS, "sft", "grpo", "grpo_kl0"):
        main.open_artifact(name).publish()
    for run in (main, arm):
        run.open("claim_confidence").publish()
    own = {"claim_confidence", "claim_confidence_kl0"}
    assert own & set(main.parents_of("report")) == {"claim_confidence"}
    assert own & set(arm.parents_of("report")) == {"claim_confidence_kl0"}


def test_sft_is_not_begun_without_the_labels_that_it_is_to_be_taught(tmp_path: Path) -> None:
    taught = run_at(tmp_path, plain_nano(), sft={"claims": "replaced"})
    for name in ("activations", "labels"):
        taught.open_artifact(name).publish()
    with pytest.raises(ValueError, match=r"artifact 'readable_labels': got none .* jobs/sft\.py"):
        taught.open("sft")
    assert taught.started("sft") is None


def test_a_closure_holds_every_ancestor_once_in_the_order_of_the_table() -> None:
    assert names(closure(["labels", "reward_scorer"])) == PIPELINE[:6]
    assert closure([]) == ()


@pytest.mark.parametrize(
    ("artifact", "job"),
    [
        ("activations", "capture"),
        ("judge_scorer", "sft"),
        ("sft_few", "sft"),
        ("grpo_no_contrast_kl0", "grpo"),
        ("report_validation", "evaluate"),
    ],
)
def test_an_artifact_with_a_name_of_its_own_belongs_to_the_job_of_its_stage(
    artifact: str, job: str
) -> None:
    assert job_of(artifact) == job


@pytest.mark.parametrize("name", ["corpus_two", "serving", "grpos"])
def test_a_name_of_no_stage_belongs_to_no_job(name: str) -> None:
    with pytest.raises(KeyError):
        job_of(name)


def test_kinds_are_what_the_report_and_serving_choose_from() -> None:
    assert artifacts_of_kind("scorer") == ("reward_scorer", "judge_scorer", "linear_scorer")
    assert artifacts_of_kind("verbalizer") == ("sft", "grpo")


def test_grpo_passes_its_name_on_and_sft_does_not() -> None:
    config = override(plain_nano(), sft={"name": "few"}, grpo={"contrast": "none", "name": "kl0"})
    sft, grpo, report = (stage_named(name) for name in ("sft", "grpo", "report"))
    assert (sft.artifact(config), sft.parent_artifact(config)) == ("sft_few", "sft")
    assert grpo.artifact(config) == grpo.parent_artifact(config) == "grpo_no_contrast_kl0"
    assert report.artifact(config) == "report_no_contrast_kl0"


def test_the_pipelines_seconds_are_those_of_its_own_artifacts(tmp_path: Path) -> None:
    run = run_at(tmp_path, plain_nano())
    assert pipeline_timings(run) == {}
    seconds = {"base": 9.0, "corpus": 1.5, "grpo": 3.0, "grpo_kl0": 4.0, "report_validation": 5.0}
    (run.root / stages.TIMINGS_NAME).write_text(json.dumps(seconds))
    assert pipeline_timings(run) == {"corpus": 1.5, "grpo": 3.0}


def test_the_pipelines_seconds_hold_those_of_its_seeds_and_of_the_report_over_them(
    tmp_path: Path,
) -> None:
    run = Run(dataclasses.replace(plain_nano(), run_dir=str(tmp_path), seeds=(0, 1)))
    seconds = {"grpo": 3.0, "grpo_seed1": 4.0, "grpo_seed2": 5.0, "report": 6.0}
    (run.root / stages.TIMINGS_NAME).write_text(json.dumps({**seconds, "report_seeds": 7.0}))
    assert pipeline_timings(run) == {"grpo": 3.0, "grpo_seed1": 4.0, "report_seeds": 7.0}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "report"),
        ({"seeds": (0, 1)}, "report_seeds"),
        ({"compare": ("theirs=descriptions.jsonl",)}, "report_theirs"),
    ],
)
def test_the_pipeline_and_the_reports_job_make_it_under_the_name_that_the_settings_give_it(
    settings: dict, name: str
) -> None:
    config, report = dataclasses.replace(plain_nano(), **settings), stage_named("report")
    for job in ("pipeline", "evaluate"):
        assert report.is_target(job) and report.artifact_of_job(job, config) == name
    assert not stage_named("grpo").is_target("pipeline")


def test_a_missing_parent_is_asked_for_by_its_own_name_when_a_variant_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making it would make the variant, of which nothing is made."""
    [sft] = [stage for stage in stages.STAGES if stage.name == "sft"]
    table = (
        dataclasses.replace(sft, parents=(), function=f"{__name__}:make_second"),
        Stage(name="after", job="after", parents=("sft",), function=f"{__name__}:look"),
    )
    monkeypatch.setattr(stages, "STAGES", table)
    run = run_at(tmp_path, plain_nano(), sft={"name": "few"})
    with pytest.raises(ValueError, match=r"artifact 'sft': got none .* jobs/sft\.py"):
        list(make_stages(run, "after"))


# Making -------------------------------------------------------------------------------------------

MADE: list[str] = []
"""Stages whose function did work, in order."""


def make_first(run: Run) -> Manifest:
    return publish(run, "first")


def make_second(run: Run) -> Manifest:
    return publish(run, "second")


def look(run: Run) -> dict[str, int]:
    MADE.append("look")
    return {"found": 3}


def publish(run: Run, name: str) -> Manifest:
    artifact = run.open(name)
    if artifact.manifest is None:
        MADE.append(name)
        return artifact.publish()
    return artifact.manifest


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of a table of three stages: `first`, `second` made from it, and `look`."""
    table = (
        Stage(
            name="first",
            job="begin",
            kind="data",
            sections=("corpus",),
            function=f"{__name__}:make_first",
        ),
        Stage(
            name="second",
            job="go_on",
            kind="data",
            sections=("sft",),
            parents=("first",),
            function=f"{__name__}:make_second",
        ),
        Stage(name="look", job="look", parents=("first",), function=f"{__name__}:look"),
    )
    monkeypatch.setattr(stages, "STAGES", table)
    MADE.clear()
    return run_at(tmp_path, plain_nano())


def run_at(folder: Path, config: RunConfig, **sections: dict) -> Run:
    return Run(dataclasses.replace(override(config, **sections), run_dir=str(folder)))


def test_making_goes_parents_first_skips_what_is_complete_and_tells_where_it_is(
    run: Run, told: list[str]
) -> None:
    made = list(make_stages(run, "go_on"))
    assert [stage.name for stage, _ in made] == MADE == ["first", "second"]
    assert [manifest for _, manifest in made] == [run.find("first"), run.find("second")]
    assert set(made[1][1].parents) == {"first"}
    assert told[0] == "[1/2] first" and told[1].startswith("[1/2] first: ")
    assert list(make_stages(run, "go_on")) == made and MADE == ["first", "second"]
    assert told[-2:] == ["[1/2] first: complete", "[2/2] second: complete"]


def test_a_stage_without_an_artifact_is_made_every_time_and_yields_what_it_found(run: Run) -> None:
    for _ in range(2):
        *_, (stage, found) = make_stages(run, "look")
        assert stage.name == "look" and found == {"found": 3}
    assert MADE == ["first", "look", "look"]
    assert set(read_timings(run)) == {"first"}


def test_a_jobs_own_stage_is_compared_and_a_complete_parent_only_when_it_is_strict(
    run: Run, tmp_path: Path
) -> None:
    list(make_stages(run, "go_on"))
    changed = run_at(tmp_path, plain_nano(), corpus={"seed": 7})
    assert [stage.name for stage, _ in make_stages(changed, "go_on")] == ["first", "second"]
    with pytest.raises(ValueError, match=r"artifact 'first' .*corpus\.seed: there 0, here 7"):
        list(make_stages(changed, "go_on", strict=True))
    with pytest.raises(ValueError, match=r"corpus\.seed: there 0, here 7"):
        list(make_stages(changed, "begin"))
    with pytest.raises(ValueError, match=r"sft\.epochs: there 2, here 5"):
        list(make_stages(run_at(tmp_path, plain_nano(), sft={"epochs": 5}), "go_on"))


def test_seconds_are_recorded_for_what_a_job_completed_and_kept_when_it_runs_again(
    run: Run,
) -> None:
    assert read_timings(run) == {}
    list(make_stages(run, "begin"))
    first = read_timings(run)
    assert set(first) == {"first"} and first["first"] >= 0
    list(make_stages(run, "go_on"))
    both = read_timings(run)
    assert set(both) == {"first", "second"} and both["first"] == first["first"]


# Optional parents ---------------------------------------------------------------------------------


@pytest.fixture
def extended(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run of a later version: `second` is made from the new stage `extra` as well."""
    first, second, look = stages.STAGES
    extra = dataclasses.replace(first, name="extra", function=f"{__name__}:make_extra")
    changed = dataclasses.replace(second, optional_parents=("extra",))
    monkeypatch.setattr(stages, "STAGES", (first, extra, changed, look))
    return run


def make_extra(run: Run) -> Manifest:
    return publish(run, "extra")


def test_an_optional_parent_is_made_and_taken_where_nothing_is_there_yet(extended: Run) -> None:
    made = list(make_stages(extended, "go_on"))
    assert [stage.name for stage, _ in made] == MADE == ["first", "extra", "second"]
    assert set(extended.require("second").parents) == {"first", "extra"}
    assert list(make_stages(extended, "go_on", strict=True)) == made
    assert MADE == ["first", "extra", "second"]


@pytest.mark.parametrize("begun", [False, True])
def test_what_an_earlier_version_made_or_began_stays_without_the_optional_parent(
    run: Run, begun: bool, request: pytest.FixtureRequest, told: list[str]
) -> None:
    list(make_stages(run, "begin"))
    if begun:
        run.open("second")
    else:
        list(make_stages(run, "go_on"))
    before = run.find("second")
    extended = request.getfixturevalue("extended")
    made = list(make_stages(extended, "go_on", strict=True))
    assert [stage.name for stage, _ in made] == ["first", "second"] and "extra" not in MADE
    assert extended.find("extra") is None
    assert "[2/3] extra: left out, because what is made from it exists already" in told
    assert set(extended.require("second").parents) == {"first"}
    assert before is None if begun else extended.require("second") == before


# Seeds --------------------------------------------------------------------------------------------


def make_sft(run: Run) -> Manifest:
    artifact = run.open("sft")
    if artifact.manifest is None:
        MADE.append(f"{artifact.name} of seed {run.config.sft.seed}")
        return artifact.publish()
    return artifact.manifest


def test_seeds_are_trained_one_after_another_from_the_same_parents(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = stages.STAGES
    [sft] = [stage for stage in STAGES if stage.name == "sft"]
    sft = dataclasses.replace(
        sft, parents=("first",), optional_parents=(), function=f"{__name__}:make_sft"
    )
    monkeypatch.setattr(stages, "STAGES", (first, sft))
    seeded = Run(dataclasses.replace(run.config, seeds=(0, 2, 5)))
    made = list(make_stages(seeded, "sft"))
    trained = ["sft of seed 0", "sft_seed2 of seed 2", "sft_seed5 of seed 5"]
    assert ["first", *trained] == MADE
    assert [manifest.name for _, manifest in made[1:]] == ["sft", "sft_seed2", "sft_seed5"]
    assert {manifest.parents["first"] for _, manifest in made[1:]} == {
        seeded.require("first").fingerprint
    }
    assert list(make_stages(seeded, "sft")) == made and ["first", *trained] == MADE
    assert set(read_timings(seeded)) == {"first", "sft", "sft_seed2", "sft_seed5"}
    again = Run(dataclasses.replace(run.config, seeds=(7,)))
    assert [manifest.name for _, manifest in make_stages(again, "sft")][1:] == ["sft", "sft_seed7"]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("sft", [*DATA, *SCORERS, "sft", "sft_seed1"]),
        ("grpo", [*DATA, *SCORERS[:2], "sft", "grpo", "grpo_seed1"]),
        ("pipeline", [*DATA, *SCORERS, "sft", "grpo", "grpo_seed1", *LAST]),
        ("label", ["corpus", "labels"]),
    ],
)
def test_a_jobs_last_training_is_the_one_that_seeds_vary(
    job: str, expected: list[str], tmp_path: Path
) -> None:
    config = dataclasses.replace(plain_nano(), run_dir=str(tmp_path), seeds=(0, 1))
    lines = describe_plan(config, job).splitlines()
    assert [line for line in lines[1:] if not line.startswith(" ")] == expected
