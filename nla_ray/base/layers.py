"""What "layer K" means when a model is run: the output of block K, never the final norm's.

Knows the parts of a decoder by the table of families; knows nothing of files, adapters or prompts.
Protects the rule that nothing above the wanted blocks is run.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from nla_ray.base.families import blocks_of, decoder_of, family_of


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ValueError unless block `layer` exists in a model of `num_layers` blocks."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"base.layer: got {layer}, expected 0 to {num_layers - 1}: the model has {num_layers}"
            " blocks and layer K is the output of block K. Set --base.layer."
        )


def keep_blocks(config: Any, num_blocks: int) -> Any:
    """A copy of a transformers configuration that has the first `num_blocks` blocks only."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    return config


class ResidualReader:
    """Runs blocks 0..max(layers) of a model; returns the residual stream after each wanted block.

    It shares the model's weights (and whatever adapter is active in them) and runs nothing above
    the highest wanted block. This is the one definition of layer K: the output of block K = Hugging
    Face `hidden_states[K + 1]`, before the final norm when K is the last block.
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
            self._blocks[layer].register_forward_hook(partial(_keep_output, outputs, layer))
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


def _keep_output(
    outputs: dict[int, Tensor], layer: int, block: nn.Module, inputs: Any, output: Any
) -> None:
    """A block's forward hook: put its stream into `outputs`."""
    outputs[layer] = output[0] if isinstance(output, tuple) else output


def _first_blocks(model: nn.Module, num_blocks: int) -> tuple[nn.Module, nn.ModuleList]:
    """A decoder of the first blocks, without final norm, and its blocks.

    It shares every weight with the model's decoder, which keeps its other blocks and its norm.
    """
    family, decoder = family_of(model), decoder_of(model)
    blocks = nn.ModuleList(list(blocks_of(model))[:num_blocks])
    view = copy.copy(decoder)
    view._modules = dict(decoder._modules)  # copy.copy shares the registry
    view.set_submodule(family.blocks, blocks)
    view.set_submodule(family.final_norm, nn.Identity())
    # Hooks that DeepSpeed has put on the decoder know only that decoder.
    for name in [name for name in vars(view) if name.endswith("_hooks")]:
        setattr(view, name, OrderedDict())
    view.config = keep_blocks(decoder.config, num_blocks)
    return view, blocks
