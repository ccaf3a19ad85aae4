"""Which settings are an artifact's identity, which are not, and what older versions recorded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import plain_nano

from nla_ray.run.artifact import Run
from nla_ray.run.manifest import Manifest
from nla_ray.run.recipe import (
    NOT_IN_RECIPE,
    NOT_OF_ARTIFACT,
    TRAINING_DTYPE,
    config_differences,
    recipe_differences,
)
from nla_ray.run.stages import STAGES, stage_named
from nla_ray.settings.config import ComputeConfig, PretrainRunConfig, config_hash, to_dict
from nla_ray.settings.precision import processor_has_bf16, training_dtype
from nla_ray.settings.presets import PRESETS, nano, override

RECORDED = json.loads((Path(__file__).parent / "recorded_sections.json").read_text())
"""Sections of the presets as manifests hold them that were written before there were recipes."""
HASHED = sorted({section for stage in STAGES for section in stage.sections})


def run_at(folder: Path, **sections: dict) -> Run:
    return Run(dataclasses.replace(override(plain_nano(), **sections), run_dir=str(folder)))


def write_manifest_as_before(run: Run, name: str, config: dict, parents: dict[str, str]) -> None:
    """A complete artifact, hashed over its whole configuration as the first versions did."""
    whole = config_hash({"config": config, "parents": parents})
    manifest = Manifest(name=name, config=config, config_hash=whole, parents=parents)
    (run.root / name / "manifest.json").write_text(manifest.to_json())


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names.

    >>> dotted({"sft": {"lora": {"rank": 4}}})
    {'sft.lora.rank': 4}
    """
    names = {}
    for key, value in values.items():
        inner = dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        names |= inner if inner is not None else {f"{prefix}{key}": value}
    return names


def changed(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of nested values in which the one of this dotted name is another."""
    key, _, rest = name.partition(".")
    return {**values, key: changed(values[key], rest) if rest else "another"}


# Which settings -----------------------------------------------------------------------------------


def test_every_setting_of_a_hashed_section_is_compared_unless_the_table_gives_a_reason() -> None:
    current = to_dict(PretrainRunConfig.of(nano()))
    sections = {name: current[name] for name in HASHED}
    names = set(dotted(sections)) - {TRAINING_DTYPE}
    assert names > set(NOT_IN_RECIPE) and all(NOT_IN_RECIPE.values())
    for name in names:
        found = [
            line.partition(":")[0]
            for line in recipe_differences("grpo", sections, changed(sections, name))
        ]
        assert found == ([] if name in NOT_IN_RECIPE else [name])


@pytest.mark.parametrize(
    ("artifact", "name"),
    [(artifact, name) for artifact, names in NOT_OF_ARTIFACT.items() for name in names],
)
def test_a_setting_that_shapes_other_artifacts_alone_is_not_compared(
    artifact: str, name: str
) -> None:
    sections = stage_named(artifact).sections
    config = {section: RECORDED["nano"][section] for section in sections}
    config["base"] = {**config["base"], "training_dtype": "float32"}  # `auto` equals any
    assert name.partition(".")[0] in sections
    assert recipe_differences(artifact, config, changed(config, name)) == []
    assert recipe_differences("sft", config, changed(config, name)) != []


def test_a_setting_that_an_artifact_is_older_than_has_its_default() -> None:
    grpo = RECORDED["nano"]["grpo"]
    older = {name: value for name, value in grpo.items() if name != "evidence_weight"}
    default = {**grpo, "evidence_weight": 0.0}
    assert recipe_differences("grpo", {"grpo": older}, {"grpo": default}) == []
    assert recipe_differences("grpo", {"grpo": older}, {"grpo": grpo}) == [
        "grpo.evidence_weight: there 0.0, here 0.05"
    ]


def test_a_corpus_made_before_families_is_complete_with_and_without_them() -> None:
    older = {"corpus": RECORDED["nano"]["corpus"]}
    for families in (True, False):
        config = to_dict(override(nano(), corpus={"families": families}))
        assert recipe_differences("corpus", older, {"corpus": config["corpus"]}) == []
    joined = to_dict(nano())
    assert joined["corpus"]["families"] and recipe_differences("corpus", joined, config) == [
        "corpus.families: there True, here False"
    ]


# What older versions made -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", RECORDED)
def test_what_a_preset_made_before_is_what_the_same_settings_make_now(preset: str) -> None:
    settings = {**PRESETS, "nano": plain_nano}[preset]()
    current = to_dict(PretrainRunConfig.of(settings))
    for section, recorded in RECORDED[preset].items():
        assert recipe_differences("grpo", {section: recorded}, {section: current[section]}) == []


def test_artifacts_that_were_hashed_whole_are_complete_for_fewer_machines(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    parents = {}
    for name in ("activations", "labels", "reward_scorer", "judge_scorer", "sft", "grpo"):
        stage = stage_named(name)
        config = {section: RECORDED["nano"][section] for section in stage.sections}
        if name == "activations":
            write_manifest_as_before(run, "corpus", {"corpus": RECORDED["nano"]["corpus"]}, {})
        parents = {parent: run.require(parent).fingerprint for parent in stage.parents}
        write_manifest_as_before(run, name, config, parents)
    fewer = run_at(
        tmp_path,
        capture={"num_actors": 1, "batch_tokens": 512},
        corpus={"shard_rows": 64},
        grpo={"num_rollout_actors": 1, "num_scorer_actors": 3, "micro_batch_size": 8},
    )
    for name in ("corpus", "activations", "labels", "reward_scorer", "judge_scorer", "sft", "grpo"):
        assert fewer.open(name).complete, name
    with pytest.raises(ValueError, match=r"grpo\.group_size: there 4, here 8"):
        run_at(tmp_path, grpo={"group_size": 8}).open("grpo")


def test_an_interrupted_stage_goes_on_with_fewer_machines(tmp_path: Path) -> None:
    run = run_at(tmp_path, grpo={"num_rollout_actors": 4})
    run.open_artifact("grpo", "base", "grpo")
    fewer = run_at(tmp_path, grpo={"num_rollout_actors": 1, "save_steps": 5})
    manifest = fewer.open_artifact("grpo", "base", "grpo").publish()
    assert manifest.config["grpo"]["num_rollout_actors"] == 1, "what it ended with is recorded"
    again = run.open_artifact("grpo", "base", "grpo")
    assert again.manifest == manifest
    with pytest.raises(ValueError, match=r"grpo\.beta: there 0\.05, here 0\.5"):
        run_at(tmp_path, grpo={"beta": 0.5}).open_artifact("grpo", "base", "grpo")


def test_the_same_recipe_and_files_have_the_same_fingerprint(tmp_path: Path) -> None:
    one_actor, many_actors, other_layers = (
        run_at(tmp_path / str(number), capture=capture)
        .open_artifact("activations", "base", "capture")
        .publish()
        for number, capture in enumerate(({}, {"num_actors": 9}, {"layers": (1,)}))
    )
    assert one_actor.fingerprint == many_actors.fingerprint != other_layers.fingerprint


# One precision ------------------------------------------------------------------------------------


def test_a_manifest_names_the_precision_that_auto_stood_for(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    assert nano().base.training_dtype == "auto"
    expected = "bfloat16" if processor_has_bf16() else "float32"
    assert run.config.base.training_dtype == expected
    manifest = run.open_artifact("sft", "base", "sft").publish()
    assert manifest.config["base"]["training_dtype"] == expected


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_keeps_the_precision_it_began_with_on_any_processor(
    tmp_path: Path, dtype: str, published: bool
) -> None:
    first = run_at(tmp_path, base={"training_dtype": dtype})
    artifact = first.open_artifact("reward_scorer", "base", "reward_scorer")
    if published:
        artifact.publish()
    later = run_at(tmp_path)
    assert later.config.base.training_dtype == dtype
    assert later.open_artifact("reward_scorer", "base", "reward_scorer").complete == published
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(ValueError, match=rf"base\.training_dtype: there '{dtype}', here '{other}'"):
        run_at(tmp_path, base={"training_dtype": other}).open_artifact(
            "reward_scorer", "base", "reward_scorer"
        )


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_an_artifact_that_recorded_auto_goes_with_any_precision(tmp_path: Path, dtype: str) -> None:
    run = run_at(tmp_path, base={"training_dtype": dtype})
    config = {name: RECORDED["nano"][name] for name in ("base", "sft")}
    assert config["base"]["training_dtype"] == "auto"
    write_manifest_as_before(run, "sft", config, {})
    assert run.open_artifact("sft", "base", "sft").complete


def test_auto_is_bfloat16_for_trainers_on_gpus_and_the_processors_word_for_others() -> None:
    of_processor = "bfloat16" if processor_has_bf16() else "float32"
    on_gpu = dataclasses.replace(nano(), compute=ComputeConfig(trainer_gpus=1))
    assert training_dtype(on_gpu) == "bfloat16"
    assert training_dtype(override(on_gpu, base={"device": "cpu"})) == of_processor
    assert training_dtype(nano()) == of_processor
    assert training_dtype(override(on_gpu, base={"training_dtype": "float32"})) == "float32"


def test_differences_name_what_only_one_side_has() -> None:
    assert config_differences({"a": 1}, {"b": {"c": 2}}) == [
        "a: there 1, here nothing",
        "b: there nothing, here {'c': 2}",
    ]
