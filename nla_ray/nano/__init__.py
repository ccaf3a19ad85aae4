"""Everything that exists only for the embedded default: its corpus, teachers, and base model.

Read: installed_texts, embedded_corpus, offline_teachers, pretrain (data: the shipped base).

A run on another base with labels of its own imports nothing of it.
"""
