"""What stands in a prompt for an activation: by hand, from a capture, and from one text."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from tiny import plain_nano
from tiny_artifacts import make_artifacts
from torch import Tensor

import nla_ray
from nla_ray.activation.stage import (
    _rows_by_key,
    load_activations,
    load_stats,
    load_train_activations,
)
from nla_ray.activation.vectors import centre, mean_direction
from nla_ray.activation.views import read_layers, view_activations, view_positions
from nla_ray.base.encoding import ChatEncoder
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.serve.schema import Refusal
from nla_ray.settings.config import BaseConfig, CaptureConfig, ComputeConfig, RunConfig
from nla_ray.settings.views import View, check_views

ALL = ("activation", "centred", "text_mean", "layer:0", "activation")


def views(*values: str) -> tuple[View, ...]:
    return tuple(map(View.of, values))


def test_every_view_is_a_vector_in_the_order_of_the_setting() -> None:
    activations = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    mean = torch.tensor([0.5, 0.5])
    other, means = activations * 7, activations + 1
    seen = view_activations(
        views(*ALL), activations, mean=mean, text_means=means, layers={0: other}
    )
    assert seen.shape == (2, 5, 2)
    for number, expected in enumerate(
        (activations, torch.tensor([[0.1, 0.3], [-0.5, 0.5]]), means, other, activations)
    ):
        torch.testing.assert_close(seen[:, number], expected)
    alone = view_activations(views("activation"), activations)
    assert alone.shape == (2, 1, 2) and alone.data_ptr() == activations.data_ptr()


@pytest.mark.parametrize("value", ["centred", "text_mean", "layer:3"])
def test_a_view_of_what_is_not_there_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"base.injected: got no vectors .* expected one for each"):
        view_activations(views("activation", value), torch.ones(2, 3))


@pytest.mark.parametrize("value", ["mean", "layer:", "layer:-1", "layer:x", "", "Activation"])
def test_a_setting_that_says_nothing_known_is_refused_when_it_is_said(value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"base.injected: got {value!r}, expected")):
        BaseConfig(injected=("activation", value))
    with pytest.raises(ValueError, match=r"base.injected: got \(\), expected at least one"):
        BaseConfig(injected=())


def test_means_of_texts_are_kept_beside_the_ends_of_texts_alone() -> None:
    with pytest.raises(ValueError, match=r"capture.text_mean, .*: got \(True, 'mean'\), expected"):
        CaptureConfig(positions="mean", text_mean=True)


@pytest.fixture(scope="module")
def captured(
    ray_cluster: None, tiny_base: BaseConfig, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A run whose capture keeps two layers and the means of texts, and whose verbalizer is given
    all of ALL."""
    config = dataclasses.replace(
        plain_nano(),
        run_dir=str(tmp_path_factory.mktemp("views")),
        base=dataclasses.replace(tiny_base, injected=ALL),
        capture=CaptureConfig(layers=(0,), text_mean=True),
        compute=ComputeConfig(threads=1, capture_cpus=0.5),
    )
    make_artifacts(Run(config), verbalizers=("sft",))
    return config


def with_injected(config: RunConfig, *values: str) -> Run:
    base = dataclasses.replace(config.base, injected=values)
    return Run(dataclasses.replace(config, base=base))


def test_means_beside_activations_are_no_activations_themselves(captured: RunConfig) -> None:
    run = with_injected(captured, "activation")
    table = load_activations(run, "train")
    assert len(set(table.text_ids)) == len(table) and min(table.positions) > 0
    assert load_stats(run)["count"] == len(table)
    torch.testing.assert_close(
        torch.tensor(load_stats(run)["mean_direction"]), mean_direction(table.vectors)
    )
    [place] = load_train_activations(run).place(
        load_activations(with_injected(captured, "text_mean"), "train").injected[:1, 0]
    )
    assert place.nearest[0][0] in table.ids and place.nearest[0][1] < 1
    assert table.views is None and torch.equal(table.injected, table.vectors[:, None])


def test_captured_views_belong_to_their_activations_also_after_a_choice(
    captured: RunConfig,
) -> None:
    run = with_injected(captured, *ALL)
    table, other = load_activations(run, "train"), load_activations(run, "train", layer=0)
    assert table.injected.shape == (len(table), 5, table.vectors.shape[1])
    mean = torch.tensor(load_stats(run)["mean_direction"])
    torch.testing.assert_close(table.injected[:, 1], centre(table.vectors, mean))
    assert torch.equal(table.injected[:, 3], other.vectors)
    assert not torch.equal(table.injected[:, 2], table.vectors)
    chosen = table.select([5, 2])
    assert torch.equal(chosen.injected, table.injected[[5, 2]])
    with pytest.raises(ValueError, match="layer 2: got no train rows"):
        load_activations(with_injected(captured, "layer:2"), "train")


def test_a_text_read_by_itself_has_the_views_of_its_capture(captured: RunConfig) -> None:
    run = with_injected(captured, *ALL)
    table, base = load_activations(run, "test"), run.config.base
    assert read_layers(base) == [0, base.layer]
    encoded = ChatEncoder(load_tokenizer(base), base.model).encode(table.texts[0])
    with torch.no_grad():
        read = ResidualReader(load_backbone(base), read_layers(base)).read(
            torch.tensor([encoded.ids])
        )
    stream: dict[int, Tensor] = {layer: values[0] for layer, values in read.items()}
    mean = torch.tensor(load_stats(run)["mean_direction"])
    spans, end = list(encoded.spans), len(encoded.ids) - 1
    seen = view_positions(base, stream, [end, spans[1], 0], spans, mean)
    torch.testing.assert_close(seen[:1], table.injected[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1, 2], stream[base.layer][spans[:2]].mean(0))
    assert torch.equal(seen[2, 2], stream[base.layer][0]), "no token of the text is read there"


def test_a_verbalizer_is_bound_to_what_it_was_given_and_scorers_are_not(
    captured: RunConfig,
) -> None:
    run, other = Run(captured), with_injected(captured, "activation", "centred")
    info, other_info = base_info(run.config.base), base_info(other.config.base)
    check_base(run.require("sft"), info)
    with pytest.raises(
        ValueError, match=r"'sft': got injected vectors \['activation', 'centred'\]"
    ):
        check_base(run.require("sft"), other_info)
    for name in ("reward_scorer", "activations"):
        check_base(run.require(name), other_info)


def test_a_loaded_run_describes_texts_by_all_views_and_refuses_activations_alone(
    captured: RunConfig,
) -> None:
    run, loaded = Run(captured), nla_ray.load(captured.run_dir)
    table, sft = load_activations(run, "test"), run.require("sft")
    with run.local_copy("sft", sft, "adapter") as folder:
        verbalizer = Verbalizer.load(captured.base, folder)
        sampled = {"max_new_tokens": 12, "temperature": 1.0}
        expected = verbalizer.describe(table.injected[:3], rows=[0, 0, 0], **sampled)
        alone = verbalizer.describe(table.vectors[:3], rows=[0, 0, 0], **sampled)
    said = [body.description for body in loaded.describe(table.texts[:3], **sampled)]
    assert said == [description.text for description in expected]
    assert said != [description.text for description in alone]
    with pytest.raises(Refusal, match="expected texts: the verbalizer reads text_mean, layer:0"):
        loaded.describe(table.vectors[:3])
    explained = loaded.explain(table.texts[0], [-1, 5], **sampled).explanations
    assert explained[0].description == said[0] and set(explained[1].scores) >= {"judge"}


def test_means_that_a_capture_does_not_keep_are_never_replaced_by_activations(
    published_run: RunConfig,
) -> None:
    with pytest.raises(ValueError, match=r"base.injected: got 'text_mean of activations without"):
        load_activations(with_injected(published_run, "activation", "text_mean"), "train")


def test_a_row_that_one_layer_lacks_is_named_and_never_shifted(captured: RunConfig) -> None:
    table = load_activations(with_injected(captured, "activation"), "train")
    keys = list(zip(table.text_ids, table.positions, strict=True))
    turned = table.select(list(reversed(range(len(table)))))
    found = _rows_by_key(turned, reversed(keys), keys, "layer 0")
    assert torch.equal(found, table.vectors)
    with pytest.raises(ValueError, match=r"got none of layer 0 for 1 of .*non_finite"):
        _rows_by_key(table.select(range(1, len(table))), keys[1:], keys, "layer 0")


def test_what_a_capture_will_not_keep_is_refused_before_it_begins() -> None:
    check_views(views(*ALL), {0, 2}, text_mean=True)
    with pytest.raises(ValueError, match=r"got `layer:0`, expected .* captured: \[2\]"):
        check_views(views(*ALL), {2}, text_mean=True)
    with pytest.raises(ValueError, match="got `text_mean`, expected means of texts"):
        check_views(views(*ALL), {0}, text_mean=False)
