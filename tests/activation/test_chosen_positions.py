"""Which tokens `capture.positions` means: counted by hand on the tokenizer of the embedded base."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import CHAT_TEMPLATE, random_sentences

from nla_ray.activation.bank import activation_schema
from nla_ray.activation.capture import ActivationReader, Capture, CapturedBlock
from nla_ray.activation.positions import MEAN_POSITION, EncodedText, Skipped, TextEncoder
from nla_ray.activation.shards import write_shard
from nla_ray.activation.stage import capture_activations, load_activations, read_texts
from nla_ray.base.conversation import Turn, as_messages, join_turns
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.label.stage import activation_subjects, drawn_labels, label_texts, load_labels
from nla_ray.run import blocks
from nla_ray.run.blocks import BLOCK_BYTES, activation_row_bytes, block_rows, gather_blocks
from nla_ray.run.identity import SPLITS
from nla_ray.run.location import Location
from nla_ray.settings.config import CaptureConfig, CorpusConfig, LabelConfig
from nla_ray.settings.positions import PositionRule
from nla_ray.settings.presets import nano
from nla_ray.text.stage import build_corpus

CODE = "def read_frame(index):\n    return frame_index"
"""Tokens from position 3, after `<|im_start|>`, `user` and a line break: "def", " read", "_frame",
"(index", "):\\n", "   ", " return", " frame", "_index"."""
BYTES = "Ä frame 日本 x"
"""Tokens from position 3: two of "Ä", " frame", " ", three of "日", three of "本", " x"."""


def encode(positions: str, text: str = CODE) -> EncodedText:
    base = nano().base
    return TextEncoder(load_tokenizer(base), base, CaptureConfig(positions=positions)).encode(
        "a#0", text
    )


@pytest.mark.parametrize(
    ("positions", "text", "expected", "ends"),
    [
        ("all", CODE, [*range(3, 12)], [3, 8, 14, 20, 23, 26, 33, 39, 45]),
        ("user", CODE, [*range(3, 12)], [3, 8, 14, 20, 23, 26, 33, 39, 45]),
        ("last:user", CODE, [11], [45]),
        ("regex:frame", CODE, [5, 10], [14, 39]),
        ("regex:(?m)^def.*$", CODE, [7], [23]),
        ("regex:index|x*", CODE, [6, 11], [20, 45]),
        ("substring::", CODE, [7], [23]),
        ("substring:.", CODE + ".", [12], [46]),
        ("substring:日", BYTES, [9], [9]),
        ("regex:日本", BYTES, [12], [10]),
        ("regex:frame ", BYTES, [6], [8]),
    ],
)
def test_the_tokens_of_a_setting_are_those_counted_by_hand(
    positions: str, text: str, expected: list[int], ends: list[int]
) -> None:
    encoded = encode(positions, text)
    assert encoded.positions == expected and encoded.ends == ends and encoded.averaged == []
    assert encoded.n_raw_tokens == [position - 2 for position in expected]


@pytest.mark.parametrize(
    ("positions", "text", "averaged", "end"),
    [
        ("mean", CODE, [*range(3, 12)], 45),
        ("mean:user", CODE, [*range(3, 12)], 45),
        ("mean:regex:frame", CODE, [5, 10], 39),
        ("mean:regex:read_frame", CODE, [4, 5], 14),
        ("mean:substring:日", BYTES, [7, 8, 9], 9),
    ],
)
def test_a_mean_is_over_every_token_of_its_span_and_stands_at_none(
    positions: str, text: str, averaged: list[int], end: int
) -> None:
    encoded = encode(positions, text)
    assert encoded.positions == [MEAN_POSITION] and encoded.averaged == averaged
    assert encoded.ends == [end] and encoded.n_raw_tokens == [averaged[-1] - 2]


@pytest.mark.parametrize("positions", ["regex:licence", "substring:Frame", "regex:q*?", "system"])
def test_a_text_without_such_a_token_is_left_out_by_name(positions: str) -> None:
    with pytest.raises(Skipped, match=f"no_match: no token .* is one of {re.escape(positions)}"):
        encode(positions)


def test_a_match_in_what_offsets_leave_out_ends_in_the_token_that_begins_with_it(tiny_base) -> None:
    """Tokenizers of Llama 3 do not count the space before a word as of its token."""
    from tokenizers import processors

    tokenizer = load_tokenizer(tiny_base)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spans = tokenizer("a file", return_offsets_mapping=True)["offset_mapping"]
    assert spans[0] == (0, 1) and spans[1][0] == 2
    encoder = TextEncoder(tokenizer, tiny_base, CaptureConfig(positions="regex:a "))
    first = len(tokenizer.encode("<|im_start|>user\n"))
    assert encoder.encode("a#0", "a file").positions == [first + 1]


# Conversations ------------------------------------------------------------------------------------

TURNS = (Turn(role="user", content="TODO fix"), Turn(role="assistant", content="TODO read_frame"))
"""Tokens 3 to 6: "T", "ODO", " f", "ix"; 14 to 17: "T", "ODO", " read", "_frame"; `assistant` takes
three, and each turn ends in `<|im_end|>` and a line break. The contents begin at 6 and 27."""
JOINED = "user: TODO fix\n\nassistant: TODO read_frame"


@pytest.mark.parametrize(
    ("positions", "expected", "ends", "n_raw_tokens"),
    [
        ("last", [19], [42], [8]),
        ("all", [3, 4, 5, 6, 14, 15, 16, 17], [7, 10, 12, 14, 28, 31, 36, 42], [*range(1, 9)]),
        ("user", [3, 4, 5, 6], [7, 10, 12, 14], [1, 2, 3, 4]),
        ("assistant", [14, 15, 16, 17], [28, 31, 36, 42], [5, 6, 7, 8]),
        ("last:user", [6], [14], [4]),
        ("last:assistant", [17], [42], [8]),
        ("substring:TODO", [4, 15], [10, 31], [2, 6]),
        ("regex:^TODO", [4, 15], [10, 31], [2, 6]),
        ("regex:(?:f|ix)$", [6], [14], [4]),
        ("mean:assistant", [MEAN_POSITION], [42], [8]),
        ("mean:substring:DO f", [MEAN_POSITION], [12], [3]),
    ],
)
def test_the_tokens_of_a_conversation_are_those_counted_by_hand(
    positions: str, expected: list[int], ends: list[int], n_raw_tokens: list[int]
) -> None:
    base = nano().base
    encoder = TextEncoder(load_tokenizer(base), base, CaptureConfig(positions=positions))
    assert join_turns(TURNS) == JOINED
    encoded = encoder.encode("a#0", JOINED, as_messages(TURNS))
    assert len(encoded.ids) == 20
    assert (encoded.positions, encoded.ends, encoded.n_raw_tokens) == (expected, ends, n_raw_tokens)


@pytest.mark.parametrize("positions", ["system", "last:system", "substring:user: ", "regex:: T"])
def test_who_speaks_is_no_text_of_a_turn(positions: str) -> None:
    base = nano().base
    encoder = TextEncoder(load_tokenizer(base), base, CaptureConfig(positions=positions))
    with pytest.raises(Skipped, match="no_match"):
        encoder.encode("a#0", JOINED, as_messages(TURNS))


def test_conversations_go_from_a_file_to_activations_and_labels(
    ray_cluster, tiny_run, tiny_base, tmp_path: Path
) -> None:
    """A user's file, through corpus, capture and labels, with a base that takes no system role."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base.model, folder)
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    template = refusing + CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    rows = []
    for number in range(30):
        asked = {"role": "user", "content": f"Where is {random_sentences(number, 6)}?"}
        answer = {"role": "assistant", "content": f"On {random_sentences(100 + number, 6)}."}
        rows.append({"doc_id": f"d{number:02}", "messages": [asked, answer, asked]})
    rows.append(
        {"doc_id": "s", "messages": [{"role": "system", "content": "Be brief. " * 7}, asked]}
    )
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny_run(
        base=replace(tiny_base, model=str(folder)),
        corpus=CorpusConfig(path=str(path), near_duplicate_jaccard=1.0, families=False),
        capture=CaptureConfig(positions="last:assistant"),
    )
    assert build_corpus(run).metrics["num_chunks"] == 31
    manifest = capture_activations(run)
    assert manifest.metrics["skipped"] == {"refused_by_template": 1}
    assert manifest.metrics["activations"] == 30
    label_texts(run)
    table = load_activations(run, "train")
    by_id = {f"{row['doc_id']}#0": row["messages"] for row in rows}
    tokenizer = load_tokenizer(run.config.base)
    for text_id, position, text, vector in zip(
        table.text_ids, table.positions, table.texts, table.vectors, strict=True
    ):
        asked, answer, _ = by_id[text_id]
        assert text == f"user: {asked['content']}\n\nassistant: {answer['content']}"
        prompt = tokenizer.apply_chat_template(by_id[text_id], tokenize=False)
        whole = tokenizer.encode(prompt + "<|im_start|>assistant\n")
        assert tokenizer.decode(whole[: position + 1]).endswith(f"assistant\n{answer['content']}")
        reader = ActivationReader(load_backbone(run.config.base, num_blocks=2), (1,), 1_000)
        [[expected]] = reader.read([EncodedText(ids=whole, positions=[position])])[1]
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    subjects = activation_subjects(run, table)
    assert set(subjects) == set(drawn_labels(run, "train")) and len(subjects) > 20


def test_labels_in_a_file_of_conversations_are_those_of_its_rows(tiny_run, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": random_sentences(number, 15)}],
            "labels": {"a": f"- number {number}"},
        }
        for number in range(10)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [1]}]))
    run = tiny_run(corpus=CorpusConfig(path=str(path)), label=LabelConfig(import_path=str(path)))
    build_corpus(run)
    manifest = label_texts(run)
    assert manifest.metrics["labels"] == 10
    assert manifest.metrics["refused"] == {"messages: a turn without content": 1}


# From the model to the file -----------------------------------------------------------------------


def captured(run, corpus) -> list[CapturedBlock]:
    texts = read_texts(pa.table({"shard": ["part-00000.parquet"]}), run=run, corpus=corpus)
    return list(Capture(run.config.base, run.config.capture, threads=1)(texts))


def test_the_activation_of_a_mean_is_the_mean_of_those_of_its_tokens(
    tiny_run, publish_corpus
) -> None:
    every, mean = (
        tiny_run(name, capture=CaptureConfig(positions=positions, layers=(2,)))
        for name, positions in (("every", "all"), ("mean", "mean"))
    )
    texts = ["A licence that permits copying.", "def read(path):\n    return path"]
    tables = []
    for run in (every, mean):
        rows = [block.rows for block in captured(run, publish_corpus(run, [texts]))]
        tables.append(pa.concat_tables(rows).to_pylist())
    assert [(row["activation_id"], row["position"], row["token"]) for row in tables[1]] == [
        (f"doc-000-0000#{text}@{layer}:mean", -1, -1) for text in (0, 1) for layer in (1, 2)
    ]
    for row in tables[1]:
        inside = [
            found["activation"]
            for found in tables[0]
            if (found["text_id"], found["layer"]) == (row["text_id"], row["layer"])
        ]
        assert len(inside) > 5 and row["text"] in texts
        np.testing.assert_allclose(row["activation"], np.mean(inside, axis=0), atol=1e-6)


def test_means_and_tokens_may_be_read_in_one_batch(tiny_base) -> None:
    texts = [
        EncodedText(ids=[5, 6, 7, 8], positions=[1, 3]),
        EncodedText(ids=[9, 10, 11], positions=[MEAN_POSITION], averaged=[0, 2]),
    ]
    reader = ActivationReader(load_backbone(tiny_base, num_blocks=2), (1,), batch_tokens=1_000)
    tokens = reader.read([replace(texts[1], positions=[0, 2], averaged=[])])[1][0]
    first, second = reader.read(texts)[1]
    assert first.shape == (2, 32) and second.shape == (1, 32)
    np.testing.assert_allclose(second[0], tokens.mean(0), atol=1e-6)


def test_a_text_is_captured_labelled_and_joined_at_every_match(
    ray_cluster, tiny_run, publish_corpus
) -> None:
    run = tiny_run(capture=CaptureConfig(positions="regex:rows|file"))
    shard = [
        f"{text} number {number}"
        for number in range(12)
        for text in ("rows and rows of a file", "no such word in this")
    ]
    publish_corpus(run, [shard])
    manifest = capture_activations(run)
    assert manifest.metrics["activations"] == 36 and manifest.metrics["texts"] == 24
    assert manifest.metrics["skipped"] == {"no_match": 12}
    label_texts(run)
    read = []
    for split in SPLITS:
        if not any(row["split"] == split for row in load_labels(run, split)):
            continue
        table = load_activations(run, split)
        labels = drawn_labels(run, split)
        assert all(subject in labels for subject in activation_subjects(run, table))
        read += table.texts
    assert {text: read.count(text) for text in read} == {
        "rows": 12,
        "rows and rows": 12,
        "rows and rows of a file": 12,
    }


def test_a_mean_has_the_labels_of_the_whole_text(ray_cluster, tiny_run, publish_corpus) -> None:
    run = tiny_run(capture=CaptureConfig(positions="mean"))
    publish_corpus(run, [[f"A licence that permits copying, number {n}." for n in range(20)]])
    capture_activations(run)
    assert "inputs" not in label_texts(run).config
    table = load_activations(run, "train")
    assert set(table.positions) == {MEAN_POSITION}
    assert activation_subjects(run, table) == table.text_ids
    assert set(table.text_ids) == set(drawn_labels(run, "train"))


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_model", [32, 256, 3_584, 16_384])
@pytest.mark.parametrize("num_layers", [1, 28, 80])
@pytest.mark.parametrize("num_positions", [1, 130, 32_768])
def test_a_block_is_bounded_whatever_the_positions_layers_and_texts(
    d_model: int, num_layers: int, num_positions: int
) -> None:
    """Of a text of so many tokens, four characters each, every prefix is a row of every layer."""
    rows = [activation_row_bytes(d_model, 4 * n) for n in range(1, num_positions + 1)] * num_layers
    parts = list(gather_blocks(rows, lambda size: size))
    assert [size for part in parts for size in part] == rows
    assert max(sum(part) for part in parts) <= BLOCK_BYTES < 2**31 / 4
    longest = max(len(part) for part in parts)
    assert longest <= block_rows(activation_row_bytes(d_model, 0))
    assert longest * d_model < 2**31


def test_blocks_change_no_row_and_are_the_row_groups_of_the_file(
    tiny_run, publish_corpus, monkeypatch, tmp_path: Path
) -> None:
    run = tiny_run(capture=CaptureConfig(positions="all", layers=(0, 2)))
    corpus = publish_corpus(run, [[f"{number} rows and columns of a file" for number in range(9)]])
    [whole, left_out] = captured(run, corpus)
    assert left_out.rows.num_rows == 0
    most = 40 * activation_row_bytes(32, 100)
    monkeypatch.setattr(blocks.gather_blocks, "__defaults__", (most,))
    parts = captured(run, corpus)
    assert len(parts) > 5
    for part in parts:
        assert sum(map(len, part.rows["text"].to_pylist())) < most
        assert part.rows.num_rows <= most / activation_row_bytes(32, 0)
    rows = pa.concat_tables([part.rows for part in parts])
    assert rows.drop(["activation"]).equals(whole.rows.drop(["activation"]))
    difference = np.array(rows["activation"].to_pylist()) - whole.rows["activation"].to_pylist()
    assert np.abs(difference).max() < 1e-5
    write_shard(parts, target=Location.of(tmp_path), base_digest="d")
    file = pq.ParquetFile(tmp_path / "part-00000.parquet")
    assert file.num_row_groups == len(parts) - 1
    assert file.read().num_rows == whole.rows.num_rows
    record = json.loads((tmp_path / "scratch" / "part-00000.parquet.json").read_text())
    assert record["texts"] == 9 and record["activations"] == whole.rows.num_rows
    assert record["tokens"] <= record["padded_tokens"]


def test_a_shard_of_many_rows_is_written_in_the_memory_of_its_blocks(tmp_path: Path) -> None:
    """600,000 rows at d_model 64, in blocks of 20,000 that are made one by one."""
    most_alive, num_blocks = 0, 30

    def synthetic():
        nonlocal most_alive
        for number in range(num_blocks):
            values = np.random.default_rng(number).normal(size=(20_000, 64)).astype(np.float32)
            names = [f"t{number}" for _ in range(20_000)]
            columns = {name: pa.array(names) for name in ("text_id", "doc_id", "domain", "text")}
            rows = pa.table(
                {
                    **columns,
                    "shard": pa.array(["s.parquet"] * 20_000),
                    "split": pa.array(["train"] * 20_000),
                    "num_tokens": pa.array([7] * 20_000, pa.int32()),
                    "skipped": pa.nulls(20_000, pa.string()),
                    "activation_id": pa.array(names),
                    **{
                        name: pa.array(range(20_000), pa.int32())
                        for name in ("position", "token", "layer")
                    },
                    "activation": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 64),
                }
            )
            del values
            yield CapturedBlock(rows=rows, padded_tokens=9)
            most_alive = max(most_alive, pa.total_allocated_bytes())

    before = pa.total_allocated_bytes()
    write_shard(synthetic(), target=Location.of(tmp_path), base_digest="d")
    block_bytes = 20_000 * 64 * 4
    assert most_alive - before < 8 * block_bytes < num_blocks * block_bytes / 3
    file = pq.ParquetFile(tmp_path / "s.parquet")
    assert file.metadata.num_rows == 600_000 and file.num_row_groups == num_blocks
    assert file.schema_arrow.equals(activation_schema(64))
    expected = np.random.default_rng(17).normal(size=(20_000, 64)).astype(np.float32)
    found = file.read_row_group(17)["activation"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(found.reshape(-1, 64), expected)


def test_labels_of_a_shard_are_written_in_row_groups_and_are_the_same(
    tiny_run, publish_corpus, monkeypatch
) -> None:
    runs = [tiny_run(name, capture=CaptureConfig(positions="all")) for name in ("one", "more")]
    found = []
    for run, most in zip(runs, (32 << 20, 40_000), strict=True):
        monkeypatch.setattr("nla_ray.label.stage._BLOCK_BYTES", most)
        publish_corpus(run, [[f"{number} rows and columns of a file" for number in range(20)]])
        manifest = label_texts(run)
        file = pq.ParquetFile(f"{run.root.path}/labels/part-00000.parquet")
        found.append((manifest.metrics, manifest.documents, file.read().to_pylist()))
        assert (file.num_row_groups > 3) == (most == 40_000)
    assert found[0] == found[1] and found[0][0]["texts"] == 20


def test_a_rule_says_what_its_labels_are_of() -> None:
    whole = {
        name
        for name in ("last", "mean", "all", "mean:regex:a", "user", "last:user")
        if PositionRule.of(name).of_whole_texts
    }
    assert whole == {"last", "mean"}
