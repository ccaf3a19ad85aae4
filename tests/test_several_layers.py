"""One verbalizer for several layers: its prompts, what it learns, and what it describes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import MARKER, build_tokenizer, plain_nano
from tiny_artifacts import LORA, make_artifacts

import nla_ray
from nla_ray.activation import vectors
from nla_ray.activation.stage import activations_at, load_activations, load_stats
from nla_ray.activation.views import read_layers, read_prompt, read_together
from nla_ray.base import prompts
from nla_ray.base.encoding import ChatEncoder
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.prompts import injection_prompt, layer_endings
from nla_ray.cluster.job import _check_views
from nla_ray.description.protocol import generation_protocol
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.label.stage import drawn_labels
from nla_ray.report.stage import make_report, read_report
from nla_ray.run.artifact import Run
from nla_ray.score.linear import LinearReconstructor, further_file
from nla_ray.serve.local import local_endpoint
from nla_ray.serve.schema import DescribeRequest, Refusal
from nla_ray.settings.config import (
    BaseConfig,
    CaptureConfig,
    ComputeConfig,
    EvaluationConfig,
    GRPOSettings,
    RunConfig,
    ServeConfig,
    SFTConfig,
)
from nla_ray.training import sft

LAYERS, NORMS = (2, 0), (6.0, 2.5)


# What is said of layers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"further_layers": (4,)}, r"base.further_layers: got \(4,\), expected block indices"),
        ({"further_layers": (2, 2)}, "each once"),
        ({"further_layers": (-1,)}, "each once"),
        ({"further_norms": (1.0,)}, r"base.further_norms: got \(1.0,\), expected a positive norm"),
        ({"further_layers": (2, 3), "further_norms": (1.0,)}, r"for each of .* = \(2, 3\)"),
        ({"further_layers": (2,), "further_norms": (0.0,)}, "a positive norm"),
        (
            {"further_layers": (2,), "injected": ("activation", "centred")},
            r"base.further_layers, base.injected: got .* expected the activation alone",
        ),
    ],
)
def test_layers_that_a_verbalizer_cannot_learn_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseConfig(layer=4, **fields)


def test_each_layer_has_its_norm_and_by_default_that_of_the_base() -> None:
    base = BaseConfig(layer=4, injection_norm=50.0, further_layers=(2, 5), further_norms=(30, 60))
    assert base.described_layers == (4, 2, 5)
    assert [base.norm_of(layer) for layer in base.described_layers] == [50.0, 30, 60]
    base = dataclasses.replace(base, further_norms=())
    assert [base.norm_of(layer) for layer in base.described_layers] == [50.0] * 3


def test_a_layer_that_would_not_be_captured_is_refused_before_anything_is_made(
    tiny_run: Callable[..., Run], tiny_base: BaseConfig
) -> None:
    run = tiny_run(base=dataclasses.replace(tiny_base, further_layers=(0,)))
    with pytest.raises(ValueError, match=r"base.further_layers: got \(0,\), expected layers that"):
        _check_views(run.config)
    _check_views(dataclasses.replace(run.config, capture=CaptureConfig(layers=(0,))))


def test_the_layer_is_told_behind_the_marker_and_only_where_there_are_several() -> None:
    tokenizer, base = build_tokenizer(), BaseConfig(layer=1, marker=MARKER)
    alone = injection_prompt(tokenizer, base)
    assert alone == prompts.build_injection_prompt(tokenizer, MARKER)
    text = prompts.verbalizer_prompt(tokenizer, MARKER)
    assert tokenizer.encode(text) == alone.marked_ids and "layer" not in text
    several = dataclasses.replace(base, further_layers=(0, 12), further_norms=(2.0, 3.0))
    endings = layer_endings(tokenizer, several)
    assert list(endings) == [0, 12]
    told = {1: injection_prompt(tokenizer, several)}
    told |= {layer: ending.of(told[1]) for layer, ending in endings.items()}
    for layer, prompt in told.items():
        assert prompt == injection_prompt(tokenizer, several, layer=layer)
        assert tokenizer.decode(prompt.marked_ids) == text.replace(
            MARKER, f"{MARKER} (layer {layer})"
        )
        assert prompt.prefix_ids == alone.prefix_ids
        assert prompt.neighbours == told[1].neighbours != alone.neighbours
    assert [ending.injection_norm for ending in endings.values()] == [2.0, 3.0]
    with pytest.raises(ValueError, match="neighbours of the marker"):
        injection_prompt(tokenizer, several, alone.neighbours)


# A run of three layers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layered(tiny_base: BaseConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose verbalizers know three layers."""
    config = dataclasses.replace(
        plain_nano(),
        run_dir=str(tmp_path_factory.mktemp("layered")),
        base=dataclasses.replace(tiny_base, further_layers=LAYERS, further_norms=NORMS),
        capture=CaptureConfig(layers=(0, 2)),
        sft=SFTConfig(lora=LORA, epochs=2, batch_size=8, learning_rate=1e-2, difference_share=0.5),
        grpo=GRPOSettings(max_new_tokens=8),
        evaluation=EvaluationConfig(min_documents=10, bootstrap_resamples=200, samples=0),
        compute=ComputeConfig(threads=1, capture_cpus=0.5, zero_stage=0),
    )
    make_artifacts(Run(config), with_ray=False)
    return config


def test_the_same_tokens_are_learned_at_every_layer_with_the_same_labels(
    layered: RunConfig,
) -> None:
    run = Run(layered)
    parts = sft._pairs_by_layer(run, "train", first_row=3, limit=20)
    assert list(parts) == [1, 2, 0]
    rows = [row for pairs in parts.values() for row in pairs.rows]
    assert rows == list(range(3, 3 + 30 + 20 + 20)), "differences at the base's layer alone"
    own, train = parts[1], load_activations(run, "train")
    for layer in LAYERS:
        pairs, table = parts[layer], load_activations(run, "train", layer=layer)
        assert pairs.labels == own.labels[:20] and pairs.doc_ids == own.doc_ids[:20]
        kept = [
            next(row for row, own_row in enumerate(train.vectors) if torch.equal(own_row, mine[0]))
            for mine in own.vectors[:20]
        ]
        assert [table.text_ids[row] for row in kept] == [train.text_ids[row] for row in kept]
        assert torch.equal(pairs.vectors[:, 0], table.vectors[kept])
    with pytest.raises(ValueError, match="layer 5: got no train rows"):
        activations_at(run, "train", train, 5)


def test_losses_are_told_by_layer_and_each_layer_is_injected_at_its_norm(
    layered: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {}
    build = sft.TrainableVerbalizer.build

    def keep(*arguments, **named):
        kept["model"] = build(*arguments, **named)
        return kept["model"]

    monkeypatch.setattr(sft.TrainableVerbalizer, "build", keep)
    result = sft._train({"run": layered, "name": "sft_trial"})
    figures = result["metrics"]
    for name in ("eval_loss", "eval_loss_shuffled"):
        by_layer = [figures[f"{name}_layer{layer}"] for layer in (1, *LAYERS)]
        assert len(set(by_layer)) == 3
        assert figures[name] == pytest.approx(sum(by_layer) / 3)
    train = len(load_activations(Run(layered), "train"))
    assert figures["examples"] == 3 * train + train // 2
    wrapper = kept["model"].get_input_embeddings()
    first = wrapper.vocab_size + train + train // 2  # the first rows of layers 2 and 0
    embedded = wrapper(torch.tensor([wrapper.vocab_size, first, first + train]))
    norms = torch.tensor([4.0, *NORMS])
    torch.testing.assert_close(vectors.norm(embedded).squeeze(-1), norms)


# Describing ---------------------------------------------------------------------------------------


def test_a_verbalizer_describes_what_it_learned_and_refuses_other_layers_by_name(
    layered: RunConfig,
) -> None:
    run = Run(layered)
    manifest = run.require("sft")
    with run.local_copy("sft", manifest, "adapter") as folder:
        verbalizer = Verbalizer.load(
            layered.base, folder, neighbours=manifest.model["neighbours"], max_slots=4
        )
    table = load_activations(run, "test", layer=0)
    by_layer = {
        layer: verbalizer.describe(table.vectors, max_new_tokens=6, layer=layer)
        for layer in (None, 1, 0, 2, 1)
    }
    assert by_layer[None] == by_layer[1]
    written = [[row.log_probs for row in by_layer[layer]] for layer in (1, 0, 2)]
    assert written[0] != written[1] != written[2] != written[0], "layer and norm have an influence"
    with pytest.raises(ValueError, match=r"layer: got 3, expected one that .* \[0, 1, 2\]"):
        verbalizer.describe(table.vectors, max_new_tokens=6, layer=3)


def test_a_protocol_names_the_layer_its_prompt_and_its_norm(layered: RunConfig) -> None:
    tokenizer = load_tokenizer(layered.base)
    protocols = {
        layer: generation_protocol(
            layered.base, tokenizer, max_new_tokens=8, weights={"adapter": "a"}, layer=layer
        )
        for layer in (None, 1, 2)
    }
    assert protocols[None] == protocols[1]
    assert protocols[2].prompt["layer"] == 2 and protocols[2].prompt["injection_norm"] == NORMS[0]
    assert protocols[2].prompt["ids"] != protocols[1].prompt["ids"]


def test_scorers_are_those_of_a_run_of_one_layer_and_verbalizers_are_not(
    layered: RunConfig,
) -> None:
    alone = dataclasses.replace(layered.base, further_layers=(), further_norms=())
    run = Run(dataclasses.replace(layered, base=alone))
    for name in ("activations", "reward_scorer", "judge_scorer"):
        assert run.open(name).manifest is not None
        check_base(run.require(name), base_info(alone))
    with pytest.raises(ValueError, match="further_layers: there"):
        run.open("sft")
    with pytest.raises(ValueError, match=r"got further layers \[\] of .* expected \[2, 0\]"):
        check_base(run.require("sft"), base_info(alone))


def test_a_loaded_run_describes_texts_and_activations_of_each_layer(layered: RunConfig) -> None:
    run, loaded = Run(layered), nla_ray.load(layered.run_dir)
    assert loaded.models.base.further_layers == list(LAYERS)
    with run.local_copy("grpo", run.require("grpo"), "adapter") as folder:
        verbalizer = Verbalizer.load(layered.base, folder)
    for layer in (1, 0, 2):
        table = load_activations(run, "test", layer=layer)
        read = loaded.activations(table.texts[:3], layer=layer)
        torch.testing.assert_close(read, table.vectors[:3], atol=1e-4, rtol=1e-4)
        sampled = {"max_new_tokens": 12, "temperature": 1.0}
        expected = verbalizer.describe(table.vectors[:3], layer=layer, rows=[0, 0, 0], **sampled)
        written = [description.text for description in expected]
        for inputs in (table.texts[:3], table.vectors[:3], table.vectors[:3, None]):
            said = loaded.describe(inputs, layer=layer, **sampled)
            assert [body.description for body in said] == written
        train = {place.activation_id.split("@")[1].split(":")[0] for place in _nearest(said)}
        assert train == {str(layer)}, "placed among train activations of its own layer"
        explained = loaded.explain(table.texts[0], layer=layer, **sampled)
        assert explained.layer == layer and explained.explanations[0].description == written[0]
        assert bool(explained.explanations[0].scores) == (layer == 1), "no scorer reads others"


def test_prompts_of_several_layers_are_read_in_one_batch_as_alone(layered: RunConfig) -> None:
    base, run = layered.base, Run(layered)
    chat = ChatEncoder(load_tokenizer(base), base.model)
    reader = ResidualReader(load_backbone(base), read_layers(base))
    layers = (1, 2, None, 0)
    texts = load_activations(run, "test").texts[: len(layers)]
    encoded = [chat.encode(text) for text in texts]
    places = [[len(prompt.ids) - 1, 3] for prompt in encoded]
    together = read_together(base, reader, list(zip(encoded, places, layers, strict=True)), None)
    for number, layer in enumerate(layers):
        activations, injected = together[number]
        alone = read_prompt(base, reader, encoded[number], places[number], None, layer)
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=1e-4)
        table = load_activations(run, "test", layer=1 if layer is None else layer)
        torch.testing.assert_close(activations[0], table.vectors[number], atol=1e-4, rtol=1e-4)
        assert torch.equal(injected[:, 0], activations)


def test_requests_of_several_layers_are_answered_side_by_side_as_alone(layered: RunConfig) -> None:
    loaded, sampled = nla_ray.load(layered.run_dir), {"max_new_tokens": 12, "temperature": 1.0}
    texts = load_activations(Run(layered), "test").texts
    asked = [(texts[:2], 1), (texts[:3], 2), (texts[1:2], 0), (texts[:1], 2), (texts[2:4], None)]
    alone = [loaded.describe(part, layer=layer, **sampled) for part, layer in asked]
    settings = dataclasses.replace(layered, serve=ServeConfig(window_seconds=0.1))
    endpoint = local_endpoint(settings, loaded.models)
    requests = [DescribeRequest(texts=part, layer=layer, **sampled) for part, layer in asked]

    async def together():
        return await asyncio.gather(*map(endpoint.describe, requests))

    answers = asyncio.run(together())
    assert [answer.layer for answer in answers] == [1, 2, 0, 2, 1]
    for answer, expected in zip(answers, alone, strict=True):
        written = [body.description for body in answer.descriptions]
        assert written == [body.description for body in expected]
    assert alone[0][0].description != alone[1][0].description


def _nearest(bodies):
    return [near for body in bodies for near in body.typicality.nearest]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layer": 3}, r"layer: got 3, expected 1, .* or a further one .*\[2, 0\]"),
        ({"layer": 2, "samples": 2}, "samples: got samples at layer 2, expected none of it"),
        ({"layer": 2, "scorers": ["judge"]}, "scorers: got scorers at layer 2"),
    ],
)
def test_what_no_scorer_reads_is_refused_by_name(
    layered: RunConfig, asked: dict, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        nla_ray.load(layered.run_dir).explain("def read(path): return path", **asked)


# The report ---------------------------------------------------------------------------------------


def test_the_report_has_claims_and_the_linear_scorer_by_layer(
    layered: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(layered.run_dir, tmp_path / "run")
    run = Run(dataclasses.replace(layered, run_dir=str(tmp_path / "run")))
    make_report(run.config)
    report = read_report(run)
    assert list(report["layers"]) == ["1", "2", "0"]
    assert set(report["results"]) == {*report["claims"]} >= {"sft", "grpo", "gold"}
    for name in ("gold", "sft", "grpo"):
        own = report["layers"]["1"][name]
        assert own["precision"] == report["claims"][name]["precision"]
        assert own["linear.top1_10way"] == report["results"][name]["linear"]["top1_10way"]
        for layer in LAYERS:
            there = report["layers"][str(layer)][name]
            assert set(there) >= {"precision", "tokens", "linear.centred_cosine"}
            assert there["precision"]["n"] == report["n"]
            assert there["linear.centred_cosine"] != own["linear.centred_cosine"]
    assert report["layers"]["2"]["gold"]["precision"] == own_gold(report)["precision"]
    for layer in LAYERS:
        lines = (tmp_path / f"run/report/descriptions/sft_layer{layer}.jsonl").read_text()
        protocol, *described = map(json.loads, lines.splitlines())
        assert protocol["protocol"]["prompt"]["layer"] == layer and len(described) == report["n"]
    page = (tmp_path / "run/report/report.html").read_text()
    assert "sft, layer 2" in (tmp_path / "run/report/report.md").read_text() and "layer 2" in page


def own_gold(report):
    return report["layers"]["1"]["gold"]


def test_the_linear_scorer_of_a_layer_is_fitted_to_its_activations(layered: RunConfig) -> None:
    run = Run(layered)
    manifest = run.require("linear_scorer")
    assert set(manifest.files) == {"linear.safetensors", *map(further_file, LAYERS)}
    table = load_activations(run, "train", layer=2)
    with run.local_copy("linear_scorer", manifest) as folder:
        own, other = (
            LinearReconstructor.load(layered.base, folder, name=name)
            for name in ("linear.safetensors", further_file(2))
        )
    mean = torch.tensor(load_stats(run, 2)["mean_direction"])
    torch.testing.assert_close(other.mean, mean)
    labels = [drawn_labels(run, "train")[text_id] for text_id in table.text_ids]
    fits = [
        vectors.centred_cosine(scorer.reconstruct(labels), table.vectors, mean).mean()
        for scorer in (own, other)
    ]
    assert fits[1] > fits[0] + 0.1
    assert {"eval_centred_cosine", "eval_centred_cosine_layer2"} <= set(manifest.metrics)
