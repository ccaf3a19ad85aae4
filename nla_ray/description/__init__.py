"""From an activation to its description: the verbalizer and the generation engines.

Nouns: a verbalizer (activation -> description), an engine (what generates for it), a description.

Read: verbalizer, record, sampling, engines.

It trains nothing and scores nothing.
"""
