"""cluster.yaml: valid for `ray up`, room for the 7B preset, and the versions of pyproject."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from nla_ray.cluster.resources import demand, unmet_demands
from nla_ray.settings.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NODE_TYPES = CONFIG["available_node_types"]


def nodes(*, at_most: bool = True) -> list[dict[str, float]]:
    """Resources of every node the cluster may have at the same time."""
    return [
        node["resources"]
        for name, node in NODE_TYPES.items()
        if name != CONFIG["head_node_type"]
        for _ in range(node["max_workers"] if at_most else 1)
    ]


def test_rays_own_schema_accepts_it() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(copy.deepcopy(CONFIG)))


def test_rays_own_schema_would_reject_a_misspelt_key() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(ValidationError):
        validate_config({**CONFIG, "max_worker": 3})


def test_it_scales_from_nothing_to_its_limits() -> None:
    workers = {name: node for name, node in NODE_TYPES.items() if name != CONFIG["head_node_type"]}
    assert all(node["min_workers"] < node["max_workers"] for node in workers.values())
    assert CONFIG["max_workers"] >= sum(node["max_workers"] for node in workers.values())
    assert CONFIG["idle_timeout_minutes"] > 0


def test_the_head_takes_no_work() -> None:
    assert NODE_TYPES[CONFIG["head_node_type"]]["resources"] == {"CPU": 0}
    assert any(
        "--head" in command and "--num-cpus=0" in command
        for command in CONFIG["head_start_ray_commands"]
    )


@pytest.mark.parametrize("kind", ["trainer", "rollout", "scorer", "capture", "serve"])
def test_every_process_of_the_7b_preset_fits_some_node_type(kind: str) -> None:
    process = demand(PRESETS["qwen2.5-7b"]().compute, kind)
    assert unmet_demands([process], nodes(at_most=False)) == []


def test_every_stage_of_the_7b_preset_fits_the_cluster_at_once() -> None:
    config = PRESETS["qwen2.5-7b"]()
    compute, grpo = config.compute, config.grpo
    stages = {
        "capture": [demand(compute, "capture", config.capture.num_actors)],
        "training": [demand(compute, "trainer", compute.trainer_workers)],
        "grpo": [
            demand(compute, "trainer", compute.trainer_workers),
            demand(compute, "rollout", grpo.num_rollout_actors),
            demand(compute, "scorer", grpo.num_scorer_actors),
        ],
    }
    for name, demands in stages.items():
        assert unmet_demands(demands, nodes()) == [], name


def test_each_kind_of_gpu_process_has_nodes_of_its_own() -> None:
    compute = PRESETS["qwen2.5-7b"]().compute
    marks = {compute.trainer_resource, compute.rollout_resource, compute.capture_resource}
    assert len(marks) == 3
    for mark in marks:
        assert sum(mark in node["resources"] for node in NODE_TYPES.values()) == 1


def requirements(text: str) -> dict[str, str]:
    """Package -> version specifier of every requirement in a text; extras do not count."""
    found = re.findall(r"([A-Za-z][\w.-]*)(?:\[[\w,-]*\])?((?:==|>=|~=)[\w.*]+)", text)
    return dict(found)


def test_nodes_install_the_versions_of_pyproject() -> None:
    assert requirements(" ".join(CONFIG["setup_commands"])) == requirements(
        " ".join(PROJECT["dependencies"])
    )


def test_images_carry_the_ray_version_and_the_python_of_pyproject() -> None:
    ray_version = (
        requirements(" ".join(PROJECT["dependencies"]))["ray"].removeprefix("==").removesuffix("*")
    )
    python = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    for name in ("head_image", "worker_image"):
        assert CONFIG["docker"][name].startswith(f"rayproject/ray:{ray_version}")
        assert f"-py{python}-" in CONFIG["docker"][name]


def test_dependencies_are_pinned_exactly_or_to_a_minor_version() -> None:
    loose = [requirement for requirement in PROJECT["dependencies"] if "==" not in requirement]
    assert all(requirement.startswith("fsspec") for requirement in loose), (
        "fsspec's versions are dates; datasets caps it"
    )
