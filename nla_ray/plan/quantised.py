"""What the weights of a quantised base take, from its config.json: packed matrices and scales.

torchao and bitsandbytes pack the matrices of blocks; embedding, norms, biases, experts and, unless
a configuration says otherwise, the output head stay as they are. It knows no stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from nla_ray.base.families import quantiser_of

_BLOCK = 64
"""Weights of bitsandbytes that share a scale in 4 bits. Source: `quantize_4bit` of bitsandbytes."""
_SCALE_BLOCK = 256
"""Scales that share a scale of their own where they are quantised too (`double quant`)."""
_CODE_BYTES, _SCALE_CODE_BYTES = 16 * 4, 256 * 4 + 4
"""Tables that bitsandbytes keeps beside every matrix: values of 4 bits; of scales, with a mean."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the matrices of a base are packed.

    Example, nf4 with quantised scales: Quantisation(bits=4, group=64, scale_bytes=1,
    scales_are_quantised=True, code_bytes=1_092, skipped=None, item_bytes=2); a matrix of 4096 x
    4096 takes 8,388,608 + 262,144 + 4,096 + 1,092 = 8,655,940 bytes.
    """

    bits: int
    """Of a packed weight."""
    group: int | None
    """Weights that share a scale; None: those of a row."""
    scale_bytes: float
    """Of a scale with its zero point."""
    scales_are_quantised: bool = False
    """Whether 256 scales share a float32 scale of their own."""
    code_bytes: int = 0
    """Of tables beside every matrix."""
    skipped: tuple[str, ...] | None = None
    """Names of modules that are not packed, as transformers reads them; None: the output head."""
    item_bytes: int | None = None
    """Of a weight that is not packed, where the files decide it; None: as `base.dtype` says."""

    def matrix_bytes(self, rows: int, columns: int) -> float:
        """Of a packed matrix [rows, columns] with its scales."""
        scales = rows if self.group is None else ceil(rows * columns / self.group)
        of_scales = 4 * ceil(scales / _SCALE_BLOCK) if self.scales_are_quantised else 0
        packed = rows * columns * self.bits / 8
        return packed + scales * self.scale_bytes + of_scales + self.code_bytes

    def packs(self, name: str, *, is_head: bool = False) -> bool:
        """Whether a linear layer of the causal model is packed.

        Source: `should_convert_module` of transformers, which compares from a name's start up to a
        dot, as a pattern, and at a name's end.
        """
        if self.skipped is None:
            return not is_head
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return not any(
            re.match(f"(?:{skipped}){boundary}", name) or name.endswith(skipped)
            for skipped in self.skipped
        )


def quantisation_of(config: Any) -> Quantisation | None:
    """How a base's weights are packed; None: they are plain numbers.

    `config`: transformers' own or that of `known_config`. Raises ValueError for a method that no
    job takes.
    """
    method = quantiser_of(config)
    if method is None:
        return None
    given = config.quantization_config
    settings = given if isinstance(given, dict) else given.to_dict()
    return _of_torchao(settings) if method == "torchao" else _of_bitsandbytes(settings, config)


def _of_bitsandbytes(settings: Mapping[str, Any], config: Any) -> Quantisation:
    """Of what is not packed transformers leaves the type that it has in the files."""
    dtype = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None))
    common: dict[str, Any] = {
        "skipped": _names(settings.get("llm_int8_skip_modules")),
        "item_bytes": _ITEM_BYTES.get(dtype.removeprefix("torch.")),
    }
    if not settings.get("load_in_4bit"):
        return Quantisation(bits=8, group=None, scale_bytes=4, **common)
    nested = bool(settings.get("bnb_4bit_use_double_quant"))
    return Quantisation(
        bits=4,
        group=_BLOCK,
        scale_bytes=1 if nested else 4,
        scales_are_quantised=nested,
        code_bytes=_CODE_BYTES + (_SCALE_CODE_BYTES if nested else 0),
        **common,
    )


def _of_torchao(settings: Mapping[str, Any]) -> Quantisation:
    """By the name and the data of its configuration class.

    Numbers of 4 bits are packed by two where the name says 4; `Intx` keeps each in a byte. A scale
    is float32 and its zero point a byte; in 4 bits both are bfloat16. A class that is not known
    counts as 8 bits with a scale a row.
    """
    kind = settings["quant_type"]["default"]
    data = kind.get("_data", {})
    bits = 4 if re.search(r"int4weight", kind["_type"].lower()) else 8
    granularity = data.get("granularity") or {}
    granularity = granularity[-1] if isinstance(granularity, list) else granularity
    group = granularity.get("_data", {}).get("group_size") or data.get("group_size")
    if group is None and bits == 4:
        group = 128  # torchao's own
    return Quantisation(
        bits=bits,
        group=group,
        scale_bytes=4 if bits == 4 else 5,
        skipped=_names(settings.get("modules_to_not_convert")),
    )


def _names(listed: list[str] | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(listed)
