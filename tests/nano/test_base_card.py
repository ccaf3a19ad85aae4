"""The model card beside the shipped weights says what card.json and config.json say."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

FOLDER = files("nla_ray") / "nano" / "data" / "nano_base"


def read(name: str) -> str:
    return FOLDER.joinpath(name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def said() -> str:
    """The card as one line of words."""
    return " ".join(read("README.md").split())


def test_the_card_has_the_hubs_front_matter() -> None:
    _, front, body = read("README.md").split("---\n", 2)
    for line in ("license: apache-2.0", "library_name: transformers", "language:\n- en"):
        assert line in front
    assert "pipeline_tag: text-generation" in front and "tags:\n- qwen2\n" in front
    assert body.startswith("\n# nano_base\n")


def test_the_cards_training_figures_are_those_of_card_json(said: str) -> None:
    card = json.loads(read("card.json"))
    settings = card["settings"]
    for words in (
        f"{card['num_chunks']:,} pieces of {card['num_documents']:,} train documents",
        f"of {len(card['twin_digests'])} held-out ones",
        f"{settings['steps']:,} steps of {settings['rows_per_step']} rows of"
        f" {settings['row_tokens']} tokens: {card['tokens_seen']:,} tokens",
        f"in {card['seconds']:,} seconds on two processes with torch {card['torch']}",
        f"Muon at rate {settings['muon_lr']} for matrices, AdamW at {settings['peak_lr']}",
        f"{settings['warmup_steps']} steps of warm-up, weight decay {settings['weight_decay']},"
        f" seed {settings['seed']}",
    ):
        assert words in said
    assert (card["splits"], settings["num_processes"]) == (["train"], 2)


def test_the_cards_losses_and_validation_figures_are_those_of_card_json(said: str) -> None:
    card = json.loads(read("card.json"))
    losses = card["final_losses_nats"]
    layer = card["settings"]["read_layer"]
    rows = {
        "raw text": "raw",
        "documents in chats": "document",
        "answers": "answer",
        "expectation over answers at the generation prompt, last block": "first",
        f"the same, from block {layer}": "first_read",
        "next word of a list": "next_word",
    }
    for title, name in rows.items():
        assert f"| {title} | {losses[name]} |" in said
    precision = card["validation_word_precision"]
    repeats = card["validation_label_repeats"]
    shares = [precision["final"], precision["read"], repeats]
    final, read_layer, repeated = (f"{share:.3f}".removeprefix("0") for share in shares)
    assert f"On {card['num_validation_chunks']} pieces of validation documents" in said
    assert f"{final} of the likeliest next tokens at the generation prompt" in said
    assert f"a salient word of the piece (from block {layer}: {read_layer})" in said
    assert f"Of its answers {repeated} repeat a word" in said


def test_the_cards_shape_is_that_of_the_configuration(said: str) -> None:
    config = json.loads(read("config.json"))
    for words in (
        f"Qwen2 architecture: {config['num_hidden_layers']} blocks, {config['hidden_size']}"
        f" dimensions, {config['num_attention_heads']} attention heads,"
        f" {config['intermediate_size']} dimensions between, {config['vocab_size']:,} tokens",
        f"at most {config['max_position_embeddings']} positions, tied embeddings",
        f"weights in {config['dtype']}",
    ):
        assert words in said
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"]
