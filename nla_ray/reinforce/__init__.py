"""Contrastive GRPO: rollouts and scores on actors, rewards, credit, and a watch on the judge.

Nouns: a rollout (a sampled description), a group (the rollouts of one activation), a reward, an
advantage.

Read: stage (the driver), grpo (TRL's trainer in a worker), steps (what TRL calls), rewards, credit
and claim_credit, differences (prompts about two activations), rollouts and scoring (what the actors
hold), monitor (the judge), records (what is written down), live (what is drawn).

The run is known to stage, and to the worker and the scorer actors, which load its adapters. TRL
owns the loss; no test or validation document is learned from.
"""
