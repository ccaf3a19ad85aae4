"""Folders in the layout of the reference implementation: read into facts, and facts written.

A verbalizer there is a whole causal model, a reconstructor the first K + 1 blocks of one with
`value_head.safetensors` beside them; `nla_meta.yaml` says by which prompt, at which marker, TO
which norm. Both are trained whole: there is no adapter and no base. Prompts are the manifest's, to
the letter. Source of the layout: kitft/natural_language_autoencoders, released checkpoints.

Knows files; loads no model. Protects the rule that what a folder does not say, or says otherwise
than its model is, is refused by name and never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from nla_ray.base.identity import BaseInfo
from nla_ray.base.load import load_model_config
from nla_ray.base.prompts import (
    VERBALIZER_TEMPLATE,
    InjectionPrompt,
    around_description,
    chat_prompt,
    cut_at_marker,
    marker_token,
)
from nla_ray.base.sources import hub_snapshot
from nla_ray.settings.config import BaseConfig, require

REFERENCE_MANIFEST = "nla_meta.yaml"
VALUE_HEAD_NAME = "value_head.safetensors"
EXPLANATION_TAGS = "<explanation>", "</explanation>"
"""Around a description in what a verbalizer of this layout writes."""
MARKER_FIELD, DESCRIPTION_FIELD = "injection_char", "explanation"
"""What stands in braces in a verbalizer's template, and in a reconstructor's."""
OWN_KEY = "nla_ray"
"""Key of a manifest that only this package writes and reads; other tools ignore it."""

ReferenceRole = Literal["verbalizer", "reconstructor"]
_ROLE_NAMES: dict[ReferenceRole, tuple[str, ...]] = {
    "verbalizer": ("av", "actor", "verbalizer"),
    "reconstructor": ("ar", "critic", "reconstructor"),
}
"""Names of each role in manifests of version 2, of version 1, and in words."""
_SCHEMA_VERSIONS = (1, 2)
_LAYER_PLACES = (
    ("critic", "extraction_layer_index"),
    ("critic", "num_hidden_layers"),
    ("ar", "extraction_layer_index"),
    ("ar", "num_hidden_layers"),
    (None, "extraction_layer_index"),
)
"""Where a manifest may say what layer K is; the first that is there counts."""
_SQUARE_ROOT, _RAW = "sqrt_d_model", ("raw", "none")
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.yaml")


@dataclass(frozen=True, kw_only=True)
class ReferenceFacts:
    """What a folder of this layout says of its model.

    Example: ReferenceFacts(folder=Path("av"), role="verbalizer", layer=20, d_model=3584,
    num_blocks=28, model_type="qwen2", dtype="bfloat16", template="What is {injection_char}?",
    injection_norm=150.0, marker="#", marker_id=149705, neighbours=(29, 522))
    """

    folder: Path
    role: ReferenceRole
    layer: int | None
    """Layer K of the activations; None: the folder of a verbalizer does not say."""
    d_model: int
    num_blocks: int
    """Of the model in the folder."""
    model_type: str
    dtype: Literal["float32", "bfloat16"]
    """Type of its weights; those of float16 are read as float32."""
    template: str
    """Of the user's turn, with `{injection_char}`; of a reconstructor's input, `{explanation}`."""
    injection_norm: float | None = None
    """Norm TO which an activation is rescaled; None: a reconstructor injects nothing."""
    target_norm: float | None = None
    """Norm that its own error is computed at; None: at the norms that the vectors have."""
    marker: str = ""
    marker_id: int | None = None
    neighbours: tuple[int, int] | None = None
    """Ids left and right of the marker; None: not recorded."""
    suffix_ids: tuple[int, ...] = ()
    """What every input of a reconstructor ends in; empty: not recorded."""
    base_name: str | None = None
    """The base whose activations it knows; None: not recorded."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What this package has written beside: see `OWN_KEY`."""

    @property
    def tags(self) -> tuple[str, str]:
        """Around a description in what it writes."""
        opening, closing = self.own.get("tags", EXPLANATION_TAGS)
        return opening, closing

    def base_config(self, device: Literal["auto", "cpu", "cuda"] = "auto") -> BaseConfig:
        """The model in the folder, as a base is configured."""
        is_verbalizer = self.role == "verbalizer"
        return BaseConfig(
            model=str(self.folder),
            layer=self.layer or 0,
            injection_norm=self.injection_norm or 1.0,
            marker=self.marker or BaseConfig().marker,
            dtype=self.dtype,
            training_dtype=self.dtype,
            device=device,
            template="chat" if is_verbalizer else "raw",  # a reconstructor reads no turns
        )

    def around(self) -> tuple[str, str]:
        """What stands before and after the field of the template.

        Doubled braces stand for single ones, as in Python's `format`. Raises ValueError unless the
        field is there once.
        """
        name = MARKER_FIELD if self.role == "verbalizer" else DESCRIPTION_FIELD
        before, *rest = self.template.split(f"{{{name}}}")
        require(
            len(rest) == 1,
            f"{self.folder / REFERENCE_MANIFEST}: template of the {self.role}",
            self.template,
            f"{{{name}}} once",
            "Correct the manifest.",
        )
        return _unescaped(before), _unescaped(rest[0])

    def prompt(self, tokenizer: Any) -> tuple[InjectionPrompt, bool]:
        """A verbalizer's prompt, and whether it ends in the opening tag.

        Raises ValueError when the tokenizer makes another marker, or other neighbours, than the
        manifest records.
        """
        found = marker_token(tokenizer, self.marker)
        require(
            self.marker_id in (None, found),
            f"{self.folder}: id of marker {self.marker!r}",
            found,
            f"{self.marker_id}, as {REFERENCE_MANIFEST} records",
            "The tokenizer is another than the one it was trained with; load that one.",
        )
        before, after = self.around()
        text = chat_prompt(tokenizer, f"{before}{self.marker}{after}")
        prompt = cut_at_marker(tokenizer, text, self.marker, self.neighbours)
        return prompt, text.rstrip().endswith(self.tags[0])

    def to_manifest(self) -> dict[str, Any]:
        """As `nla_meta.yaml` holds it, in version 2."""
        manifest: dict[str, Any] = {
            "kind": "nla_model",
            "schema_version": _SCHEMA_VERSIONS[-1],
            "role": _ROLE_NAMES[self.role][0],
            "d_model": self.d_model,
            "extraction_layer_index": self.layer,
            "extraction": {
                "base_model": self.base_name,
                "injection_scale": self.injection_norm,
                "mse_scale": self.target_norm,
            },
            **prompt_sections(
                {self.role: self.template},
                self.marker,
                self.marker_id,
                self.neighbours,
                self.suffix_ids,
            ),
        }
        if self.role == "reconstructor":
            manifest["critic"] = {"extraction_layer_index": self.layer}
        return {**manifest, OWN_KEY: dict(self.own)} if self.own else manifest

    def save(self) -> None:
        """Write the manifest into the folder."""
        write_reference_manifest(self.folder / REFERENCE_MANIFEST, self.to_manifest())


def package_templates(marker: str) -> dict[ReferenceRole, str]:
    """This package's prompts, as `ReferenceFacts.around` reads them.

    >>> package_templates("#")["reconstructor"]
    '{explanation}\\nActivation: #'
    """
    before, after = around_description(marker)
    return {
        "verbalizer": VERBALIZER_TEMPLATE.format(marker=f"{{{MARKER_FIELD}}}"),
        "reconstructor": f"{_escaped(before)}{{{DESCRIPTION_FIELD}}}{_escaped(after)}",
    }


def prompt_sections(
    templates: Mapping[ReferenceRole, str],
    marker: str,
    marker_id: int | None,
    neighbours: tuple[int, int] | None,
    suffix_ids: Sequence[int],
) -> dict[str, Any]:
    """What manifests of models and of data sets say of prompts, under the same keys."""
    left, right = neighbours or (None, None)
    return {
        "tokens": {
            "injection_char": marker,
            "injection_token_id": marker_id,
            "injection_left_neighbor_id": left,
            "injection_right_neighbor_id": right,
            "critic_suffix_ids": list(suffix_ids) or None,
        },
        "prompt_templates": {
            name: template for role, template in templates.items() for name in _ROLE_NAMES[role][:2]
        },
    }


def write_reference_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest, of a model or of a data set, with its keys in their order."""
    text = yaml.safe_dump(dict(manifest), sort_keys=False, allow_unicode=True)
    file.write_text(text, encoding="utf-8")


def read_reference(path_or_id: str | Path, role: ReferenceRole) -> ReferenceFacts:
    """The facts of a local folder, or of a hub id, which is downloaded.

    Raises ValueError for what is no folder of this layout, for the other role, and for facts that
    are missing or contradict the model's configuration.
    """
    folder = _folder(path_or_id)
    source = folder / REFERENCE_MANIFEST
    manifest = _read_manifest(source)
    _require_role(manifest, role, source)
    config = load_model_config(BaseConfig(model=str(folder)))
    extraction, tokens = _section(manifest, "extraction"), _section(manifest, "tokens")
    d_model = manifest.get("d_model") or extraction.get("d_model") or config.hidden_size
    require(
        d_model == config.hidden_size,
        f"{source}: d_model",
        d_model,
        f"{config.hidden_size}, as config.json says",
        "The manifest is of another model.",
    )
    facts = ReferenceFacts(
        folder=folder,
        role=role,
        layer=_layer(manifest, role, config.num_hidden_layers),
        d_model=d_model,
        num_blocks=config.num_hidden_layers,
        model_type=config.model_type,
        dtype=_dtype(folder),
        template=_template(manifest, role, source),
        injection_norm=_scale(extraction, "injection_scale", d_model, None, source),
        target_norm=_scale(extraction, "mse_scale", d_model, _SQUARE_ROOT, source),
        marker=str(tokens.get("injection_char") or ""),
        marker_id=tokens.get("injection_token_id"),
        neighbours=_neighbours(tokens),
        suffix_ids=tuple(tokens.get("critic_suffix_ids") or ()),
        base_name=extraction.get("base_model") or manifest.get("base_model"),
        own=_section(manifest, OWN_KEY),
    )
    _check(facts)
    return facts


def is_reference(folder: Path) -> bool:
    """Whether a folder is one of this layout."""
    return (folder / REFERENCE_MANIFEST).is_file()


def check_reference_base(facts: ReferenceFacts, base: BaseInfo, what: str) -> None:
    """Raise ValueError, naming `what`, for a verbalizer of another base or layer than this one's.

    A folder of this package records which base it was made from. Of any other the shape is
    compared, and the name of the base where the folder has it and this one's is no folder.
    """
    compared: dict[str, tuple[Any, Any]] = {"layer": (facts.layer, base.layer)}
    if digest := facts.own.get("base_digest"):
        compared["weights of the base"] = digest, base.digest
    else:
        compared |= {
            "model type": (facts.model_type, base.model_type),
            "d_model": (facts.d_model, base.d_model),
            "number of blocks": (facts.num_blocks, base.num_layers),
        }
        if facts.base_name is not None and not Path(base.name).is_dir():
            compared["base"] = _last_name(facts.base_name), _last_name(base.name)
    for name, (found, expected) in compared.items():
        require(
            found == expected,
            f"{what}: {name} of {facts.folder}",
            "none in its manifest" if found is None else found,
            f"{expected!r}, of {base.name}, whose activations are described",
            "Name a verbalizer of the same base and layer.",
        )


def parse_explanation(
    written: str, tags: tuple[str, str], *, is_open: bool, finished: bool
) -> tuple[str, bool]:
    """The description in what a verbalizer wrote, and whether it came to its end.

    `is_open`: the prompt ends in the opening tag. `finished`: the end of the text was written.
    Between the first two tags, without outer white space; where the closing tag is missing,
    everything behind the opening one, and the end did not come. Text without tags is a description
    as it is, with the end of the text for its end.

    >>> tags = EXPLANATION_TAGS
    >>> parse_explanation("So: <explanation> a </explanation>", tags, is_open=False, finished=True)
    ('a', True)
    >>> parse_explanation("<explanation> a", tags, is_open=False, finished=True)
    ('a', False)
    >>> parse_explanation(" a ", tags, is_open=False, finished=True)
    ('a', True)
    """
    opening, closing = map(re.escape, tags)
    if found := re.search(f"{opening}(.*?){closing}", written, re.DOTALL):
        return found[1].strip(), True
    body, has_closed, _ = written.partition(tags[1])
    before, has_opened, behind = body.partition(tags[0])
    text = behind if has_opened else before
    return text.strip(), bool(has_closed) or (not (is_open or has_opened) and finished)


# What a manifest says ----------------------------------------------------------------------------


def _folder(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        expected = f"a folder with {REFERENCE_MANIFEST} in it, or a hub id"
        folder = hub_snapshot(str(path_or_id), _PATTERNS, "checkpoint", expected)
    for name in (REFERENCE_MANIFEST, "config.json"):
        require(
            (folder / name).is_file(),
            f"checkpoint {str(path_or_id)!r}",
            f"no {name}",
            f"the layout of the reference implementation: a model with {REFERENCE_MANIFEST}",
            "Name the folder that holds both.",
        )
    return folder


def _read_manifest(source: Path) -> dict[str, Any]:
    try:
        manifest = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source}: got what is no YAML ({reason}), expected a manifest. Get it again."
        ) from None
    require(
        isinstance(manifest, dict) and manifest.get("kind") == "nla_model",
        f"{source}: kind",
        manifest.get("kind") if isinstance(manifest, dict) else manifest,
        "'nla_model'",
        "Name the folder of a model, not of a data set.",
    )
    version = manifest.get("schema_version", _SCHEMA_VERSIONS[0])
    require(
        version in _SCHEMA_VERSIONS,
        f"{source}: schema_version",
        version,
        f"one of {_SCHEMA_VERSIONS}",
        "What its keys mean is not known here.",
    )
    return manifest


def _require_role(manifest: Mapping[str, Any], role: ReferenceRole, source: Path) -> None:
    require(
        manifest.get("role") in _ROLE_NAMES[role],
        f"{source}: role",
        manifest.get("role"),
        f"one of {', '.join(_ROLE_NAMES[role])}",
        "A verbalizer is loaded by load_verbalizer, a reconstructor by load_reconstructor.",
    )


def _section(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = manifest.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _layer(manifest: Mapping[str, Any], role: ReferenceRole, num_blocks: int) -> int | None:
    for section, name in _LAYER_PLACES:
        found = (manifest if section is None else _section(manifest, section)).get(name)
        if found is not None:
            return int(found)
    # The last block of a whole model says nothing of the layer.
    return num_blocks - 1 if role == "reconstructor" else None


def _template(manifest: Mapping[str, Any], role: ReferenceRole, source: Path) -> str:
    templates = _section(manifest, "prompt_templates")
    found = [templates[name] for name in _ROLE_NAMES[role] if templates.get(name)]
    require(
        bool(found),
        f"{source}: prompt_templates",
        sorted(templates),
        f"one of {', '.join(_ROLE_NAMES[role])}",
        "Without the words that it was trained with it cannot be asked.",
    )
    return str(found[0])


def _scale(
    extraction: Mapping[str, Any], name: str, d_model: int, absent: str | None, source: Path
) -> float | None:
    """A norm: a number, also as text, or the square root of d_model; None: as vectors are."""
    value = extraction.get(name, absent)
    if value is None or value in _RAW:
        return None
    if value == _SQUARE_ROOT:
        return d_model**0.5
    try:
        norm = float(value)
    except (TypeError, ValueError):
        norm = 0.0
    require(
        0.0 < norm < float("inf"),
        f"{source}: extraction.{name}",
        value,
        f"a positive number, {_SQUARE_ROOT} or null",
        "Correct the manifest.",
    )
    return norm


def _neighbours(tokens: Mapping[str, Any]) -> tuple[int, int] | None:
    left, right = (tokens.get(f"injection_{side}_neighbor_id") for side in ("left", "right"))
    return None if left is None or right is None else (int(left), int(right))


def _dtype(folder: Path) -> Literal["float32", "bfloat16"]:
    values = json.loads((folder / "config.json").read_text())
    places = (values, _section(values, "text_config"))
    found = [place.get(name) for place in places for name in ("dtype", "torch_dtype")]
    return "bfloat16" if "bfloat16" in found else "float32"


def _check(facts: ReferenceFacts) -> None:
    """Raise ValueError for facts without which the model is not what it was."""
    source = facts.folder / REFERENCE_MANIFEST
    facts.around()
    if facts.role == "verbalizer":
        for name, value in (
            ("extraction.injection_scale", facts.injection_norm),
            ("tokens.injection_char", facts.marker or None),
        ):
            require(
                value is not None,
                f"{source}: {name}",
                None,
                "what the verbalizer was trained with",
                "Ask whoever trained it; any other value makes another verbalizer.",
            )
        return
    require(
        facts.layer == facts.num_blocks - 1,
        f"{source}: layer K",
        facts.layer,
        f"{facts.num_blocks - 1}, the last of the {facts.num_blocks} blocks in config.json",
        "A reconstructor of this layout is cut after block K; one of the two files is wrong.",
    )


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _unescaped(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def _last_name(name: str) -> str:
    """What stands behind the last slash, in small letters: owners of copies differ."""
    return name.rstrip("/").rpartition("/")[2].lower()
