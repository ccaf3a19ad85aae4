"""The tokenizer of the small base: byte-level BPE with ChatML and the marker as one token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
"""ChatML without a default system prompt."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, marker: str) -> Any:
    """Byte-level BPE with ChatML; the marker is the last id, an ordinary token that decoding keeps.

    Words are split exactly as Qwen2's tokenizer splits them, because every loader builds that class
    for this architecture, even where the files say otherwise. Raises RuntimeError when the texts
    are too small for the vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    pattern = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    tokenizer: Any = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=TURN_END,
        pad_token=TEXT_END,
        unk_token=TEXT_END,
        extra_special_tokens=[TURN_START],
    )
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != vocab_size or tokenizer.convert_tokens_to_ids(marker) != vocab_size - 1:
        raise RuntimeError(
            f"tokenizer training gave {len(tokenizer)} tokens, expected {vocab_size}: the text is"
            " too small for that vocabulary. Lower vocab_size or give more text."
        )
    return tokenizer
