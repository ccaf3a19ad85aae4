"""From an activation to its description: the verbalizer and the generation engines.

Nouns: a description (text, and how it was sampled), a verbalizer (activation -> description), an
engine (what generates for it).

Read: record, verbalizer, engines/interface (what an engine is, and which one generates), sampling,
engines/compact (who decodes when), engines/decoder and engines/projection (the arithmetic).

It trains nothing and scores nothing, and no file of it knows a run directory.
"""
