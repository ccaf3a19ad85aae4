"""A reconstructor: description -> activation, by a LoRA adapter on the base and a linear head.

r = mu + W h, in the space of directions n(v): h is the residual stream of layer K at the marker
that ends the prompt, with its norm made sqrt(d_model); mu the train mean direction, which alone has
cosine 0.95-0.99 with every activation, so that only the deviation has to be learned. Source: the
public recipe (adapter, marker, layer); head [d, d] without bias as in the reference implementation.
Knows nothing of losses or of Ray.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nla_ray.activation import vectors
from nla_ray.base import prompts
from nla_ray.base.adapters import adapter_active, add_lora, load_adapter, save_adapter
from nla_ray.base.encoding import encode_texts
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import computes_in_bf16, load_backbone, load_tokenizer
from nla_ray.base.prompts import marker_token
from nla_ray.score.packing import PackedRow, pack, share_beginnings
from nla_ray.settings.config import BaseConfig, LoraSettings

ADAPTER_NAME = "adapter"
HEAD_NAME = "head.safetensors"
_SETTINGS = "reconstructor"
"""Key of the head file's metadata."""


class DescriptionReader(nn.Module, ABC):
    """What every reconstructor does: a description's prompt, blocks 0..K, a linear head.

    Abstract: `Reconstructor` is this package's, `score/reference.py` has another. Each says what
    the prompt is (`encode`) and what the head reads (`_reconstruct`).
    """

    mean: Tensor
    """The mean direction that scores are centred by: [d_model] float32, a buffer."""

    def __init__(
        self,
        model,
        tokenizer,
        *,
        adapter: str | None,
        layer: int,
        mean: Tensor,
        max_tokens: int,
        in_bf16: bool = False,
        has_bias: bool = False,
    ) -> None:
        """`adapter`: None where the model is the reader's own, whole.

        `in_bf16`: the blocks' matrix products run in bfloat16, in training as in reading. The head
        stays in float32. Raises ValueError for a mean of another width than the base's.
        """
        super().__init__()
        d_model = causal_width(model)
        if mean.shape != (d_model,):
            raise ValueError(
                f"mean direction: got shape {tuple(mean.shape)}, expected ({d_model},), the base's"
                " width. It belongs to another base; capture activations again."
            )
        device = next(model.parameters()).device
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.layer, self.max_tokens, self.in_bf16 = layer, max_tokens, in_bf16
        self.head = nn.Linear(d_model, d_model, bias=has_bias, device=device, dtype=torch.float32)
        # So that training starts from the mean, not from noise around it.
        nn.init.zeros_(self.head.weight)
        self.register_buffer("mean", mean.detach().to(device, torch.float32, copy=True))
        self._reader = ResidualReader(model, [layer])

    @abstractmethod
    def encode(self, descriptions: Sequence[str]) -> list[list[int]]:
        """The prompts as ids; the reconstruction is read at the last one."""

    @abstractmethod
    def _reconstruct(
        self, last_stream: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch d_model"]:
        """The stream at the prompts' ends -> reconstructions."""

    def _ids_if_too_long(self, description: str) -> list[int] | None:
        """Of a description of more than `max_tokens` tokens; None of any other."""
        # No tokenizer makes more tokens than bytes.
        if len(description.encode()) <= self.max_tokens:
            return None
        [ids] = encode_texts(self.tokenizer, [description])
        return ids if len(ids) > self.max_tokens else None

    def _cut(self, description: str) -> str:
        ids = self._ids_if_too_long(description)
        if ids is None:
            return description
        return self.tokenizer.decode(ids[: self.max_tokens], skip_special_tokens=True).rstrip(
            "\ufffd"
        )

    def collate(self, encoded: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids and attention mask, both [batch, seq], on the CPU."""
        longest = max(len(ids) for ids in encoded)
        input_ids = torch.full((len(encoded), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(len(encoded), longest, dtype=torch.long)
        for row, ids in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def activation_checkpointing_enable(self, **arguments) -> None:
        """What a trainer calls to save memory: the base's blocks compute activations twice."""
        self.model.activation_checkpointing_enable(**arguments)

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch d_model"]:
        """Right-padded prompts -> reconstructions in float32, under the adapter that is active.

        The mask says where each prompt ends; attention needs none, being causal. Both may lie on
        another device.
        """
        stream = self._read(input_ids.to(self.head.weight.device))
        last = attention_mask.sum(-1).to(stream.device) - 1
        return self._reconstruct(stream[torch.arange(len(stream), device=stream.device), last])

    def _read(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        # Inside the forward, because DeepSpeed turns an autocast around it off.
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.in_bf16):
            return self._reader.read(input_ids, position_ids, attention_mask)[self.layer]

    @torch.no_grad()
    def reconstruct(self, descriptions: Sequence[str], batch_size: int = 64) -> Tensor:
        """Reconstructions [n, d_model] in the order given, float32 on CPU.

        This reconstructor's adapter is made active. Batches hold `batch_size` rows of like length.
        A description that occurs twice is read once, and so is what it shares with the beginning
        of another one.
        """
        unique = list(dict.fromkeys(descriptions))
        encoded = self.encode(unique)
        rows = sorted(share_beginnings(encoded), key=lambda row: row.length)
        result = torch.empty(len(unique), self.mean.shape[0])
        was_training = self.training
        self.eval()
        try:
            with adapter_active(self.model, self.adapter):
                for start in range(0, len(rows), batch_size):
                    numbers, read = self._read_rows(encoded, rows[start : start + batch_size])
                    result[numbers] = read.cpu()
        finally:
            self.train(was_training)
        index_of = {text: index for index, text in enumerate(unique)}
        return result[[index_of[text] for text in descriptions]]

    def _read_rows(
        self, encoded: Sequence[Sequence[int]], rows: Sequence[PackedRow]
    ) -> tuple[list[int], Tensor]:
        """Numbers of the sequences in these rows, and their reconstructions [n, d_model]."""
        if not any(row.ends for row in rows):  # causal attention as it is: the fast kernel
            numbers = [row.whole for row in rows]
            return numbers, self(*self.collate([encoded[number] for number in numbers]))
        batch, last = pack(encoded, rows, self.tokenizer.pad_token_id, self.model.dtype)
        stream = self._read(
            **{name: part.to(self.head.weight.device) for name, part in batch.items()}
        )
        return list(last), self._reconstruct(stream[tuple(torch.tensor(list(last.values())).T)])


class Reconstructor(DescriptionReader):
    """Reads descriptions; writes reconstructions near unit norm, to be compared by direction."""

    adapter: str

    def __init__(
        self,
        model,
        tokenizer,
        *,
        adapter: str,
        layer: int,
        marker: str,
        mean: Tensor,
        max_tokens: int,
        in_bf16: bool = False,
    ) -> None:
        """As `DescriptionReader` takes them; `marker` ends the prompt."""
        super().__init__(
            model,
            tokenizer,
            adapter=adapter,
            layer=layer,
            mean=mean,
            max_tokens=max_tokens,
            in_bf16=in_bf16,
        )
        self.marker, self.marker_id = marker, marker_token(tokenizer, marker)

    @classmethod
    def build(
        cls,
        base: BaseConfig,
        lora: LoraSettings,
        mean: Tensor,
        *,
        max_tokens: int = 96,
        seed: int = 0,
        adapter: str = "default",
        attention: str | None = None,
    ) -> Reconstructor:
        """A new one for training: only the adapter and the head have gradients.

        `mean`: train mean direction [d_model]. `attention`: as `load_backbone` takes it.
        """
        model = load_backbone(base, num_blocks=base.layer + 1, attention=attention)
        model = add_lora(model, lora, adapter, num_blocks=base.layer + 1, seed=seed)
        return cls(
            model,
            load_tokenizer(base),
            adapter=adapter,
            layer=base.layer,
            marker=base.marker,
            mean=mean,
            max_tokens=max_tokens,
            in_bf16=computes_in_bf16(base),
        )

    @classmethod
    def load(
        cls,
        base: BaseConfig,
        folder: Path | str,
        *,
        adapter: str = "default",
        model=None,
        trainable: bool = False,
    ) -> Reconstructor:
        """A saved one: frozen, or with gradients of the adapter and the head alone.

        `model`: a loaded base to share, for example another reconstructor's `.model`. It gets the
        weights as a further adapter, so `adapter` must be a new name in it. Raises ValueError for a
        folder of another layer.
        """
        weight, mean, layer, max_tokens = read_head(Path(folder) / HEAD_NAME)
        if layer != base.layer:
            raise ValueError(
                f"reconstructor {str(folder)!r}: got layer {layer}, expected base.layer"
                f" {base.layer}. Use the configuration that its manifest records."
            )
        model = load_backbone(base, num_blocks=base.layer + 1) if model is None else model
        model = load_adapter(model, Path(folder) / ADAPTER_NAME, adapter, trainable=trainable)
        loaded = cls(
            model,
            load_tokenizer(base),
            adapter=adapter,
            layer=layer,
            marker=base.marker,
            mean=mean,
            max_tokens=max_tokens,
            in_bf16=computes_in_bf16(base),
        )
        loaded.head.weight.data.copy_(weight)
        return loaded if trainable else loaded.eval().requires_grad_(False)

    def save(self, folder: Path | str) -> None:
        """Write adapter/ and head.safetensors (`weight` [d, d], `mean` [d])."""
        save_adapter(self.model, Path(folder) / ADAPTER_NAME, self.adapter)
        tensors = {"weight": self.head.weight, "mean": self.mean}
        # One entry: the library writes several in an order that changes from process to process.
        settings = json.dumps({"layer": self.layer, "max_tokens": self.max_tokens})
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            Path(folder) / HEAD_NAME,
            metadata={_SETTINGS: settings},
        )

    def encode(self, descriptions: Sequence[str]) -> list[list[int]]:
        """The prompts as ids, each ending in the marker.

        A description of more than `max_tokens` tokens is cut at its end.
        """
        texts = [prompts.unmarked(self._cut(text), self.marker) for text in descriptions]
        before, after = prompts.around_description(self.marker)
        encoded = encode_texts(
            self.tokenizer, texts, before=before, after=after, add_special_tokens=True
        )
        for ids, text in zip(encoded, texts, strict=True):
            if ids[-1] != self.marker_id or ids.count(self.marker_id) != 1:
                raise ValueError(
                    f"reconstructor prompt: got {ids.count(self.marker_id)} markers and last id"
                    f" {ids[-1]} for {text[-40:]!r}, expected one, at the end (id"
                    f" {self.marker_id}). The tokenizer appends tokens; choose another base."
                )
        return encoded

    def unread(self, description: str) -> str | None:
        """What keeps a description from being read as it is; None: nothing.

        It is longer than `max_tokens`, or the marker stands in it, which is left out.
        """
        if self.marker in description:
            return f"the character {self.marker!r}"
        ids = self._ids_if_too_long(description)
        return None if ids is None else f"{len(ids)} tokens"

    def _reconstruct(
        self, marker_stream: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch d_model"]:
        """The stream at markers -> reconstructions."""
        scaled = vectors.rescale(marker_stream, self.mean.shape[0] ** 0.5)
        with torch.autocast(marker_stream.device.type, enabled=False):
            return self.mean + self.head(scaled)


def causal_width(model) -> int:
    """d_model of a causal model, wrapped by adapters or not."""
    return model.config.hidden_size


def read_head(file: Path) -> tuple[Tensor, Tensor, int, int]:
    """Weight, mean, layer, max_tokens. Raises ValueError when the file is missing or not finite."""
    if not file.is_file():
        raise ValueError(
            f"reconstructor: got no {file}, expected the head that training has saved. Train it"
            " again."
        )
    with safe_open(file, framework="pt") as tensors:
        weight, mean, metadata = (
            tensors.get_tensor("weight"),
            tensors.get_tensor("mean"),
            tensors.metadata(),
        )
    if not (weight.isfinite().all() and mean.isfinite().all()):
        raise ValueError(
            f"{file}: got non-finite values, expected finite ones. The training run diverged; train"
            " it again."
        )
    settings = json.loads(metadata[_SETTINGS])
    return weight, mean, settings["layer"], settings["max_tokens"]
