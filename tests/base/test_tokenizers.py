"""Tokenizers of other bases: SentencePiece, without chat template, with tokens listed otherwise."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import MARKER, build_sentencepiece_tokenizer, build_tokenizer, make_tiny_base

from nla_ray.activation.positions import TextEncoder
from nla_ray.base.encoding import encode_texts
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import (
    around_description,
    build_injection_prompt,
    chat_prompt,
    find_marker,
    marker_token,
    verbalizer_prompt,
)
from nla_ray.settings.config import BaseConfig, CaptureConfig


@pytest.fixture(scope="module")
def pieces():
    return build_sentencepiece_tokenizer()


def test_a_character_that_gets_a_piece_before_it_is_a_marker(pieces) -> None:
    alone = pieces.encode(MARKER, add_special_tokens=False)
    assert len(alone) == 2 and pieces.convert_ids_to_tokens(alone) == ["\u2581", MARKER]
    assert marker_token(pieces, MARKER) == alone[1]
    with pytest.raises(ValueError, match="is not one token"):
        marker_token(pieces, "no marker")
    with pytest.raises(ValueError, match="is not one token"):
        marker_token(pieces, "\u53f7")  # unknown: bytes


def test_the_marker_stands_once_in_both_prompts_and_is_found(pieces) -> None:
    assert find_marker(pieces) == MARKER
    prompt = build_injection_prompt(pieces, MARKER)
    assert prompt.marker_id == marker_token(pieces, MARKER)
    before, after = around_description(MARKER)
    [ids] = encode_texts(
        pieces, ["- a licence"], before=before, after=after, add_special_tokens=True
    )
    assert ids[-1] == prompt.marker_id and ids.count(prompt.marker_id) == 1


def test_a_sequence_begins_once(pieces) -> None:
    """The template begins it, or the tokenizer: never both."""
    first = pieces.bos_token_id
    chat = build_injection_prompt(pieces, MARKER)
    assert [*chat.prefix_ids, *chat.suffix_ids].count(first) == 1 and chat.prefix_ids[0] == first
    [ids] = encode_texts(pieces, ["- a licence"], after=f"\n{MARKER}", add_special_tokens=True)
    assert ids.count(first) == 1 and ids[0] == first


def test_ends_of_tokens_are_those_of_the_text_where_pieces_hold_a_space(pieces) -> None:
    base = BaseConfig(model="pieces")
    encoded = TextEncoder(pieces, base, CaptureConfig(positions="random:99")).encode(
        "id", "A licence that permits"
    )
    read = ["A licence that permits"[:end] for end in encoded.ends]
    assert read[-1] == "A licence that permits" and read == sorted(read, key=len)
    words = [pieces.decode([encoded.ids[position]]) for position in encoded.positions]
    assert "".join(words).strip() == "A licence that permits"


def test_control_tokens_in_a_text_stay_characters(pieces) -> None:
    base = BaseConfig(model="pieces")
    encoded = TextEncoder(pieces, base, CaptureConfig()).encode("id", "a [/INST] b </s> c")
    closing, end = (pieces.convert_tokens_to_ids(token) for token in ("[/INST]", "</s>"))
    assert encoded.ids.count(closing) == 1 and encoded.ids.count(end) == 0


def without_template(folder: Path, tokenizer: object = None) -> BaseConfig:
    base = make_tiny_base(folder, architecture="gpt2", tokenizer=tokenizer)
    (folder / "chat_template.jinja").unlink()
    return base


def test_a_base_without_a_chat_template_is_read_as_it_is_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    base = without_template(tmp_path)
    with pytest.raises(ValueError, match=r"without chat template.*--base.template raw"):
        load_tokenizer(base)
    tokenizer = load_tokenizer(dataclasses.replace(base, template="raw"))
    assert chat_prompt(tokenizer, "hello") == "hello\n"
    assert verbalizer_prompt(tokenizer, MARKER).endswith(f": {MARKER}\n<description>")
    encoder = TextEncoder(tokenizer, base, CaptureConfig())
    encoded = encoder.encode("id", "<|im_end|> is text")
    assert tokenizer.decode(encoded.ids) == "<|im_end|> is text\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in encoded.ids


def test_a_raw_text_begins_as_the_tokenizer_begins_it(tmp_path: Path, pieces) -> None:
    base = dataclasses.replace(
        without_template(tmp_path, build_sentencepiece_tokenizer()), template="raw"
    )
    tokenizer = load_tokenizer(base)
    ids = TextEncoder(tokenizer, base, CaptureConfig()).encode("id", "A licence").ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_another_template_is_another_base(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path)
    chat, raw = base_info(base), base_info(dataclasses.replace(base, template="raw"))
    assert chat.reading_digest != raw.reading_digest
    assert chat.reading_digest == f"{chat.digest}/{chat.tokenizer_digest}"
    assert chat.prompt_digest != raw.prompt_digest


@pytest.mark.parametrize("listed", [["<|im_start|>", "<|im_end|>"], {"turn": "<|im_start|>"}])
def test_extra_special_tokens_come_as_a_list_or_by_name(tmp_path: Path, listed: object) -> None:
    base = make_tiny_base(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": listed}))
    loaded, usual = load_tokenizer(base), build_tokenizer()
    assert chat_prompt(loaded, "hello") == chat_prompt(usual, "hello")
    prompt = verbalizer_prompt(usual, MARKER)
    assert loaded.encode(prompt) == usual.encode(prompt)
