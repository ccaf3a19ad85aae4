"""From an activation to its description: the verbalizer and the generation engines.

Nouns: a description (text, and how it was sampled), a verbalizer (activation -> description), an
engine (what generates for it), a generation protocol (how the descriptions of a file came about).

Read: record, verbalizer, protocol (what two verbalizers must share to be compared), files,
engines/interface (what an engine is, and which one generates), sampling, engines/compact (who
decodes when), engines/decoder and engines/projection (the arithmetic), engines/graphed (a step as a
CUDA graph).

It trains nothing and scores nothing, and no file of it knows a run directory.
"""
