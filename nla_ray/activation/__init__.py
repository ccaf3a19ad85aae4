"""Activations: captured, kept, injected, and all arithmetic on them.

Nouns: an activation (raw float32 residual-stream vector at a layer and position), a bank (many of
them, by row).

Read: vectors, positions, answers, capture, patching, injection, views, directions, bank, shards,
stage.

An activation is never normalised on disk. Only `stage` knows a run directory; `shards` is given the
folder that it writes to.
"""
