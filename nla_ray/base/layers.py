"""What "layer K" means when a model is run: the output of block K, never the final norm's.

Knows the parts of a decoder by the table of families; knows nothing of files, adapters or prompts.
Protects the rule that nothing above the wanted blocks is run.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nla_ray.base.families import blocks_of, causal_model, check_layer, decoder_of, family_of

if TYPE_CHECKING:
    from transformers import Cache


def keep_blocks(config: Any, kept: range) -> Any:
    """A copy of a transformers configuration that has these of its blocks only."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in kept])
    return config


class ResidualReader:
    """Runs blocks 0..max(layers) of a model; returns the residual stream after each wanted block.

    It shares the model's weights (and whatever adapter is active in them) and runs nothing above
    the highest wanted block. This is the one definition of layer K: the output of block K. It is
    transformers' `hidden_states[K + 1]`, but for the last block: there transformers has put the
    final norm on it, and it is taken before that norm here.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        """`model`: a causal model, wrapped by adapters or not.

        Raises ValueError for a layer that it lacks, and for a model of an unsupported family.
        """
        num_blocks = len(blocks_of(model))
        for layer in layers:
            check_layer(layer, num_blocks)
        self.layers = tuple(sorted(set(layers)))
        self._decoder, self._blocks = _first_blocks(model, self.layers[-1] + 1)
        self.device = next(decoder_of(model).parameters()).device
        """Where ids are read."""

    def read(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """[batch, seq] ids -> {layer: [batch, seq, d_model]}.

        Rows are padded on the RIGHT, with any id: attention is causal, so no padding mask is needed
        for the real tokens, and the output at padding means nothing. Rows of several sequences
        (`score.packing.pack`) come with their positions and with the mask that is added to
        attention's weights, [batch, 1, seq, seq].
        """
        outputs: dict[int, Tensor] = {}
        hooks = [
            self._blocks[layer].register_forward_hook(partial(keep_output, outputs, layer))
            for layer in self.layers[:-1]
        ]
        try:
            outputs[self.layers[-1]] = self._decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=False,
            ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


class ResidualWriter:
    """What a model says next when its residual stream after block K is another vector.

    The text before the position is read once, by all blocks; the vectors that stand for the stream
    at the position then go side by side through the blocks above K, each seeing that text and
    itself. It shares the model's weights and whatever adapter is active in them.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        """`model`: a whole causal model. Raises ValueError for a layer that it lacks."""
        check_layer(layer, len(blocks_of(model)))
        causal, family = causal_model(model), family_of(model)
        self._decoder, self._head = decoder_of(model), causal.get_submodule(family.head)
        self._config = causal.config
        self._block = blocks_of(model)[layer]
        self._upper = _with_blocks(model, range(layer + 1, len(blocks_of(model))))
        if family.positions is not None:  # they are in the stream already
            self._upper.set_submodule(family.positions, _Nothing(), strict=True)

    def read(self, input_ids: Tensor) -> tuple[Tensor, Cache]:
        """Ids [seq] -> the stream after block K at the last position, and what stands before it.

        The stream is [d_model]; the second are keys and values of all positions but the last.
        """
        outputs: dict[int, Tensor] = {}
        hook = self._block.register_forward_hook(partial(keep_output, outputs, 0))
        try:
            cache = self._decoder(input_ids=input_ids[None], use_cache=True).past_key_values
        finally:
            hook.remove()
        cache.crop(-1)
        return outputs[0][0, -1], cache

    def next_logits(self, vectors: Tensor, before: Cache) -> Tensor:
        """[n, d_model] in place of the stream -> logits of the next token [n, vocab], float32.

        `before`: from `read`; it is used up.
        """
        position, count, like = before.get_seq_length(), len(vectors), self._head.weight
        itself = torch.eye(count, dtype=torch.bool)
        seen = torch.cat([torch.ones(count, position, dtype=torch.bool), itself], dim=1)
        lowest = torch.finfo(like.dtype).min
        hidden = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, lowest)
        stream = self._upper(
            inputs_embeds=vectors[None].to(like),
            position_ids=torch.full((1, count), position, device=like.device),
            attention_mask=hidden[None, None].to(like.device),
            past_key_values=before,
            use_cache=True,
        ).last_hidden_state
        return cap_logits(self._config, self._head(stream[0]).float())


class _Nothing(nn.Module):
    """In place of an embedding whose vectors are not to be added: [...] ids -> 0."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros((), device=ids.device)


def cap_logits(config: Any, logits: Tensor) -> Tensor:
    """Logits as a base gives them: some keep them below a cap, smoothly."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def keep_output(
    outputs: dict[int, Tensor], layer: int, block: nn.Module, inputs: Any, output: Any
) -> None:
    """A block's forward hook: put its stream into `outputs`."""
    outputs[layer] = output[0] if isinstance(output, tuple) else output


def _first_blocks(model: nn.Module, num_blocks: int) -> tuple[nn.Module, nn.ModuleList]:
    """A decoder of the first blocks, without final norm, and its blocks.

    It shares every weight with the model's decoder, which keeps its other blocks and its norm.
    """
    view, family = _with_blocks(model, range(num_blocks)), family_of(model)
    # Strict: a norm of another name would stay in, and the stream would be a normed one.
    view.set_submodule(family.final_norm, nn.Identity(), strict=True)
    return view, view.get_submodule(family.blocks)


def _with_blocks(model: nn.Module, kept: range) -> Any:
    """The model's decoder with these of its blocks alone; the model keeps its own."""
    decoder, blocks = decoder_of(model), blocks_of(model)
    view = copy.copy(decoder)
    view._modules = dict(decoder._modules)  # copy.copy shares the registry
    chosen = nn.ModuleList([blocks[layer] for layer in kept])
    view.set_submodule(family_of(model).blocks, chosen, strict=True)
    # Hooks that DeepSpeed has put on the decoder know only that decoder.
    for name in [name for name in vars(view) if name.endswith("_hooks")]:
        setattr(view, name, OrderedDict())
    view.config = keep_blocks(decoder.config, kept)
    return view
