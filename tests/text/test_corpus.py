"""The corpus: what is read, how it is cut, what is left out, and that no twin of a text sits on two
sides of a split."""

import json
import random
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_ray.nano import installed_texts
from nla_ray.nano.embedded_corpus import embedded_chunks
from nla_ray.run.artifact import Run
from nla_ray.run.identity import split_of
from nla_ray.settings.config import CorpusConfig
from nla_ray.settings.presets import preset
from nla_ray.text.chunks import Chunk
from nla_ray.text.cutting import cut_chunks
from nla_ray.text.documents import Document, read_documents
from nla_ray.text.duplicates import (
    first_of_clusters,
    has_twin,
    jaccard_similarity,
    minhash_signatures,
)
from nla_ray.text.rejects import Reject, RejectsFile
from nla_ray.text.stage import build_corpus
from nla_ray.text.user_corpus import user_chunks

GOOD = (
    "A first line about parsers and grammars, long enough to be kept as one text of the corpus.\n"
)


def sentences(seed: int, count: int) -> str:
    draw = random.Random(seed)
    words = [
        f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rk", "lt", "s", "m")
    ]
    return " ".join(draw.choice(words) for _ in range(count))


def write_jsonl(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# Near duplicates ----------------------------------------------------------------------------------


def exact_jaccard(left: str, right: str, size: int = 8) -> float:
    first, second = (
        {text[i : i + size] for i in range(len(text) - size + 1)} for text in (left, right)
    )
    return len(first & second) / len(first | second)


def test_signatures_estimate_the_jaccard_similarity_of_shingle_sets() -> None:
    base = sentences(1, 120)
    for keep in (0.95, 0.8, 0.5, 0.0):
        changed = base[: int(len(base) * keep)] + sentences(2, 120)[: int(len(base) * (1 - keep))]
        estimate = jaccard_similarity(*minhash_signatures([base, changed]))
        assert estimate == pytest.approx(exact_jaccard(base, changed), abs=0.12)


def test_case_white_space_and_the_values_of_digits_do_not_tell_texts_apart() -> None:
    texts = [
        "Version 1.2 of the  parser library",
        "version 9.7 of the\nparser library",
        "another text about the parser",
    ]
    assert first_of_clusters(minhash_signatures(texts), 0.7).tolist() == [True, False, True]


def test_twins_are_the_texts_that_nearly_repeat_one_of_others() -> None:
    text = (
        "def read(path):\n    with open(path) as file:\n        return [line.split(',') for line in"
        " file]\n" * 3
    )
    signatures = minhash_signatures(
        [text, "A licence that permits copying, with conditions, and nothing else at all."]
    )
    assert has_twin(
        signatures, minhash_signatures([text + "# end", "unrelated words"]), 0.7
    ).tolist() == [True, False]
    assert has_twin(signatures, minhash_signatures([]), 0.7).tolist() == [False, False]


def test_the_first_of_each_cluster_is_kept_and_chains_collapse() -> None:
    words = sentences(3, 60).split()
    chain = [" ".join(words[start : start + 50]) for start in (0, 3, 6)] + [sentences(4, 50)]
    assert first_of_clusters(minhash_signatures(chain), 0.7).tolist() == [True, False, False, True]


def test_duplicates_are_found_the_same_way_whatever_the_batch() -> None:
    texts = [sentences(seed, 40) for seed in range(50)]
    together = minhash_signatures(texts)
    assert np.array_equal(together, np.concatenate([minhash_signatures([text]) for text in texts]))


@pytest.mark.parametrize("texts", [[], ["only one"]])
def test_none_or_one_text_has_no_duplicate(texts: list[str]) -> None:
    assert first_of_clusters(minhash_signatures(texts), 0.7).tolist() == [True] * len(texts)


# Documents of the embedded corpus -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("torch/nn/modules/linear.py", "python_code"),
        ("pandas/tests/frame/test_api.py", "python_test"),
        ("networkx/algorithms/cuts.py", "api_reference"),
        ("transformers/models/bert/modeling_bert.py", "model_code"),
        ("torch/include/ATen/Tensor.h", "native_code"),
        ("ray/includes/common.cc", "native_code"),
        ("torch/include/ATen/ops/add.h", None),
        ("numpy/__init__.pyi", "type_stub"),
        ("numpy-2.4.6.dist-info/METADATA", "package_metadata"),
        ("numpy-2.4.6.dist-info/licenses/LICENSE.txt", "licence"),
        ("google/protobuf/any.proto", "protocol_buffer"),
        ("ray/dashboard/client/build/static/js/main.js", None),
        ("../../../bin/ninja", None),
    ],
)
def test_a_file_belongs_to_one_domain_by_its_path(path: str, domain: str | None) -> None:
    assert installed_texts.domain_of(path) == domain


def test_native_code_is_one_domain_whose_ids_keep_headers_and_sources_apart() -> None:
    prefixes = {
        source.doc_id.split("/")[0]
        for source in installed_texts.list_sources()
        if source.domain == "native_code"
    }
    assert prefixes == {"cpp_header", "cpp_source"}


def test_documents_are_named_without_the_version_of_their_package() -> None:
    assert (
        installed_texts._without_version("numpy-2.4.6.dist-info/METADATA")
        == "numpy.dist-info/METADATA"
    )
    assert (
        installed_texts._without_version("torch-2.13.0+cpu.dist-info/RECORD")
        == "torch.dist-info/RECORD"
    )
    assert installed_texts._without_version("ray/data/dataset.py") == "ray/data/dataset.py"


def test_packages_that_only_the_tests_need_are_outside_the_corpus() -> None:
    names = {
        distribution.name.lower()
        for distribution in installed_texts.closure_distributions(installed_texts.CORE_REQUIREMENTS)
    }
    assert {"torch", "ray", "numpy", "jinja2"} <= names
    assert not {"pytest", "moto", "boto3", "coverage"} & names


def test_docstrings_come_under_the_names_they_document() -> None:
    code = (
        'def outer():\n    """Says hello."""\n    if True:\n        class Inner:\n            """Is'
        ' nested."""\n\ndef bare():\n    return 1\n'
    )
    assert installed_texts.extract_docstrings(code) == "outer\nSays hello.\n\nInner\nIs nested."
    assert installed_texts.extract_docstrings("def broken(:") == ""


def test_chunks_end_at_lines_and_keep_their_bounds() -> None:
    lines = [f"line {number} of a text with several words in it" for number in range(60)]
    chunks = cut_chunks("\n".join(lines), seed_key="doc", min_chars=100, max_chars=200)
    assert all(100 <= len(chunk) <= 200 for chunk in chunks)
    starts = [lines.index(chunk.split("\n")[0]) for chunk in chunks]
    assert all(
        chunk.split("\n") == lines[start : start + chunk.count("\n") + 1]
        for chunk, start in zip(chunks, starts, strict=True)
    )
    assert len(chunks) > 10 and starts == sorted(set(starts))
    assert chunks == cut_chunks("\n".join(lines), seed_key="doc", min_chars=100, max_chars=200)


@pytest.mark.parametrize("length", [90, 115, 150, 190])
def test_prose_in_long_lines_loses_nothing_but_its_end_where_pieces_are_filled(length: int) -> None:
    words = [f"word{number}" for number in range(600)]
    lines = textwrap.wrap(" ".join(words), length)
    chunks = cut_chunks("\n".join(lines), seed_key="doc", min_chars=120, max_chars=210, fill=True)
    kept = " ".join(chunks).split()
    assert kept == words[: len(kept)] and len(" ".join(words[len(kept) :])) < 120
    assert all(120 <= len(chunk) <= 210 for chunk in chunks)


def test_a_line_longer_than_a_chunk_is_cut_at_a_space() -> None:
    chunks = cut_chunks(sentences(5, 300), seed_key="doc", min_chars=50, max_chars=120)
    assert chunks and all(len(chunk) <= 120 for chunk in chunks)
    words = set(sentences(5, 300).split())
    assert all(word in words for chunk in chunks for word in chunk.split())


@pytest.fixture(scope="module")
def corpus() -> list[Chunk]:
    return embedded_chunks(CorpusConfig())


def test_the_embedded_corpus_is_large_balanced_and_in_order(corpus: list[Chunk]) -> None:
    domains = Counter(chunk.domain for chunk in corpus)
    assert len(corpus) >= 3_000 and len(domains) >= 10
    assert max(domains.values()) / len(corpus) < 0.25
    assert len({chunk.doc_id for chunk in corpus if chunk.split == "test"}) >= 400
    text_ids = [chunk.text_id for chunk in corpus]
    assert text_ids == sorted(set(text_ids))
    assert all(
        chunk.split == split_of(chunk.doc_id)
        and chunk.text_id == f"{chunk.doc_id}#{chunk.chunk_index}"
        for chunk in corpus
    )


def test_the_embedded_corpus_is_large_enough_for_a_report_of_the_small_real_model() -> None:
    config = preset("smollm2-135m")
    chunks = embedded_chunks(config.corpus)
    assert len({chunk.doc_id for chunk in chunks}) == len(chunks) <= config.corpus.max_chunks
    assert (
        len([chunk for chunk in chunks if chunk.split == "test"])
        >= 1.1 * config.evaluation.min_documents
    )


def test_documents_keep_their_ids_outside_this_machine(corpus: list[Chunk]) -> None:
    assert not [
        chunk.doc_id
        for chunk in corpus
        if "site-packages" in chunk.doc_id or chunk.doc_id.startswith("/")
    ]


def test_a_larger_test_share_keeps_the_test_documents_of_a_smaller_one() -> None:
    names = [f"doc{number}" for number in range(4_000)]
    small, large = (
        {name for name in names if split_of(name, share) == "test"} for share in (0.1, 0.25)
    )
    assert (
        small < large
        and abs(len(small) / 4_000 - 0.1) < 0.02
        and abs(len(large) / 4_000 - 0.25) < 0.03
    )
    assert small == {name for name in names if split_of(name) == "test"}
    assert abs(sum(split_of(name, 0.25) == "validation" for name in names) / 4_000 - 0.06) < 0.02


def test_no_text_has_a_near_duplicate_on_another_side_of_the_split(corpus: list[Chunk]) -> None:
    signatures = minhash_signatures([chunk.text for chunk in corpus])
    is_train = np.array([chunk.split == "train" for chunk in corpus])
    train, held_out = signatures[is_train], signatures[~is_train]
    closest = max(jaccard_similarity(train, row).max() for row in held_out)
    # The search may miss a pair exactly at the threshold of 0.7; from 0.8 on it misses one in ten
    # million.
    assert closest < 0.8
    assert not {chunk.text for chunk in corpus if chunk.split == "train"} & {
        chunk.text for chunk in corpus if chunk.split != "train"
    }


# Texts of the user's ------------------------------------------------------------------------------

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

    texts = [f"{GOOD} number {number} {sentences(number, 20)}" for number in range(5)]
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
    assert (bad.source, bad.reason) == ("bad.txt", "not UTF-8") and good.doc_id == "good.txt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
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
        return user_chunks(CorpusConfig(path=str(path), **settings), rejects)


def test_a_short_text_stays_whole_and_a_long_one_is_cut(tmp_path: Path) -> None:
    long_text = "\n".join(sentences(number, 12) for number in range(100))
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
        json.dumps({"doc_id": f"d{number}", "text": f"{number} {sentences(number, 30)}"}).encode()
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
        json.dumps({"doc_id": f"d{number}", "text": f"{number} {sentences(number, 30)}"}).encode()
        for number in range(30)
    ]
    twin = json.dumps({"doc_id": "twin", "text": f"7 {sentences(7, 30)}."}).encode()
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
