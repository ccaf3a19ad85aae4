"""The verbalizer as it is trained: a base with an adapter and a forward of its own.

One class is what TRL's trainers get, in supervised training and in GRPO. Knows no loss and no
trainer. Protects the rule that a GPU runs the libraries' own forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nla_ray.activation.injection import attach_activations
from nla_ray.base.adapters import AdaptedModel, LoraConfig, add_lora, load_adapter
from nla_ray.base.families import causal_model, decoder_of
from nla_ray.base.layers import cap_logits
from nla_ray.base.load import computes_in_bf16, load_backbone
from nla_ray.base.prompts import InjectionPrompt
from nla_ray.cpu import door
from nla_ray.cpu.log_probs import score_labels
from nla_ray.cpu.shared_prefix import decode_sharing_prefix
from nla_ray.settings.config import BaseConfig, LoraSettings
from nla_ray.training.attention import training_attention

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput


class TrainableVerbalizer(AdaptedModel):
    """A base with a trainable adapter, fed with virtual tokens of activations.

    It is a PeftModel, by which TRL knows that it has a reference adapter to make, PEFT what to save
    and DeepSpeed what is trained; `forward` alone is not the library's. (TRL still puts its own
    answer for `fused_lm_head=True` on the base inside, where `forward` calls it on a GPU only.)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str = "default",
        *,
        prefix_ids: tuple[int, ...] = (),
        in_bf16: bool = False,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> None:
        """`model`, `config` and `adapter_name` as PEFT takes them.

        `prefix_ids` begin every prompt. `in_bf16`: matrix products run in bfloat16; weights and
        gradients stay as they are. `temperature`: of the log-probs.
        """
        super().__init__(model, config, adapter_name)
        self.prefix_ids, self.in_bf16 = prefix_ids, in_bf16
        self.temperature, self.with_entropy = temperature, with_entropy
        self.scores_labels = door.is_for_device(model.device)
        """Whether log-probs are computed by `cpu`, or as TRL does."""

    @classmethod
    def build(
        cls,
        base: BaseConfig,
        lora: LoraSettings,
        bank: Tensor,
        prompt: InjectionPrompt,
        *,
        seed: int,
        norms: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> TrainableVerbalizer:
        """A new one for supervised training.

        `bank`: what virtual tokens name, activations [rows, d_model], or [rows, vectors, d_model]
        where several vectors stand for one. `norms` [rows]: the injection norm of each, where they
        are of several layers. `model`: the base, loaded.
        """
        wrap = partial(cls, prefix_ids=prompt.prefix_ids, in_bf16=computes_in_bf16(base))
        injected = _injected_backbone(base, bank, model, norms)
        return add_lora(injected, lora, seed=seed, wrap=wrap)

    @classmethod
    def load(
        cls,
        base: BaseConfig,
        folder: Path | str,
        bank: Tensor,
        prompt: InjectionPrompt,
        *,
        temperature: float,
        model: nn.Module | None = None,
    ) -> TrainableVerbalizer:
        """One that goes on from a saved adapter, as GRPO's policy.

        Its log-probs, at `temperature`, come with their entropy. `model`: the base, loaded.
        """
        wrap = partial(
            cls,
            prefix_ids=prompt.prefix_ids,
            in_bf16=computes_in_bf16(base),
            temperature=temperature,
            with_entropy=True,
        )
        injected = _injected_backbone(base, bank, model)
        return load_adapter(injected, folder, trainable=True, wrap=wrap)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        fused_lm_head: bool = False,
        **arguments: Any,
    ) -> ModelOutput:
        """ids [batch, seq] -> logits [batch, seq, vocab], or with `fused_lm_head` log-probs.

        Those are of the labels, [batch, seq - 1]. `arguments` are the library's; log-probs on a CPU
        take none.
        """
        with self._precision():
            if not (fused_lm_head and self.scores_labels and door.is_for_device(self.device)):
                return super().forward(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    labels=labels,
                    **({"fused_lm_head": True} if fused_lm_head else {}),
                    **arguments,
                )
            if arguments:
                raise TypeError(
                    f"log-probs on a CPU: got the arguments {sorted(arguments)}, expected none."
                )
            stream = decode_sharing_prefix(
                decoder_of(self), self.prefix_ids, input_ids, attention_mask
            )
            return score_labels(
                stream,
                self.get_output_embeddings(),
                labels,
                temperature=self.temperature,
                finish=partial(cap_logits, causal_model(self).config),
                with_entropy=self.with_entropy,
            )

    def _precision(self) -> AbstractContextManager:
        """Inside the forward, because DeepSpeed turns an autocast around it off.

        And not by the trainer's `bf16`, with which DeepSpeed would hold the adapter itself in
        bfloat16.
        """
        if not self.in_bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _injected_backbone(
    base: BaseConfig, bank: Tensor, model: nn.Module | None, norms: Tensor | None = None
) -> nn.Module:
    model = model or load_backbone(base, attention=training_attention(base))
    attach_activations(model, bank.flatten(0, -2), base.injection_norm if norms is None else norms)
    return model
