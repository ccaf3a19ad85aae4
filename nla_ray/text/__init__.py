"""The corpus: documents of a user or of the embedded default, cut into chunks and split.

Nouns: a document (with a stable doc_id, whose hash is its split), a chunk (one text of it).

Read: stage, documents, rejects, cutting, chunks, choosing, duplicates, user_corpus, words, domains.

No choice depends on order or time: on ids and the seed alone.
"""
