"""A run directory: its stages, its artifacts, their identity, its log and metrics.

Nouns: a stage (one row of the table in `stages`), an artifact (a folder that a stage publishes), a
manifest (the file in it that says what the artifact is and what it was made from), a recipe (the
settings that decide what it holds).

Read: stages, artifact, manifest, recipe, location, lock, identity, log, metrics,
blocks.

It knows no model and no data: only names, files, hashes and sizes.
"""
