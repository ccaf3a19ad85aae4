"""Plans: what `--dry-run` prints, and that sizes are those of real models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nla_ray.plan.sizes import base_sizes
from nla_ray.plan.text import describe_plan
from nla_ray.run.stages import stages_of_job
from nla_ray.settings.config import LoraSettings, PretrainRunConfig
from nla_ray.settings.presets import PRESETS, nano, override


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS[name](), run_dir=str(tmp_path))
    text = describe_plan(config, "pipeline")
    for stage in stages_of_job("pipeline"):
        assert f"\n{stage.name}\n" in text


def test_a_plan_of_a_base_nobody_knows_says_what_to_do(tmp_path: Path) -> None:
    config = override(nano(), base={"model": "nobody/knows"})
    with pytest.raises(ValueError, match=r"got no config\.json .*Download the model first"):
        describe_plan(dataclasses.replace(config, run_dir=str(tmp_path)), "capture")


@pytest.mark.parametrize(
    "changed", [{"corpus": {"path": "nowhere.jsonl"}}, {"label": {"import_path": "nowhere.jsonl"}}]
)
def test_a_plan_refuses_a_file_that_is_not_there(changed: dict, tmp_path: Path) -> None:
    config = dataclasses.replace(override(nano(), **changed), run_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"--(corpus\.path|label\.import-path) nowhere\.jsonl: got nothing there"
    ):
        describe_plan(config, "pipeline")


def test_the_published_sizes_of_qwen_7b_come_out() -> None:
    sizes = base_sizes(PRESETS["qwen2.5-7b"]())
    # By hand: block 2*3584^2 + 2*3584*512 + 3*3584*18944 = 25,690,112 + 3,670,016 + 203,685,888 =
    # 233,046,016; 28 of them, and two tables of 152,064 x 3584 = 544,997,376. The card says 7.61
    # billion (with norms and biases).
    assert sizes.block_parameters == 233_046_016
    assert sizes.parameters == 28 * 233_046_016 + 2 * 544_997_376 == 7_615_283_200
    assert sizes.parameters_up_to(20) == 21 * 233_046_016 + 544_997_376
    # 28 * 32 * (2*(3584+3584) + 2*(3584+512) + 3*(3584+18944)) = 896 * 90,112
    assert sizes.lora_parameters(LoraSettings(rank=32, alpha=64), 28) == 896 * 90_112 == 80_740_352
    # 2 (K and V) * 28 blocks * 10 tokens * 4 heads * 128 * 2 bytes
    assert sizes.kv_bytes(10, 2) == 573_440


def test_an_embedded_base_that_is_not_trained_yet_has_the_sizes_it_would_be_trained_with() -> None:
    config = override(nano(), base={"model": "embedded:new"})
    wider = PretrainRunConfig.of(config)
    wider = dataclasses.replace(wider, pretrain=dataclasses.replace(wider.pretrain, d_model=512))
    assert (base_sizes(config).d_model, base_sizes(wider).d_model) == (256, 512)


def test_sizes_agree_with_transformers_and_peft_on_a_real_model(tiny_base) -> None:
    from nla_ray.base.adapters import add_lora
    from nla_ray.base.load import load_backbone

    sizes = base_sizes(dataclasses.replace(nano(), base=tiny_base))
    model = load_backbone(tiny_base)
    assert sizes.tied
    matrices = {
        parameter.data_ptr(): parameter.numel()
        for parameter in model.parameters()
        if parameter.ndim == 2
    }
    assert sizes.parameters == sum(matrices.values())
    settings = LoraSettings(rank=4, alpha=8)
    adapted = add_lora(model, settings)
    assert sizes.lora_parameters(settings, 3) == sum(
        p.numel() for name, p in adapted.named_parameters() if "lora_" in name
    )
