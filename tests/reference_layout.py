"""Tiny random checkpoints in the layout of the reference implementation, written to the letter.

d_model 64, 4 blocks, layer 2. Prompts are the test's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import MARKER, build_sentencepiece_tokenizer, build_tokenizer, make_tiny_base

WIDTH, BLOCKS, LAYER = 64, 4, 2
FAMILY_NAMES = ("qwen2", "llama", "gemma3_text")
NORMS = {"qwen2": 4.0, "llama": 2.0, "gemma3_text": 60.0}
"""Injection norms, by family."""
VERBALIZER_PROMPT = "Say what lies behind <concept>{injection_char}</concept>, in {{words}}."
RECONSTRUCTOR_PROMPT = "Text: <text>{explanation}</text> Gist:"


def tokenizer_of(family: str) -> Any:
    """Llama and Gemma begin a text with a token, Qwen does not."""
    return build_tokenizer() if family == "qwen2" else build_sentencepiece_tokenizer()


def write_verbalizer(folder: Path, family: str, **changes: Any) -> Path:
    """A whole model with its manifest. `changes`: of the manifest's sections, or None to drop."""
    _write_model(folder, family, BLOCKS, seed=3)
    tokenizer = tokenizer_of(family)
    content = VERBALIZER_PROMPT.replace("{injection_char}", MARKER)
    content = content.replace("{{", "{").replace("}}", "}")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    at = ids.index(tokenizer.convert_tokens_to_ids(MARKER))
    manifest = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": "av",
        "d_model": WIDTH,
        "extraction_layer_index": LAYER,
        "extraction": {"injection_scale": NORMS[family], "mse_scale": None},
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": ids[at],
            "injection_left_neighbor_id": ids[at - 1],
            "injection_right_neighbor_id": ids[at + 1],
        },
        "prompt_templates": {"av": VERBALIZER_PROMPT},
        "trained_by": {"a key": "that nobody knows"},
    }
    return write_manifest(folder, manifest, changes)


def write_reconstructor(
    folder: Path, family: str, *, bias: bool = False, dummies: bool = True, **changes: Any
) -> Path:
    """The first K + 1 blocks and the head. `dummies`: with the tensors that some tools add."""
    _write_model(folder, family, LAYER + 1, seed=4)
    file = folder / "model.safetensors"
    tensors = {
        name: value for name, value in load_file(file).items() if name != "model.norm.weight"
    }
    tensors.pop("lm_head.weight", None)
    draw = torch.Generator().manual_seed(5)
    if dummies:
        tensors["model.norm.weight"] = torch.randn(WIDTH, generator=draw)
        tensors["lm_head.weight"] = torch.randn(WIDTH, WIDTH, generator=draw)
    save_file(tensors, file, metadata={"format": "pt"})
    head = {"weight": torch.randn(WIDTH, WIDTH, generator=draw) / 8}
    if bias:
        head["bias"] = torch.randn(WIDTH, generator=draw)
    save_file(head, folder / "value_head.safetensors")
    manifest = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": "ar",
        "d_model": WIDTH,
        "critic": {"extraction_layer_index": LAYER},
        "extraction": {"injection_scale": None, "mse_scale": "sqrt_d_model"},
        "tokens": {
            "critic_suffix_ids": tokenizer_of(family).encode(
                RECONSTRUCTOR_PROMPT.partition("{explanation}")[2], add_special_tokens=False
            )[-3:]
        },
        "prompt_templates": {"ar": RECONSTRUCTOR_PROMPT},
    }
    return write_manifest(folder, manifest, changes)


def write_manifest(folder: Path, manifest: dict[str, Any], changes: dict[str, Any]) -> Path:
    """The manifest with other values; a section is changed key by key, None drops a key."""
    for name, value in changes.items():
        if value is None:
            del manifest[name]
        elif isinstance(value, dict):
            manifest[name] = {**manifest.get(name, {}), **value}
        else:
            manifest[name] = value
    (folder / "nla_meta.yaml").write_text(yaml.safe_dump(manifest, allow_unicode=True))
    return folder


def change_json(file: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _write_model(folder: Path, family: str, blocks: int, seed: int) -> None:
    make_tiny_base(
        folder,
        architecture=family,
        tied=family == "gemma3_text",
        blocks=blocks,
        width=WIDTH,
        heads=4,
        key_value_heads=2,
        seed=seed,
        tokenizer=tokenizer_of(family),
    )
