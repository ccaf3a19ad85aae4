"""Pretraining of the small base that ships with the package: `jobs/pretrain.py`, an hour on a CPU.

Nouns: a chat (a text, and an answer about it), a row (chats and raw text packed together), a card
(what the model is and learned from).

Read: stage, texts, answers, rows, tokenizer, model.

It reads no held-out document, and no run but one that pretrains imports it.
"""
