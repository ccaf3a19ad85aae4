"""Supervised training: the verbalizer's SFT and the scorers, in Ray Train workers.

Nouns: a worker (one process of a training stage), a checkpoint, an offer (what is published when it
is the best so far).

Read: sft, reconstruction, linear, workers, checkpoints, callbacks, precision, zero, batches.

TRL and transformers own the loops.
"""
