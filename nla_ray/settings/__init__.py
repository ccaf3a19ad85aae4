"""Every setting of a run, the named presets, and the command line that overrides them.

Nouns: a configuration (frozen dataclasses, one section a stage), a preset (a complete configuration
with a name).

Read: config, positions, presets, command_line, fit, resources, precision.

It imports neither torch nor Ray: `--help` and `--dry-run` answer at once.
"""
