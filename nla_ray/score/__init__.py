"""What a description is worth: reconstructors, scorers, and the figures of both.

Nouns: a reconstructor (description -> activation), a scorer (it compares), a figure (a ratio that
can be computed on any resample of documents), a claim (a word that a description says of its text).

Read: reconstructor, packing, scorer, linear, reference (reconstructors of others); comparisons,
metrics (one row a metric), claims, bootstrap, choice; probe, logistic, cross_fit, readable (what of
a label can be seen), claim_confidence, rewording; ceiling, proposal, stage (a base before anything
is trained on it).

It pays nothing: rewards are made of scores in `reinforce`.
"""
