"""The labels: two offline teachers, the cleaner, the draw of one style, and labels made
elsewhere."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_ray.label.cleaner import clean_label
from nla_ray.label.rows import label_rows
from nla_ray.label.stage import label_texts, load_labels
from nla_ray.label.teacher import make_teachers
from nla_ray.nano.offline_teachers import (
    ContentFirstTeacher,
    FormatFirstTeacher,
    TextFacts,
    describe_ending,
    observe,
)
from nla_ray.plan.text import describe_plan
from nla_ray.run.artifact import Run
from nla_ray.run.identity import split_of, text_hash
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import LabelConfig
from nla_ray.text.chunks import CHUNK_SCHEMA
from nla_ray.text.words import WordStatistics, salient_words, split_words

STATISTICS = WordStatistics(
    num_documents=1_000,
    document_frequency={
        "frame": 20,
        "index": 50,
        "assert": 80,
        "dtype": 20,
        "columns": 40,
        "column": 40,
        "result": 200,
        "expected": 125,
        "common": 600,
        "rare": 2,
    },
)
TEXT = "frame = read_frame(index)\nassert frame.dtype == expected\nresult common rare columns"


# Words --------------------------------------------------------------------------------------------


def test_identifiers_are_cut_into_words_and_stop_words_left_out() -> None:
    assert split_words("readFrameIndex(df_test, x1) HTTPServer for the_self") == [
        "read",
        "frame",
        "index",
        "test",
        "http",
        "server",
    ]


def test_document_frequency_counts_a_word_once_a_text() -> None:
    statistics = WordStatistics.fit(["frame frame index", "frame dtype"])
    assert (statistics.num_documents, statistics.document_frequency) == (
        2,
        {"frame": 2, "index": 1, "dtype": 1},
    )


def test_salient_words_are_ranked_by_tf_idf() -> None:
    ranked = salient_words(TEXT, STATISTICS, 4)
    assert [word for word, _ in ranked] == ["frame", "dtype", "columns", "index"]
    assert ranked[0][1] == pytest.approx((1 + math.log(3)) * math.log(1_000 / 20))
    assert ranked[1][1] == pytest.approx(math.log(50))


def test_words_that_are_too_rare_or_too_common_are_never_named() -> None:
    assert not {"rare", "common"} & {word for word, _ in salient_words(TEXT, STATISTICS, 20)}


def test_a_plural_is_not_named_beside_its_singular() -> None:
    assert [word for word, _ in salient_words("columns column", STATISTICS, 5)] == ["column"]


def test_words_fall_into_bands_by_their_share_of_all_tellable_words() -> None:
    """Frequencies 20, 20, 40, 40, 50, 80, 125, 200: the middle of `columns` is at 100/575 = .17, of
    `index` at 145/575 = .25 (in no band), of `assert` at .37 (none), of `expected` at 312.5/575 =
    .54, of `result` at .83."""
    assert STATISTICS.band_of == {
        "dtype": 2,
        "frame": 2,
        "column": 2,
        "columns": 2,
        "expected": 1,
        "result": 0,
    }


def test_a_text_is_told_by_the_best_word_of_every_band() -> None:
    facts = observe(TEXT, "python_test", STATISTICS)
    assert facts == TextFacts(
        kind="unit test",
        topics=["result"],
        tokens=["expected", "frame"],
        ending="the rest of a sentence",
    )


def test_a_band_without_a_word_of_the_text_stays_empty() -> None:
    facts = observe("dtype of the index", "python_test", STATISTICS)
    assert (facts.topics, facts.tokens) == ([], ["dtype"])


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("for row in rows:", "the body of an opened block"),
        ("call(a,", "the next item of an open list"),
        ("x = 3\n}\n", "a new part after a closed block"),
        ("#include <vector>", "a preprocessor line"),
        ("    # a remark", "more of a comment"),
        (">>> f(1)", "the output of an example"),
        ("- a first point", "another list item"),
        ("    return x", "a new function or branch"),
        ("assert x == 1", "another check"),
        ("int x;", "another statement or member"),
        ("x = 3", "another assignment"),
        ("That was all.", "a new sentence"),
        ("run(x)", "another call"),
        ("        deeper", "more of an indented block"),
        ("and so the", "the rest of a sentence"),
        ("", "the rest of a sentence"),
    ],
)
def test_the_end_of_a_text_says_how_it_goes_on(text: str, ending: str) -> None:
    assert describe_ending(text) == ending


# Teachers -----------------------------------------------------------------------------------------


def test_the_two_teachers_say_the_same_facts_in_clearly_different_form() -> None:
    content, form = (
        ContentFirstTeacher(STATISTICS).describe(TEXT, "python_test"),
        FormatFirstTeacher(STATISTICS).describe(TEXT, "python_test"),
    )
    assert content.startswith("1. **Tokens**: expected, frame.")
    assert form.startswith(
        "This text appears to be unit test on result. The model is likely to continue"
    )


def test_the_cleaned_forms_differ_in_order_only() -> None:
    content = clean_label(
        ContentFirstTeacher(STATISTICS).describe(TEXT, "python_test")
    ).splitlines()
    form = clean_label(FormatFirstTeacher(STATISTICS).describe(TEXT, "python_test")).splitlines()
    assert content[0] == form[2] and content[0].startswith("- tokens: ")
    assert content[1] == form[0] == "- unit test: result"
    assert content[2] == form[1] == "- next: the rest of a sentence"


def test_a_text_without_a_word_to_name_still_has_a_label() -> None:
    label = clean_label(ContentFirstTeacher(STATISTICS).describe("zzz", "licence"))
    assert (
        label
        == "- tokens: no word stands out\n- licence: nothing in particular\n- next: the rest of a"
        " sentence"
    )


def test_an_unknown_teacher_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="got 'gpt', expected one of offline-content-first, offline-format-first"
    ):
        make_teachers(["gpt"], STATISTICS)


# Cleaner ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        pytest.param(
            '1. **"Use a lock"**: The model is likely preparing to name the remedy.\n\n2. **"Or a'
            ' queue"**: It predicts a second way. More.',
            "- Use a lock: name the remedy\n- Or a queue: a second way",
            id="numbered list with bold headings",
        ),
        pytest.param(
            "1. 'A lock' – the model expects the usual remedy. 2. 'A queue' – a second way. 3."
            " 'Neither",
            "- A lock: the usual remedy\n- A queue: a second way",
            id="one paragraph, cut off",
        ),
        pytest.param(
            "“Take a lock.” The model expects a remedy. “Or use a queue?” A second way is offered.",
            "- Take a lock: a remedy\n- Or use a queue?: A second way is offered",
            id="quotations and remarks",
        ),
        pytest.param(
            "- first point.\n- second point.\n- third point.\n- fourth point.",
            "- first point\n- second point\n- third point",
            id="more bullets than three",
        ),
        pytest.param(
            "This text appears to be about locks. It is long.",
            "- about locks\n- It is long",
            id="sentences",
        ),
        pytest.param("Same thing. Same thing.", "- Same thing", id="repeated"),
        pytest.param(
            "As in 2. The lock is held.",
            "- As in 2\n- The lock is held",
            id="a number that counts nothing",
        ),
        pytest.param("", "", id="nothing"),
        pytest.param("** **", "", id="only markup"),
    ],
)
def test_raw_labels_become_bullets(raw: str, clean: str) -> None:
    assert clean_label(raw) == clean


def test_a_long_label_is_capped_at_the_end_of_a_clause() -> None:
    raw = "1. one two three four, five six seven eight nine ten.\n2. short."
    assert clean_label(raw, max_words=12) == "- one two three four\n- short"


def test_cleaning_a_clean_label_changes_nothing() -> None:
    for teacher in make_teachers(["offline-content-first", "offline-format-first"], STATISTICS):
        once = clean_label(teacher.describe(TEXT, "python_test"))
        assert clean_label(once) == once


# The stage ----------------------------------------------------------------------------------------


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
    raw = [("a", "One label."), ("b", "Another label.")]
    drawn = [
        [
            label["drawn"]
            for label in label_rows({**row, "text_id": f"d#{index}"}, raw, LabelConfig())
        ]
        for index in range(200)
    ]
    assert drawn == [
        [
            label["drawn"]
            for label in label_rows({**row, "text_id": f"d#{index}"}, raw[::-1], LabelConfig())
        ]
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
