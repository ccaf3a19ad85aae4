"""Blocks over several GPUs of a process, shown without one.

torch's fake tensors compute no numbers, but know on which device each would be and refuse what
mixes two: `cpu:1` and `cpu:2` stand for two GPUs.
"""

import re
from typing import Any

import pytest
import torch
from test_families import IDS, random_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nla_ray.activation.capture import ActivationReader
from nla_ray.activation.positions import EncodedText
from nla_ray.base.config_files import as_config
from nla_ray.base.families import FAMILIES, blocks_of, decoder_of
from nla_ray.base.gpus import check_gpus, check_gpus_of_base
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import _headless
from nla_ray.base.self_check import check_reading
from nla_ray.base.spread import spread_blocks
from nla_ray.settings.config import ComputeConfig
from nla_ray.settings.presets import nano, override, preset

FIRST, SECOND = torch.device("cpu", 1), torch.device("cpu", 2)
LAYERS = [0, 1, 2, 3]
SHOWN = [name for name in FAMILIES if name != "gpt_neox"]
"""The buffer of its rotary frequencies stays where it was when its module becomes a fake one."""


def first_blocks(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of four blocks, without final norm and head, as capture loads it."""
    model = random_model(family).to(dtype)
    return _headless(model.config, decoder_of(model))


@pytest.mark.parametrize("family", SHOWN)
def test_blocks_on_two_devices_are_read_without_mixing_them(family: str) -> None:
    # Experts are multiplied in bfloat16 by the only kernel that fake tensors know.
    model = first_blocks(family, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        spread_blocks(model, [FIRST, SECOND])
        assert [next(block.parameters()).device for block in blocks_of(model)] == [
            *2 * [FIRST],
            *2 * [SECOND],
        ]
        assert model.device == FIRST
        streams = ResidualReader(model, LAYERS).read(IDS.to(FIRST))
        places = [streams[layer].device for layer in LAYERS]
        assert places == [FIRST, FIRST, SECOND, SECOND]
        for block in blocks_of(model):
            block._forward_pre_hooks.clear()
        with pytest.raises(RuntimeError, match="same device"):
            ResidualReader(model, LAYERS).read(IDS.to(FIRST))


class Devices(ActivationReader):
    """Says where the wanted vectors are, instead of copying them: fake ones have no numbers."""

    def _wanted(self, values: Tensor, texts: Any) -> Any:
        assert values.shape == (3, 32) and values.dtype == torch.float32
        return [values.device] * len(texts)


def test_wanted_positions_are_taken_on_the_device_of_their_block() -> None:
    model = first_blocks("llama", torch.bfloat16)
    texts = [
        EncodedText(ids=[3, 4, 5, 6], positions=[1, 3], averaged=[], ends=[1, 2]),
        EncodedText(ids=[7, 8, 9, 10], positions=[1], averaged=[], ends=[1]),
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        spread_blocks(model, [FIRST, SECOND])
        found: Any = Devices(model, [1, 3], 1_000).read(texts)
    assert found == {1: [FIRST, FIRST], 3: [SECOND, SECOND]}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_the_same_number_by_number(family: str) -> None:
    """On one device the hooks move nothing."""
    expected = ResidualReader(first_blocks(family), LAYERS).read(IDS)
    model = first_blocks(family)
    spread_blocks(model, 3 * [torch.device("cpu")])
    check_reading(model, LAYERS)
    found = ResidualReader(model, LAYERS).read(IDS)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ({"trainer_gpus": 2.0}, "trainer_gpus: got 2.0, expected at most 1. .*zero-stage 3"),
        ({"scorer_gpus": 2.0}, "compute.scorer_gpus: got 2.0, expected at most 1. Set --compute.s"),
        ({"serve_gpus": 4.0}, "serve_gpus: got 4.0, expected at most 1. Set --compute.serve"),
        ({"rollout_gpus": 2.0}, "compute.rollout_gpus: got 2.0, .*'auto'.* --base.engine vllm"),
        ({"capture_gpus": 1.5}, "compute.capture_gpus: got 1.5, expected a part .* whole number"),
    ],
)
def test_several_gpus_that_a_process_would_not_use_are_refused(compute: dict, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_gpus(override(nano(), compute=compute))


def test_several_gpus_are_taken_where_they_are_used() -> None:
    used = override(nano(), compute={"rollout_gpus": 2.0, "capture_gpus": 4.0})
    check_gpus(override(used, base={"engine": "vllm"}))
    check_gpus(preset("qwen2.5-7b"))
    check_gpus(override(nano(), base={"model": "nobody/knows"}, compute={"capture_gpus": 2.0}))
    with pytest.raises(ValueError, match="The whole base answers first, on one GPU"):
        check_gpus(override(used, base={"engine": "vllm"}, capture={"positions": "generated:2"}))
    for engine in ("compact", "plain"):
        with pytest.raises(ValueError, match=f"The engine '{engine}' generates on one"):
            check_gpus(override(used, base={"engine": engine}))


@pytest.mark.parametrize(
    ("values", "compute", "message"),
    [
        ({"num_attention_heads": 6}, {"rollout_gpus": 4.0}, "of 6 attention heads, expected a num"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            {"capture_gpus": 2.0},
            "compute.capture_gpus: got 2 for a base of quantised weights, expected at most 1",
        ),
    ],
)
def test_bases_that_cannot_be_spread_are_refused(values: dict, compute: dict, message: str) -> None:
    base = as_config({"model_type": "llama", "hidden_size": 48, **values})
    check_gpus_of_base(base, ComputeConfig())
    with pytest.raises(ValueError, match=re.escape(message)):
        check_gpus_of_base(base, ComputeConfig(**compute))


def test_a_job_and_its_plan_refuse_before_anything_is_begun(monkeypatch, capsys, tmp_path) -> None:
    from nla_ray.cluster.job import run_job

    def body(run: Any) -> None:
        raise AssertionError("begun")

    for flags in ([], ["--dry-run"]):
        arguments = ["grpo.py", "--run", str(tmp_path / "run"), "--compute.rollout-gpus", "2"]
        monkeypatch.setattr("sys.argv", [*arguments, *flags])
        with pytest.raises(SystemExit, match="1"):
            run_job("A job.", body, ray=False)
        assert "error: compute.rollout_gpus: got 2.0, expected at most 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
