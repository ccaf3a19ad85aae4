"""Generation protocols: what they hold, what a comparison asks, and the files that carry them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import build_tokenizer

from nla_ray.base.prompts import InjectionPrompt, verbalizer_prompt
from nla_ray.base.reference import ReferenceFacts
from nla_ray.base.sources import base_folder
from nla_ray.description.files import DescriptionFile, protocol_in
from nla_ray.description.protocol import (
    NOT_GENERATED,
    GenerationProtocol,
    checkpoint_protocol,
    generation_protocol,
    require_same_protocol,
)
from nla_ray.description.record import Description
from nla_ray.settings.config import BaseConfig, config_hash

BASE = BaseConfig(model="embedded:nano", layer=4, injection_norm=50.0)
WEIGHTS = {"base": "b1", "adapter": "a1"}
IDS = ["a#0@4:1", "b#0@4:1", "c#0@4:1"]


def protocol(base: BaseConfig = BASE, **changes: object) -> GenerationProtocol:
    settings = {"max_new_tokens": 64, "weights": WEIGHTS, **changes}
    return generation_protocol(base, build_tokenizer(), **settings)


def said(*texts: str) -> list[Description]:
    return [Description.from_text(text, num_tokens=len(text)) for text in texts]


def test_a_protocol_holds_prompt_decoding_limits_engine_and_weights() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(verbalizer_prompt(tokenizer, BASE.marker), add_special_tokens=False)
    assert dataclasses.asdict(protocol(samples=8, temperature=0.7, seed=3)) == {
        "prompt": {"ids": config_hash(ids), "layer": 4, "injection_norm": 50.0},
        "decoding": {"temperature": 0.7, "samples": 8, "seed": 3},
        "limits": {"max_new_tokens": 64},
        "engine": {"name": "compact", "dtype": "float32"},
        "weights": WEIGHTS,
    }


def test_verbalizers_of_other_weights_are_compared_and_their_hashes_differ() -> None:
    sft, grpo = protocol(), protocol(weights={"base": "b1", "adapter": "a2"})
    assert sft.hash != grpo.hash and sft.comparison_hash == grpo.comparison_hash
    require_same_protocol(("grpo", "sft"), grpo, sft)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"max_new_tokens": 200}, "limits.max_new_tokens: there 200, here 64"),
        ({"temperature": 0.7}, "decoding.temperature: there 0.7, here 0.0"),
        ({"samples": 4}, "decoding.samples: there 4, here 1"),
        (
            {"base": dataclasses.replace(BASE, injection_norm=80.0)},
            "prompt.injection_norm: there 80.0, here 50.0",
        ),
        ({"base": dataclasses.replace(BASE, layer=3)}, "prompt.layer: there 3, here 4"),
        (
            {"base": dataclasses.replace(BASE, dtype="bfloat16")},
            "engine.dtype: there 'bfloat16', here 'float32'",
        ),
        ({"base": dataclasses.replace(BASE, marker="#")}, "prompt.ids: there "),
    ],
)
def test_another_protocol_is_no_comparison_and_the_error_names_what_differs(
    changed: dict, difference: str
) -> None:
    with pytest.raises(ValueError, match="comparison of theirs") as raised:
        require_same_protocol(("theirs", "grpo"), protocol(**changed), protocol())
    assert difference in str(raised.value)


def whole(**changes: object) -> GenerationProtocol:
    """Of a verbalizer that is trained whole, with a prompt and a norm of its own."""
    facts = ReferenceFacts(
        folder=base_folder("embedded:nano"),
        role="verbalizer",
        layer=4,
        d_model=256,
        num_blocks=6,
        model_type="qwen2",
        dtype="float32",
        template="{injection_char}",
        injection_norm=80.0,
    )
    facts = dataclasses.replace(facts, **{"layer": changes.pop("layer", 4)})
    prompt = InjectionPrompt(prefix_ids=(1,), marker_id=7, suffix_ids=(2,))
    settings = {"max_new_tokens": 64, "weights": {"checkpoint": "c"}, **changes}
    return checkpoint_protocol(BASE, facts, prompt, **settings)


def test_a_checkpoint_brings_its_prompt_and_everything_else_must_be_the_same() -> None:
    require_same_protocol(("theirs", "grpo"), whole(), protocol())
    require_same_protocol(("grpo", "theirs"), protocol(), whole())
    record = json.loads(json.dumps(whole().to_record()))
    assert GenerationProtocol.from_record(record, "file") == whole()
    with pytest.raises(ValueError, match=r"limits.max_new_tokens: there 200, here 64"):
        require_same_protocol(("theirs", "grpo"), whole(max_new_tokens=200), protocol())
    with pytest.raises(ValueError, match=r"prompt.layer: there 3, here 4"):
        require_same_protocol(("theirs", "grpo"), whole(layer=3), protocol())


def test_what_nobody_generated_is_compared_with_anything() -> None:
    require_same_protocol(("grpo", "nearest_train_label"), protocol(), NOT_GENERATED)
    require_same_protocol(("gold", "nearest_train_label"), NOT_GENERATED, NOT_GENERATED)


def test_a_record_gives_the_protocol_back_and_an_edited_one_is_refused() -> None:
    record = json.loads(json.dumps(protocol().to_record()))
    assert GenerationProtocol.from_record(record, "file") == protocol()
    assert GenerationProtocol.from_record(NOT_GENERATED.to_record(), "file") is NOT_GENERATED
    edited = {**record, "limits": {"max_new_tokens": 200}}
    with pytest.raises(ValueError, match="file: hash of the generation protocol"):
        GenerationProtocol.from_record(edited, "file")
    with pytest.raises(ValueError, match="file: generation protocol"):
        GenerationProtocol.from_record({"hash": record["hash"]}, "file")


# Files --------------------------------------------------------------------------------------------


def test_a_file_begins_with_its_protocol_and_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path, asked = tmp_path / "grpo.jsonl", []

    def describe(start: int, stop: int) -> list[Description]:
        asked.append((start, stop))
        return said(*(f"- {number}" for number in range(start, stop)))

    whole = DescriptionFile(path, IDS, protocol()).complete(describe, chunk=2)
    assert whole == said("- 0", "- 1", "- 2") and asked == [(0, 2), (2, 3)]
    first, *lines = path.read_text().splitlines()
    assert json.loads(first) == {"protocol": protocol().to_record()}
    assert [json.loads(line)["activation_id"] for line in lines] == IDS
    assert protocol_in(path.read_bytes(), "grpo") == protocol()
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"- 1") + 2])
    assert DescriptionFile(path, IDS, protocol()).complete(describe, chunk=2) == whole
    assert asked[2:] == [(1, 3)] and path.read_bytes() == content


def test_a_begun_group_of_samples_is_drawn_anew(tmp_path: Path) -> None:
    path, sampled = tmp_path / "samples.jsonl", protocol(samples=2, temperature=1.0, seed=5)

    def describe(start: int, stop: int) -> list[Description]:
        return said(*(f"- {row} {sample}" for row in range(start, stop) for sample in "ab"))

    whole = DescriptionFile(path, IDS, sampled).complete(describe, chunk=9)
    assert len(whole) == 6
    content = path.read_text()
    path.write_text("".join(content.splitlines(keepends=True)[:4]))  # one group, one of the next
    file = DescriptionFile(path, IDS, sampled)
    assert file.read() == whole[:2] and len(path.read_text().splitlines()) == 3
    assert file.complete(describe, chunk=9) == whole and path.read_text() == content


def test_a_file_begun_under_another_protocol_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grpo.jsonl"
    DescriptionFile(path, IDS, protocol(max_new_tokens=200)).write(said("a", "b", "c"))
    with pytest.raises(ValueError, match=r"max_new_tokens: there 200, here 64"):
        DescriptionFile(path, IDS, protocol()).read()


def test_a_file_of_an_earlier_version_is_read_and_its_protocol_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "grpo.jsonl"
    DescriptionFile(path, IDS, None).write(said("a", "b", "c"))
    assert [json.loads(line)["description"] for line in path.read_text().splitlines()] == [*"abc"]
    file = DescriptionFile(path, IDS, protocol())
    assert file.read() == said("a", "b", "c") and file.protocol is None
    assert protocol_in(path.read_bytes(), "grpo") is None
