"""The refreshed reward scorer: what it learns from, and that it goes on from the reward scorer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.settings.config import RefreshedScorerConfig, RunConfig
from nla_ray.training import refreshed
from nla_ray.training.reconstruction import load_examples
from nla_ray.training.refreshed import NAME, describe_train, refreshing_examples, refreshing_rows

SETTINGS = RefreshedScorerConfig(max_examples=9, max_new_tokens=6, learning_rate=0.0)


@pytest.fixture
def run(published_run: RunConfig, tmp_path: Path) -> Run:
    shutil.copytree(published_run.run_dir, tmp_path / "run")
    return Run(
        dataclasses.replace(
            published_run,
            run_dir=str(tmp_path / "run"),
            reward_scorer_refreshed=SETTINGS,
            reward_scorer=dataclasses.replace(published_run.reward_scorer, batch_size=6),
            compute=dataclasses.replace(published_run.compute, zero_stage=0),
        )
    )


def with_settings(run: Run, **changes: object) -> Run:
    settings = dataclasses.replace(SETTINGS, **changes)
    return Run(dataclasses.replace(run.config, reward_scorer_refreshed=settings))


def test_it_learns_from_a_seeded_part_of_the_documents_that_the_reward_scorer_learned_from(
    run: Run,
) -> None:
    table, labels = refreshing_rows(run)
    assert len(table) == len(labels) == 9 and table.ids == sorted(table.ids)
    train = load_examples(run, "train", run.config.reward_scorer)
    assert set(table.doc_ids) <= set(train.doc_ids)
    assert set(table.doc_ids).isdisjoint(run.require("judge_scorer").documents["train"])
    everything, _ = refreshing_rows(with_settings(run, max_examples=None))
    assert everything.doc_ids == train.doc_ids
    assert refreshing_rows(with_settings(run, seed=8))[0].ids != table.ids


def test_its_examples_are_labels_and_sfts_greedy_descriptions_of_the_same_activations(
    run: Run,
) -> None:
    describe_train(run.config)
    examples, (table, labels) = refreshing_examples(run), refreshing_rows(run)
    verbalizer = Verbalizer.load(run.config.base, run.root.path / Path("sft/adapter"))
    said = [new.text for new in verbalizer.describe(table.vectors, max_new_tokens=6)]
    assert examples.descriptions == [*labels, *said] and all(said)
    assert torch.equal(examples.targets, torch.cat([table.vectors, table.vectors]))
    assert examples.doc_ids == [*table.doc_ids, *table.doc_ids]
    first, *_ = (run.root / NAME / "descriptions.jsonl").read_text().splitlines()
    protocol = json.loads(first)["protocol"]
    assert protocol["limits"] == {"max_new_tokens": 6}
    assert protocol["weights"]["base"] == run.require("sft").model["digest"]


def test_training_goes_on_from_the_reward_scorers_weights(run: Run) -> None:
    describe_train(run.config)
    folder = Path(run.root.path)
    files = ("head.safetensors", "adapter/adapter_model.safetensors")

    def weights(of: Path) -> list[dict[str, torch.Tensor]]:
        return [load_file(of / file) for file in files]

    def trained(rate: float) -> list[dict[str, torch.Tensor]]:
        changed = with_settings(run, learning_rate=rate)
        result = refreshed._train({"run": changed.config, "name": NAME})
        assert result["metrics"]["examples"] == 18
        assert result["documents"]["train"] == sorted(set(refreshing_rows(run)[0].doc_ids))
        [best] = (folder / NAME / "scratch").glob("best-*")
        read = weights(best)
        shutil.rmtree(folder / NAME / "scratch")
        return read

    before = weights(folder / "reward_scorer")
    for was, still, moved in zip(before, trained(0.0), trained(1e-2), strict=True):
        torch.testing.assert_close(still, was, rtol=0, atol=0)
        assert was.keys() == moved.keys()
        assert any(not torch.equal(was[name], moved[name]) for name in was)
