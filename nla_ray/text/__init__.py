"""The corpus: documents of a user or of the embedded default, cut into chunks and split.

Nouns: a document (with a stable doc_id; it may be a conversation), a chunk (one text of it), a
family (documents that share text; the hash of its id is its split).

Read: stage, documents, fields, rejects, cutting, chunks, choosing, duplicates, user_corpus,
shingles, joining, families, words, summary, domains.

No choice depends on order or time: on ids and the seed alone.
"""
