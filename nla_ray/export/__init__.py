"""What other tools read of a run: models in the reference layout, an adapter, data sets.

Nouns: the reference layout (`base/reference.py` reads and writes its manifests), a card (what an
adapter is, and the lines that inject).

Read: models, adapter, datasets, stage.

It trains and describes nothing new, sends nothing anywhere, and changes nothing in the run.
"""
