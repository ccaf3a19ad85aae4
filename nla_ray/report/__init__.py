"""The report: every description of the test activations, what scorers read in it, figures, pages.

Nouns: a verbalizer's row, a control, a gate, a figure with its interval.

Read: stage, controls, describing, readings, summary, gates, growth, compared, experiments, rendering.

No description is dropped, and nothing is computed before lineage is proved.
"""
