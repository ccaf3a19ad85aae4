"""Pretraining of the small base: its targets, its packing, its loss, its tokenizer, its card."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nla_ray.base.pretrained import check_never_seen, digest, never_nearly_seen
from nla_ray.base.prompts import chat_prompt
from nla_ray.nano.pretrain.answers import (
    compose_answer,
    list_targets,
    next_word_shares,
    prompt_target,
)
from nla_ray.nano.pretrain.model import (
    build_model,
    lr_factor,
    run_blocks,
    soft_cross_entropy,
    training_losses,
)
from nla_ray.nano.pretrain.rows import (
    ANSWER,
    CHATS_PER_ROW,
    DOCUMENT,
    RAW,
    Chat,
    Rows,
    build_chats,
    pack_rows,
    raw_segments,
)
from nla_ray.nano.pretrain.stage import (
    Progress,
    Work,
    check_train_only,
    prepare_data,
    pretrain_worker,
    save_model,
    train,
)
from nla_ray.nano.pretrain.texts import PretrainTexts
from nla_ray.nano.pretrain.tokenizer import train_tokenizer
from nla_ray.run.identity import split_of
from nla_ray.settings.config import BaseConfig, PretrainConfig
from nla_ray.text.chunks import Chunk
from nla_ray.text.domains import DOMAIN_NAMES
from nla_ray.text.words import WordStatistics, salient_words

MARKER = BaseConfig().marker
SMALL = PretrainConfig(
    vocab_size=400,
    d_model=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=48,
    max_positions=128,
    row_tokens=96,
    rows_per_step=4,
    steps=6,
    warmup_steps=2,
    num_processes=1,
    compile=False,
    checkpoint_seconds=0.0,
)
STATISTICS = WordStatistics(
    num_documents=100, document_frequency={"frame": 10, "index": 10, "dtype": 10, "columns": 5}
)


def small_texts() -> PretrainTexts:
    draw = random.Random(0)
    words = ["frame", "index", "dtype", "columns", "value", "parser", "label", "reader"]
    chunks = [("python_test", "assert " + " ".join(draw.choices(words, k=8))) for _ in range(40)]
    raw = [" ".join(draw.choices(words, k=80)) for _ in range(20)]
    train_ids = [
        name for name in (f"doc{number}" for number in range(30)) if split_of(name) == "train"
    ]
    validation = [
        Chunk(
            text_id="v#0",
            doc_id="v",
            split="validation",
            domain="python_test",
            chunk_index=0,
            text="frame index dtype",
        )
    ]
    return PretrainTexts(
        chunks=chunks,
        raw=raw,
        doc_ids=train_ids,
        twins=["twin"],
        validation=validation,
        statistics=STATISTICS,
    )


@pytest.fixture(scope="module")
def texts() -> PretrainTexts:
    return small_texts()


@pytest.fixture(scope="module")
def tokenizer(texts: PretrainTexts):
    return train_tokenizer(
        [text for _, text in texts.chunks]
        + texts.raw * 3
        + ["abcdefghijklmnopqrstuvwxyz " * 3, *VARIED],
        vocab_size=SMALL.vocab_size,
        marker=MARKER,
    )


VARIED = ["".join(random.Random(number).choices("abcdefghijklmnop", k=400)) for number in range(40)]


# Tokenizer ----------------------------------------------------------------------------------------


def test_every_loader_splits_text_as_the_trained_tokenizer_does(tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_model(build_model(SMALL, tokenizer), tokenizer, {"step": 0}, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"def f(frame_index):\n    return 17.5 * {MARKER} # done<|im_end|>\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_marker_is_one_ordinary_token_and_chats_have_no_system_prompt(tokenizer) -> None:
    ids = tokenizer(f"a{MARKER}b")["input_ids"]
    assert ids.count(SMALL.vocab_size - 1) == 1 and MARKER in tokenizer.decode(
        ids, skip_special_tokens=True
    )
    assert (
        chat_prompt(tokenizer, "hello")
        == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_too_little_text_for_the_vocabulary_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match="expected 4096: the text is too small"):
        train_tokenizer(["a b c"], vocab_size=4_096, marker=MARKER)


# Targets ------------------------------------------------------------------------------------------


def test_the_target_at_the_prompt_is_the_expectation_over_answers() -> None:
    first_ids = {"frame": 1, "framework": 1, "index": 2, "- ": 3, "unit test": 4}
    target = prompt_target(
        first_ids.__getitem__, [("frame", 5.0), ("framework", 3.0), ("index", 2.0)], "unit test"
    )
    assert target == pytest.approx({1: 0.36, 2: 0.09, 3: 0.35, 4: 0.2})
    assert prompt_target(first_ids.__getitem__, [], "unit test") == pytest.approx(
        {3: 0.35, 4: 0.65}
    )


def test_inside_a_list_the_words_not_listed_yet_are_the_target() -> None:
    encode = {"index": [7, 8], " frame": [9], " frames": [9, 5], " dtype": [4]}.__getitem__
    targets = list_targets(
        encode, [("index", 9.0), ("frame", 1.0), ("frames", 2.0), ("dtype", 2.0)]
    )
    assert targets == [
        (2, pytest.approx({9: 0.6, 4: 0.4})),
        (4, pytest.approx({9: 0.5, 4: 0.5})),
        (7, pytest.approx({4: 1.0})),
    ]


def test_a_word_comes_first_in_a_list_as_often_as_its_share_says() -> None:
    words = salient_words("frame frame index dtype columns", STATISTICS, 12)
    answers = [
        compose_answer(
            "frame frame index dtype columns", "python_test", STATISTICS, words, random.Random(seed)
        )
        for seed in range(6_000)
    ]
    first = Counter(answer.listed[0][0] for answer in answers if answer.listed)
    assert first.total() / 6_000 == pytest.approx(0.45, abs=0.03)
    for word, share in next_word_shares(words):
        assert first[word] / first.total() == pytest.approx(share, abs=0.03)


def test_answers_are_word_lists_labels_or_the_domain() -> None:
    words = salient_words("frame index dtype", STATISTICS, 12)
    answers = {
        compose_answer(
            "frame index dtype", "python_test", STATISTICS, words, random.Random(seed)
        ).text
        for seed in range(60)
    }
    assert "unit test" in answers
    assert any(answer.startswith("- tokens:") for answer in answers) and any(
        answer.startswith("- unit test:") for answer in answers
    )
    assert {tuple(sorted(answer.split(", "))) for answer in answers if "-" not in answer} == {
        ("unit test",),
        ("dtype", "frame", "index"),
    }


def test_the_first_token_of_a_domain_s_name_tells_the_domain() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped())
    assert len({tokenizer(name)["input_ids"][0] for name in DOMAIN_NAMES.values()}) == len(
        DOMAIN_NAMES
    )


# Packing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(texts: PretrainTexts, tokenizer) -> Rows:
    return pack_rows(
        build_chats(texts, tokenizer, SMALL), raw_segments(texts.raw, tokenizer, 0), 24, SMALL
    )


def test_rows_hold_whole_chats_and_raw_text_without_padding(
    rows: Rows, texts: PretrainTexts, tokenizer
) -> None:
    chats = {
        tuple(chat.prompt_ids + chat.answer_ids) for chat in build_chats(texts, tokenizer, SMALL)
    }
    for row in range(len(rows.tokens)):
        for segment in range(rows.segments[row].max() + 1):
            inside = rows.segments[row] == segment
            assert rows.positions[row][inside].tolist() == list(range(inside.sum()))
            if rows.parts[row][inside][0] != RAW:
                assert tuple(rows.tokens[row][inside].tolist()) in chats
    assert 0.2 < (rows.parts == RAW).mean() < 0.6


def test_soft_targets_stand_at_generation_prompts_and_at_the_commas_of_lists(
    rows: Rows, tokenizer
) -> None:
    used = rows.soft_positions >= 0
    assert used[:, :CHATS_PER_ROW].any() and used[:, CHATS_PER_ROW:].any()
    for row, slot in zip(*np.nonzero(used), strict=True):
        position = rows.soft_positions[row, slot]
        here, after = rows.parts[row, position], rows.parts[row, position + 1]
        assert (here, after) == ((DOCUMENT, ANSWER) if slot < CHATS_PER_ROW else (ANSWER, ANSWER))
        assert slot < CHATS_PER_ROW or tokenizer.decode([rows.tokens[row, position]]) == ","
        assert rows.soft_probabilities[row, slot].sum() == pytest.approx(1.0)
        assert slot < CHATS_PER_ROW or rows.tokens[row, position + 1] in rows.soft_ids[row, slot]


def test_rows_come_back_from_disk_as_they_were(rows: Rows, tmp_path: Path) -> None:
    rows.save(tmp_path)
    loaded = Rows.load(tmp_path)
    assert all(
        np.array_equal(getattr(rows, field.name), getattr(loaded, field.name))
        for field in dataclasses.fields(Rows)
    )
    assert loaded.batch(slice(0, 2))["tokens"].dtype == torch.int64


# Loss ---------------------------------------------------------------------------------------------


def test_samples_in_one_row_do_not_see_each_other(rows: Rows, tokenizer) -> None:
    model = build_model(SMALL, tokenizer).eval()
    batch = rows.batch(slice(0, 3))
    with torch.no_grad():
        states, read = run_blocks(model, batch["tokens"], batch["positions"], batch["segments"], 1)
        for row in range(3):
            for segment in range(int(batch["segments"][row].max()) + 1):
                inside = batch["segments"][row] == segment
                alone = model(batch["tokens"][row][inside][None], output_hidden_states=True)
                torch.testing.assert_close(
                    model.lm_head(states[row][inside]), alone.logits[0], atol=1e-5, rtol=1e-5
                )
                torch.testing.assert_close(
                    read[row][inside], alone.hidden_states[2][0], atol=1e-5, rtol=1e-5
                )


def test_soft_cross_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    batch = {
        "soft_ids": torch.tensor([[[0, 1]]]),
        "soft_probabilities": torch.tensor([[[0.75, 0.25]]]),
    }
    assert soft_cross_entropy(logits, batch).item() == pytest.approx(
        0.75 * 0.693147 + 0.25 * 1.386294, abs=1e-5
    )


def test_the_loss_is_the_weighted_mean_of_its_parts(tokenizer) -> None:
    chat = Chat(
        prompt_ids=[5, 6, 7, 8],
        answer_ids=[9, 10, 11],
        soft=[(3, {9: 0.6, 11: 0.4}), (5, {11: 0.7, 12: 0.3})],
    )
    config = dataclasses.replace(SMALL, row_tokens=7, raw_share=0.0)
    batch = pack_rows([chat], iter(()), 1, config).batch(slice(0, 1))
    model = build_model(SMALL, tokenizer).eval()
    with torch.no_grad():
        total, (raw, document, answer, first, first_read, next_word) = training_losses(
            model, batch, config, 1
        )
        logits = torch.log_softmax(model(batch["tokens"]).logits[0], dim=-1)
    losses = [
        -logits[position, token].item()
        for position, token in enumerate(batch["tokens"][0, 1:].tolist())
    ]
    assert raw.item() == 0.0
    assert document.item() == pytest.approx(sum(losses[:3]) / 3, abs=1e-5)
    assert answer.item() == pytest.approx(losses[4], abs=1e-5)
    assert first.item() == pytest.approx(
        -(0.6 * logits[3, 9] + 0.4 * logits[3, 11]).item(), abs=1e-5
    )
    assert next_word.item() == pytest.approx(
        -(0.7 * logits[5, 11] + 0.3 * logits[5, 12]).item(), abs=1e-5
    )
    soft = 8 * first.item() + 8 * first_read.item() + 4 * next_word.item()
    expected = (sum(losses[:3]) + 2.5 * losses[4] + soft) / (3 + 2.5 + 8 + 8 + 4)
    assert total.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.5), (11, 0.125)])
def test_the_learning_rate_rises_and_falls_in_lines(step: int, factor: float) -> None:
    assert lr_factor(step, warmup_steps=4, num_steps=12) == pytest.approx(factor)


# The loop -----------------------------------------------------------------------------------------


def work_in(folder: Path, texts: PretrainTexts) -> Work:
    enough = dataclasses.replace(texts, raw=texts.raw * 2 + VARIED)
    prepare_data(enough, SMALL, MARKER, folder / "scratch")
    return Work(
        config=SMALL,
        read_layer=1,
        folder=folder / "scratch",
        target=folder,
        rendezvous=folder / "scratch" / "rendezvous",
    )


def test_training_writes_a_bf16_model_that_transformers_loads_with_its_card(
    texts: PretrainTexts, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    pretrain_worker(0, work_in(tmp_path, texts))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert model.dtype == torch.bfloat16 and model.config.model_type == "qwen2"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert card["tokens_seen"] == 6 * 4 * 96 and card["final_losses_nats"]["step"] == 6
    assert card["doc_id_digests"] == sorted(digest(doc_id) for doc_id in texts.doc_ids)
    assert card["twin_digests"] == [digest("twin")]
    assert 0.0 <= card["validation_label_repeats"] <= 1.0


def test_a_training_that_starts_from_a_model_keeps_its_tokenizer_and_names_its_documents(
    texts: PretrainTexts, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain_worker(0, work_in(first, texts))
    config = dataclasses.replace(SMALL, start_from=str(first), steps=1, seed=1)
    fewer = dataclasses.replace(texts, doc_ids=texts.doc_ids[:3], raw=texts.raw * 2 + VARIED)
    prepare_data(fewer, config, MARKER, second / "scratch")
    pretrain_worker(
        0,
        Work(
            config=config,
            read_layer=1,
            folder=second / "scratch",
            target=second,
            rendezvous=second / "rendezvous",
        ),
    )
    card = json.loads((second / "card.json").read_text())
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    assert card["doc_id_digests"] == sorted(digest(doc_id) for doc_id in texts.doc_ids)
    assert card["started_from"]["tokens_seen"] == 6 * 4 * 96


class Interrupted(Exception):
    pass


def test_a_training_that_was_cut_off_ends_with_the_same_weights(
    texts: PretrainTexts, tokenizer, tmp_path: Path
) -> None:
    work = work_in(tmp_path, texts)
    rows = Rows.load(work.folder)
    undisturbed = build_model(SMALL, tokenizer)
    train(undisturbed, rows, dataclasses.replace(work, folder=tmp_path), 0, dict)
    calls = iter(range(100))

    def stop_at_the_third_checkpoint() -> dict[str, float]:
        if next(calls) == 2:
            raise Interrupted
        return {}

    with pytest.raises(Interrupted):
        train(build_model(SMALL, tokenizer), rows, work, 0, stop_at_the_third_checkpoint)
    resumed = build_model(SMALL, tokenizer)
    progress = train(resumed, rows, work, 0, dict)
    assert isinstance(progress, Progress) and progress.step == 6
    for name, weight in undisturbed.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


# Lineage ------------------------------------------------------------------------------------------


def test_a_document_outside_the_train_split_is_refused() -> None:
    stranger = next(
        name for name in (f"doc{number}" for number in range(100)) if split_of(name) == "test"
    )
    with pytest.raises(RuntimeError, match="1 documents outside the train split"):
        check_train_only([stranger])


def test_the_card_tells_whether_a_report_s_document_was_learned_from() -> None:
    card = {"doc_id_digests": [digest("seen")], "twin_digests": [digest("twin")]}
    assert never_nearly_seen(card, ["new", "twin", "other"]) == [0, 2]
    check_never_seen(card, ["unseen", "other"])
    with pytest.raises(ValueError, match=r"1 of the documents held out: \['seen'\]"):
        check_never_seen(card, ["unseen", "seen"])


def shipped() -> Path:
    return Path(__file__).resolve().parents[2] / "nla_ray" / "nano" / "data" / "nano_base"


def test_the_shipped_model_never_saw_a_held_out_document() -> None:
    from nla_ray.nano.installed_texts import list_sources

    card = json.loads((shipped() / "card.json").read_text())
    check_never_seen(
        card, [source.doc_id for source in list_sources() if split_of(source.doc_id) != "train"]
    )
    assert card["num_documents"] == len(card["doc_id_digests"]) > 1_000 and card["splits"] == [
        "train"
    ]


def test_the_shipped_model_is_small_and_its_card_gives_seed_data_steps_and_loss() -> None:
    card = json.loads((shipped() / "card.json").read_text())
    assert (shipped() / "model.safetensors").stat().st_size <= 12 * 1024**2
    assert {
        "settings",
        "tokens_seen",
        "seconds",
        "final_losses_nats",
        "validation_word_precision",
    } <= set(card)
    assert {"seed", "steps"} <= set(card["settings"])


def test_a_base_is_installed_where_it_is_read_and_keeps_its_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nla_ray.base.sources import base_folder
    from nla_ray.nano.pretrain import stage

    assert base_folder("embedded:nano") == stage.EMBEDDED_DIR / "nano_base"
    made, installed = tmp_path / "made", tmp_path / "package" / "nano_base"
    (made / "scratch").mkdir(parents=True)
    (made / "config.json").write_text("new")
    installed.mkdir(parents=True)
    (installed / "README.md").write_text("by hand")
    (installed / "old.json").write_text("old")
    monkeypatch.setattr(stage, "EMBEDDED_DIR", tmp_path / "package")
    assert stage.install_model(made) == installed
    content = {path.name: path.read_text() for path in installed.iterdir()}
    assert content == {"README.md": "by hand", "config.json": "new"}
