"""The command line: a preset, and flags that override it field by field."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nla_ray.settings.config import RunConfig
from nla_ray.settings.presets import preset

_LONG_NAMES = {"--run": "--run-dir"}


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> RunConfig:
    """The command line as a RunConfig: `--preset NAME` chooses the start, every other flag
    overrides one field.

    Exits with status 2 and one message on an unknown preset, flag or value (as argparse does).
    """
    import tyro

    arguments = [
        _LONG_NAMES.get(argument, argument)
        for argument in (sys.argv[1:] if arguments is None else arguments)
    ]
    name = "nano"
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            name = arguments[index + 1]
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    try:
        default = preset(name)
        return tyro.cli(RunConfig, default=default, args=arguments, description=description)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
