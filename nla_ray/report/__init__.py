"""The report: every description of the test activations, what scorers read in it, figures, pages.

Nouns: a verbalizer's row, a control, a gate, a figure with its interval.

Read: stage (the steps), lineage, controls, describing, matched, readings, patch_back, gathering,
evaluated, pairing, claim_figures, claim_confidence, recovered, samples, lengths, differences,
layers, refreshed, wording, summary, gates, then what stands beside the figures (gallery, growth,
seeds, notes, compared, reuse), rendering, and cards with their example.

A figure is added in one place: a scorer's in score/metrics, a claim's in claim_figures, a section
in summary. A run is known to stage and to the files that read artifacts of it: lineage, gathering,
describing, matched, readings, patch_back, reuse, growth, seeds, notes and example. No description
is dropped, and nothing is computed before lineage is proved.
"""
