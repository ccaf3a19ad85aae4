"""`--compare` with a verbalizer that is trained whole, in the layout of the reference."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from nla_ray.export.stage import export_run
from nla_ray.report.stage import check_corpus, make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.settings.config import ExportConfig, RunConfig


@pytest.fixture
def exported(published_run: RunConfig, tmp_path: Path) -> Path:
    export_run(Run(published_run), ExportConfig(output=str(tmp_path / "export")))
    return tmp_path / "export"


def compared_run(published_run: RunConfig, folder: Path, theirs: Path) -> Run:
    shutil.copytree(published_run.run_dir, folder)
    compare = (f"theirs={theirs}",)
    return Run(dataclasses.replace(published_run, run_dir=str(folder), compare=compare))


def test_the_runs_own_verbalizer_as_a_whole_model_is_worth_the_same(
    published_run: RunConfig, exported: Path, tmp_path: Path
) -> None:
    run = compared_run(published_run, tmp_path / "run", exported / "av")
    check_corpus(run)
    make_report(run.config)
    report = read_report(run)
    assert report["results"]["theirs"] == report["results"]["grpo"]
    assert report["paired"]["theirs-grpo"]["judge"]["delta"]["value"] == 0.0
    prompt = report["protocols"]["theirs"]["prompt"]
    assert prompt["of_checkpoint"] and prompt["layer"] == published_run.base.layer
    assert report["notes"] == [
        "theirs: nothing is known of what it was trained on; test documents may be among it."
    ]


def test_one_of_another_layer_or_base_is_refused_before_anything_is_made(
    published_run: RunConfig, exported: Path, tmp_path: Path
) -> None:
    run = compared_run(published_run, tmp_path / "run", exported / "av")
    file = exported / "av" / "nla_meta.yaml"
    manifest = yaml.safe_load(file.read_text())
    for changes, message in (
        ({"extraction_layer_index": 0}, r"--compare theirs: layer of .*: got 0, expected 1"),
        ({"nla_ray": {"base_digest": "0"}}, r"--compare theirs: weights of the base of .* got '0'"),
        ({"role": "ar"}, r"role: got 'ar', expected one of av, actor"),
    ):
        file.write_text(yaml.safe_dump({**manifest, **changes}))
        with pytest.raises(ValueError, match=message):
            check_corpus(run)
