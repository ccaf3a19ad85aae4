"""Verbalizers of the reference layout, against a greedy generation written out."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from plain_models import PlainModel
from reference_layout import FAMILY_NAMES, NORMS, WIDTH, change_json, tokenizer_of, write_verbalizer
from safetensors.torch import load_file, save_file

from nla_ray.base.reference import EXPLANATION_TAGS
from nla_ray.description.reference import ReferenceVerbalizer, load_verbalizer

ACTIVATIONS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)) * 5
MOST = 8


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_writes_what_its_model_writes_after_the_injected_vector(
    family: str, tmp_path: Path
) -> None:
    write_verbalizer(tmp_path, family)
    model, tokenizer = PlainModel(tmp_path), tokenizer_of(family)
    verbalizer = load_verbalizer(tmp_path)
    prompt = verbalizer.prompt
    for said, activation in zip(
        verbalizer.describe(ACTIVATIONS, max_new_tokens=MOST), ACTIVATIONS.double(), strict=True
    ):
        embedded = model.embed(prompt.marked_ids)
        # Not scaled, where Gemma scales the tokens.
        embedded[len(prompt.prefix_ids)] = activation * NORMS[family] / activation.norm()
        expected = model.greedy(embedded, tokenizer.eos_token_id, MOST)
        assert said.token_ids == expected
        logits = model.logits(torch.cat([embedded, model.embed(expected[:-1])]))
        log_probs = logits[-len(expected) :].log_softmax(-1)
        chosen = log_probs.gather(-1, torch.tensor(expected)[:, None])[:, 0]
        found = torch.tensor(said.log_probs).double()
        torch.testing.assert_close(found, chosen, atol=1e-5, rtol=1e-5)


def test_the_prompt_is_the_manifests_by_the_chat_template_with_one_beginning(
    tmp_path: Path,
) -> None:
    write_verbalizer(tmp_path, "llama")
    tokenizer, ids = tokenizer_of("llama"), load_verbalizer(tmp_path).prompt.marked_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "Say what lies behind <concept>\u320e</concept>, in {words}." in text


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"injection_left_neighbor_id": 5}, r"neighbours of the marker: got .*, expected \(5, "),
        ({"injection_right_neighbor_id": 5}, r"neighbours of the marker: got .*, 5\) as recorded"),
        ({"injection_token_id": 5}, r"id of marker '.': got \d+, expected 5, as nla_meta.yaml"),
    ],
)
def test_another_marker_or_neighbour_than_recorded_is_refused(
    tokens: dict, message: str, tmp_path: Path
) -> None:
    write_verbalizer(tmp_path, "qwen2", tokens=tokens)
    with pytest.raises(ValueError, match=message):
        load_verbalizer(tmp_path)


@pytest.fixture(scope="module")
def verbalizer(tmp_path_factory: pytest.TempPathFactory) -> ReferenceVerbalizer:
    return load_verbalizer(write_verbalizer(tmp_path_factory.mktemp("av"), "qwen2"))


def test_tags_are_its_own_and_a_missing_one_is_told(verbalizer: ReferenceVerbalizer) -> None:
    [said] = verbalizer.describe(ACTIVATIONS[:1], max_new_tokens=2)
    opening, closing = EXPLANATION_TAGS
    for written, expected in (
        (f"{opening}\na b\n{closing} and", ("a b", True)),
        (f"{opening} a", ("a", False)),
        ("a plain sentence", ("a plain sentence", True)),
    ):
        new = verbalizer._read(dataclasses.replace(said, written=written, finished=True))
        assert (new.text, new.closed) == expected
    cut = verbalizer._read(dataclasses.replace(said, written="a plain", finished=False))
    assert not cut.closed


def test_samples_and_claims_are_those_of_any_verbalizer(verbalizer: ReferenceVerbalizer) -> None:
    drawn = verbalizer.describe(
        ACTIVATIONS, max_new_tokens=4, temperature=1.0, seed=3, group_size=2, with_claims=True
    )
    assert len(drawn) == 6 and all(said.claim_log_probs is not None for said in drawn)
    again = verbalizer.describe(
        ACTIVATIONS[1:2], max_new_tokens=4, temperature=1.0, seed=3, group_size=2, rows=[1]
    )
    assert [said.token_ids for said in again] == [said.token_ids for said in drawn[2:4]]


def test_nested_names_and_a_list_of_extra_special_tokens_are_read(
    verbalizer: ReferenceVerbalizer, tmp_path: Path
) -> None:
    shutil.copytree(verbalizer.facts.folder, tmp_path / "av")
    file = tmp_path / "av" / "model.safetensors"
    renamed = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    change_json(tmp_path / "av" / "tokenizer_config.json", extra_special_tokens=["<|im_start|>"])
    found = load_verbalizer(tmp_path / "av").describe(ACTIVATIONS, max_new_tokens=MOST)
    assert found == verbalizer.describe(ACTIVATIONS, max_new_tokens=MOST)
