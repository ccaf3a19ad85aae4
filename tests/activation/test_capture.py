"""Capture: which positions, which layer, which rows.

Neither batches, actors, shards nor crashes change them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TEXTS, corpus_table

from nla_ray.activation.bank import activation_schema
from nla_ray.activation.capture import ActivationReader, Capture
from nla_ray.activation.positions import (
    EncodedText,
    Skipped,
    TextEncoder,
    padded_tokens,
    plan_batches,
)
from nla_ray.activation.shards import ShardRecord, write_shard
from nla_ray.activation.stage import (
    capture_activations,
    load_activations,
    load_stats,
    read_texts,
    shard_stream,
)
from nla_ray.base.adapters import adapter_active, add_lora
from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.cluster.errors import user_message
from nla_ray.run.location import Location
from nla_ray.settings.config import CaptureConfig, ComputeConfig, LoraSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def encode_all(tokenizer, base, positions: str = "last", texts=TEXTS) -> list[EncodedText]:
    encoder = TextEncoder(tokenizer, base, CaptureConfig(positions=positions))
    return [encoder.encode(f"t{index}", text) for index, text in enumerate(texts)]


# Positions ----------------------------------------------------------------------------------------


def test_the_last_position_is_the_end_of_the_generation_prompt(tokenizer, tiny_base) -> None:
    [encoded] = encode_all(tokenizer, tiny_base, texts=["hello"])
    assert encoded.positions == [len(encoded.ids) - 1]
    assert (
        tokenizer.decode(encoded.ids)
        == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_random_positions_are_tokens_of_the_text_only(tokenizer, tiny_base) -> None:
    [encoded] = encode_all(tokenizer, tiny_base, "random:1000", ["AB assistant user CD"])
    inside = tokenizer.decode([encoded.ids[place] for place in encoded.positions])
    assert "AB" in inside and "CD" in inside
    assert "<|im_start|>" not in inside and "<|im_end|>" not in inside
    assert inside.count("assistant") == 1 and inside.count("user") == 1


def test_random_positions_depend_on_the_text_id_and_nothing_else(tokenizer, tiny_base) -> None:
    encoder = TextEncoder(tokenizer, tiny_base, CaptureConfig(positions="random:4"))
    first = encoder.encode("a", TEXTS[0]).positions
    encoder.encode("b", TEXTS[1])
    assert (
        encoder.encode("a", TEXTS[0]).positions == first == sorted(set(first)) and len(first) == 4
    )
    assert any(encoder.encode(name, TEXTS[0]).positions != first for name in "bcdefg")


def test_a_text_without_tokens_and_one_that_is_too_long_are_named(tokenizer, tiny_base) -> None:
    encoder = TextEncoder(tokenizer, replace(tiny_base, max_tokens=30), CaptureConfig())
    with pytest.raises(Skipped, match=r"no_tokens: .*expected at least one"):
        encoder.encode("a", "")
    with pytest.raises(Skipped, match=r"too_long: the prompt has .*expected at most 30") as caught:
        encoder.encode("a", "a b c " * 50)
    assert caught.value.reason == "too_long"


# Batches ------------------------------------------------------------------------------------------


def test_batches_are_of_like_length_and_within_the_token_budget() -> None:
    assert plan_batches([10, 5, 10, 5], 20) == [[1, 3], [0, 2]]
    assert plan_batches([10, 10, 10], 20) == [[0, 1], [2]]
    assert plan_batches([100], 20) == [[0]]
    assert plan_batches([], 20) == []
    assert padded_tokens([10, 5, 10, 5], 1_000) == 30


def test_padding_stays_below_five_percent_whatever_the_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, size=1_000).tolist()
    batches = plan_batches(lengths, 8_192)
    assert sorted(index for batch in batches for index in batch) == list(range(1_000))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 8_192
        assert sum(lengths[index] for index in batch) >= 0.95 * len(batch) * longest
    assert 1 - sum(lengths) / padded_tokens(lengths, 8_192) < 0.05


# The model ----------------------------------------------------------------------------------------


def residual_by_transformers(base, ids: list[int]) -> list[torch.Tensor]:
    """Outputs of all blocks for one unpadded text: `output_hidden_states`, and a hook for the last.

    The last of `output_hidden_states` has the final norm.
    """
    model = load_backbone(base)
    last = {}
    hook = model.model.layers[-1].register_forward_hook(
        lambda _, __, output: last.update(value=output)
    )
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    value = last["value"][0] if isinstance(last["value"], tuple) else last["value"]
    return [*(state[0] for state in states[1:-1]), value.reshape(len(ids), -1)]


def test_layer_k_is_hidden_states_k_plus_one_of_an_unpadded_text_for_every_layer(
    tokenizer, tiny_base
) -> None:
    texts = encode_all(tokenizer, tiny_base, "random:5")
    for layers in ((0, 1, 2), (0,), (1,)):
        reader = ActivationReader(
            load_backbone(tiny_base, num_blocks=layers[-1] + 1), layers, batch_tokens=100_000
        )
        found = reader.read(texts)
        assert tuple(found) == layers
        for row, text in enumerate(texts):
            expected = residual_by_transformers(tiny_base, text.ids)
            for layer in layers:
                torch.testing.assert_close(
                    torch.tensor(found[layer][row]),
                    expected[layer][text.positions],
                    atol=1e-5,
                    rtol=0,
                )


def test_the_batch_a_text_is_in_does_not_change_its_activation(tokenizer, tiny_base) -> None:
    texts = encode_all(tokenizer, tiny_base)
    model = load_backbone(tiny_base, num_blocks=2)
    alone, together = (
        ActivationReader(model, (1,), batch_tokens=budget).read(texts)[1] for budget in (1, 100_000)
    )
    np.testing.assert_allclose(np.concatenate(alone), np.concatenate(together), atol=1e-5)


def test_an_attached_adapter_that_is_off_does_not_change_what_is_captured(
    tokenizer, tiny_base
) -> None:
    texts = encode_all(tokenizer, tiny_base)
    plain = np.concatenate(ActivationReader(load_backbone(tiny_base), (1,), 1_000).read(texts)[1])
    model = add_lora(load_backbone(tiny_base), LoraSettings(rank=2, alpha=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with adapter_active(model, None):
        off = np.concatenate(ActivationReader(model, (1,), 1_000).read(texts)[1])
    with adapter_active(model, "default"):
        on = np.concatenate(ActivationReader(model, (1,), 1_000).read(texts)[1])
    np.testing.assert_array_equal(off, plain)
    assert np.abs(on - plain).max() > 1e-3


# Shards, without Ray ------------------------------------------------------------------------------


def block(run, corpus, shard: str = "part-00000.parquet") -> pa.Table:
    return read_texts(pa.table({"shard": [shard]}), run=run, corpus=corpus)


def test_a_vector_that_is_not_finite_is_counted_and_never_written(
    tiny_base, tiny_run, publish_corpus, tmp_path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "broken"
    tokenizer, model = (
        load_tokenizer(tiny_base),
        AutoModelForCausalLM.from_pretrained(tiny_base.model),
    )
    [token] = tokenizer.encode("Z", add_special_tokens=False)
    model.get_input_embeddings().weight.data[token] = float("inf")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = tiny_run(base=replace(tiny_base, model=str(folder)))
    corpus = publish_corpus(run, [["a fine text", "Z breaks it", ""]])
    rows = Capture(run.config.base, run.config.capture, threads=1)(block(run, corpus))
    target = Location.of(tmp_path / "out")
    write_shard(rows, target=target, base_digest="d")
    written = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert written["text"].to_pylist() == ["a fine text"]
    assert written.schema.equals(activation_schema(32))
    record = ShardRecord.load(target, "part-00000.parquet", "d")
    assert [(row["text_id"], row["reason"]) for row in record.skipped] == [
        ("doc-000-0000#1", "non_finite"),
        ("doc-000-0001#0", "no_tokens"),
    ]


def test_a_shard_of_which_no_text_is_left_is_an_empty_file_with_its_reasons(
    tiny_run, publish_corpus, tmp_path
) -> None:
    run = tiny_run()
    corpus = publish_corpus(run, [["", ""]])
    target = Location.of(tmp_path / "out")
    write_shard(
        Capture(run.config.base, run.config.capture, threads=1)(block(run, corpus)),
        target=target,
        base_digest="d",
    )
    assert pq.read_table(tmp_path / "out" / "part-00000.parquet").num_rows == 0
    assert len(ShardRecord.load(target, "part-00000.parquet", "d").skipped) == 2


def test_a_shard_counts_as_done_only_when_its_record_and_its_file_agree(
    tiny_run, publish_corpus, tmp_path
) -> None:
    run = tiny_run()
    capture = Capture(run.config.base, run.config.capture, threads=1)
    rows = list(capture(block(run, publish_corpus(run))))
    target, shard = Location.of(tmp_path / "out"), "part-00000.parquet"
    assert ShardRecord.load(target, shard, "d") is None
    write_shard(rows, target=target, base_digest="d")
    assert ShardRecord.load(target, shard, "d").activations == len(TEXTS)
    assert ShardRecord.load(target, shard, "another base") is None
    os.truncate(tmp_path / "out" / shard, 100)
    assert ShardRecord.load(target, shard, "d") is None
    write_shard(rows, target=target, base_digest="d")
    os.truncate(tmp_path / "out" / "scratch" / f"{shard}.json", 20)
    assert ShardRecord.load(target, shard, "d") is None


def test_a_block_that_mixes_two_shards_is_refused(tiny_run, publish_corpus, tmp_path) -> None:
    run = tiny_run()
    corpus = publish_corpus(run)
    capture = Capture(run.config.base, run.config.capture, threads=1)
    mixed = capture(
        pa.concat_tables([block(run, corpus), block(run, corpus, "part-00001.parquet")])
    )
    with pytest.raises(RuntimeError, match="got rows of 2 shards, expected those of one"):
        write_shard(mixed, target=Location.of(tmp_path / "out"), base_digest="d")


# The stage, with Ray Data -------------------------------------------------------------------------


def vectors_by_id(run, layer: int | None = None) -> dict[str, np.ndarray]:
    found = {}
    for split in ("train", "validation", "test"):
        try:
            table = load_activations(run, split, layer)
        except ValueError:
            continue
        found.update(zip(table.ids, table.vectors.numpy(), strict=True))
    return found


def test_a_stream_for_gpus_is_laid_out_like_one_for_cpus(
    ray_cluster, tiny_run, publish_corpus
) -> None:
    """Ray Data refuses what it does not like when the stream is made, before anything runs."""
    compute = ComputeConfig(capture_gpus=1.0)
    run = tiny_run(compute=compute)
    corpus = publish_corpus(run, [TEXTS, TEXTS[::-1]])
    stream = shard_stream(run, run.open("activations"), corpus, ["a", "b"], "digest")
    assert "Capture" in repr(stream)


def test_the_stage_writes_one_file_a_shard_with_stats_and_counts(
    ray_cluster, tiny_run, publish_corpus, tiny_base, tokenizer
) -> None:
    run = tiny_run(capture=CaptureConfig(layers=(2,)))
    publish_corpus(run, [TEXTS, ["", *TEXTS[::-1], "too long " * 300]])
    manifest = capture_activations(run)
    assert set(manifest.files) == {
        "part-00000.parquet",
        "part-00001.parquet",
        "stats.json",
        "skipped.jsonl",
    }
    assert manifest.metrics["skipped"] == {"no_tokens": 1, "too_long": 1}
    assert manifest.metrics["texts"] == 12 and manifest.metrics["activations"] == 20
    assert manifest.metrics["padding"] < 0.05
    assert manifest.model == base_info(tiny_base).to_dict()
    skipped = [
        json.loads(line)
        for line in (run.root / "activations" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [row["text_id"] for row in skipped] == ["doc-001-0000#0", "doc-001-0003#0"]

    train = load_activations(run, "train")
    assert train.ids == sorted(train.ids) and train.vectors.dtype == torch.float32
    for row, text in enumerate(train.texts):
        [encoded] = encode_all(tokenizer, tiny_base, texts=[text])
        expected = residual_by_transformers(tiny_base, encoded.ids)[1][-1]
        torch.testing.assert_close(train.vectors[row], expected, atol=1e-5, rtol=0)
    stats, rows = load_stats(run), train.vectors.numpy().astype(np.float64)
    norms = np.sqrt((rows**2).sum(1))
    np.testing.assert_allclose(stats["mean_direction"], (rows / norms[:, None]).mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["norm_quantiles"]["0.5"], np.median(norms), rtol=1e-6)
    assert stats["count"] == len(train) and manifest.documents["train"] == sorted(
        set(train.doc_ids)
    )
    assert capture_activations(run) == manifest, "a complete stage is skipped"


@pytest.mark.slow
def test_neither_actors_nor_shards_change_an_activation(
    ray_cluster, tiny_run, publish_corpus
) -> None:
    texts = [f"{text} {number}" for number in range(4) for text in TEXTS]
    capture = CaptureConfig(positions="random:2")
    alone, shared = (
        tiny_run("one", capture=capture),
        tiny_run("two", capture=replace(capture, num_actors=2, batch_tokens=200)),
    )
    table = corpus_table(0, texts)
    for run, cuts in ((alone, [0, 20]), (shared, [0, 3, 9, 14, 20])):
        stage = run.open_artifact("corpus", "corpus")
        Path(stage.location.path).mkdir(parents=True, exist_ok=True)
        for number, (start, end) in enumerate(pairwise(cuts)):
            pq.write_table(
                table.slice(start, end - start), f"{stage.location.path}/part-{number:05}.parquet"
            )
        stage.publish()
        capture_activations(run)
    first, second = vectors_by_id(alone), vectors_by_id(shared)
    assert list(first) and set(first) == set(second)
    for name, vector in first.items():
        np.testing.assert_allclose(vector, second[name], atol=1e-5)


def test_a_damaged_corpus_shard_is_one_message_that_names_it(
    ray_cluster, tiny_run, publish_corpus
) -> None:
    run = tiny_run()
    publish_corpus(run)
    shard = Path(run.root.path) / "corpus" / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Exception) as caught:
        capture_activations(run)
    assert "part-00001.parquet: got" in user_message(caught.value)
    assert "The file is damaged" in user_message(caught.value)


def test_a_layer_that_the_model_does_not_have_is_one_message(
    ray_cluster, tiny_run, publish_corpus
) -> None:
    run = tiny_run(capture=CaptureConfig(layers=(3,)))
    publish_corpus(run)
    with pytest.raises(ValueError, match="got 3, expected 0 to 2"):
        capture_activations(run)


@pytest.mark.slow
def test_when_nothing_can_be_captured_the_stage_says_so(
    ray_cluster, tiny_run, publish_corpus, tiny_base
) -> None:
    run = tiny_run(base=replace(tiny_base, max_tokens=3))
    publish_corpus(run)
    with pytest.raises(
        ValueError, match=r"got none from 10 texts .*too_long.*expected at least one"
    ):
        capture_activations(run)


def test_artifacts_of_another_model_or_tokenizer_are_refused(tiny_run, tiny_base) -> None:
    info = base_info(tiny_base)
    manifest = tiny_run().open_artifact("activations", "base").publish(model=info.to_dict())
    check_base(manifest, info)
    with pytest.raises(ValueError, match=r"got weights 0 .*expected .*was made"):
        check_base(manifest, replace(info, digest="0"))
    with pytest.raises(ValueError, match="got tokenizer 0 "):
        check_base(manifest, replace(info, tokenizer_digest="0"))
    check_base(manifest, replace(info, injection_norm=1.5))  # activations are captured without it
    adapter = replace(manifest, name="sft")
    check_base(adapter, info)
    with pytest.raises(ValueError, match=r"artifact 'sft': got injection norm 1\.5 "):
        check_base(adapter, replace(info, injection_norm=1.5))
    with pytest.raises(ValueError, match="artifact 'sft': got marker x "):
        check_base(adapter, replace(info, marker="x"))


@pytest.mark.slow
def test_a_killed_capture_actor_costs_only_the_work_in_flight(
    ray_cluster, tiny_run, publish_corpus
) -> None:
    calm, disturbed = tiny_run("calm"), tiny_run("disturbed")
    shards = [[f"{text} {number}" for text in TEXTS * 8] for number in range(12)]
    publish_corpus(calm, shards)
    publish_corpus(disturbed, shards)
    capture_activations(calm)
    job = threading.Thread(target=capture_activations, args=(disturbed,))
    job.start()
    scratch, killed = Path(disturbed.root.path) / "activations" / "scratch", []
    while job.is_alive() and not killed:
        if any(scratch.glob("*.json")):
            for process in psutil.Process().children(recursive=True):
                if process.is_running() and process.name().startswith("ray::MapWorker"):
                    process.kill()
                    killed.append(process.pid)
        time.sleep(0.02)
    job.join()
    assert killed, "the capture ended before its actor could be killed: use more shards"
    assert disturbed.find("activations").files == calm.find("activations").files


@pytest.mark.slow
def test_after_sigkill_of_the_driver_the_same_command_completes_with_the_same_bytes(
    ray_cluster, tiny_run, publish_corpus, tiny_base
) -> None:
    calm, disturbed = tiny_run("calm"), tiny_run("disturbed")
    for run in (calm, disturbed):
        publish_corpus(run, [[f"{text} {number}" for text in TEXTS * 20] for number in range(20)])
    command = [
        sys.executable,
        str(ROOT / "jobs" / "capture.py"),
        "--run-dir",
        disturbed.config.run_dir,
        "--base.model",
        tiny_base.model,
        "--base.layer",
        "1",
        "--base.injection-norm",
        "4",
        "--base.max-tokens",
        "256",
        "--base.device",
        "cpu",
        "--compute.threads",
        "1",
        "--compute.capture-cpus",
        "0.5",
    ]
    environment, folder = (
        {**os.environ, "PYTHONPATH": str(ROOT)},
        Path(disturbed.root.path) / "activations",
    )
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while driver.poll() is None and len(list(folder.glob("scratch/*.json"))) < 2:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = sorted(folder.glob("*.parquet"))
    assert done and not (folder / "manifest.json").exists(), (
        "the job ended before it could be killed: use more shards"
    )
    os.truncate(done[0], 64)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert disturbed.find("activations").files == capture_activations(calm).files
    assert not list(folder.glob("**/*.tmp")) and not (folder / "scratch").exists()


@pytest.mark.slow
def test_capture_works_on_an_s3_run_directory(
    ray_cluster, tiny_run, publish_corpus, s3_uri
) -> None:
    run = tiny_run(run_dir=s3_uri("capture"))
    publish_corpus(run)
    manifest = capture_activations(run)
    local = tiny_run("local")
    publish_corpus(local)
    assert manifest.files == capture_activations(local).files
    assert len(load_activations(run, "train")) > 0
