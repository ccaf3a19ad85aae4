"""Every setting of a run, the named presets, and the command line that overrides them.

Nouns: a configuration (frozen dataclasses, one section a stage), a preset (a complete configuration
with a name, or in a file that starts from one).

Read: config, positions, views, presets, preset_file, command_line, fit, resources, precision.

It imports neither torch nor Ray: `--help` and `--dry-run` answer at once.
"""
