"""Contrastive GRPO: rollouts and scores on actors, rewards, credit, and a watch on the judge.

Nouns: a rollout (one sampled description), a group (those of one activation), a reward, an advantage.

Read: grpo, steps, rewards, credit, rollouts, scoring, monitor, live.

TRL owns the loss; no test or validation document is learned from.
"""
