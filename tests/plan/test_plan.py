"""Plans: what `--dry-run` prints, and that sizes are those of real models."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nla_ray import bench
from nla_ray.base.config_files import as_config
from nla_ray.base.families import FAMILIES
from nla_ray.base.identity import base_info
from nla_ray.plan.facts import LABEL_TOKENS, PlanFacts, kept_bytes, recomputes_activations
from nla_ray.plan.formulas import FORMULAS
from nla_ray.plan.sizes import base_sizes, sizes_in
from nla_ray.plan.text import describe_plan
from nla_ray.run.artifact import Run
from nla_ray.run.stages import stages_of_job
from nla_ray.settings import precision
from nla_ray.settings.config import BaseConfig, LoraSettings, PretrainRunConfig
from nla_ray.settings.presets import PRESETS, nano, override, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS[name](), run_dir=str(tmp_path))
    text = describe_plan(config, "pipeline")
    for stage in stages_of_job("pipeline"):
        assert (f"\n{stage.name}\n" in text) == stage.is_wanted(config)


def test_readable_labels_are_planned_where_sft_is_taught_them(tmp_path: Path) -> None:
    config = override(nano(), sft={"claims": "replaced"})
    text = describe_plan(dataclasses.replace(config, run_dir=str(tmp_path)), "sft")
    assert "labels in three forms" in text and "\nreadable_labels\n" in text


@pytest.mark.parametrize(
    ("flags", "of_smollm2"), [("flags : avx2", 4), ("flags : avx2 avx512_bf16", 2)]
)
def test_a_plan_counts_weights_in_the_type_that_the_processor_computes_in(
    monkeypatch, tmp_path: Path, flags: str, of_smollm2: int
) -> None:
    (tmp_path / "cpuinfo").write_text(f"{flags}\n")
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    for name, expected in (("smollm2-135m", of_smollm2), ("qwen2.5-7b", 2), ("nano", 4)):
        config = dataclasses.replace(preset(name), run_dir=str(tmp_path / name))
        assert PlanFacts.of(Run(config)).item_bytes == expected


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
    # 233,046,016, with biases 3584 + 2*512 and norms 2*3584; 28 of them, a final norm, and two
    # tables of 152,064 x 3584 = 544,997,376. The card says 7.61 billion.
    assert sizes.block_parameters == 233_046_016 + 4_608 + 7_168 == 233_057_792
    assert sizes.parameters == 28 * 233_057_792 + 3_584 + 2 * 544_997_376 == 7_615_616_512
    assert sizes.parameters_up_to(20) == 21 * 233_057_792 + 544_997_376
    # 28 * 32 * (2*(3584+3584) + 2*(3584+512) + 3*(3584+18944)) = 896 * 90,112
    assert sizes.lora_parameters(LoraSettings(rank=32, alpha=64), 28) == 896 * 90_112 == 80_740_352
    # 2 (K and V) * 28 blocks * 10 tokens * 4 heads * 128 * 2 bytes
    assert sizes.kv_bytes(10, 2) == 573_440


def test_an_embedded_base_that_is_not_trained_yet_has_the_sizes_it_would_be_trained_with() -> None:
    config = override(nano(), base={"model": "embedded:new"})
    wider = PretrainRunConfig.of(config)
    wider = dataclasses.replace(wider, pretrain=dataclasses.replace(wider.pretrain, d_model=512))
    assert (base_sizes(config).d_model, base_sizes(wider).d_model) == (256, 512)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if FAMILIES[name].parts])
@pytest.mark.parametrize("head_dim, tied", [(16, True), (24, False)])
def test_parameters_are_those_of_the_model_that_transformers_builds_with_heads_of_any_width(
    model_type: str, head_dim: int, tied: bool
) -> None:
    import torch
    from transformers import AutoConfig

    from nla_ray.base.adapters import add_lora
    from nla_ray.base.load import random_backbone

    values = {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "vocab_size": 100,
        "tie_word_embeddings": tied,
    }
    sizes = sizes_in(as_config(values))
    model = random_backbone(AutoConfig.for_model(**values))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    settings = LoraSettings(rank=4, alpha=8)
    with torch.device("meta"):
        adapted = add_lora(model, settings)
    assert sizes.lora_parameters(settings, 3) == sum(
        p.numel() for name, p in adapted.named_parameters() if "lora_" in name
    )


def test_a_head_that_is_wider_than_its_share_of_the_stream_counts_as_it_is() -> None:
    sizes = sizes_in(as_config(QWEN3_4B))
    # 36 blocks of 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728, norms of 2 * 2560 + 2 * 128, a
    # final norm, one table of 151,936 x 2560: as transformers counts them.
    assert sizes.parameters == 4_022_468_096


QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
WINDOWS = {
    "layer_types": None,
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 1,
}


@pytest.fixture
def written_base(tiny_base: BaseConfig, tmp_path: Path) -> Callable[..., BaseConfig]:
    """The tiny base with other values in its config.json."""

    def write(**values: object) -> BaseConfig:
        folder = tmp_path / "base"
        shutil.copytree(tiny_base.model, folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return dataclasses.replace(tiny_base, model=str(folder))

    return write


@pytest.mark.parametrize(
    "values, settings, message",
    [
        ({"model_type": "nobody_knows_it"}, {}, "model type 'nobody_knows_it'"),
        (WINDOWS, {}, "base.max_tokens: got 256, expected at most 16"),
        ({}, {"layer": 99}, "base.layer: got 99, expected 0 to 2"),
        ({}, {"marker": "two words"}, "marker 'two words' is not one token"),
    ],
)
def test_a_plan_refuses_a_base_in_the_words_of_the_job(
    values: dict, settings: dict, message: str, written_base, tmp_path: Path
) -> None:
    base = dataclasses.replace(written_base(**values), **settings)
    config = dataclasses.replace(nano(), base=base, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=re.escape(message)) as of_the_plan:
        describe_plan(config, "pipeline")
    with pytest.raises(ValueError) as of_the_job:
        base_info(base)
    assert str(of_the_plan.value) == str(of_the_job.value)


def test_a_plan_refuses_a_further_layer_and_a_job_without_a_base_asks_for_none(
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(nano(), run_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"capture.layers: got 99, .*Set --capture.layers"):
        describe_plan(override(config, capture={"layers": (99,)}), "capture")
    unknown = override(config, base={"model": "nobody/knows"})
    assert "base nobody/knows" not in describe_plan(unknown, "label")


def test_a_plan_refuses_batches_that_the_workers_cannot_share(tmp_path: Path) -> None:
    config = dataclasses.replace(nano(), run_dir=str(tmp_path))  # of two workers
    with pytest.raises(ValueError, match=r"batch_size: got 33, expected a multiple of .* = 2"):
        describe_plan(override(config, sft={"batch_size": 33}), "sft")
    odd = override(config, grpo={"prompts_per_step": 15})
    with pytest.raises(ValueError, match=r"grpo.prompts_per_step: got 15"):
        describe_plan(odd, "grpo")
    assert "sft" in describe_plan(odd, "sft")


# Memory -------------------------------------------------------------------------------------------


def planned(name: str, folder: Path, **sections: dict) -> PlanFacts:
    return PlanFacts.of(
        Run(dataclasses.replace(override(PRESETS[name](), **sections), run_dir=str(folder)))
    )


def storages(value: object, seen: dict[int, object]) -> dict[int, int]:
    """Bytes of every storage that is reached from an object; modules are passed over."""
    import torch

    if id(value) in seen or isinstance(value, torch.nn.Module):
        return {}
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage._cdata: storage.nbytes()}
    if isinstance(value, list | tuple):
        inner = list(value)
    else:
        inner = list(
            (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
        )
    found: dict[int, int] = {}
    for part in inner:
        found |= storages(part, seen)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copies_of_an_engine_are_those_that_the_plan_counts(dtype: str, tmp_path: Path) -> None:
    import torch

    from nla_ray.base.load import load_model_config, random_backbone
    from nla_ray.description.engines.compact import CompactDecoder

    facts = planned("qwen2.5-7b", tmp_path, base={"dtype": dtype})
    base, rank = facts.config.base, facts.config.sft.lora.rank
    model = random_backbone(load_model_config(base), dtype=getattr(torch, dtype))
    adapter = {}
    for name, module in model.model.layers.named_modules(prefix="base_model.model.model.layers"):
        if isinstance(module, torch.nn.Linear):
            out, inner = module.weight.shape
            adapter[f"{name}.lora_A.weight"] = torch.empty(rank, inner, device="meta")
            adapter[f"{name}.lora_B.weight"] = torch.empty(out, rank, device="meta")
    decoder = CompactDecoder(model, rows=64)
    decoder.load(adapter, 2.0)
    shared = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    copies = {key: held for key, held in storages(decoder, {}).items() if key not in shared}
    held, changing = facts.engine_bytes("rollout")
    if dtype == "bfloat16":  # a GPU uses the base's head; this device, which is none, holds a copy
        held += facts.sizes.vocab * facts.sizes.d_model * 4
    assert held == pytest.approx(sum(copies.values()), rel=0.01)
    # The next blocks, or the next factors, stand beside the last ones.
    blocks = storages(decoder._blocks, {})
    assert changing == pytest.approx(
        sum(held for key, held in blocks.items() if key not in shared)
        - (28 * 3_584 * 4_608 * 2 if dtype == "bfloat16" else 0),
        rel=0.15,
    )


def test_an_engine_on_a_gpu_was_measured_to_hold_what_the_plan_counts(tmp_path: Path) -> None:
    results = Path(bench.__file__).parent / "results" / "nvidia-h200.json"
    measured = json.loads(results.read_text())["sections"]["engine_memory"]["versions"][-1]
    facts = planned("qwen2.5-7b", tmp_path)
    held, changing = facts.engine_bytes("rollout")
    counted = facts.weights_bytes() + held
    assert counted == pytest.approx(measured["held_bytes"], rel=0.03)
    assert counted + changing == pytest.approx(measured["peak_bytes_while_loading"], rel=0.03)


@pytest.mark.parametrize("gpus, suffix", [(0.0, ""), (1.0, ", checkpointing")])
def test_what_a_token_keeps_for_the_backward_pass_was_measured(
    gpus: float, suffix: str, tmp_path: Path
) -> None:
    results = Path(bench.__file__).parent / "results" / "nvidia-h200.json"
    passes = json.loads(results.read_text())["sections"]["micro_batches"]
    few, many = passes[f"8 rows{suffix}"], passes[f"32 rows{suffix}"]
    # A trainer on a GPU that may keep nothing computes blocks twice; without one all is kept.
    facts = planned("qwen2.5-7b", tmp_path, compute={"trainer_gpus": gpus, "kept_gib": 0.0})
    tokens = many["tokens"] - few["tokens"]
    measured = (many["peak_bytes"] - few["peak_bytes"]) / tokens
    assert facts.backward_bytes(28, tokens) / tokens == pytest.approx(measured, rel=0.05)


def test_a_trainer_on_a_gpu_computes_activations_twice_where_they_take_too_much_of_it() -> None:
    config = override(preset("qwen2.5-7b"), compute={"trainer_gpus": 1.0, "kept_gib": 8.0})
    sizes = base_sizes(config)
    most = 8 * 2**30 / kept_bytes(config, sizes, 28, 1)
    assert 900 < most < 1_100  # 8.3 MB a token
    verdicts = [recomputes_activations(config, sizes, 28, most + step) for step in (-1, 1)]
    assert verdicts == [False, True]
    assert not recomputes_activations(config, sizes, 14, most + 1)
    on_cpu = override(config, compute={"trainer_gpus": 0.0})
    assert not recomputes_activations(on_cpu, sizes, 28, 100 * most)


def test_a_plan_states_the_memory_of_every_process_its_host_memory_and_that_of_a_shard(
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(PRESETS["qwen2.5-7b"](), run_dir=str(tmp_path))
    text = describe_plan(config, "grpo")
    # 15.23 GB of weights, .92 of joined queries, keys and values, .16 of factors, 128 rows of 245
    # tokens x 57,344 bytes and of logits twice, and 1.5 of CUDA.
    assert "4 x rollout: 4 CPU, 1 GPU, 1 rollout_node; about 19.8 GB GPU memory each" in text
    # The weights pass through host memory: 15.23 GB beside 3 of the process.
    assert "(19.9 GB while weights change), 18.2 GB host memory each" in text
    # 1,024 vectors of 3,584 float32, three times.
    assert "a shard takes 73.4 MB of host memory" in text
    merged = describe_plan(override(config, base={"dtype": "float32"}), "grpo")
    # 30.46 of weights, 28.28 of merged copies of blocks and head; 26.1 more for the next blocks.
    [rollout] = re.findall(r"4 x rollout: .* about (.*) GB GPU .*\((.*) GB while", merged)
    assert float(rollout[1]) - float(rollout[0]) == pytest.approx(26.1, abs=0.1)
    assert float(rollout[0]) == pytest.approx(30.46 + 28.28 + 1.5 + 3.6 + 0.16, abs=0.1)


def test_a_plan_for_a_laptop_names_one_memory(tmp_path: Path) -> None:
    text = describe_plan(dataclasses.replace(nano(), run_dir=str(tmp_path)), "grpo")
    assert "GPU memory" not in text and "host memory each" not in text
    assert re.search(r"2 x rollout: .* MB memory each \(\d+ MB while weights change\)", text)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        # 500 texts of 420 / 3.2 = 131 tokens, and 30 of the template that are not kept.
        ("all", "65,500 activations x 256 float32 = 67.1 MB"),
        ("user", "not known before capture (further figures count 65,500)"),
        ("random:3", "1,500 activations"),
        ("generated:3", "1,500 activations"),
        ("mean:regex:def", "500 activations"),
        ("regex:def", "for every token that `regex:def` finds, not known before capture"),
        ("last:assistant", "for every token that `last:assistant` finds, not known"),
    ],
)
def test_a_plan_says_how_many_activations_it_expects_or_that_it_cannot_know(
    positions: str, said: str, tmp_path: Path
) -> None:
    config = override(nano(), capture={"positions": positions}, corpus={"max_chunks": 500})
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    assert said in describe_plan(config, "capture")


def test_a_plan_counts_the_tokens_of_answers_where_positions_are_in_them(tmp_path: Path) -> None:
    config = override(nano(), capture={"positions": "generated:3"}, corpus={"max_chunks": 500})
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    # 420 / 3.2 + 30 = 161.25 tokens of a prompt and 64 of an answer: drafted, then read at once.
    text = describe_plan(config, "capture")
    _, answers, activations = re.split(r"^(?=answers|activations)", text, flags=re.MULTILINE)
    assert "work       225,250 tokens" in answers
    assert "500 answers of at most 64 tokens, 32,000 in all" in answers
    assert "work       112,625 tokens" in activations
    plain = describe_plan(override(config, capture={"positions": "random:3"}), "capture")
    assert "work       80,625 tokens" in plain and "\nanswers" not in plain
    short = override(config, base={"max_tokens": 180})
    assert PlanFacts.of(Run(short)).read_tokens == 180


def test_a_plan_counts_every_vector_that_stands_for_an_activation(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["nano"](), run_dir=str(tmp_path))
    three = override(config, base={"injected": ("activation", "centred", "text_mean")})
    three = override(
        three, capture={"text_mean": True}, sft={"difference_share": 0.5, "unlikelihood_share": 0.2}
    )
    one, many = (PlanFacts.of(Run(each)) for each in (config, three))
    assert many.injected_bytes == 3 * one.injected_bytes == 3 * one.activations_bytes(1)
    assert many.activations_per_text == 2 * one.activations_per_text
    tokens = [
        float(
            re.search(r"\nsft\n.*?work +([\d,]+) tokens", describe_plan(each, "sft"), re.DOTALL)[
                1
            ].replace(",", "")
        )
        for each in (config, three)
    ]
    assert tokens[1] == pytest.approx(1.5 * 1.2 * tokens[0], rel=1e-3)


def test_a_plan_counts_what_is_said_and_read_of_differences(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["nano"](), run_dir=str(tmp_path))
    plans = [
        describe_plan(override(config, evaluation={"differences": count}), "evaluate")
        for count in (0, 100)
    ]
    tokens = [
        int(re.search(r"\nreport\n.*?work +([\d,]+) tokens", plan, re.DOTALL)[1].replace(",", ""))
        for plan in plans
    ]
    # Two descriptions of each; labels, theirs of another pair and those two by three scorers.
    assert tokens[1] - tokens[0] == 100 * (2 * 64 + 3 * 4 * 60)


def test_a_plan_counts_every_layer_that_the_verbalizer_describes(tmp_path: Path) -> None:
    alone = dataclasses.replace(PRESETS["nano"](), run_dir=str(tmp_path))
    alone = override(alone, sft={"difference_share": 0.5})
    three = override(alone, base={"further_layers": (2, 3), "further_norms": (30.0, 40.0)})
    three = override(three, capture={"layers": (2, 3)})
    both = [PlanFacts.of(Run(each)) for each in (alone, three)]
    one, many = ({name: formula(facts) for name, formula in FORMULAS.items()} for facts in both)
    assert many["sft"].tokens == pytest.approx(3.5 / 1.5 * one["sft"].tokens)
    activations = both[0].texts * alone.corpus.test_share
    more = activations * (4 * alone.grpo.max_new_tokens + 6 * LABEL_TOKENS)
    assert many["report"].tokens - one["report"].tokens == pytest.approx(more)
    assert many["linear_scorer"].processes[0].bytes > one["linear_scorer"].processes[0].bytes
    for name in ("reward_scorer", "judge_scorer", "grpo"):
        assert many[name] == one[name], "at the base's layer alone"
    plan = describe_plan(three, "sft")
    assert "further layer 2, injection norm 30\n" in plan and "further layer 3" in plan


def test_the_memory_of_a_shard_in_a_plan_is_that_of_some_blocks(tmp_path: Path) -> None:
    config = override(PRESETS["qwen2.5-7b"](), capture={"positions": "all", "layers": (5, 10)})
    facts = PlanFacts.of(Run(dataclasses.replace(config, run_dir=str(tmp_path))))
    rows = config.corpus.shard_rows * facts.activations_per_text
    assert facts.shard_bytes == 5 * 128 * 2**20 < facts.activations_bytes(rows) / 5


# GPUs ---------------------------------------------------------------------------------------------


def test_a_plan_says_how_many_gpus_of_which_memory_are_enough(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["qwen2.5-7b"](), run_dir=str(tmp_path))
    text = describe_plan(config, "grpo")
    *_, grpo = text.partition("\ngrpo\n")
    trainer, rollout, scorer = re.findall(r"about (\S+) GB GPU memory each", grpo)
    most = re.findall(r"\((\S+) GB while weights change\)", grpo)
    [(number, size)] = re.findall(r"  GPUs       (\d+) with (\S+) GB each are enough", grpo)
    compute = config.compute
    assert int(number) == (
        compute.trainer_workers * compute.trainer_gpus
        + config.grpo.num_rollout_actors * compute.rollout_gpus
        + config.grpo.num_scorer_actors * compute.scorer_gpus
    )
    assert float(size) == max(map(float, (trainer, rollout, scorer, *most)))


def test_one_gpu_for_all_holds_what_all_hold_and_parts_of_several_are_scaled(
    tmp_path: Path,
) -> None:
    shares = {"trainer_gpus": 0.4, "rollout_gpus": 0.3, "scorer_gpus": 0.2, "trainer_workers": 1}
    config = override(
        PRESETS["smollm2-135m"](),
        compute=shares,
        grpo={"num_rollout_actors": 1, "num_scorer_actors": 1},
    )
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    *_, grpo = describe_plan(config, "grpo").partition("\ngrpo\n")
    sizes = [float(size) for size in re.findall(r"about (\S+) GB GPU memory each", grpo)]
    changing = float(re.findall(r"\((\S+) GB while", grpo)[0])
    [size] = re.findall(r"  GPUs       1 with (\S+) GB is enough", grpo)
    assert float(size) == pytest.approx(sizes[0] + changing + sizes[2], abs=0.02)
    more = override(config, grpo={"num_rollout_actors": 4})
    *_, grpo = describe_plan(more, "grpo").partition("\ngrpo\n")
    # Four rollouts on two GPUs, one GPU more for each other kind; a trainer needs its .4 of one.
    [size] = re.findall(r"  GPUs       4 with (\S+) GB each are enough", grpo)
    assert float(size) == pytest.approx(max(sizes[0] / 0.4, changing / 0.3, sizes[2] / 0.2), 0.01)


def test_of_several_gpus_each_holds_its_part(tmp_path: Path) -> None:
    config = override(PRESETS["qwen2.5-7b"](), base={"engine": "vllm"})
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    wide = override(config, compute={"capture_gpus": 2.0, "rollout_gpus": 4.0})
    text = describe_plan(wide, "grpo")
    # Blocks 0 to 10 of 21 and the embedding, beside what a batch takes and 1.5 of CUDA.
    one, two = (PlanFacts.of(Run(c)) for c in (config, wide))
    [on_each] = re.findall(r"2 GPU.*; about (\S+) GB GPU memory on 2 GPUs each", text)
    [whole] = re.findall(
        r"x capture: .* about (\S+) GB GPU memory each", describe_plan(config, "capture")
    )
    ten_blocks = 10 * one.sizes.block_parameters * 2 / 1e9
    assert float(whole) - float(on_each) == pytest.approx(ten_blocks, abs=0.1)
    # A quarter of vLLM's copy, of the factors and of the caches; the base is in host memory.
    copy = one.weights_bytes() + 2 * one.sizes.lora_parameters(config.sft.lora, 28)
    quarter = (copy + two.generation_bytes(128, 245)) / 4e9
    [on_each] = re.findall(r"4 GPU.*; about (\S+) GB GPU memory on 4 GPUs each", text)
    assert float(on_each) == pytest.approx(1.5 + quarter, abs=0.02)
    [alone] = re.findall(
        r"x rollout: .* about (\S+) GB GPU memory each", describe_plan(config, "grpo")
    )
    assert float(alone) == pytest.approx(1.5 + one.weights_bytes() / 1e9 + 4 * quarter, abs=0.06)
