"""The base's own answers: those of transformers' `generate`, whatever is answered beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TEXTS
from tiny import MARKER, make_tiny_base

from nla_ray.activation.answers import Answerer
from nla_ray.activation.capture import Capture
from nla_ray.activation.positions import Skipped, TextEncoder
from nla_ray.activation.shards import ANSWER_SCHEMA, AnswersRecord
from nla_ray.activation.stage import (
    ShardAnswers,
    answer_texts,
    capture_activations,
    captured_ids,
    load_activations,
    read_answers,
    read_prompts,
    read_texts,
)
from nla_ray.base.conversation import Turn, as_messages, join_turns
from nla_ray.base.families import FAMILIES
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.run.artifact import Run
from nla_ray.run.identity import SPLITS
from nla_ray.settings.config import CaptureConfig, CorpusConfig
from nla_ray.settings.presets import nano
from nla_ray.text.stage import build_corpus

GENERATED = CaptureConfig(positions="generated:3", answer_tokens=12)
MOST = 20


def prompts_of(base) -> list[list[int]]:
    """Prompts of many lengths."""
    encoder = TextEncoder(load_tokenizer(base), base, GENERATED)
    texts = [*TEXTS, *(f"{text} And {number}." for number, text in enumerate(TEXTS))]
    return [encoder.prompt(text)[0] for text in texts]


def by_library(model, prompt: list[int], ends: list[int], most: int = MOST) -> list[int]:
    """What transformers' `generate` gives for a prompt alone, without the end."""
    with torch.no_grad():
        ids = torch.tensor([prompt])
        row = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    return row[: next((n for n, token in enumerate(row) if token in ends), len(row))]


def some_ends(written: list[list[int]]) -> list[int]:
    """Ids that end some of these texts early and some late: a random model hardly ends any."""
    firsts = [[*dict.fromkeys(row)] for row in written]
    early = {token for row in firsts for token in row[:2]}
    return sorted({2, firsts[0][0], *(row[-1] for row in firsts if row[-1] not in early)})


# Generating ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_library_token_for_token(family: str, tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path, architecture=family, heads=4, key_value_heads=2, tied=False)
    model, prompts = load_backbone(base), prompts_of(base)
    ends = some_ends([by_library(model, prompt, [2]) for prompt in prompts])
    expected = [by_library(model, prompt, ends) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2, "answers end at several lengths"
    found = Answerer(model, ends, 2_000).answer(prompts, [MOST] * len(prompts))
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_is_its_prompts_alone_whatever_is_answered_beside_it(tiny_base, dtype) -> None:
    model, prompts = load_backbone(tiny_base).to(dtype), prompts_of(tiny_base)
    most = [MOST - number % 3 for number in range(len(prompts))]
    whole = Answerer(model, [2], 4_000).answer(prompts, most)
    assert [len(answer) for answer in whole] == most
    for batch_tokens, step in ((1, 1), (300, -1), (4_000, 3)):
        order = [*range(len(prompts))][::step]
        found = Answerer(model, [2], batch_tokens).answer(
            [prompts[row] for row in order], [most[row] for row in order]
        )
        assert found == [whole[row] for row in order]


def test_a_wrong_draft_changes_no_answer(tiny_base, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = load_backbone(tiny_base), prompts_of(tiny_base)[:5]
    most, drafts, draft = [8] * 5, [], Answerer._draft
    right = Answerer(model, [2], 4_000).answer(prompts, most)

    def spoil(self, known, missing):
        drafts.append(len(known))
        return [[*row[:2], 7, *row[3:]][: len(row)] for row in draft(self, known, missing)]

    monkeypatch.setattr(Answerer, "_draft", spoil)
    assert Answerer(model, [2], 4_000).answer(prompts, most) == right
    assert len(drafts) > 1


def test_an_answer_that_ends_at_once_is_empty(tiny_base) -> None:
    model, [prompt, *_] = load_backbone(tiny_base), prompts_of(tiny_base)
    [first, *_] = by_library(model, prompt, [2])
    assert Answerer(model, [first], 100).answer([prompt], [MOST]) == [[]]
    assert Answerer(model, [2], 100).answer([], []) == []


# Positions ----------------------------------------------------------------------------------------

ANSWER = "Ä frame 日"
"""Seven tokens: two of "Ä", " frame", " ", three of "日"."""


def encode(answer: list[int], text_id: str = "a#0", positions: str = "generated:99", **given):
    base = nano().base
    encoder = TextEncoder(load_tokenizer(base), base, CaptureConfig(positions=positions))
    return encoder.encode(text_id, "read_frame", answer=answer, **given)


def test_the_tokens_of_an_answer_are_those_counted_by_hand() -> None:
    tokenizer = load_tokenizer(nano().base)
    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    encoded, length = encode(answer), len(encode(answer).ids) - len(answer)
    assert encoded.ids[length:] == answer and len(answer) == 7
    assert tokenizer.decode(encoded.ids[:length]).endswith("<|im_start|>assistant\n")
    assert encoded.positions == [*range(length, length + 7)]
    assert encoded.text == f"user: read_frame\n\nassistant: {ANSWER}"
    # A character is read with its last token.
    said = ["", "Ä", "Ä frame", "Ä frame ", "Ä frame ", "Ä frame ", ANSWER]
    assert encoded.read == [f"user: read_frame\n\nassistant: {part}" for part in said]
    of_text = len(tokenizer.encode("read_frame"))
    assert encoded.n_raw_tokens == [of_text + number for number in range(1, 8)]


def test_positions_in_an_answer_are_drawn_by_the_id_and_are_no_special_tokens() -> None:
    tokenizer = load_tokenizer(nano().base)
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    words = tokenizer.encode("one two three four five six", add_special_tokens=False)
    answer = [special[0], *words[:3], special[1], *words[3:], len(tokenizer) + 1]
    encoded = encode(answer)
    first = len(encoded.ids) - len(answer)
    assert [encoded.ids[position] for position in encoded.positions] == words
    assert encoded.read[-1] == "user: read_frame\n\nassistant: one two three four five six"
    assert encoded.positions[0] == first + 1 and encoded.n_raw_tokens[-1] - len(words) > 0
    few = encode(answer, positions="generated:3")
    assert few.positions == sorted(set(few.positions)) and len(few.positions) == 3
    assert set(few.positions) < set(encoded.positions)
    assert few.positions == encode(answer, positions="generated:3").positions
    others = {tuple(encode(answer, name, "generated:3").positions) for name in "bcdefgh"}
    assert len(others) > 1
    assert dict(zip(encoded.positions, encoded.read, strict=True)).items() >= set(
        zip(few.positions, few.read, strict=True)
    )


def test_a_conversation_goes_on_with_the_answer_as_with_a_turn_of_the_assistants() -> None:
    turns = (Turn(role="system", content="Be brief."), Turn(role="user", content="Where?"))
    base, tokenizer = nano().base, load_tokenizer(nano().base)
    answer = tokenizer.encode("On a shelf.", add_special_tokens=False)
    encoder = TextEncoder(tokenizer, base, CaptureConfig(positions="generated:99"))
    encoded = encoder.encode("a#0", join_turns(turns), as_messages(turns), answer)
    whole = (*turns, Turn(role="assistant", content="On a shelf."))
    theirs = TextEncoder(tokenizer, base, CaptureConfig(positions="assistant"))
    expected = theirs.encode("a#0", join_turns(whole), as_messages(whole))
    assert encoded.positions == expected.positions and encoded.read == expected.read
    assert encoded.n_raw_tokens == expected.n_raw_tokens
    end = expected.positions[-1] + 1
    assert encoded.ids[:end] == expected.ids[:end]


def test_texts_without_an_answer_are_left_out_by_name() -> None:
    for answer in ([], [load_tokenizer(nano().base).convert_tokens_to_ids("<|im_start|>")]):
        with pytest.raises(Skipped, match="no_answer: the base's answer has no token"):
            encode(answer)
    turns = (Turn(role="user", content="Where?"), Turn(role="assistant", content="Here."))
    with pytest.raises(Skipped, match="answered: the last turn is the assistant's"):
        encode([7], messages=as_messages(turns))


def test_a_prompt_leaves_room_for_its_answer_within_max_tokens(tiny_base) -> None:
    tokenizer = load_tokenizer(tiny_base)
    ids, most = TextEncoder(tokenizer, tiny_base, GENERATED).prompt(TEXTS[0])
    assert most == 12
    for room, expected in ((5, 5), (1, 1)):
        base = replace(tiny_base, max_tokens=len(ids) + room)
        assert TextEncoder(tokenizer, base, GENERATED).prompt(TEXTS[0]) == (ids, expected)
    base = replace(tiny_base, max_tokens=len(ids))
    with pytest.raises(Skipped, match=f"too_long: .* expected at most {len(ids) - 1} "):
        TextEncoder(tokenizer, base, GENERATED).prompt(TEXTS[0])


# The stages ---------------------------------------------------------------------------------------


def answer_without_ray(run: Run) -> None:
    """The artifact of the stage, in this process."""
    corpus, stage, base = run.require("corpus"), run.open("answers"), run.config.base
    actor = ShardAnswers(
        base, run.config.capture, threads=1, target=stage.location, base_digest="d"
    )
    for shard in corpus.files:
        actor(read_prompts(pa.table({"shard": [shard]}), run=run, corpus=corpus))
    stage.publish(model=base_info(base).to_dict())


def test_activations_are_what_a_pass_over_prompt_and_answer_leaves_there(
    tiny_run: Callable[..., Run], publish_corpus: Callable
) -> None:
    run = tiny_run(capture=replace(GENERATED, layers=(0,)))
    corpus = publish_corpus(run, [[*TEXTS, "long " * 250]])
    answer_without_ray(run)
    texts = read_texts(pa.table({"shard": [*corpus.files]}), run=run, corpus=corpus)
    [block, left_out] = Capture(run.config.base, run.config.capture, threads=1)(texts)
    assert [reason[:9] for reason in left_out.rows["skipped"].to_pylist()] == ["too_long:"]
    model, tokenizer = load_backbone(run.config.base), load_tokenizer(run.config.base)
    ids, rows = captured_of(run), block.rows.to_pylist()
    assert len(rows) == 2 * 3 * len(TEXTS)
    for row in rows:
        whole = ids[row["text_id"]]
        with torch.no_grad():
            states = model(torch.tensor([whole]), output_hidden_states=True).hidden_states
        expected = states[row["layer"] + 1][0, row["position"]]
        np.testing.assert_allclose(row["activation"], expected, atol=1e-5)
        assert row["token"] == whole[row["position"]] and row["num_tokens"] == len(whole)
        _, _, answer = row["text"].rpartition("\n\nassistant: ")
        read = tokenizer.decode(whole[: row["position"] + 1])
        assert read.rpartition("assistant\n")[2].rstrip("\ufffd") == answer


def captured_of(run: Run) -> dict[str, list[int]]:
    """Prompt and answer of every text."""
    encoder = TextEncoder(load_tokenizer(run.config.base), run.config.base, run.config.capture)
    answers = read_answers(run, run.config.capture)
    texts = {f"doc-000-{n // 2:04}#{n % 2}": text for n, text in enumerate(TEXTS)}
    return {name: encoder.prompt(text)[0] + answers[name] for name, text in texts.items()}


@pytest.mark.slow
def test_answers_and_activations_are_the_same_by_any_actors_and_in_any_shards(
    ray_cluster: None, tiny_run: Callable[..., Run], publish_corpus: Callable
) -> None:
    found = []
    texts = [f"{text} Number {number}." for number in range(4) for text in TEXTS]
    for name, shards, num_actors, batch_tokens in (
        ("one", [texts], 1, 8_192),
        ("more", [texts[n : n + 4] for n in range(0, 20, 4)], 2, 150),
    ):
        capture = replace(GENERATED, num_actors=num_actors, batch_tokens=batch_tokens)
        run = tiny_run(name, capture=capture)
        publish_corpus(run, shards)
        manifest = answer_texts(run)
        assert answer_texts(run) == manifest and manifest.metrics["answers"] == 20
        made = capture_activations(run)
        assert made.parents["answers"] == manifest.fingerprint
        assert made.metrics["tokens"] > manifest.metrics["tokens"] > 20
        tables = [load_activations(run, split) for split in SPLITS if has_rows(run, split)]
        answers = read_answers(run, capture)
        found.append(
            (
                sorted(map(tuple, answers.values())),
                sorted(text for table in tables for text in table.texts),
            )
        )
    assert found[0][0] == found[1][0]
    # Positions are drawn by ids, which say in which shard a text stands here.
    assert len(found[0][1]) == len(found[1][1]) == 60


def has_rows(run: Run, split: str) -> bool:
    files = (Path(run.root.path) / "activations").glob("*.parquet")
    return any(split in pq.read_table(file)["split"].to_pylist() for file in files)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_shards_whose_texts_have_no_answers(
    ray_cluster: None, tiny_run: Callable[..., Run], publish_corpus: Callable
) -> None:
    run = tiny_run(capture=GENERATED)
    publish_corpus(run)
    manifest = answer_texts(run)
    folder = Path(run.root.path) / "answers"
    first, second = (folder / f"part-0000{n}.parquet" for n in (0, 1))
    again = tiny_run("again", capture=GENERATED)
    publish_corpus(again)
    stage, digest = again.open("answers"), base_info(run.config.base).reading_digest
    actor = ShardAnswers(
        run.config.base, GENERATED, threads=1, target=stage.location, base_digest=digest
    )
    corpus = again.require("corpus")
    actor(read_prompts(pa.table({"shard": [first.name]}), run=again, corpus=corpus))
    made = Path(again.root.path) / "answers" / first.name
    before = made.stat().st_mtime_ns
    assert AnswersRecord.load(stage.location, first.name, digest).answers == len(TEXTS)
    assert answer_texts(again).fingerprint == manifest.fingerprint
    assert made.stat().st_mtime_ns == before and made.read_bytes() == first.read_bytes()
    assert pq.read_table(second).schema.equals(ANSWER_SCHEMA)


def test_conversations_go_from_a_file_to_activations_inside_answers(
    ray_cluster: None, tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    asked = [
        f"Where is number {number}, and why is it there? {'x' * number}" for number in range(6)
    ]
    rows = [
        {"doc_id": f"d{n}", "messages": [{"role": "user", "content": text}]}
        for n, text in enumerate(asked)
    ]
    rows[0]["messages"].append({"role": "assistant", "content": "Here, as it is said."})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny_run(
        corpus=CorpusConfig(
            path=str(path), near_duplicate_jaccard=1.0, families=False, min_chunk_chars=5
        ),
        capture=GENERATED,
    )
    build_corpus(run)
    answers = answer_texts(run)
    assert (answers.metrics["texts"], answers.metrics["answers"]) == (6, 5)
    manifest = capture_activations(run)
    assert manifest.metrics["skipped"] == {"answered": 1}
    assert manifest.metrics["activations"] == 15
    [(text_id, ids)] = captured_ids(run, ["d3#0"]).items()
    answer = read_answers(run, GENERATED)[text_id]
    assert ids[-len(answer) :] == answer and len(ids) > len(answer)
    table = pq.read_table(Path(run.root.path) / "answers" / "part-00000.parquet").to_pylist()
    said = {row["text_id"]: row["answer"] for row in table}
    assert said["d0#0"] == ""
    for row in pq.read_table(
        Path(run.root.path) / "activations" / "part-00000.parquet"
    ).to_pylist():
        asked_first = asked[int(row["doc_id"][1:])]
        start = f"user: {asked_first}\n\nassistant: "
        assert row["text"].startswith(start)
        assert said[row["text_id"]].startswith(row["text"].removeprefix(start))


def test_answers_of_other_settings_are_refused_and_other_runs_do_not_know_them(
    tiny_run: Callable[..., Run], publish_corpus: Callable
) -> None:
    run = tiny_run(capture=GENERATED)
    publish_corpus(run)
    answer_without_ray(run)
    for changed in ({"positions": "generated:9"}, {"layers": (2,)}, {"batch_tokens": 9}):
        other = Run(replace(run.config, capture=replace(GENERATED, **changed)))
        assert other.open("answers").complete
    longer = Run(replace(run.config, capture=replace(GENERATED, answer_tokens=13)))
    with pytest.raises(ValueError, match=r"capture\.answer_tokens: there 12, here 13"):
        longer.open("answers")
    plain = tiny_run("plain")
    publish_corpus(plain)
    plain.open("activations").publish()
    for answer_tokens in (1, 500):
        capture = CaptureConfig(answer_tokens=answer_tokens)
        changed = Run(replace(plain.config, capture=capture))
        assert changed.open("activations").complete
        assert read_answers(changed, capture) == {}


def test_the_marker_in_an_answer_is_a_token_like_any_other(tiny_base) -> None:
    tokenizer = load_tokenizer(tiny_base)
    encoder = TextEncoder(tokenizer, tiny_base, CaptureConfig(positions="generated:9"))
    [marker] = tokenizer.encode(MARKER, add_special_tokens=False)
    encoded = encoder.encode("a", "A licence", answer=[marker])
    assert encoded.read == [f"user: A licence\n\nassistant: {MARKER}"]
