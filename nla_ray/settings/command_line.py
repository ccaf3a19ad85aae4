"""The command line: a preset, and flags that override it field by field."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from nla_ray.settings.config import RunConfig
from nla_ray.settings.preset_file import load_preset

_LONG_NAMES = {
    "--run": "--run-dir",
    "--import": "--label.import-path",
    "--to": "--export.to",
    "--output": "--export.output",
}
"""Short names of flags that are typed often."""

_Config = TypeVar("_Config", bound=RunConfig)


def parse_arguments(
    description: str,
    arguments: Sequence[str] | None = None,
    config_class: type[_Config] = RunConfig,
) -> _Config:
    """The configuration that a command line asks for; None: the process's own command line.

    `--preset` NAME or FILE chooses the start, every other flag overrides one field. Exits with
    status 2 and one message on an unknown preset, flag or value (as argparse does), and on a file
    that is no preset.
    """
    import tyro

    given = sys.argv[1:] if arguments is None else arguments
    named = [_LONG_NAMES.get(argument, argument) for argument in given]
    try:
        default = config_class.of(load_preset(_preset_name(named)))
        return tyro.cli(config_class, default=default, args=named, description=description)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _preset_name(arguments: Sequence[str]) -> str:
    """The last preset that is named, as flags are read: `nano` where none is."""
    name = "nano"
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            name = arguments[index + 1]
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    return name
