"""Patch-back in a report: the base's own answers, row by row, and kept when it is stopped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nla_ray.activation.patching import Patcher
from nla_ray.activation.positions import TextEncoder
from nla_ray.activation.stage import answer_texts, capture_activations, load_activations, load_stats
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.description.record import Description
from nla_ray.label.stage import drawn_labels
from nla_ray.report.controls import SCORERS
from nla_ray.report.patch_back import patch_reconstructions
from nla_ray.report.readings import Readings
from nla_ray.report.rendering.markdown import to_markdown
from nla_ray.report.stage import make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.settings.config import CaptureConfig, RunConfig

ROWS = 6


@pytest.fixture
def run_with_patches(published_run: RunConfig, tmp_path: Path) -> Callable[..., Run]:
    def make(name: str, patch_rows: int = ROWS) -> Run:
        shutil.copytree(published_run.run_dir, tmp_path / name)
        evaluation = dataclasses.replace(
            published_run.evaluation, patch_rows=patch_rows, samples=0, bootstrap_resamples=50
        )
        return Run(
            dataclasses.replace(published_run, run_dir=str(tmp_path / name), evaluation=evaluation)
        )

    return make


def test_the_divergences_are_those_of_the_whole_base_with_the_stream_overwritten(
    run_with_patches: Callable[..., Run],
) -> None:
    run = run_with_patches("run")
    make_report(run.config)
    report = read_report(run)
    gold = report["results"]["gold"]["judge"]
    assert gold["recovered"]["n"] == gold["patched_divergence"]["n"] == ROWS
    assert report["results"]["shuffled"]["judge"]["recovered_excess"]["value"] == 0.0
    assert "recovered" in report["paired"]["grpo-sft"]["judge"]
    generator = torch.Generator().manual_seed(run.config.evaluation.seed)
    test = load_activations(run, "test")
    rows = sorted(torch.randperm(len(test), generator=generator)[:ROWS].tolist())
    with run.local_copy("judge_scorer", run.require("judge_scorer")) as folder:
        judge = Reconstructor.load(run.config.base, folder)
    labels = drawn_labels(run, "test")
    read = judge.reconstruct([labels[test.text_ids[row]] for row in rows])
    mean = torch.tensor(load_stats(run)["mean_direction"])
    model, encoder = (
        load_backbone(run.config.base),
        TextEncoder(load_tokenizer(run.config.base), run.config.base, CaptureConfig()),
    )
    by_label, by_mean = [], []
    for row, reconstruction in zip(rows, read, strict=True):
        ids = encoder.encode(test.text_ids[row], test.texts[row]).ids
        length = test.vectors[row].norm()
        for kept, vector in ((by_label, reconstruction), (by_mean, mean)):
            kept.append(divergence(model, run.config.base.layer, ids, vector, length))
    assert gold["patched_divergence"]["value"] == pytest.approx(sum(by_label) / ROWS, abs=1e-5)
    expected = 1 - sum(by_label) / sum(by_mean)
    assert gold["recovered"]["value"] == pytest.approx(expected, abs=1e-3)


def divergence(
    model, layer: int, ids: list[int], vector: torch.Tensor, length: torch.Tensor
) -> float:
    def overwrite(block, inputs, stream):
        stream = stream.clone()
        stream[:, -1] = vector / vector.norm() * length
        return stream

    with torch.no_grad():
        clean = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        hook = model.model.layers[layer].register_forward_hook(overwrite)
        patched = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        hook.remove()
    return (clean.exp() * (clean - patched)).sum().item()


def test_an_interrupted_report_goes_on_with_the_row_at_which_it_was_stopped(
    run_with_patches: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, interrupted = run_with_patches("undisturbed"), run_with_patches("interrupted")
    make_report(undisturbed.config)
    patch, calls = Patcher.patch, []

    def stop_at_the_third(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return patch(*arguments)

    monkeypatch.setattr(Patcher, "patch", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_report(interrupted.config)
    monkeypatch.setattr(Patcher, "patch", lambda *given: calls.append(1) or patch(*given))
    make_report(interrupted.config)
    assert len(calls) == ROWS
    assert read_report(interrupted) == read_report(undisturbed)


def test_an_activation_of_another_prompt_is_left_out_and_counted(
    run_with_patches: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, encode = run_with_patches("run"), TextEncoder.encode
    test = load_activations(run, "test")
    generator = torch.Generator().manual_seed(run.config.evaluation.seed)
    row = min(torch.randperm(len(test), generator=generator)[:ROWS].tolist())
    other = "A text that was never captured, and longer than any that was."

    def read_otherwise(self, text_id: str, text: str, messages: str | None, answer: tuple):
        assert messages is None and answer == ()
        return encode(self, text_id, other if text_id == test.text_ids[row] else text)

    monkeypatch.setattr(TextEncoder, "encode", read_otherwise)
    make_report(run.config)
    report = read_report(run)
    assert report["results"]["gold"]["judge"]["keeps_top"]["n"] == ROWS - 1
    assert f"patch-back: 1 of {ROWS} activations are left out" in " ".join(report["notes"])


@pytest.mark.parametrize("positions", ["random:3", "generated:3"])
def test_activations_inside_texts_are_put_back_where_they_were_captured(
    ray_cluster: None,
    tiny_run: Callable[..., Run],
    publish_corpus: Callable,
    tmp_path: Path,
    positions: str,
) -> None:
    run = tiny_run(capture=CaptureConfig(positions=positions, answer_tokens=8))
    publish_corpus(run)
    if run.config.capture.needs_answers:
        answer_texts(run)
    capture_activations(run)
    run = tiny_run()  # a later job, which was not told of the positions
    table = load_activations(run, "train")
    said = [Description.from_text("a licence", num_tokens=3)] * len(table)
    readings = Readings(["a licence"], dict.fromkeys(SCORERS, torch.ones(1, 32)))
    descriptions, mean = {"gold": said, "shuffled": said}, torch.full((32,), 0.1)
    patched = patch_reconstructions(run, table, descriptions, readings, mean, tmp_path)
    assert len(set(table.positions)) > 3, "the texts are cut at many places"
    assert patched.rows == list(range(len(table))) and patched.left_out == 0


def test_without_rows_nothing_is_put_back_and_the_report_says_so(
    run_with_patches: Callable[..., Run],
) -> None:
    run = run_with_patches("run", patch_rows=0)
    make_report(run.config)
    report = read_report(run)
    assert "recovered" not in report["results"]["gold"]["judge"]
    markdown = to_markdown(report)
    [section] = [part for part in markdown.split("\n## ") if part.startswith("Put back")]
    assert section.rstrip().endswith("- Not measured.")
