"""Labels of activations inside texts: of the text up to the position, and joined on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import TEXTS

from nla_ray.activation.capture import Capture
from nla_ray.activation.positions import TextEncoder
from nla_ray.activation.shards import write_shard
from nla_ray.activation.stage import ShardAnswers, load_activations, read_prompts, read_texts
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import chat_prompt
from nla_ray.label.rows import LABEL_SCHEMA
from nla_ray.label.stage import label_texts, load_labels
from nla_ray.label.teacher import make_teachers
from nla_ray.plan.facts import PlanFacts
from nla_ray.run.artifact import Run
from nla_ray.run.identity import SPLITS, document_half, text_hash
from nla_ray.settings.config import CaptureConfig, LabelConfig, ReconstructorConfig
from nla_ray.text.stage import read_chunks
from nla_ray.text.words import WordStatistics
from nla_ray.training.reconstruction import load_examples
from nla_ray.training.sft import load_pairs

INSIDE = CaptureConfig(positions="random:3")
SHARD = [f"{text} Copy {number} of it." for number in range(12) for text in TEXTS]
PublishCorpus = Callable[..., object]


@pytest.fixture
def inside(tiny_run: Callable[..., Run], publish_corpus: PublishCorpus) -> Run:
    """A run with a corpus whose activations are captured at three tokens of every text."""
    run = tiny_run(capture=INSIDE)
    publish_corpus(run, [SHARD])
    return run


def publish_activations(run: Run, model: dict | None = None) -> None:
    """The artifact of the capture stage, without Ray. `model`: what its manifest says of it."""
    corpus, stage = run.require("corpus"), run.open("activations")
    for shard in corpus.files:
        texts = read_texts(pa.table({"shard": [shard]}), run=run, corpus=corpus)
        captured = Capture(run.config.base, run.config.capture, threads=1)(texts)
        write_shard(captured, target=stage.location, base_digest="")
    stage.publish(model=model or base_info(run.config.base).to_dict())


def read_up_to(run: Run, text: str, position: int) -> tuple[str, int]:
    """What stands in the prompt up to a position, of the text alone, and its tokens."""
    tokenizer = load_tokenizer(run.config.base)
    ids = tokenizer.encode(chat_prompt(tokenizer, text))
    first = len(tokenizer.encode("<|im_start|>user\n"))
    return tokenizer.decode(ids[first : position + 1]), position + 1 - first


def every_row(run: Run) -> list[dict]:
    return [row for split in SPLITS for row in load_labels(run, split)]


def import_labels(run: Run, rows: list[dict]) -> Run:
    """The run with labels of this content to import."""
    path = Path(run.root.path) / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(dataclasses.replace(run.config, label=LabelConfig(import_path=str(path))))


def chunks_of(run: Run) -> dict[str, dict]:
    """The texts of the corpus by their ids."""
    rows = read_chunks(run, ("text_id", "split", "text")).to_pylist()
    return {row["text_id"]: row for row in rows}


def test_a_teacher_sees_the_text_up_to_the_position_and_no_further(inside: Run) -> None:
    manifest, chunks = label_texts(inside), chunks_of(inside)
    train = [chunk["text"] for chunk in chunks.values() if chunk["split"] == "train"]
    teachers = make_teachers(LabelConfig().teachers, WordStatistics.fit(train))
    rows = every_row(inside)
    assert {(row["text_id"], row["teacher"]) for row in rows} == {
        (text_id, teacher.name) for text_id in chunks for teacher in teachers
    }
    by_name = {teacher.name: teacher for teacher in teachers}
    for row in rows:
        text = chunks[row["text_id"]]["text"]
        prefix, tokens = read_up_to(inside, text, row["position"])
        assert text.startswith(prefix) and row["n_raw_tokens"] == tokens
        assert row["raw"] == by_name[row["teacher"]].describe(prefix, "prose")
    drawn = [(row["text_id"], row["position"]) for row in rows if row["drawn"]]
    assert sorted(drawn) == sorted({(row["text_id"], row["position"]) for row in rows})
    assert manifest.config["inputs"]["positions"] == "random:3"


def test_an_activation_goes_with_the_text_up_to_it_and_with_the_labels_of_its_position(
    inside: Run,
) -> None:
    publish_activations(inside)
    rows = [
        {
            "text": chunk["text"],
            "position": position,
            "labels": {"a": f"- a {text_id} {position}", "b": f"- b {text_id} {position}"},
        }
        for text_id, chunk in chunks_of(inside).items()
        for position in positions_of(inside, text_id)
    ]
    run, chunks = import_labels(inside, rows), chunks_of(inside)
    assert label_texts(run).metrics["refused"] == {}
    table = load_activations(run, "train")
    for text_id, position, text in zip(table.text_ids, table.positions, table.texts, strict=True):
        assert text == read_up_to(run, chunks[text_id]["text"], position)[0]
    pairs = load_pairs(run, "train", limit=None, seed=0, first_row=0, every_label=True)
    expected = [
        f"- {teacher} {text_id} {position}"
        for text_id, position in zip(table.text_ids, table.positions, strict=True)
        for teacher in "ab"
    ]
    assert pairs.labels == expected
    assert torch.equal(pairs.vectors, table.injected.repeat_interleave(2, 0))
    drawn = load_pairs(run, "train", limit=None, seed=0, first_row=0).labels
    assert [label[4:] for label in drawn] == [label[4:] for label in expected[::2]]
    settings = ReconstructorConfig(document_half="even")
    examples = load_examples(run, "train", settings)
    of_half = [row for row, doc_id in enumerate(table.doc_ids) if document_half(doc_id) == "even"]
    assert [text[4:] for text in examples.descriptions] == [drawn[row][4:] for row in of_half]
    assert torch.equal(examples.targets, table.vectors[of_half])
    assert {text[2] for text in examples.descriptions} == {"a", "b"}


def positions_of(run: Run, text_id: str) -> list[int]:
    """Those whose activations are captured."""
    tables = [load_activations(run, split) for split in SPLITS]
    return [
        position
        for table in tables
        for found, position in zip(table.text_ids, table.positions, strict=True)
        if found == text_id
    ]


def test_imported_labels_name_a_captured_position_or_are_refused_by_line(inside: Run) -> None:
    chunks, encoder = (
        chunks_of(inside),
        TextEncoder(load_tokenizer(inside.config.base), inside.config.base, INSIDE),
    )
    first, second = sorted(chunks)[:2]
    encoded = encoder.encode(first, chunks[first]["text"])
    [position, *_], [tokens, *_] = encoded.positions, encoded.n_raw_tokens
    other = next(place for place in range(3, 99) if place not in encoded.positions)
    row = {"text": chunks[first]["text"], "teacher": "a", "label": "- x"}
    rows = [
        {**row, "position": position},
        {**row, "teacher": "b", "n_raw_tokens": tokens},
        {**row, "teacher": "c", "n_raw_tokens": tokens, "position": position},
        {**row, "teacher": "a", "n_raw_tokens": tokens},
        {**row, "teacher": "d", "position": other},
        {**row, "teacher": "e", "position": position, "n_raw_tokens": tokens + 1},
        {**row, "teacher": "f", "position": "3"},
        {**row, "teacher": "g"},
        {"text_hash": text_hash(chunks[second]["text"]), "labels": {"a": "- y"}, "position": None},
    ]
    run = import_labels(inside, rows)
    refused = label_texts(run).metrics["refused"]
    assert [(row["teacher"], row["position"], row["n_raw_tokens"]) for row in every_row(run)] == [
        (teacher, position, tokens) for teacher in "abc"
    ]
    assert refused == {
        "label is there twice": 1,
        "no activation is captured at its position": 1,
        "no activation is captured at its position and n_raw_tokens": 1,
        "position is no whole number": 1,
        "neither position nor n_raw_tokens, and the run captures inside texts": 2,
    }


def test_a_label_of_a_whole_text_may_name_its_end_and_nothing_before(
    tiny_run: Callable[..., Run], publish_corpus: PublishCorpus
) -> None:
    run = tiny_run()
    publish_corpus(run, [SHARD[:4]])
    texts = [chunk["text"] for _, chunk in sorted(chunks_of(run).items())]
    tokenizer = load_tokenizer(run.config.base)
    end = len(tokenizer.encode(chat_prompt(tokenizer, texts[0]))) - 1
    rows = [
        {"text": texts[0], "teacher": "a", "label": "- whole", "position": end},
        {"text": texts[1], "teacher": "a", "label": "- whole"},
        {"text": texts[2], "teacher": "a", "label": "- part", "n_raw_tokens": 2},
    ]
    run = import_labels(run, rows)
    manifest = label_texts(run)
    assert [row["label"] for row in every_row(run)] == ["- whole", "- whole"]
    assert manifest.metrics["refused"] == {"no activation is captured at its n_raw_tokens": 1}
    assert "inputs" not in manifest.config and {*every_row(run)[0]} == {*LABEL_SCHEMA.names}


@pytest.mark.parametrize("labelled", ["last", "random:2"])
def test_training_refuses_labels_of_other_positions(inside: Run, labelled: str) -> None:
    publish_activations(inside)
    other = dataclasses.replace(inside.config, capture=CaptureConfig(positions=labelled))
    label_texts(Run(other))
    message = rf"labels of capture.positions {labelled}.*expected random:3.*run jobs/label.py"
    with pytest.raises(ValueError, match=message):
        load_pairs(inside, "train", limit=None, seed=0, first_row=0)
    with pytest.raises(ValueError, match=message):
        load_examples(inside, "train", ReconstructorConfig())


def test_training_refuses_activations_that_an_earlier_version_kept_with_whole_texts(
    inside: Run,
) -> None:
    label_texts(inside)
    model = {**base_info(inside.config.base).to_dict()}
    del model["prompt_digest"]
    publish_activations(inside, model)
    with pytest.raises(ValueError, match=r"each with the text up to it.*run jobs/capture.py"):
        load_pairs(inside, "train", limit=None, seed=0, first_row=0)


def test_training_refuses_labels_inside_texts_for_activations_at_their_end(
    tiny_run: Callable[..., Run], publish_corpus: PublishCorpus
) -> None:
    run = tiny_run()
    publish_corpus(run, [SHARD[:20]])
    publish_activations(run)
    label_texts(Run(dataclasses.replace(run.config, capture=INSIDE)))
    with pytest.raises(ValueError, match=r"labels of capture.positions random:3, expected last, "):
        load_pairs(run, "train", limit=None, seed=0, first_row=0)


# Inside answers -----------------------------------------------------------------------------------

ANSWERED = CaptureConfig(positions="generated:2", answer_tokens=9)


def publish_answers(run: Run) -> None:
    """The artifact of the stage `answers`, without Ray."""
    corpus, stage, capture = run.require("corpus"), run.open("answers"), run.config.capture
    answer = ShardAnswers(
        run.config.base, capture, threads=1, target=stage.location, base_digest=""
    )
    for shard in corpus.files:
        answer(read_prompts(pa.table({"shard": [shard]}), run=run, corpus=corpus))
    stage.publish(model=base_info(run.config.base).to_dict())


@pytest.fixture
def answered(tiny_run: Callable[..., Run], publish_corpus: PublishCorpus) -> Run:
    """A run whose activations are at two tokens of the base's answer to every text."""
    run = tiny_run(capture=ANSWERED)
    publish_corpus(run, [SHARD[:30], SHARD[30:]])
    publish_answers(run)
    return run


def test_a_teacher_sees_the_text_and_the_answer_up_to_the_position(answered: Run) -> None:
    manifest = label_texts(answered)
    assert set(manifest.parents) == {"corpus", "answers"}
    assert manifest.metrics["texts"] == len(SHARD) and manifest.metrics["unlabelled_texts"] == 0
    publish_activations(answered)
    table, chunks = load_activations(answered, "train"), chunks_of(answered)
    train = [chunk["text"] for chunk in chunks.values() if chunk["split"] == "train"]
    statistics = WordStatistics.fit(train)
    by_name = {
        teacher.name: teacher for teacher in make_teachers(LabelConfig().teachers, statistics)
    }
    names = zip(table.text_ids, table.positions, strict=True)
    read = dict(zip(names, table.texts, strict=True))
    rows = load_labels(answered, "train")
    assert {(row["text_id"], row["position"]) for row in rows} == set(read)
    for row in rows:
        text = read[row["text_id"], row["position"]]
        assert text.startswith(f"user: {chunks[row['text_id']]['text']}\n\nassistant: ")
        assert row["raw"] == by_name[row["teacher"]].describe(text, "prose")
    pairs = load_pairs(answered, "train", limit=None, seed=0, first_row=0)
    assert len(pairs.labels) == len(table)
    examples = load_examples(answered, "train", ReconstructorConfig(document_half="even"))
    assert len(examples.descriptions) > 5


def test_labels_made_elsewhere_name_a_position_in_the_answer_or_its_tokens(answered: Run) -> None:
    label_texts(answered)
    first, *_, last = every_row(answered)
    texts = {row["text_id"]: row["text"] for row in chunks_of(answered).values()}
    tokenizer, text = load_tokenizer(answered.config.base), texts[first["text_id"]]
    assert first["position"] >= len(tokenizer.encode(chat_prompt(tokenizer, text)))
    (answered.root / "labels").delete()
    run = import_labels(
        answered,
        [
            {"text": text, "teacher": "a", "label": "- x", "position": first["position"]},
            {
                "text": texts[last["text_id"]],
                "teacher": "b",
                "label": "- y",
                "n_raw_tokens": last["n_raw_tokens"],
            },
            {"text": text, "teacher": "c", "label": "- z", "position": 3},
        ],
    )
    refused = label_texts(run).metrics["refused"]
    assert refused == {"no activation is captured at its position": 1}
    assert sorted((row["teacher"], row["position"]) for row in every_row(run)) == [
        ("a", first["position"]),
        ("b", last["position"]),
    ]


def test_training_refuses_labels_of_other_answers(answered: Run) -> None:
    label_texts(answered)
    for name in ("answers", "activations"):
        (answered.root / name).delete()
    capture = dataclasses.replace(ANSWERED, answer_tokens=8)
    again = Run(dataclasses.replace(answered.config, capture=capture))
    publish_answers(again)
    publish_activations(again)
    with pytest.raises(ValueError, match=r"labels of .* answers \w+, expected .* answers \w+, as"):
        load_pairs(again, "train", limit=None, seed=0, first_row=0)


def test_a_plan_counts_labels_of_every_position(inside: Run) -> None:
    facts = PlanFacts.of(inside)
    assert (facts.labels_per_text, facts.positions_per_text) == (6, 3)
    label_texts(inside)
    assert PlanFacts.of(inside).labels_per_text == len(every_row(inside)) / len(SHARD)
