"""The verbalizer's adapter as peft reads it, with a card whose lines inject an activation.

Protects the rule that the lines on the card run as they are printed, and say what the verbalizer
says: they bring the prompt, the marker and the norm that it was trained with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nla_ray.base.identity import BaseInfo
from nla_ray.base.prompts import CLOSING_TAG, verbalizer_prompt
from nla_ray.base.sources import has_own_name
from nla_ray.settings.config import BaseConfig, require

CARD_NAME = "README.md"
EXAMPLE_NAME = "example.safetensors"

_SNIPPET = """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
{base_import}
base = {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, ".").eval()  # the folder of this card
activation = load_file("{example}")["activation"]  # [{d_model}], as it is in the stream
prompt = {prompt}
ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
vector = activation * ({norm!r} / activation.square().sum().sqrt())  # TO this norm
embedded = model.get_input_embeddings()(ids).detach().clone()
embedded[ids == {marker_id}] = vector.to(embedded)
options = {{"do_sample": False, "max_new_tokens": {max_new_tokens}}}
written = model.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(ids), **options)
print(tokenizer.decode(written[0], skip_special_tokens=True).partition("{closing}")[0].strip())
"""

_CARD = """\
---
library_name: peft
tags:
- natural-language-autoencoder
- activation-verbalizer
---

# A verbalizer of {base_name}, layer {layer}

A LoRA adapter that turns one residual-stream vector of {base_name} into a short description in
words. The vector is the output of decoder block {layer}, counted from 0: `hidden_states[{next}]` in
transformers. It stands in a prompt for the token of a marker, rescaled TO the norm {norm:g}.

A description is a guess. It says what the verbalizer reads in the vector, and may name what is
nowhere in the text: measure it on texts of your own before you believe it.

## How to inject

```python
{snippet}```

Of the activation in `{example}` it says:

```text
{said}
```

| | |
|---|---|
| base | {base_name} ({model_type}, d_model {d_model}, {num_layers} blocks), digest {digest} |
| layer | {layer}, the output of that block, before any final norm |
| norm | {norm:g} |
| marker | {marker!r}, id {marker_id}, between ids {left} and {right} |
| longest description | {max_new_tokens} tokens; it ends in `{closing}` |
"""


def export_adapter(
    base: BaseConfig,
    info: BaseInfo,
    tokenizer: Any,
    adapter: Path,
    folder: Path,
    *,
    activation: Tensor,
    said: str,
    max_new_tokens: int,
) -> None:
    """Write the adapter's files, the card, and the example that its lines describe.

    `activation` [d_model], raw, and what the verbalizer says of it. Raises ValueError for a base
    whose prompt takes several vectors.
    """
    require(
        base.injected == ("activation",),
        "base.injected",
        base.injected,
        "the activation alone",
        "The lines on the card inject one vector.",
    )
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    save_file({"activation": activation.contiguous()}, folder / EXAMPLE_NAME)
    left, right = info.neighbours
    layer_told = base.layer if base.further_layers else None
    facts = {
        "example": EXAMPLE_NAME,
        "closing": CLOSING_TAG,
        "norm": base.injection_norm,
        "max_new_tokens": max_new_tokens,
        "marker_id": info.marker_id,
        "d_model": info.d_model,
    }
    is_found_here = has_own_name(base.model)
    snippet = _SNIPPET.format(
        base_import="from nla_ray.base.sources import base_folder\n" if is_found_here else "",
        base=f"base_folder({base.model!r})" if is_found_here else repr(base.model),
        dtype=base.dtype,
        prompt=repr(verbalizer_prompt(tokenizer, base.marker, layer_told)),
        **facts,
    )
    card = _CARD.format(
        snippet=snippet,
        said=said,
        base_name=base.model,
        model_type=info.model_type,
        num_layers=info.num_layers,
        digest=info.digest,
        layer=base.layer,
        next=base.layer + 1,
        marker=base.marker,
        left=left,
        right=right,
        **facts,
    )
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
