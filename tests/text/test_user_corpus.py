"""The corpus of a user's texts: what is read, what is left out and why, what the stage writes."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import random_sentences

from nla_ray.run.artifact import Run
from nla_ray.run.identity import text_hash
from nla_ray.settings.config import CorpusConfig
from nla_ray.text.chunks import Chunk
from nla_ray.text.documents import Document, read_documents
from nla_ray.text.rejects import Reject, RejectsFile
from nla_ray.text.stage import build_corpus
from nla_ray.text.user_corpus import user_texts

GOOD = (
    "A first line about parsers and grammars, long enough to be kept as one text of the corpus.\n"
)


def write_jsonl(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


BAD_LINES = [
    (b'{"text": "\xff\xfe broken bytes"}', "not UTF-8"),
    (b'{"text": ""}', "empty"),
    (b"", "empty"),
    (b'{"text": "  \\n\\t "}', "only white space"),
    (b'{"text": "' + b"x" * 1_001 + b'"}', "over the length limit"),
    (b'{"body": "no text here"}', "missing field"),
    (b'{"text": "never closed', "truncated or invalid JSON"),
    (b'{"text": "fine", "number": ' + b"1" * 5_000 + b"}", "truncated or invalid JSON"),
    (b'{"text": "a \\u0000 inside"}', "NUL bytes"),
    (b'{"text": "raw \x00 inside"}', "NUL bytes"),
    (b'{"text": "lone \\ud800 surrogate"}', "lone surrogates"),
    (b'{"text": 17}', "not a string"),
    (b"[1, 2]", "not a JSON object"),
]


def test_bad_rows_are_rejected_with_line_and_reason_and_the_rest_is_read(tmp_path: Path) -> None:
    good = json.dumps({"text": GOOD}).encode()
    path = write_jsonl(tmp_path / "texts.jsonl", [good, *(line for line, _ in BAD_LINES)])
    items = list(read_documents(CorpusConfig(path=str(path), max_document_chars=1_000)))
    assert isinstance(items[0], Document) and items[0].text == GOOD
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [(reject.line, reject.reason) for reject in rejects] == [
        (number, reason) for number, (_, reason) in enumerate(BAD_LINES, 2)
    ]


def test_a_line_that_would_fill_the_memory_is_skipped_unread(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "texts.jsonl",
        [b'{"text": "' + b"y" * 9_000_000 + b'"}', json.dumps({"text": GOOD}).encode()],
    )
    first, second = read_documents(CorpusConfig(path=str(path), max_document_chars=1_000))
    assert isinstance(first, Reject) and first.reason == "over the length limit"
    assert isinstance(second, Document)


def test_rows_carry_doc_id_and_domain_or_are_named_by_their_text(tmp_path: Path) -> None:
    rows = [
        {"text": GOOD, "doc_id": "letters/1", "domain": "letter"},
        {"text": GOOD + "two"},
        {"text": "other", "doc_id": "letters/1"},
    ]
    path = write_jsonl(tmp_path / "texts.jsonl", [json.dumps(row).encode() for row in rows])
    named, hashed, repeated = read_documents(CorpusConfig(path=str(path)))
    assert isinstance(named, Document) and (named.doc_id, named.domain) == ("letters/1", "letter")
    assert (
        isinstance(hashed, Document)
        and hashed.doc_id.startswith("text/")
        and hashed.domain == "text"
    )
    assert isinstance(repeated, Reject) and repeated.reason == "repeated doc_id letters/1"


def test_parquet_folder_and_dataset_give_the_same_texts_as_jsonl(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = [f"{GOOD} number {number} {random_sentences(number, 20)}" for number in range(5)]
    rows = [{"body": text, "doc_id": f"d{number}.txt"} for number, text in enumerate(texts)]
    write_jsonl(tmp_path / "a.jsonl", [json.dumps(row).encode() for row in rows])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "dataset")
    (tmp_path / "folder").mkdir()
    for row in rows:
        (tmp_path / "folder" / row["doc_id"]).write_text(row["body"])
    for name in ("a.jsonl", "a.parquet", "dataset", "folder"):
        documents = list(read_documents(CorpusConfig(path=str(tmp_path / name), text_field="body")))
        assert [(document.doc_id, document.text) for document in documents] == [
            (row["doc_id"], row["body"]) for row in rows
        ], name


def test_bad_rows_of_parquet_and_bad_files_of_a_folder_are_rejected_too(tmp_path: Path) -> None:
    column = pa.array([GOOD.encode(), b"\xff\xfe", None, b""], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    items = list(read_documents(CorpusConfig(path=str(tmp_path / "a.parquet"))))
    assert [(item.line, item.reason) for item in items[1:]] == [
        (2, "not UTF-8"),
        (3, "missing field"),
        (4, "empty"),
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "folder" / "good.txt").write_text(GOOD)
    bad, good = read_documents(CorpusConfig(path=str(tmp_path / "folder")))
    assert (bad.source, bad.reason) == (
        "bad.txt",
        "UTF-16, not UTF-8",
    ) and good.doc_id == "good.txt"


MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""
ROWS = [json.dumps({"text": f"{GOOD} {number}"}).encode() for number in range(2)]


def texts_of(path: Path) -> list[str]:
    """The texts of a source that has no bad row."""
    documents = list(read_documents(CorpusConfig(path=str(path))))
    assert all(isinstance(item, Document) for item in documents), documents
    return [item.text for item in documents if isinstance(item, Document)]


@pytest.mark.parametrize("name", ["texts.jsonl", "TEXTS.JSONL", "texts.NDJSON", "texts.json"])
def test_a_byte_order_mark_and_the_case_of_an_ending_cost_no_row(tmp_path: Path, name: str) -> None:
    whole = MARK + ROWS[0] + b"\r\n" + MARK + ROWS[1] + b"\r\n"  # two files in one
    (tmp_path / name).write_bytes(whole)
    assert texts_of(tmp_path / name) == [f"{GOOD} 0", f"{GOOD} 1"]


def test_no_text_holds_a_byte_order_mark_wherever_it_comes_from(tmp_path: Path) -> None:
    marked, name = "\ufeff" + GOOD, f"text/{text_hash(GOOD)[:32]}"
    (tmp_path / "marked.TXT").write_text(marked)
    pq.write_table(pa.table({"text": [marked]}), tmp_path / "marked.parquet")
    (tmp_path / "marked.jsonl").write_text(json.dumps({"text": marked}))
    for path in tmp_path.iterdir():
        [document] = read_documents(CorpusConfig(path=str(path)))
        assert isinstance(document, Document) and document.text == GOOD
        assert document.doc_id == ("marked.TXT" if path.suffix == ".TXT" else name)


def test_the_rows_of_a_downloaded_dataset_are_the_corpus_and_its_card_is_none_of_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# A card that is long enough to be taken for a document")
    (tmp_path / "script.py").write_text("print('A script beside the data files')\n")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    for part in range(2):
        rows = pa.table({"text": [f"{GOOD} {part} {number}" for number in range(2)]})
        pq.write_table(rows, tmp_path / "data" / f"train-{part}.parquet")
    assert texts_of(tmp_path) == [f"{GOOD} {part} {row}" for part in range(2) for row in range(2)]


def test_a_folder_of_shards_is_its_rows_with_each_reject_under_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "part-0.jsonl").write_bytes(b"\n".join(ROWS))
    (tmp_path / "part-1.JSON").write_bytes(json.dumps({"text": GOOD}).encode() + b"\n{torn")
    (tmp_path / "config.json").write_text('{"name": "rows of texts"}')
    *documents, reject = read_documents(CorpusConfig(path=str(tmp_path)))
    assert [item.text for item in documents if isinstance(item, Document)] == [
        f"{GOOD} 0",
        f"{GOOD} 1",
        GOOD,
    ]
    assert reject == Reject(source="part-1.JSON", line=2, reason="truncated or invalid JSON")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": ROWS[0], "b.txt": GOOD.encode()}, r"data files \(\['a.jsonl'\].*\['b.txt'\]"),
        ({"a.csv": b"text\nhello", "README.md": b"# A card"}, r"a\.csv.*Convert"),
        ({"a.json": b'[\n {"text": "hello"}]'}, "one JSON array.*json.load"),
    ],
)
def test_a_folder_whose_texts_cannot_be_told_is_one_clear_error(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(CorpusConfig(path=str(tmp_path))))


def test_an_archive_among_texts_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(GOOD)
    (tmp_path / "old.zip").write_bytes(b"PK")
    text, archive = read_documents(CorpusConfig(path=str(tmp_path)))
    assert isinstance(text, Document)
    assert archive == Reject(source="old.zip", line=0, reason=".zip is not read")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wide.jsonl", ROWS[0].decode().encode("utf-16"), "UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("wide.txt", GOOD.encode("utf-32"), "UTF-32.*iconv -f UTF-32 -t UTF-8"),
        ("array.json", b'[\n {\n  "text": "a"}]', "one JSON array.*one object a line.*json.load"),
        ("array.jsonl", MARK + b'[{"text": "a"}]', "one JSON array.*one object a line.*json.load"),
        ("missing.jsonl", None, "a file or a folder that exists"),
        ("texts.csv", b"text\nhello\n", "a .jsonl, .parquet or .txt file"),
        ("torn.parquet", b"PAR1 no more", "a whole Parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(CorpusConfig(path=str(tmp_path / name))))


def test_a_missing_column_names_the_columns_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="one of its columns body, title"):
        list(read_documents(CorpusConfig(path=str(tmp_path / "a.parquet"))))


def user_corpus(path: Path, tmp_path: Path, **settings: int) -> list[Chunk]:
    with RejectsFile(tmp_path / "rejects.jsonl") as rejects:
        return user_texts(CorpusConfig(path=str(path), **settings), rejects).chunks


def test_a_short_text_stays_whole_and_a_long_one_is_cut(tmp_path: Path) -> None:
    long_text = "\n".join(random_sentences(number, 12) for number in range(100))
    rows = [{"doc_id": "short", "text": f"  {GOOD}  "}, {"doc_id": "long", "text": long_text}]
    path = write_jsonl(tmp_path / "texts.jsonl", [json.dumps(row).encode() for row in rows])
    chunks = user_corpus(path, tmp_path, chunk_chars=300, chunks_per_document=3)
    assert [chunk.text for chunk in chunks if chunk.doc_id == "short"] == [f"  {GOOD}  "]
    assert len([chunk for chunk in chunks if chunk.doc_id == "long"]) == 3
    assert all(
        chunk.text in long_text and len(chunk.text) <= 300
        for chunk in chunks
        if chunk.doc_id == "long"
    )


def test_the_choice_from_a_large_source_depends_neither_on_its_order_nor_holds_it_in_memory(
    tmp_path: Path,
) -> None:
    lines = [
        json.dumps(
            {"doc_id": f"d{number}", "text": f"{number} {random_sentences(number, 30)}"}
        ).encode()
        for number in range(300)
    ]
    chosen = user_corpus(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path, max_chunks=40)
    random.Random(0).shuffle(lines)
    assert user_corpus(write_jsonl(tmp_path / "b.jsonl", lines), tmp_path, max_chunks=40) == chosen
    assert len(chosen) == 40


def test_the_stage_writes_sorted_shards_rejects_and_counts_and_is_skipped_when_complete(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    lines = [
        json.dumps(
            {"doc_id": f"d{number}", "text": f"{number} {random_sentences(number, 30)}"}
        ).encode()
        for number in range(30)
    ]
    twin = json.dumps({"doc_id": "twin", "text": f"7 {random_sentences(7, 30)}."}).encode()
    path = write_jsonl(tmp_path / "texts.jsonl", [*lines, twin, b"{torn"])
    run = tiny_run(corpus=CorpusConfig(path=str(path), shard_rows=8))
    manifest = build_corpus(run)
    rows = [
        row
        for name in sorted(manifest.files)
        if name.endswith(".parquet")
        for row in pq.read_table(str(run.root / "corpus" / name)).to_pylist()
    ]
    assert [row["text_id"] for row in rows] == sorted(row["text_id"] for row in rows) and len(
        rows
    ) == 30
    assert {"d7", "twin"} - {row["doc_id"] for row in rows} in ({"d7"}, {"twin"})
    assert manifest.metrics["rejected"] == {"truncated or invalid JSON": 1}
    assert json.loads((run.root / "corpus" / "rejects.jsonl").read_text())["line"] == 32
    assert sorted(manifest.documents["train"]) == sorted(
        {row["doc_id"] for row in rows if row["split"] == "train"}
    )
    assert build_corpus(run).created == manifest.created
    whole = path.read_bytes()
    path.write_bytes(whole.swapcase())
    with pytest.raises(ValueError, match=r"corpus.path .*The file has changed"):
        build_corpus(run)
    path.unlink()
    assert build_corpus(run) == manifest, "a complete corpus does not need its source any more"


def test_a_source_without_any_usable_text_fails_with_its_reasons(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", [b'{"text": ""}', b'{"text": "short"}', b"{torn"])
    with pytest.raises(
        ValueError,
        match=r"no usable text \(3 rejected .*1 empty.*shorter than corpus.min_chunk_chars",
    ):
        build_corpus(tiny_run(corpus=CorpusConfig(path=str(path))))
