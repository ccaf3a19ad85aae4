"""Supervised training: the verbalizer's SFT and the scorers, in Ray Train workers.

Nouns: a trainable verbalizer (base, adapter and a forward of its own; GRPO trains it too), a worker
(one process of a training stage), a checkpoint (what is trained, free of the number of workers), an
offer (published when it is the best).

Read: verbalizer, readable, sft, reconstruction, linear, refreshed, claim_confidence, workers,
resuming, checkpoints, callbacks, trackers, batches, attention, zero.

A scorer needs no such class: `score.Reconstructor` is a module with its own forward. Stages are the
first functions of readable, sft, reconstruction, linear, refreshed and claim_confidence, which
stand beside their trainers.

It owns no loop: TRL and transformers do.
"""
