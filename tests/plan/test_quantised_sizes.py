"""Plans of quantised bases: bytes by arithmetic from the documented formats, and as they are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_quantised_base, make_tiny_base
from transformers import BitsAndBytesConfig

from nla_ray.base.config_files import as_config, known_config
from nla_ray.base.load import load_backbone
from nla_ray.plan.facts import PlanFacts
from nla_ray.plan.sizes import sizes_in
from nla_ray.plan.text import describe_plan
from nla_ray.run.artifact import Run
from nla_ray.settings.config import BaseConfig, RunConfig
from nla_ray.settings.presets import nano, override

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MATRICES = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336
"""Of a block: 218,103,808 weights."""
TABLE = 128256 * 4096
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def bytes_of(quantisation: dict[str, Any], layer: int | None = None, item_bytes: int = 2) -> float:
    sizes = sizes_in(as_config({**LLAMA_8B, "quantization_config": quantisation}))
    return sizes.weights_bytes(item_bytes, layer)


def test_four_bits_with_scales_of_eight_take_what_the_format_says() -> None:
    # 4 bits a weight; of 64 weights a scale of 1 byte; of 256 scales one of 4 bytes; beside each of
    # seven matrices 16 and 256 values and a mean in float32.
    block = MATRICES / 2 + MATRICES / 64 + MATRICES / 64 / 256 * 4 + 7 * (64 + 1024 + 4)
    norms = 2 * 4096 * 2
    expected = 32 * (block + norms) + 4096 * 2 + 2 * TABLE * 2
    assert bytes_of(NF4) == expected == 5_702_540_160
    assert bytes_of(NF4, layer=9) == 10 * (block + norms) + TABLE * 2
    # Scales in float32, without the table of their values.
    plain_scales = bytes_of({**NF4, "bnb_4bit_use_double_quant": False})
    assert plain_scales == 32 * (MATRICES / 2 + MATRICES / 64 * 4 + 7 * 64 + norms) + 8192 + (
        2 * TABLE * 2
    )


def test_eight_bits_have_a_scale_a_row() -> None:
    rows = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
    rest = 32 * 2 * 4096 * 2 + 8192 + 2 * TABLE * 2
    by_bitsandbytes = bytes_of({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert by_bitsandbytes == 32 * (MATRICES + 4 * rows) + rest
    of_torchao = {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": {"_type": "PerRow"}}}
    by_torchao = bytes_of({"quant_method": "torchao", "quant_type": {"default": of_torchao}})
    assert by_torchao == 32 * (MATRICES + 5 * rows) + rest
    of_groups = {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}
    in_groups = bytes_of({"quant_method": "torchao", "quant_type": {"default": of_groups}})
    assert in_groups == 32 * (MATRICES / 2 + 4 * MATRICES / 64) + rest


def test_modules_that_a_configuration_leaves_out_are_plain() -> None:
    """Names are compared as transformers does; a list replaces its own, which is the head."""
    plain_block = bytes_of({**NF4, "llm_int8_skip_modules": ["model.layers.1", "lm_head"]})
    packed = MATRICES / 2 + MATRICES / 64 + MATRICES / 64 / 256 * 4 + 7 * 1092
    assert plain_block - bytes_of(NF4) == 2 * MATRICES - packed  # and not blocks 10 to 19
    of_one = bytes_of({**NF4, "llm_int8_skip_modules": ["v_proj", "lm_head"]})
    assert of_one > bytes_of({**NF4, "llm_int8_skip_modules": ["lm_head"]}) == bytes_of(NF4)
    assert bytes_of({**NF4, "llm_int8_skip_modules": ["v_proj"]}) < of_one - TABLE


def run_config(base: BaseConfig, folder: Path, **sections: Any) -> RunConfig:
    config = dataclasses.replace(nano(), base=base, run_dir=str(folder / "run"))
    return override(config, **sections)


def held_bytes(model: torch.nn.Module) -> int:
    """Of everything that a model holds, tensors inside of packed ones too."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
        is_packed = isinstance(value, torch.Tensor) and hasattr(value, "tensor_data_names")
        if isinstance(value, torch.Tensor) and not is_packed:
            found[value.data_ptr()] = value.nbytes
        for part in inner:
            if isinstance(part, torch.Tensor) or type(part).__name__ == "QuantState":
                visit(part)

    for tensor in (*model.parameters(), *model.buffers()):
        visit(tensor)
    for module in model.modules():
        rotary = getattr(module, "inv_freq", None)
        if rotary is not None:  # a buffer, and no weight
            found.pop(rotary.data_ptr())
            found.pop(module.original_inv_freq.data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_of_eight_bits_by_torchao_takes_what_a_plan_says(
    tmp_path: Path, tied: bool, dtype: Any
) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    settings = TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    base = make_quantised_base(
        tmp_path, settings, architecture="llama", width=64, heads=4, tied=tied
    )
    base = dataclasses.replace(base, dtype=dtype)
    facts = PlanFacts.of(Run(run_config(base, tmp_path)))
    assert facts.weights_bytes() == held_bytes(load_backbone(base))
    assert facts.weights_bytes(1) == held_bytes(load_backbone(base, num_blocks=2))


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1"]},
    ],
)
def test_a_base_by_bitsandbytes_takes_what_a_plan_says(tmp_path: Path, options: dict) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(**options)
    base = make_quantised_base(
        tmp_path, settings, architecture="llama", width=64, heads=4, tied=False
    )
    # What is not packed keeps the type of the files.
    for dtype in ("float32", "bfloat16"):
        chosen: Any = dataclasses.replace(base, dtype=dtype)
        facts = PlanFacts.of(Run(run_config(chosen, tmp_path)))
        assert facts.item_bytes == 4
        assert facts.weights_bytes() == held_bytes(load_backbone(chosen))


def test_a_plan_says_in_how_many_bits_and_counts_what_is_read_whole(tmp_path: Path) -> None:
    """Blocks above layer K are dropped after they were read."""
    base = make_tiny_base(tmp_path / "base")
    file = Path(base.model) / "config.json"
    values = {**json.loads(file.read_text()), "quantization_config": NF4, "dtype": "bfloat16"}
    file.write_text(json.dumps(values))
    config = run_config(base, tmp_path, compute={"capture_gpus": 1.0, "rollout_gpus": 1.0})
    assert ", float32, matrices of 4 bits, " in describe_plan(config, "capture")
    facts = PlanFacts.of(Run(config))
    known = known_config(base.model)
    assert known is not None and facts.sizes == sizes_in(known)
    assert facts.read_bytes(1) == facts.weights_bytes() > facts.weights_bytes(1)
    whole = facts.weights_bytes()
    process = facts.process("capture", 1, facts.weights_bytes(1), loaded=whole)
    assert process.bytes == facts.process("capture", 1, whole, loaded=whole).bytes
    # The engine `plain` keeps its factors beside packed weights, in float32, and merges nothing.
    factors = 4 * facts.sizes.lora_parameters(config.sft.lora, 3)
    assert facts.engine_bytes("rollout") == (factors, factors)
