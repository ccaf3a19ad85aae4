"""What "layer K" means when a model is run: the output of block K, never the final norm's.

Protects the rule that nothing above the wanted blocks is run.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def check_layer(layer: int, num_layers: int) -> None:
    """Raise ValueError unless block `layer` exists in a model of `num_layers` blocks."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"base.layer: got {layer}, expected 0 to {num_layers - 1}: the model has {num_layers}"
            " blocks and layer K is the output of block K. Set --base.layer."
        )


def keep_blocks(config, num_blocks: int):
    """A copy of a model configuration that has the first `num_blocks` blocks only."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    return config


# layer K ------------------------------------------------------------------------------------------


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers causal model inside a model that may be wrapped by adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ResidualReader:
    """Runs blocks 0..max(layers) of a model and returns the residual stream after each wanted
    block.

    It shares the model's weights (and whatever adapter is active in them) and runs nothing above
    the highest wanted block. This is the one definition of layer K: the output of block K = Hugging
    Face `hidden_states[K + 1]`, before the final norm when K is the last block.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        decoder = causal_model(model).model
        for layer in layers:
            check_layer(layer, len(decoder.layers))
        self.layers = tuple(sorted(set(layers)))
        self._decoder = _first_blocks(decoder, self.layers[-1] + 1)

    def read(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """[batch, seq] ids -> {layer: [batch, seq, d_model]}.

        Rows are padded on the RIGHT, with any id: attention is causal, so no padding mask is needed
        for the real tokens, and the output at padding means nothing. Rows of several sequences
        (`models.prefix.pack`) come with their positions and with the mask that is added to
        attention's weights, [batch, 1, seq, seq].
        """
        outputs: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [
            self._decoder.layers[layer].register_forward_hook(keep(layer))
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


def _first_blocks(decoder: nn.Module, num_blocks: int) -> nn.Module:
    """A decoder of the first blocks, without final norm, that shares every weight with
    `decoder`."""
    view = copy.copy(decoder)
    # copy.copy shares the registry, and the original must keep its blocks and norm
    view._modules = dict(decoder._modules)
    view.layers = nn.ModuleList(list(decoder.layers)[:num_blocks])
    view.norm = nn.Identity()
    # DeepSpeed's, put on the decoder, know only it
    for name in [name for name in vars(view) if name.endswith("_hooks")]:
        setattr(view, name, OrderedDict())
    view.config = keep_blocks(decoder.config, num_blocks)
    return view
