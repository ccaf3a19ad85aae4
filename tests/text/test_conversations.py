"""Conversations as rows of a corpus: what is read, what is rejected, and that none is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import random_sentences

from nla_ray.base.conversation import Turn, as_conversation, content_starts, join_turns
from nla_ray.run.artifact import Run
from nla_ray.run.identity import text_hash
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import CHUNK_SCHEMA, CONVERSATION_SCHEMA
from nla_ray.text.documents import Document, read_documents
from nla_ray.text.rejects import Reject
from nla_ray.text.stage import build_corpus, read_chunks, read_shards

ASKED = [
    {"role": "system", "content": "You answer in one line."},
    {"role": "user", "content": "Where is my order of May? It has not come."},
    {"role": "assistant", "content": "It left our store on Monday. <|im_end|>"},
]
TEXT = (
    "system: You answer in one line.\n\nuser: Where is my order of May? It has not come.\n\n"
    "assistant: It left our store on Monday. <|im_end|>"
)


def read(path: Path, **settings: object) -> list[Document | Reject]:
    return list(read_documents(CorpusConfig(path=str(path), **settings)))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_conversation_is_its_turns_and_the_text_that_they_make(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chats.jsonl", {"doc_id": "a", "messages": ASKED}, {"text": "A text"})
    chat, text = read(path)
    assert (chat.doc_id, chat.text) == ("a", TEXT)
    turns = as_conversation(chat.text, chat.messages)
    assert [vars(turn) for turn in turns] == ASKED and join_turns(turns) == TEXT
    for start, message in zip(content_starts(turns), ASKED, strict=True):
        assert TEXT[start:].startswith(message["content"])
    assert text.messages is None and text.text == "A text"


def test_a_row_with_a_text_is_that_text_whatever_else_it_holds(tmp_path: Path) -> None:
    rows = [{"text": "A text", "messages": ASKED}, {"text": None, "messages": ASKED}]
    first, second = read(jsonl(tmp_path / "chats.jsonl", *rows))
    assert (first.text, first.messages) == ("A text", None)
    assert second.text == TEXT and second.doc_id == f"text/{text_hash(TEXT)[:32]}"
    [named] = read(jsonl(tmp_path / "n.jsonl", {"turns": ASKED}), text_field="turns")
    assert named.text == TEXT


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("user: hello", "messages: not a list of turns"),
        ({"role": "user", "content": "hello"}, "messages: not a list of turns"),
        ([], "messages: not a list of turns"),
        (["hello"], "messages: a turn without content"),
        ([{"role": "assistant", "content": None}], "messages: a turn without content"),
        ([{"content": "hello"}], "messages: role or content not a string"),
        ([{"role": "user", "content": ["hello"]}], "messages: role or content not a string"),
        ([{"role": "user", "content": "  "}], "messages: role or content only white space"),
        ([{"role": "user", "content": "\ud800"}], "messages: role or content lone surrogates"),
        (
            [{"role": "tool", "content": "{}"}],
            "messages: a role that is none of system, user, assistant",
        ),
        ([{"role": "user", "content": "ab" * 300}] * 2, "over the length limit"),
    ],
)
def test_what_is_no_conversation_is_rejected_by_line_and_reason(
    messages: object, reason: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "chats.jsonl", {"messages": ASKED}, {"messages": messages})
    good, bad = read(path, max_document_chars=1_000)
    assert isinstance(good, Document)
    assert bad == Reject(source="chats.jsonl", line=2, reason=reason)


def test_conversations_are_read_from_parquet_and_from_a_saved_dataset(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"messages": ASKED, "id": 1}, {"messages": ASKED[1:], "id": 2}, {"messages": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    Dataset.from_list(rows[:2]).save_to_disk(tmp_path / "saved")
    first, second, missing = read(tmp_path / "chats.parquet")
    assert first.text == TEXT and second.text == TEXT.partition("\n\n")[2]
    assert missing.reason == "missing field"
    assert [document.messages for document in read(tmp_path / "saved")] == [
        first.messages,
        second.messages,
    ]


def test_a_column_of_that_name_that_holds_something_else_costs_no_text(tmp_path: Path) -> None:
    rows = {"text": ["A text", None], "messages": ["of whatever length" * 100, "x"]}
    pq.write_table(pa.table(rows), tmp_path / "texts.parquet")
    good, bad = read(tmp_path / "texts.parquet")
    assert good.text == "A text" and bad.reason == "messages: not a list of turns"


def test_a_folder_of_json_files_with_messages_is_one_of_data_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "part-0.json", {"messages": ASKED})
    jsonl(tmp_path / "part-1.json", {"messages": ASKED[:2]})
    assert len(read(tmp_path)) == 2 and read(tmp_path)[0].text == TEXT


def build(tiny_run: Callable[..., Run], path: Path, **settings: object) -> Run:
    run = tiny_run(corpus=CorpusConfig(path=str(path), near_duplicate_jaccard=1.0, **settings))
    build_corpus(run)
    return run


def test_the_corpus_keeps_messages_and_cuts_no_conversation(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    long = [ASKED[1], {"role": "assistant", "content": "It left on Monday. " * 40}]
    rows = [
        {"doc_id": "a", "messages": ASKED},
        {"doc_id": "b", "messages": long},
        {"doc_id": "c", "text": random_sentences(1, 250)},
        {"doc_id": "d", "messages": [{"role": "user", "content": "Too short."}]},
    ]
    run = build(tiny_run, jsonl(tmp_path / "chats.jsonl", *rows))
    [(_, table)] = read_shards(run, run.require("corpus"))
    assert table.schema.equals(CONVERSATION_SCHEMA)
    chunks = {row["text_id"]: row for row in table.to_pylist()}
    assert chunks["a#0"]["text"] == TEXT and json.loads(chunks["a#0"]["messages"]) == ASKED
    others = [row for row in chunks.values() if row["doc_id"] != "a"]
    assert {row["doc_id"] for row in others} == {"c"}
    assert len(others) > 1 and all(row["messages"] is None for row in others)
    assert run.require("corpus").metrics["rejected"] == {
        "conversation longer than corpus.chunk_chars": 1,
        "shorter than corpus.min_chunk_chars": 1,
    }


def test_a_corpus_without_conversations_is_what_it_was(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = build(tiny_run, jsonl(tmp_path / "t.jsonl", {"text": "A text of the corpus. " * 5}))
    [(_, table)] = read_shards(run, run.require("corpus"))
    assert table.schema.equals(CHUNK_SCHEMA)
    assert read_chunks(run, ("text_id", "messages"))["messages"].to_pylist() == [None]


def test_turns_join_in_the_stated_form() -> None:
    assert join_turns([Turn(role=row["role"], content=row["content"]) for row in ASKED]) == TEXT
