"""The stage of labels: teachers, the draw of one label a text, and labels made elsewhere."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import WORD_STATISTICS

from nla_ray.label.rows import label_rows
from nla_ray.label.stage import label_texts, load_labels
from nla_ray.label.subjects import Subject
from nla_ray.label.teacher import make_teachers
from nla_ray.plan.text import describe_plan
from nla_ray.run.artifact import Run
from nla_ray.run.identity import split_of, text_hash
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import LabelConfig
from nla_ray.text.chunks import CHUNK_SCHEMA


def test_an_unknown_teacher_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="got 'gpt', expected one of offline-content-first, offline-format-first"
    ):
        make_teachers(["gpt"], WORD_STATISTICS)


def write_corpus(run: Run, texts: dict[str, str], shard_rows: int = 4) -> Manifest:
    """A corpus artifact made by hand: one text a document."""
    stage = run.open_artifact("corpus", "corpus")
    rows = [
        {
            "text_id": f"{doc_id}#0",
            "doc_id": doc_id,
            "split": split_of(doc_id),
            "domain": "text",
            "chunk_index": 0,
            "text": text,
        }
        for doc_id, text in sorted(texts.items())
    ]
    with stage.local_folder() as folder:
        for shard, start in enumerate(range(0, len(rows), shard_rows)):
            table = pa.Table.from_pylist(rows[start : start + shard_rows], schema=CHUNK_SCHEMA)
            pq.write_table(table, folder / f"part-{shard:05d}.parquet")
    return stage.publish()


TEXTS = {
    f"doc{number}": f"text number {number} about frame index dtype columns result {number % 3}"
    for number in range(40)
}


def all_labels(run: Run) -> list[dict]:
    return [row for split in ("train", "validation", "test") for row in load_labels(run, split)]


def test_every_text_is_labelled_by_every_teacher_and_one_label_is_drawn(
    tiny_run: Callable[..., Run],
) -> None:
    run = tiny_run()
    corpus = write_corpus(run, TEXTS)
    manifest = label_texts(run)
    rows = all_labels(run)
    assert len(rows) == 80 and sorted(manifest.files) == sorted(corpus.files)
    assert all(
        count == 1 for count in Counter(row["text_id"] for row in rows if row["drawn"]).values()
    )
    assert {row["teacher"] for row in rows if row["drawn"]} == {
        "offline-content-first",
        "offline-format-first",
    }
    assert manifest.metrics["labels"] == 80 and manifest.metrics["unlabelled_texts"] == 0


def test_the_draw_depends_on_the_text_id_and_the_seed_alone() -> None:
    row = {"text_id": "d#0", "doc_id": "d", "split": "train", "domain": "text", "text": "x"}

    def subject(index: int) -> Subject:
        return Subject(text={**row, "text_id": f"d#{index}"}, read="x")

    raw = [("a", "One label."), ("b", "Another label.")]
    drawn = [
        [label["drawn"] for label in label_rows(subject(index), raw, LabelConfig())]
        for index in range(200)
    ]
    assert drawn == [
        [label["drawn"] for label in label_rows(subject(index), raw[::-1], LabelConfig())]
        for index in range(200)
    ]
    assert 70 < sum(first for first, _ in drawn) < 130


def test_a_run_that_was_cut_off_continues_with_the_missing_shards(
    tiny_run: Callable[..., Run],
) -> None:
    run, undisturbed = tiny_run("cut"), tiny_run("whole")
    for each in (run, undisturbed):
        write_corpus(each, TEXTS)
        label_texts(each)
    before = all_labels(undisturbed)
    folder = Path(run.root.path) / "labels"
    kept = (folder / "part-00003.parquet").stat().st_mtime_ns
    (folder / "manifest.json").unlink()
    (folder / "part-00005.parquet").unlink()
    (folder / "part-00006.tmp").write_bytes(b"torn")
    label_texts(run)
    assert all_labels(run) == before
    assert (folder / "part-00003.parquet").stat().st_mtime_ns == kept


def test_statistics_come_from_train_texts_only(tiny_run: Callable[..., Run]) -> None:
    train = {doc_id: text for doc_id, text in TEXTS.items() if split_of(doc_id) == "train"}
    held_out = {doc_id: "heldout words " * 9 for doc_id in TEXTS if doc_id not in train}
    run = tiny_run()
    write_corpus(run, {**train, **held_out})
    label_texts(run)
    assert held_out and all("heldout" not in row["label"] for row in all_labels(run))


def imported(tmp_path: Path, rows: list[dict]) -> str:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_labels_made_elsewhere_are_joined_on_the_text_and_strangers_are_refused(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    rows = [
        {
            "doc_id": "doc0",
            "text": TEXTS["doc0"],
            "labels": {"a": "First. Label.", "b": "Second label."},
        },
        {"text_hash": text_hash(TEXTS["doc1"]), "teacher": "a", "label": "By its hash."},
        {
            "doc_id": "doc2",
            "text": TEXTS["doc2"] + " changed",
            "teacher": "a",
            "label": "Wrong text.",
        },
        {"doc_id": "elsewhere", "text": "unknown", "teacher": "a", "label": "Unknown text."},
        {"text": TEXTS["doc3"], "text_hash": "0" * 64, "teacher": "a", "label": "Two stories."},
        {"doc_id": "doc4", "teacher": "a", "label": "No text."},
        {"doc_id": "doc5", "text": TEXTS["doc5"]},
        {"doc_id": "doc0", "text": TEXTS["doc0"], "teacher": "a", "label": "Again."},
        {"doc_id": "doc6", "text": TEXTS["doc6"], "teacher": "a", "label": "** **"},
    ]
    run = tiny_run(label=LabelConfig(import_path=imported(tmp_path, rows)))
    write_corpus(run, TEXTS)
    manifest = label_texts(run)
    assert {(row["doc_id"], row["teacher"], row["label"]) for row in all_labels(run)} == {
        ("doc0", "a", "- First\n- Label"),
        ("doc0", "b", "- Second label"),
        ("doc1", "a", "- By its hash"),
    }
    assert manifest.metrics["refused"] == {
        "text differs from the document's in the corpus": 1,
        "text is not in the corpus": 1,
        "text_hash is not the hash of text": 1,
        "neither text nor text_hash": 1,
        "neither labels nor teacher and label": 1,
        "label is there twice": 1,
        "nothing is left after cleaning": 1,
    }
    refused = [
        json.loads(line)
        for line in (run.root / "labels" / "refused.jsonl").read_text().splitlines()
    ]
    assert [entry["line"] for entry in refused] == [3, 4, 5, 6, 7, 8, 9]


def test_a_bad_label_costs_no_good_one_of_its_row(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    half = "- a smile \ud83d"  # JSON's escape of the first half of an emoji
    rows = [
        {"text": TEXTS["doc0"], "labels": {"gpt": "- whole", "kimi": None}},
        {"text": TEXTS["doc1"], "labels": {"gpt": half, "kimi": "- a smile \U0001f642"}},
        {"text": TEXTS["doc2"], "labels": {"gpt": ["- a list"], "\ud83d": "- a name", "": "- x"}},
        {"text": TEXTS["doc3"], "teacher": "gpt", "label": None},
        {"text": TEXTS["doc4"], "teacher": "gpt", "label": half},
        {"doc_id": "\ud83d", "text": TEXTS["doc5"] + "\ud83d", "teacher": "gpt", "label": "- x"},
    ]
    run = tiny_run(label=LabelConfig(import_path=imported(tmp_path, rows)))
    write_corpus(run, TEXTS)
    manifest = label_texts(run)
    assert {(row["doc_id"], row["teacher"], row["label"]) for row in all_labels(run)} == {
        ("doc0", "gpt", "- whole"),
        ("doc1", "kimi", "- a smile \U0001f642"),
    }
    not_unicode = "is not valid Unicode: it holds half a character"
    assert manifest.metrics["refused"] == {
        "label of 'kimi' is null": 1,
        f"label of 'gpt' {not_unicode}": 2,
        "label of 'gpt' is no string": 1,
        f"label of '\\ud83d' {not_unicode}": 1,
        "label without a teacher's name": 1,
        "label of 'gpt' is null": 1,
        "text is not valid Unicode": 1,
    }
    refused = (run.root / "labels" / "refused.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in refused] == [1, 2, 3, 3, 3, 4, 5, 6]


def test_a_byte_order_mark_costs_no_label(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    text = "\ufeff" + TEXTS["doc0"]
    path = Path(imported(tmp_path, [{"text": text, "teacher": "a", "label": "- first"}]))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    run = tiny_run(label=LabelConfig(import_path=str(path)))
    write_corpus(run, TEXTS)
    assert label_texts(run).metrics["refused"] == {}
    assert [row["label"] for row in all_labels(run)] == ["- first"]


@pytest.mark.parametrize("content", [b"[{}]", '{"text": "x"}'.encode("utf-16")])
def test_a_file_that_is_no_json_lines_in_utf8_is_one_message(
    tiny_run: Callable[..., Run], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(content)
    run = tiny_run(label=LabelConfig(import_path=str(path)))
    write_corpus(run, TEXTS)
    with pytest.raises(ValueError, match=r"label.import_path .*labels.jsonl.* Convert it: "):
        label_texts(run)


def test_a_plan_counts_the_labels_there_are_not_the_offline_teachers(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    rows = [{"text": text, "labels": dict.fromkeys("abc", "A label.")} for text in TEXTS.values()]
    path = imported(tmp_path, rows)
    run = tiny_run(label=LabelConfig(import_path=path))
    write_corpus(run, TEXTS)
    texts = run.config.corpus.max_chunks
    assert f" {texts:,} labels of {path}" in describe_plan(run.config, "label")
    label_texts(run)
    assert f" {3 * texts:,} labels of {path}" in describe_plan(run.config, "label")


def test_labels_of_other_texts_only_are_one_clear_error(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = imported(tmp_path, [{"text": "unknown", "teacher": "a", "label": "Unknown."}])
    run = tiny_run(label=LabelConfig(import_path=path))
    write_corpus(run, TEXTS)
    with pytest.raises(
        ValueError, match=r"no label for any of 40 texts .*'text is not in the corpus': 1"
    ):
        label_texts(run)


def test_an_import_file_that_changed_since_is_an_error_not_a_mix(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = imported(tmp_path, [{"text": TEXTS["doc0"], "teacher": "a", "label": "Good."}])
    run = tiny_run(label=LabelConfig(import_path=path))
    write_corpus(run, TEXTS)
    label_texts(run)
    imported(tmp_path, [{"text": TEXTS["doc0"], "teacher": "a", "label": "Changed."}])
    with pytest.raises(ValueError, match="Restore the file"):
        label_texts(run)


def test_an_import_file_that_changed_while_a_run_was_cut_off_is_an_error_too(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    path = imported(tmp_path, [{"text": TEXTS["doc0"], "teacher": "a", "label": "..."}])
    run = tiny_run(label=LabelConfig(import_path=path))
    write_corpus(run, TEXTS)
    with pytest.raises(ValueError, match="got no label"):
        label_texts(run)
    imported(tmp_path, [{"text": TEXTS["doc0"], "teacher": "a", "label": "Changed."}])
    with pytest.raises(ValueError, match="Restore the file"):
        label_texts(run)


def test_labels_need_a_corpus_and_say_which_job_makes_it(tiny_run: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match=r"jobs/corpus.py"):
        label_texts(tiny_run())
