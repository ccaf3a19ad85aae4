"""What a base is, as manifests record it; and whether an artifact was made with it.

Knows the base's files and the fields of a manifest. Protects the rule that nothing made with one
base is ever read with another.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from nla_ray.base.families import check_context, check_layer
from nla_ray.base.load import load_model_config, load_tokenizer
from nla_ray.base.prompts import chat_prompt, fixed_date, injection_prompt
from nla_ray.base.sources import base_folder, origin_of, tokenizer_digest, weights_digest
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.run.stages import artifacts_of_kind
from nla_ray.settings.config import BaseConfig

_BEFORE = {"injected": list(BaseConfig().injected), "further_layers": [], "further_norms": []}
"""What manifests that do not record it were made with."""

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """Identity and shape of a base, as manifests record it.

    Example: name="embedded:nano", model_type="qwen2", d_model=256, num_layers=6, vocab_size=4096,
    layer=4, injection_norm=50.0, injected=("activation",), further_layers=(), further_norms=(),
    marker_id=4095, neighbours=(223, 2), origin=None, template="chat", date=None,
    transformers="5.23.0", and three digests.
    """

    name: str
    digest: str
    """Hash of configuration and weights (hub models: of id and commit)."""
    tokenizer_digest: str
    model_type: str
    d_model: int
    num_layers: int
    vocab_size: int
    """Rows of the embedding table, which may exceed the tokenizer's length; virtual ids start
    here."""
    layer: int
    injection_norm: float
    injected: tuple[str, ...]
    """Vectors that stand for an activation in the verbalizer's prompt: `base.injected`."""
    further_layers: tuple[int, ...]
    """Layers beside `layer` that the verbalizer describes: `base.further_layers`."""
    further_norms: tuple[float, ...]
    """Their injection norms; none: that of `layer`."""
    marker: str
    marker_id: int
    neighbours: tuple[int, int]
    """Ids left and right of the marker in the verbalizer's prompt."""
    origin: str | None
    """The file that a converted model was made from, with its digest."""
    template: str
    """`base.template`: `chat` is the tokenizer's own."""
    date: str | None
    """What its chat template prints as today's date; None: it prints none."""
    prompt_digest: str
    """Hash of the chat prompt of an empty text, as the template renders it."""
    transformers: str
    """Version of the library that computes it."""

    @property
    def reading_digest(self) -> str:
        """Of all that decides what an activation of a text is, but the layer.

        The prompt is the tokenizer's alone where no date stands in it and the template is its own.
        """
        digest = f"{self.digest}/{self.tokenizer_digest}"
        return f"{digest}/{self.prompt_digest}" if self.date or self.template != "chat" else digest

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }


def base_info(base: BaseConfig, tokenizer: Any = None) -> BaseInfo:
    """Identity and shape of a base, from its configuration and tokenizer; no weights are loaded.

    Raises ValueError for a base without a row in the table of families, before anything is made
    from it, for prompts that it does not see whole, and for a layer or a marker that it lacks.
    """
    config = load_model_config(base)
    check_layer(base.layer, config.num_hidden_layers)
    for layer in base.further_layers:
        check_layer(layer, config.num_hidden_layers, "base.further-layers")
    check_context(config, base.max_tokens)
    folder = base_folder(base.model, weights=False)
    tokenizer = tokenizer or load_tokenizer(base)
    prompt = injection_prompt(tokenizer, base)
    return BaseInfo(
        name=base.model,
        digest=weights_digest(folder),
        tokenizer_digest=tokenizer_digest(folder),
        model_type=config.model_type,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        layer=base.layer,
        injection_norm=base.injection_norm,
        injected=base.injected,
        further_layers=base.further_layers,
        further_norms=base.further_norms,
        marker=base.marker,
        marker_id=prompt.marker_id,
        neighbours=prompt.neighbours,
        origin=origin_of(folder),
        template=base.template,
        date=fixed_date(tokenizer.chat_template),
        transformers=version("transformers"),
        prompt_digest=hashlib.sha256(chat_prompt(tokenizer, "").encode()).hexdigest()[:16],
    )


def check_base(manifest: Manifest, info: BaseInfo) -> None:
    """Raise ValueError when an artifact was made with another base than this one.

    Weights, tokenizer, layer and the date in the prompt must be the same. An adapter is also bound
    to the marker and the injection norm that it learned with, a verbalizer to what is injected and
    to its layers; activations know of none of these, and answers of no layer either.
    Manifests of earlier versions record no prompt: the tokenizer decides it unless it has a date.
    Another version of transformers is said, not refused: what is read and generated is checked by
    itself (`self_check`).
    """
    compared = {"weights": "digest", "tokenizer": "tokenizer_digest"}
    if manifest.name != "answers":
        compared |= {"layer": "layer"}
    if info.date or "prompt_digest" in manifest.model:
        compared |= {"date in the chat prompt": "date", "chat prompt": "prompt_digest"}
    if manifest.name not in ("activations", "answers"):
        compared |= {"marker": "marker", "injection norm": "injection_norm"}
    if any(manifest.name.startswith(name) for name in artifacts_of_kind("verbalizer")):
        compared |= {"injected vectors": "injected"}
        compared |= {"further layers": "further_layers", "norms of these": "further_norms"}
    recorded = manifest.model.get("transformers", info.transformers)
    if recorded != info.transformers:
        logger.info(
            "artifact %r was made with transformers %s; here is %s",
            manifest.name,
            recorded,
            info.transformers,
        )
    made_with, given = {**_BEFORE, **manifest.model}, info.to_dict()
    for what, name in compared.items():
        recorded, actual = made_with.get(name), given[name]
        if recorded != actual:
            raise ValueError(
                f"artifact {manifest.name!r}: got {what} {actual} of {info.name}, expected"
                f" {recorded} of {manifest.model.get('name')}, with which it was made. Give"
                " the same --base fields as then, or make the artifact again."
            )
