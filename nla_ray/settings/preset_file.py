"""A preset in a file: TOML that names a preset to start from, and the settings that differ from it.

Every job takes one as `--preset FILE`; `jobs/inspect_base.py` writes one. A file holds values as
flags do: a path in it is relative to where a job is started, and "None" is no value::

    preset = "smollm2-135m"
    run_dir = "runs/qwen3"

    [base]
    model = "Qwen/Qwen3-0.6B"
    layer = 20

    [reward_scorer]
    lora.rank = 16

It protects the rule that a file gives the configuration that the same flags give: a number without
a point is a float where the setting is one, so artifacts have one identity.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nla_ray.settings.config import RunConfig, is_preset_file, require, to_dict
from nla_ray.settings.presets import PRESETS, preset

_NO_VALUE = "None"
"""What stands for no value, as on the command line: TOML has no word for it."""
_SECTIONS = tuple(
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.default_factory is not dataclasses.MISSING
)


# Reading ------------------------------------------------------------------------------------------


def load_preset(name: str) -> RunConfig:
    """The configuration of `--preset`: a name, or a file, whose path its `preset` then is.

    A file that names no `run_dir` has one of its own, `runs/{name of the file}`. Raises ValueError
    for an unknown name, and for a file that cannot be read or holds what no setting takes.
    """
    if not is_preset_file(name):
        return preset(name)
    values = _read(name)
    default = preset(values.pop("preset"))
    run_dir = values.pop("run_dir", f"runs/{Path(name).stem}")
    try:
        sections = {
            section: _replaced(getattr(default, section), fields, section)
            for section, fields in values.items()
        }
        return dataclasses.replace(default, preset=name, run_dir=run_dir, **sections)
    except ValueError as error:
        raise ValueError(f"preset file {name}: {error}") from None


def start_preset(name: str) -> RunConfig:
    """The named preset that `--preset` starts from: itself, or the one that a file names.

    Raises ValueError as `load_preset`, but for values that no setting takes.
    """
    return preset(_read(name)["preset"] if is_preset_file(name) else name)


def _read(path: str) -> dict[str, Any]:
    """What the file says; its first level is checked: `preset`, perhaps `run_dir`, and sections."""
    what = f"preset file {path}"
    values = _parse(path, what)
    for key, value in values.items():
        if key in _SECTIONS:
            table = f"a table: [{key}], and its settings below"
            require(isinstance(value, dict), f"{what}: {key}", value, table, "Write it so.")
            continue
        expected = f"preset, run_dir, or a section of {', '.join(_SECTIONS)}"
        remedy = "Correct the name; what is asked of one job, such as --card, stays a flag."
        require(key in ("preset", "run_dir"), what, key, expected, remedy)
        require(isinstance(value, str), f"{what}: {key}", value, "text in quotes", "Write it so.")
    remedy = 'A line above the sections names what it starts from, such as preset = "smollm2-135m".'
    start = values.get("preset")
    require(start in PRESETS, f"{what}: preset", start, _one_of(tuple(PRESETS)), remedy)
    return values


def _parse(path: str, what: str) -> dict[str, Any]:
    require("://" not in path, what, "a URI", "a local file", "Copy it to this machine first.")
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(
            f"{what}: got {(error.strerror or str(error)).lower()!r}, expected a TOML file that can"
            " be read. Correct the path after --preset."
        ) from None
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # not UTF-8, or not TOML
        raise ValueError(
            f"{what}: got {str(error)!r}, expected TOML in UTF-8. Correct it there: text stands in"
            " quotes, and a backslash in it is written twice."
        ) from None


def _replaced(default: Any, values: Mapping[str, Any], where: str) -> Any:
    """A section with fields replaced. Raises ValueError that names `where`, the section."""
    types = get_type_hints(type(default))
    fields: dict[str, Any] = {}
    for name, value in values.items():
        remedy = "Correct the name; --help explains every setting."
        require(name in types, where, name, f"a setting of {', '.join(types)}", remedy)
        current, what = getattr(default, name), f"{where}.{name}"
        if dataclasses.is_dataclass(current):
            require(isinstance(value, dict), what, value, f"{name}.SETTING = VALUE", "Write it so.")
            fields[name] = _replaced(current, value, what)
            continue
        try:
            fields[name] = _converted(types[name], value)
        except (TypeError, OverflowError):
            require(False, what, value, _expected(types[name]), "Correct the value.")
    return dataclasses.replace(default, **fields)


def _converted(kind: Any, value: Any) -> Any:
    """A value of the file as the field's type has it. Raises TypeError where that is another."""
    choices = get_args(kind)
    if get_origin(kind) is UnionType:
        [inner] = [choice for choice in choices if choice is not NoneType]
        return None if value == _NO_VALUE else _converted(inner, value)
    if get_origin(kind) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
    elif get_origin(kind) is tuple and isinstance(value, list):
        kinds = [choices[0]] * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) == len(value):
            return tuple(map(_converted, kinds, value))
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise TypeError(kind)


def _expected(kind: Any) -> str:
    """The type of a field in words."""
    names = {
        str: "text in quotes",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: f'"{_NO_VALUE}"',
    }
    if kind in names:
        return names[kind]
    choices = get_args(kind)
    if get_origin(kind) is UnionType:
        return " or ".join(map(_expected, choices))
    if get_origin(kind) is Literal:
        return _one_of(choices)
    if choices[-1] is Ellipsis:
        return f"a list, each {_expected(choices[0])}"
    return f"a list of {len(choices)}: {', '.join(map(_expected, choices))}"


def _one_of(choices: Sequence[Any]) -> str:
    return f"one of {', '.join(map(toml_value, choices))}"


# Writing ------------------------------------------------------------------------------------------


def differing_settings(config: RunConfig, start: RunConfig) -> dict[str, dict[str, Any]]:
    """section -> dotted field -> value, of all that a configuration has otherwise than its start.

    >>> from nla_ray.settings.presets import nano, override
    >>> differing_settings(override(nano(), base={"layer": 3}), nano())
    {'base': {'layer': 3}}
    """
    values, defaults = to_dict(config), to_dict(start)
    sections = {
        section: _differing_fields(values[section], defaults[section]) for section in _SECTIONS
    }
    return {section: fields for section, fields in sections.items() if fields}


def _differing_fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            inner = _differing_fields(value, defaults[name])
            fields |= {f"{name}.{key}": changed for key, changed in inner.items()}
        elif value != defaults[name]:
            fields[name] = value
    return fields


def to_preset_file(
    heading: Sequence[str],
    first: Mapping[str, str],
    sections: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, Sequence[str]],
) -> str:
    """The text of a preset file.

    `heading`: comment lines above all. `first`: `preset` and perhaps `run_dir`. `sections`: as
    `differing_settings` gives them. `sources`: `section.field` -> comment lines above the value.
    Comments are written as they are: they may hold no line break and no control character.
    """
    lines = [*_comments(heading), *(f"{key} = {toml_value(value)}" for key, value in first.items())]
    for section, fields in sections.items():
        lines += ["", f"[{section}]"]
        for name, value in fields.items():
            lines += _comments(sources.get(f"{section}.{name}", ()))
            lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def _comments(lines: Sequence[str]) -> list[str]:
    return [f"# {line}".rstrip() for line in lines]


def toml_value(value: Any) -> str:
    """A setting as TOML writes it; text keeps what can be seen of it and escapes the rest.

    >>> print(toml_value('C:\\\\"a"'), toml_value([True, 0.5, None]), toml_value("号\\n\\u200b"))
    "C:\\\\\\"a\\"" [true, 0.5, "None"] "号\\u000a\\u200b"
    """
    if value is None:
        return toml_value(_NO_VALUE)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 1 << 16 else f"\\U{ord(character):08x}"
