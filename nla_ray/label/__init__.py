"""Labels: what teachers say of the texts, cleaned to bullets; or labels made elsewhere.

Nouns: a subject (a text, or a text up to a position), a teacher (text -> raw label), a label (two
or three bullets), the label drawn for a subject.

Read: stage, subjects, teacher, cleaner, rows, imports. Teachers over the network: network,
asking, providers, instructions, limits, store, rewriting.

It knows the positions of activations and none of their vectors.
"""
