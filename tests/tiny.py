"""A tiny random chat model on disk: the base of unit tests.

Built in about a second, from a few sentences: d_model 32, 3 blocks, 2 heads, 1 key-value head,
byte-level BPE with a ChatML template and the marker as one token. Its embedding table has more rows
than its tokenizer has tokens, as real models have.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nla_ray.settings.config import BaseConfig, RunConfig
from nla_ray.settings.presets import nano, override
from nla_ray.text.words import WordStatistics

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "\u320e"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content']"
    " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    (
        "Describe the text behind this activation in two or three bullets: the topics, the tokens,"
        " the response."
    ),
    "- A Python test that opens a file and asserts the number of rows.",
    "- A licence that permits copying, with conditions.",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    (
        "<description>- topics: code, tests\n- tokens: def, assert\n- next: the assistant explains"
        " the function</description>"
    ),
    "Activation: user assistant system\n",
)
WORD_STATISTICS = WordStatistics(
    num_documents=1_000,
    document_frequency={
        "frame": 20,
        "index": 50,
        "assert": 80,
        "dtype": 20,
        "columns": 40,
        "column": 40,
        "result": 200,
        "expected": 125,
        "common": 600,
        "rare": 2,
    },
)
WORDY_TEXT = "frame = read_frame(index)\nassert frame.dtype == expected\nresult common rare columns"
"""A text whose words fall into all bands of WORD_STATISTICS."""
_TABLE_ROWS_BEYOND_TOKENIZER = 13


def plain_nano() -> RunConfig:
    """Preset nano with labels as their teachers wrote them, without the stage `readable_labels`.

    That is what the preset was when it came out."""
    as_written = {"replaced_share": 0.0}
    return override(
        nano(),
        sft={"claims": "all", "epochs": 2},
        reward_scorer=as_written,
        judge_scorer=as_written,
        grpo={
            "temperature": 1.0,
            "claim_weight": 0.0,
            "claim_precision": 0.75,
            "repeat_penalty": 0.5,
        },
    )


def build_tokenizer(vocab_size: int = 400):
    """A byte-level BPE tokenizer with ChatML tokens and the marker as an ordinary token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken(MARKER, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_sentencepiece_tokenizer(vocab_size: int = 400):
    """As Llama 2 and Mistral have it: a piece before every string, bytes for what is unknown.

    It begins a text with `<s>`; its template does so itself.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    begin = "\u2581"
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(begin), normalizers.Replace(" ", begin)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(begin, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=[begin, MARKER, *(chr(code) for code in range(33, 127))],
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken("[INST]"), AddedToken("[/INST]")])
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]"
            "{% endfor %}"
        ),
    )


def make_tiny_base(
    folder: Path | str,
    *,
    architecture: str = "qwen2",
    tied: bool = True,
    blocks: int = 3,
    width: int = 32,
    heads: int = 2,
    key_value_heads: int = 1,
    seed: int = 0,
    tokenizer: object = None,
) -> BaseConfig:
    """Write a random model with its tokenizer; return the base configuration that names it.

    `architecture`: a model type of transformers. One that has no key-value heads of its own takes
    `heads`.
    """
    from nla_ray.bench.families import small_sizes, write_random_base

    tokenizer = tokenizer or build_tokenizer()
    write_random_base(
        Path(folder),
        architecture,
        tokenizer,
        vocab_size=len(tokenizer) + _TABLE_ROWS_BEYOND_TOKENIZER,
        tie_word_embeddings=tied,
        seed=seed,
        **small_sizes(architecture, blocks, width, heads, key_value_heads),
    )
    return tiny_config(folder)


def tiny_config(folder: Path | str) -> BaseConfig:
    """The configuration of a tiny base in a folder."""
    return BaseConfig(
        model=str(folder),
        layer=1,
        injection_norm=4.0,
        max_tokens=256,
        dtype="float32",
        device="cpu",
        training_dtype="float32",
    )


def make_quantised_base(folder: Path, quantisation: object, **fields: object) -> BaseConfig:
    """A tiny base whose matrices a package has packed; `quantisation`: in transformers' words."""
    import torch
    from transformers import AutoModelForCausalLM

    base = make_tiny_base(folder / "plain", **fields)
    model = AutoModelForCausalLM.from_pretrained(
        base.model, dtype=torch.float32, quantization_config=quantisation
    )
    model.save_pretrained(folder / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(base.model) / name, folder / "packed" / name)
    return dataclasses.replace(base, model=str(folder / "packed"))


def random_state(state: dict[str, Tensor], scale: float = 0.2, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the shapes of an adapter's: every part of it gets an influence."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * scale for name, value in state.items()
    }


def random_sentences(seed: int, count: int) -> str:
    """`count` made-up words, of which two seeds share few in the same order."""
    draw = random.Random(seed)
    words = [
        f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rk", "lt", "s", "m")
    ]
    return " ".join(draw.choice(words) for _ in range(count))
