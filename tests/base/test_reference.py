"""Manifests of the reference layout: every way in which they say things, and what is refused."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from reference_layout import (
    BLOCKS,
    LAYER,
    VERBALIZER_PROMPT,
    WIDTH,
    write_manifest,
    write_reconstructor,
    write_verbalizer,
)
from tiny import MARKER

from nla_ray.base.identity import base_info
from nla_ray.base.reference import (
    EXPLANATION_TAGS,
    ReferenceFacts,
    check_reference_base,
    parse_explanation,
    read_reference,
)
from nla_ray.settings.config import BaseConfig


@pytest.fixture(scope="module")
def av(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_verbalizer(tmp_path_factory.mktemp("av"), "qwen2")


@pytest.fixture(scope="module")
def ar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reconstructor(tmp_path_factory.mktemp("ar"), "qwen2")


@pytest.fixture
def changed(tmp_path: Path):
    """A folder with the same model under another manifest: `changed(av, role="actor")`."""

    def change(folder: Path, **changes: object) -> Path:
        manifest = yaml.safe_load((folder / "nla_meta.yaml").read_text())
        for file in folder.iterdir():
            if file.name != "nla_meta.yaml" and not (tmp_path / file.name).exists():
                (tmp_path / file.name).symlink_to(file)
        return write_manifest(tmp_path, manifest, changes)

    return change


def test_what_a_verbalizers_folder_says(av: Path) -> None:
    facts = read_reference(av, "verbalizer")
    assert (facts.layer, facts.d_model, facts.num_blocks) == (LAYER, WIDTH, BLOCKS)
    assert (facts.injection_norm, facts.target_norm, facts.marker) == (4.0, None, MARKER)
    assert facts.around() == ("Say what lies behind <concept>", "</concept>, in {words}.")


@pytest.mark.parametrize("version", [1, 2, None])
@pytest.mark.parametrize("name", ["av", "actor", "verbalizer"])
def test_roles_and_templates_have_the_names_of_every_version(
    av: Path, changed, name: str, version: int | None
) -> None:
    folder = changed(av, role=name, schema_version=version, prompt_templates=None)
    write_manifest(
        folder,
        yaml.safe_load((folder / "nla_meta.yaml").read_text()),
        {"prompt_templates": {name: VERBALIZER_PROMPT}},
    )
    assert read_reference(folder, "verbalizer").template == VERBALIZER_PROMPT


@pytest.mark.parametrize("name", ["ar", "critic", "reconstructor"])
def test_a_reconstructor_has_three_names_too(ar: Path, changed, name: str) -> None:
    facts = read_reference(changed(ar, role=name), "reconstructor")
    assert facts.template.endswith("Gist:")


@pytest.mark.parametrize(
    "said",
    [
        {"critic": {"extraction_layer_index": 2, "num_hidden_layers": 9}},
        {"critic": {"num_hidden_layers": 2}, "ar": {"extraction_layer_index": 9}},
        {"ar": {"extraction_layer_index": 2, "num_hidden_layers": 9}},
        {"ar": {"num_hidden_layers": 2}, "extraction_layer_index": 9},
        {"extraction_layer_index": 2},
        {},
    ],
)
def test_layer_k_is_what_is_said_first_and_else_the_last_block(
    ar: Path, changed, said: dict
) -> None:
    folder = changed(ar, critic=None)
    write_manifest(folder, yaml.safe_load((folder / "nla_meta.yaml").read_text()), said)
    assert read_reference(folder, "reconstructor").layer == 2


def test_the_layer_of_a_verbalizer_is_never_guessed(av: Path, changed) -> None:
    facts = read_reference(changed(av, extraction_layer_index=None), "verbalizer")
    assert facts.layer is None


@pytest.mark.parametrize(
    ("said", "norm"),
    [(None, None), ("raw", None), (7, 7.0), ("7.5", 7.5), ("sqrt_d_model", math.sqrt(WIDTH))],
)
def test_a_norm_is_a_number_the_square_root_or_none(ar: Path, changed, said, norm) -> None:
    facts = read_reference(changed(ar, extraction={"mse_scale": said}), "reconstructor")
    assert facts.target_norm == norm


def test_without_a_word_the_error_is_at_the_square_root(ar: Path, changed) -> None:
    facts = read_reference(changed(ar, extraction=None), "reconstructor")
    assert facts.target_norm == math.sqrt(WIDTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "ar"}, r"role: got 'ar', expected one of av, actor, .*load_reconstructor"),
        ({"kind": "nla_dataset"}, r"kind: got 'nla_dataset', expected 'nla_model'"),
        ({"schema_version": 3}, r"schema_version: got 3, expected one of \(1, 2\)"),
        ({"d_model": 65}, r"d_model: got 65, expected 64, as config.json says"),
        ({"extraction": {"injection_scale": None}}, r"injection_scale: got None, expected what"),
        ({"extraction": {"injection_scale": -1}}, r"got -1, expected a positive number"),
        ({"tokens": {"injection_char": None}}, r"injection_char: got None, expected what"),
        ({"prompt_templates": {"av": "no field"}}, r"got 'no field', expected .injection_char."),
        ({"prompt_templates": None}, r"prompt_templates: got \[\], expected one of av"),
    ],
)
def test_what_is_no_verbalizers_manifest_is_refused(av, changed, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_reference(changed(av, **changes), "verbalizer")


def test_a_reconstructor_that_is_not_cut_after_its_layer_is_refused(ar: Path, changed) -> None:
    folder = changed(ar, critic={"extraction_layer_index": 1})
    with pytest.raises(ValueError, match=r"layer K: got 1, expected 2, the last of the 3 blocks"):
        read_reference(folder, "reconstructor")


def test_what_is_no_folder_of_the_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'no nla_meta.yaml', expected the layout of"):
        read_reference(tmp_path, "verbalizer")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "nla_meta.yaml").write_text("kind: [")
    with pytest.raises(ValueError, match=r"got what is no YAML .*, expected a manifest"):
        read_reference(tmp_path, "verbalizer")


def test_a_hub_id_without_the_hub_is_refused_in_words() -> None:
    with pytest.raises(
        ValueError, match=r"checkpoint: got 'org/no-such-nla', which is no folder here and cannot"
    ):
        read_reference("org/no-such-nla", "verbalizer")


@pytest.mark.parametrize("role", ["verbalizer", "reconstructor"])
def test_what_is_written_is_read_again(av: Path, ar: Path, changed, role: str) -> None:
    folder = av if role == "verbalizer" else ar
    facts, own = read_reference(folder, role), {"tags": ["<a>", "</a>"]}
    written = dataclasses.replace(facts, folder=changed(folder), own=own, base_name="org/base")
    written.save()
    assert read_reference(written.folder, role) == written
    assert written.tags == ("<a>", "</a>")


TAGS = EXPLANATION_TAGS


@pytest.mark.parametrize(
    ("written", "is_open", "finished", "expected"),
    [
        ("<explanation>\n a b\n</explanation> c", False, True, ("a b", True)),
        ("x <explanation>a</explanation><explanation>b</explanation>", False, True, ("a", True)),
        ("x <explanation>a", False, True, ("a", False)),
        ("a plain sentence", False, True, ("a plain sentence", True)),
        ("a plain sentence", False, False, ("a plain sentence", False)),
        ("a</explanation> b", True, True, ("a", True)),
        ("a", True, True, ("a", False)),
        ("", False, True, ("", True)),
    ],
)
def test_a_description_stands_between_the_first_tags_or_without_any(
    written: str, is_open: bool, finished: bool, expected: tuple[str, bool]
) -> None:
    assert parse_explanation(written, TAGS, is_open=is_open, finished=finished) == expected


def facts_of(base: BaseConfig, **changes: object) -> ReferenceFacts:
    facts = ReferenceFacts(
        folder=Path("av"),
        role="verbalizer",
        layer=base.layer,
        d_model=32,
        num_blocks=3,
        model_type="qwen2",
        dtype="float32",
        template="{injection_char}",
    )
    return dataclasses.replace(facts, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 2}, "theirs: layer of av: got 2, expected 1, of"),
        ({"layer": None}, "theirs: layer of av: got 'none in its manifest', expected 1"),
        ({"d_model": 64}, "d_model of av: got 64, expected 32"),
        ({"num_blocks": 4}, "number of blocks of av: got 4, expected 3"),
        ({"model_type": "llama"}, "model type of av: got 'llama', expected 'qwen2'"),
        ({"base_name": "org/other"}, "base of av: got 'other', expected 'name'"),
        ({"own": {"base_digest": "x"}}, "weights of the base of av: got 'x', expected"),
    ],
)
def test_a_verbalizer_of_another_base_or_layer_is_refused_by_name(
    tiny_base: BaseConfig, changes: dict, message: str
) -> None:
    info = dataclasses.replace(base_info(tiny_base), name="ORG/Name")
    check_reference_base(facts_of(tiny_base, base_name="org2/name"), info, "theirs")
    with pytest.raises(ValueError, match=message):
        check_reference_base(facts_of(tiny_base, **changes), info, "theirs")
