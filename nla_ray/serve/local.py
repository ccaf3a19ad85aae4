"""A finished run in one process: describe, score and explain from Python, without HTTP or Ray.

The checks, the choice among samples and the answers are the endpoint's own: its `Endpoint` is
called with services that live here and share one loaded base. Knows no job and starts nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ValidationError

from nla_ray.activation.directions import read_directions
from nla_ray.base.load import load_backbone
from nla_ray.run.artifact import Run
from nla_ray.run.stages import STAGES
from nla_ray.serve.application import SERVED_VERBALIZERS, find_models
from nla_ray.serve.deployments import CaptureService, ScorerService, VerbalizerService, make_batches
from nla_ray.serve.endpoint import Endpoint
from nla_ray.serve.routes import refusal_of
from nla_ray.serve.schema import (
    DescribeRequest,
    DescriptionBody,
    ExplainRequest,
    ExplainResponse,
    ModelsResponse,
    Refusal,
    ScoreBody,
    ScoreRequest,
)
from nla_ray.settings.config import ComputeConfig, RunConfig, ServeConfig, from_dict
from nla_ray.settings.presets import PRESETS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_NO_LIMIT = 10**9
"""Of texts in one call, of characters in a text and of tokens: limits protect a server."""


def run_config(run_dir: str) -> RunConfig:
    """The configuration that the artifacts of a run were made with, read from their manifests.

    Sections that no artifact records are those of the preset with the same base, else of the first.
    Raises ValueError for a run without a verbalizer.
    """
    presets = [make() for make in PRESETS.values()]
    run = Run(dataclasses.replace(presets[0], run_dir=run_dir))
    found = [manifest for name in SERVED_VERBALIZERS if (manifest := run.find(name))]
    if not found:
        raise ValueError(
            f"run {run_dir}: got no verbalizer ({', '.join(SERVED_VERBALIZERS)}) in it, expected a"
            f" finished run. Make it with: python jobs/pipeline.py --run-dir {run_dir}"
        )
    base = found[0].config["base"]
    preset = next((config for config in presets if config.base.model == base["model"]), presets[0])
    types = {
        field.name: type(getattr(run.config, field.name)) for field in dataclasses.fields(RunConfig)
    }
    sections: dict[str, Any] = {}
    for stage in STAGES:
        if manifest := run.find(stage.name):
            recorded = {name: manifest.config[name] for name in stage.sections if name in types}
            sections |= {name: from_dict(types[name], value) for name, value in recorded.items()}
    compute = ComputeConfig(threads=torch.get_num_threads())
    serve = ServeConfig(
        max_batch=_NO_LIMIT,
        max_text_chars=_NO_LIMIT,
        max_request_tokens=_NO_LIMIT,
        window_seconds=0.0,
    )
    return dataclasses.replace(preset, run_dir=run_dir, compute=compute, serve=serve, **sections)


class LoadedRun:
    """Verbalizers and scorers of one run, over one loaded base.

    Example::

        loaded = nla_ray.load("runs/nano")
        [answer] = loaded.describe(["def add(a, b): return a + b"])
        answer.description                                # "- Python code: ..."
        [answer] = loaded.explain("def add(a, b): return a + b").explanations
        answer.scores["judge"].centred_cosine
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.models = find_models(Run(config))
        """What there is: the base, `verbalizers` and `scorers` by name, as /v1/models tells it."""
        self._thread = ThreadPoolExecutor(max_workers=1)

    def describe(
        self,
        inputs: Sequence[str] | Sequence[Tensor] | Tensor | np.ndarray,
        *,
        verbalizer: str | None = None,
        layer: int | None = None,
        **sampling: Any,
    ) -> list[DescriptionBody]:
        """Descriptions of texts (of the activation that ends each one's prompt) or of activations.

        `inputs`: texts, raw activations [n, d_model] or a list of them, or [n, vectors, d_model]
        for several vectors in each prompt. `layer`: which one they are of, or are read at; None:
        the base's, others where the verbalizer has learned several. `sampling`: fields of
        `schema.Sampling` (temperature, max_new_tokens, seed, samples, min_confidence,
        min_claim_confidence); greedy without any. Raises ValueError for what the endpoint refuses.
        """
        _require_list("inputs", inputs)
        is_texts = len(inputs) > 0 and isinstance(inputs[0], str)
        named = {"texts": list(inputs)} if is_texts else _vectors(inputs)
        request = _request(DescribeRequest, **named, verbalizer=verbalizer, layer=layer, **sampling)
        return self._answer(self._endpoint.describe(request)).descriptions

    def activations(self, texts: Sequence[str], *, layer: int | None = None) -> Tensor:
        """The activation that ends each text's prompt: [n, d_model] float32, raw.

        `layer`: at which of those that are described; None: the base's. For differences, means and
        whatever else `describe` is to be asked about. Raises ValueError for what the endpoint
        refuses.
        """
        _require_list("texts", texts)
        ends = self._answer(self._endpoint.capture_ends(texts, layer))
        return torch.from_numpy(ends.activations)

    def directions(self, path: str | Path, *, tensor: str | None = None) -> dict[str, Tensor]:
        """The vectors of a file of another tool, by name: each [d_model] float32.

        Rows of an SAE's decoder, steering vectors: .safetensors, .npy, .npz or PyTorch. `tensor`:
        of this one alone. Raises ValueError for a file without vectors of this width.
        """
        return read_directions(path, self.models.base.d_model, tensor=tensor)

    def score(
        self,
        descriptions: Sequence[str],
        activations: Tensor | np.ndarray,
        *,
        scorers: Sequence[str] | None = None,
    ) -> list[dict[str, ScoreBody]]:
        """Scores of each description against its row of [n, d_model], by scorer."""
        _require_list("descriptions", descriptions)
        rows = _rows(activations)
        if len(rows) != len(descriptions):
            raise Refusal(
                "activations", f"{len(rows)} rows", f"{len(descriptions)}, one for each description"
            )
        pairs = zip(descriptions, rows, strict=True)
        items = [{"description": text, "activation": row} for text, row in pairs]
        request = _request(ScoreRequest, items=items, scorers=scorers)
        return self._answer(self._endpoint.score(request)).scores

    def explain(
        self,
        text: str,
        positions: Sequence[int] = (-1,),
        *,
        verbalizer: str | None = None,
        scorers: Sequence[str] | None = None,
        layer: int | None = None,
        **sampling: Any,
    ) -> ExplainResponse:
        """Descriptions of a text's activations at `positions` of its chat-formatted prompt, scored.

        Negative positions count from the prompt's end. `layer`, `sampling` as in `describe`: at
        another layer than the base's nothing is scored.
        """
        request = _request(
            ExplainRequest,
            text=text,
            positions=list(positions),
            verbalizer=verbalizer,
            scorers=scorers,
            layer=layer,
            **sampling,
        )
        return self._answer(self._endpoint.explain(request))

    @cached_property
    def _endpoint(self) -> Endpoint:
        """Models are loaded when it is first asked."""
        return local_endpoint(self.config, self.models)

    def _answer(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the endpoint's coroutine in a thread of its own: a notebook's loop runs already."""
        return self._thread.submit(asyncio.run, coroutine).result()


def local_endpoint(config: RunConfig, models: ModelsResponse) -> Endpoint:
    """The endpoint of a run over services of this process, which share one loaded base."""
    scorers = [scorer.name for scorer in models.scorers]
    verbalizers = [verbalizer.name for verbalizer in models.verbalizers]
    # One thread for all that runs the base's blocks: adapters in them are switched.
    batches = make_batches(config)
    with warnings.catch_warnings():
        # peft asks transformers for things by their old names.
        warnings.simplefilter("ignore", FutureWarning)
        base = load_backbone(config.base)
        scoring = ScorerService(config, scorers, base, batches)
        services = (
            VerbalizerService(config, verbalizers, scoring.model),
            scoring,
            CaptureService(config, scoring.model, batches),
        )
    return Endpoint(config.serve, models, *map(_Handle, services), is_loaded=True)


class _Handle:
    """A service of this process, called as a deployment's handle is."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._service, method))


class _Method:
    def __init__(self, function: Any) -> None:
        self._function = function

    def remote(self, *arguments: Any, **named: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self._function(*arguments, **named))


def _require_list(what: str, values: Any) -> None:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise Refusal(what, values, "a list: put a single one into a list")


def _rows(activations: Tensor | np.ndarray) -> list[list[float]]:
    rows = torch.as_tensor(activations, dtype=torch.float32)
    if rows.ndim != 2:
        raise Refusal("activations", f"shape {list(rows.shape)}", "[n, d_model]: one row for each")
    return rows.tolist()


def _vectors(inputs: Sequence[Tensor] | Tensor | np.ndarray) -> dict[str, list]:
    """The field of a request that holds them."""
    if isinstance(inputs, list | tuple) and isinstance(inputs[0], torch.Tensor):
        inputs = torch.stack(list(inputs))
    rows = torch.as_tensor(inputs, dtype=torch.float32)
    return {"vectors": rows.tolist()} if rows.ndim == 3 else {"activations": _rows(rows)}


def _request(kind: type[BaseModel], **fields: Any) -> Any:
    """A request of the endpoint; what its form refuses is a Refusal, as over HTTP."""
    try:
        return kind(**fields)
    except ValidationError as error:
        raise refusal_of(error.errors()) from None
