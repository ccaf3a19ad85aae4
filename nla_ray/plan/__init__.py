"""What a job would do, from configuration and sizes alone: `--dry-run` prints it.

Nouns: the sizes of a base, plan facts (what every formula is computed from), a stage plan (its
processes, tokens, FLOP and files).

Read: text, formulas, facts, sizes, quantised, units.

It refuses what the job refuses of a base. It downloads nothing, reads no weight, and imports
neither torch nor Ray. Its figures are estimates by the formulas beside them, not promises.
"""
