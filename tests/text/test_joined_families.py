"""Content families: what counts as shared text, who is joined, and which split a family takes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import random_sentences

from nla_ray.run.artifact import Run
from nla_ray.run.identity import split_of
from nla_ray.settings.config import CorpusConfig
from nla_ray.text import joining
from nla_ray.text.chunks import Chunk
from nla_ray.text.families import SourceTexts, chunk_shingles, family_ids, with_family_splits
from nla_ray.text.joining import SHARED, join_documents
from nla_ray.text.shingles import SHINGLE_WORDS, fingerprint, shingle_hashes
from nla_ray.text.stage import FAMILIES_NAME, build_corpus, read_chunks, read_families


def word_shingles(text: str) -> list[tuple[str, ...]]:
    """By the definition: eight words in a row; fewer words are one shingle."""
    words = re.sub(r"\d", "0", text.lower())
    words = re.findall(r"\w+", words)
    count = min(SHINGLE_WORDS, len(words))
    return [tuple(words[i : i + count]) for i in range(len(words) - count + 1)] if words else []


# Shingles -----------------------------------------------------------------------------------------


def test_hashes_are_equal_exactly_where_word_shingles_are() -> None:
    pieces = [random_sentences(seed, 30) for seed in range(6)]
    texts = [f"{a}. {b}" for a in pieces for b in pieces]
    texts += ["", " \n", "!", "two words", "Two, WORDS", "item 12 of 345", "item 98 of 345"]
    name_of: dict[int, tuple[str, ...]] = {}
    hashes = shingle_hashes(texts)
    for text, found in zip(texts, hashes, strict=True):
        expected = word_shingles(text)
        assert len(found) == len(expected)
        for value, shingle in zip(found.tolist(), expected, strict=True):
            assert name_of.setdefault(value, shingle) == shingle
    assert len(set(name_of.values())) == len(name_of)
    alone = [shingle_hashes([text])[0] for text in texts]
    assert all(map(np.array_equal, hashes, alone))


def test_letters_of_a_script_without_spaces_count_as_words() -> None:
    [hashes] = shingle_hashes(
        ["\u6f22\u5b57\u4eee\u540d\u4ea4\u3058\u308a\u6587\u3001\u3067\u3059"]
    )
    assert len(hashes) == 10 - SHINGLE_WORDS + 1


def test_texts_that_share_fifteen_words_share_one_of_their_fingerprints() -> None:
    for seed in range(50):
        common = random_sentences(1_000 + seed, 15)
        first, second = (
            f"{random_sentences(number, 40)} {common} {random_sentences(5_000 + number, 20)}"
            for number in (2 * seed, 2 * seed + 1)
        )
        prints = [fingerprint(shingles) for shingles in shingle_hashes([first, second])]
        assert np.intersect1d(*prints).size
        assert len(prints[0]) < 0.4 * len(word_shingles(first))


# Joining ------------------------------------------------------------------------------------------


def joined(texts: Sequence[str], documents: Sequence[int] | None = None) -> list[int]:
    """The family of every document: the number of its first document."""
    owners = np.arange(len(texts)) if documents is None else np.array(documents)
    shingles = [np.unique(hashes) for hashes in shingle_hashes(texts)]
    return join_documents(np.arange(owners.max() + 1), owners, shingles).tolist()


def largest_share_outside(texts: Sequence[str], families: Sequence[int]) -> float:
    """The largest share of a text's shingles that texts of other families hold."""
    shares = []
    for text, family in zip(texts, families, strict=True):
        others = [other for other, theirs in zip(texts, families, strict=True) if theirs != family]
        held = {shingle for other in others for shingle in word_shingles(other)}
        mine = set(word_shingles(text))
        shares.append(len(mine & held) / len(mine))
    return max(shares)


def test_a_text_made_of_pieces_of_others_joins_them_though_it_is_near_to_none() -> None:
    sources = [random_sentences(seed, 100) for seed in range(6)]
    pieces = [" ".join(source.split()[20:40]) for source in sources[:5]]
    assert joined([*sources, " ".join(pieces)])[5:] == [5, 0]
    # a fifth of it is in each; joined with enough of them, less than a third is left outside
    families = joined([*sources, " ".join(pieces)])
    assert families.count(0) >= 4
    assert largest_share_outside([*sources, " ".join(pieces)], families) < SHARED


def test_a_phrase_in_common_joins_nothing_and_a_quoted_text_joins_its_source() -> None:
    phrase = random_sentences(1, 12)
    texts = [f"{phrase} {random_sentences(seed, 60)}" for seed in range(2, 6)]
    assert joined(texts) == [0, 1, 2, 3]
    article = random_sentences(7, 400)
    quote = " ".join(article.split()[100:130])
    assert joined([*texts, article, f"{quote} {random_sentences(8, 10)}"])[4:] == [4, 4]


def test_several_texts_of_a_document_join_its_family_and_not_each_other() -> None:
    first, second = random_sentences(1, 60), random_sentences(2, 60)
    assert joined([first, second, second, random_sentences(3, 60)], [0, 0, 1, 2]) == [0, 0, 2]


@pytest.mark.parametrize(("rounds", "pairs"), [(16, 1 << 22), (16, 1), (0, 1)])
def test_no_text_keeps_a_third_of_itself_in_other_families_however_many_share_it(
    monkeypatch: pytest.MonkeyPatch, rounds: int, pairs: int
) -> None:
    monkeypatch.setattr(joining, "CAREFUL_ROUNDS", rounds)
    monkeypatch.setattr(joining, "_PAIRS", pairs)
    draw, licence = random.Random(0), random_sentences(1, 90).split()
    texts = [" ".join(licence)]
    for seed in range(2, 102):
        start = draw.randrange(60)
        part = " ".join(licence[start : start + draw.randrange(8, 30)])
        texts.append(f"{random_sentences(seed, draw.randrange(5, 90))} {part}")
    families = joined(texts)
    assert largest_share_outside(texts, families) < SHARED
    assert len(set(families)) > 1 or rounds == 0


def test_nothing_is_joined_where_there_is_nothing() -> None:
    none = np.arange(0)
    assert join_documents(none, none, []).tolist() == []
    assert joined(["", "", "word"]) == [0, 1, 2]


def test_shingles_whose_hashes_differ_in_the_last_bit_are_two() -> None:
    hashes = [np.array([2**63 + last], dtype=np.uint64) for last in (0, 1)]
    assert join_documents(np.arange(2), np.arange(2), hashes).tolist() == [0, 1]


# Families and splits ------------------------------------------------------------------------------


def windows(num_articles: int, seed: int = 0) -> list[dict[str, str]]:
    """Windows of 12 sentences that begin every fourth one, each under an id of its own."""
    rows = []
    for article in range(num_articles):
        sentences = [
            random_sentences(seed + 1_000 * article + number, 11).capitalize() + "."
            for number in range(36)
        ]
        for start in range(0, 28, 4):
            text = " ".join(sentences[start : start + 12])
            rows.append({"doc_id": f"article{article}/{start}", "text": text})
    return rows


def corpus_run(make: Callable[..., Run], path: Path, name: str = "run", **settings: object) -> Run:
    run = make(name, corpus=CorpusConfig(path=str(path), **settings))  # type: ignore[arg-type]
    build_corpus(run)
    return run


def splits_of(run: Run) -> dict[str, str]:
    rows = read_chunks(run, ["doc_id", "split"]).to_pylist()
    return {row["doc_id"]: row["split"] for row in rows}


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_windows_of_an_article_take_one_split_and_other_documents_keep_theirs(
    tiny_run: Callable[..., Run], tmp_path: Path, told: list[str]
) -> None:
    alone = [
        {"doc_id": f"alone{seed}", "text": random_sentences(500_000 + seed, 60)}
        for seed in range(1, 60)
    ]
    path = write_rows(tmp_path / "texts.jsonl", [*windows(30), *alone])
    run = corpus_run(tiny_run, path)
    splits, families = splits_of(run), read_families(run)
    for article in range(30):
        members = [doc_id for doc_id in splits if doc_id.startswith(f"article{article}/")]
        assert len(members) == 7 and {families[doc_id] for doc_id in members} == {min(members)}
        assert {splits[doc_id] for doc_id in members} == {split_of(min(members))}
    for row in alone:
        assert row["doc_id"] not in families
        assert splits[row["doc_id"]] == split_of(row["doc_id"])
    metrics = run.require("corpus").metrics
    assert (metrics["joined_documents"], metrics["joined_families"]) == (210, 30)
    assert (metrics["num_families"], metrics["largest_family"]) == (89, 7)
    assert metrics["held_out_in_train"] == {"validation": 0, "test": 0}
    assert any("210 documents are joined in 30 families" in line for line in told)


@pytest.mark.parametrize(("num_windows", "warns"), [(1, False), (2, True)])
def test_a_family_that_holds_much_of_the_corpus_is_said(
    tiny_run: Callable[..., Run], tmp_path: Path, told: list[str], num_windows: int, warns: bool
) -> None:
    corpus_run(tiny_run, write_rows(tmp_path / "texts.jsonl", list(windows(1)[:num_windows])))
    assert warns == any("one family holds 2 of 2 documents" in line for line in told)
    assert warns == any("one family holds" in line for line in told)


def test_without_families_the_corpus_says_how_much_of_it_is_no_test(
    tiny_run: Callable[..., Run], tmp_path: Path, told: list[str]
) -> None:
    rows = windows(30)
    path = write_rows(tmp_path / "texts.jsonl", rows)
    run = corpus_run(tiny_run, path, families=False)
    splits, text_of = splits_of(run), dict(map(lambda row: row.values(), rows))
    assert splits == {doc_id: split_of(doc_id) for doc_id in text_of}
    chunks = read_chunks(run, ["split", "text"]).to_pylist()
    train = {s for row in chunks if row["split"] == "train" for s in word_shingles(row["text"])}
    covered = {"validation": 0, "test": 0}
    for row in chunks:
        mine = set(word_shingles(row["text"]))
        if row["split"] != "train" and len(mine & train) >= len(mine) / 2:
            covered[row["split"]] += 1
    assert run.require("corpus").metrics["held_out_in_train"] == covered
    assert covered["test"] > 0 and any("is in train texts" in line for line in told)
    assert read_families(run) == {}


def test_families_do_not_depend_on_the_order_of_the_source(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    rows = windows(5)
    first = corpus_run(tiny_run, write_rows(tmp_path / "a.jsonl", rows), "first")
    random.Random(1).shuffle(rows)
    second = corpus_run(tiny_run, write_rows(tmp_path / "b.jsonl", rows), "second")
    assert read_families(first) == read_families(second) != {}
    assert splits_of(first) == splits_of(second)


def test_who_names_the_families_overrides_what_texts_share(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {**row, "group_id": number % 2} for number, row in enumerate(windows(1))
    ]
    rows += [
        {"doc_id": f"free{row['doc_id']}", "text": row["text"]} for row in windows(1, seed=50_000)
    ]
    rows[-1]["group_id"] = None
    run = corpus_run(tiny_run, write_rows(tmp_path / "texts.jsonl", rows))
    families, splits = read_families(run), splits_of(run)
    for number, row in enumerate(rows[:7]):
        assert families[str(row["doc_id"])] == f"group/{number % 2}"
        assert splits[str(row["doc_id"])] == split_of(f"group/{number % 2}")
    assert {families[str(row["doc_id"])] for row in rows[7:]} == {"freearticle0/0"}


@pytest.mark.parametrize(
    "column", [[1.0, float("nan"), 1.0], ["1.0", None, "1.0"], ["1.0", "", "1.0"]]
)
def test_a_table_names_families_in_a_column_of_any_name_and_a_gap_is_no_family(
    tiny_run: Callable[..., Run], tmp_path: Path, column: list
) -> None:
    texts = [random_sentences(seed, 60) for seed in range(3)]
    table = pa.table({"text": texts, "doc_id": ["a", "b", "c"], "article": column})
    pq.write_table(table, tmp_path / "texts.parquet")
    run = corpus_run(tiny_run, tmp_path / "texts.parquet", group_field="article")
    assert read_families(run) == {"a": "group/1.0", "c": "group/1.0"}


def test_a_field_of_families_that_no_document_has_is_an_error(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "texts.jsonl", list(windows(1)))
    with pytest.raises(ValueError, match=r"corpus\.group_field: got 'artcile'.*Correct"):
        corpus_run(tiny_run, path, group_field="artcile")


def family_of_three(config: CorpusConfig) -> tuple[list[str], dict[str, str]]:
    """Documents of the splits test, validation, train in the order of their names, joined."""
    wanted, ids = ["test", "validation", "train"], []
    number = 0
    while len(ids) < 3:
        doc_id, number = f"{len(ids)}/{number}", number + 1
        if split_of(doc_id) == wanted[len(ids)]:
            ids.append(doc_id)
    text = random_sentences(1, 60)
    chunks = [
        Chunk(
            text_id=f"{doc_id}#0",
            doc_id=doc_id,
            split=split_of(doc_id),
            domain="text",
            chunk_index=0,
            text=text,
        )
        for doc_id in ids
    ]
    families = family_ids(SourceTexts(chunks=chunks), chunk_shingles(chunks), config)
    moved = with_family_splits(chunks, families, config)
    assert [(a.text_id, a.text) for a in moved] == [(b.text_id, b.text) for b in chunks]
    assert len({chunk.split for chunk in moved}) == 1
    return ids, {**families, "split": moved[0].split}


def test_a_family_of_the_embedded_corpus_is_never_held_out_of_what_its_base_has_read() -> None:
    ids, told = family_of_three(CorpusConfig(path="texts.jsonl"))
    assert told == {**dict.fromkeys(ids, ids[0]), "split": "test"}
    ids, told = family_of_three(CorpusConfig())
    assert told == {**dict.fromkeys(ids, ids[2]), "split": "train"}


def test_a_corpus_made_before_families_is_taken_as_it_is(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "texts.jsonl", list(windows(2)))
    run = corpus_run(tiny_run, path)
    manifest = run.root / "corpus" / "manifest.json"
    older = json.loads(manifest.read_text())
    for field in ("families", "group_field"):
        del older["config"]["corpus"][field]
    del older["files"][FAMILIES_NAME]
    manifest.write_text(json.dumps(older | {"fingerprint": fingerprint_of(older)}))
    assert build_corpus(run).files == run.require("corpus").files
    assert read_families(run) == {}


def fingerprint_of(manifest: dict) -> str:
    from nla_ray.run.manifest import FileRecord, Manifest

    fields = {
        name: value for name, value in manifest.items() if name not in ("files", "fingerprint")
    }
    files = {path: FileRecord(**record) for path, record in manifest["files"].items()}
    return Manifest(files=files, **fields).fingerprint
