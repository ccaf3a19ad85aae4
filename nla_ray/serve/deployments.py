"""The served classes: verbalizer, scorer, capture, and the HTTP endpoint in front of them.

The first three are plain classes that hold models. `application.py` makes Serve deployments of
them: their methods run in threads, off the event loop. The endpoint holds no model. It checks a
request, calls the three services and answers. Protects the rule that nothing invalid reaches a
model: the endpoint refuses a request before any model runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import nla_ray
from nla_ray.activation import vectors
from nla_ray.activation.stage import load_train_activations, view_mean
from nla_ray.activation.typical import TrainActivations
from nla_ray.activation.views import read_layers, read_prompt, view_activations
from nla_ray.base.adapters import adapter_active
from nla_ray.base.encoding import ChatEncoder
from nla_ray.base.layers import ResidualReader
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.self_check import check_reading
from nla_ray.description.record import Description
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.score.choice import agreement, best_of
from nla_ray.score.claim_confidence import ClaimConfidence, without_unlikely
from nla_ray.score.claims import claim_spans
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.serve import schema
from nla_ray.serve.application import find_claim_confidence
from nla_ray.serve.schema import (
    Activation,
    BaseBody,
    ClaimBody,
    DescribeRequest,
    DescribeResponse,
    DescriptionBody,
    ErrorBody,
    ExplainRequest,
    ExplainResponse,
    Explanation,
    HealthResponse,
    ModelsResponse,
    NearActivation,
    Refusal,
    Sampling,
    ScoreBody,
    ScoreRequest,
    ScoreResponse,
    TypicalityBody,
)
from nla_ray.settings.config import RunConfig, ServeConfig

_PING_SECONDS = 10.0


logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Activations of one text; no positions when the text is refused.

    Example: Captured(num_tokens=12, positions=[11], tokens=["\\n"],
    activations=array of shape [1, d_model], injected=array of shape [1, 1, d_model])
    """

    num_tokens: int
    positions: list[int]
    tokens: list[str]
    activations: np.ndarray
    """[positions, d_model] float32; [0, 0] when the text is refused."""
    injected: np.ndarray
    """What stands for each in a verbalizer's prompt: [positions, vectors, d_model] float32."""


@dataclass(frozen=True, kw_only=True)
class CapturedEnds:
    """The activations at the ends of several prompts.

    Example: CapturedEnds(activations=array of shape [2, d_model], injected=array of shape
    [2, 1, d_model])
    """

    activations: np.ndarray
    injected: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SampleChoice:
    """Which of one activation's samples is the best, and how far all of them agree.

    Example: the third sample is the best, and all agree well.

    >>> SampleChoice(best=2, confidence=0.71)
    SampleChoice(best=2, confidence=0.71)
    """

    best: int
    """Index of the sample, from 0."""
    confidence: float
    """-1 to 1."""


class VerbalizerService:
    """Verbalizers of one run by name: activations in, descriptions out."""

    def __init__(self, config: RunConfig, names: Sequence[str], model: Any = None) -> None:
        """`model`: a loaded base to share, with or without adapters in it; None loads one."""
        torch.set_num_threads(config.compute.threads)
        run = Run(config)
        self._lock, self._verbalizers = threading.Lock(), {}
        self._decoding: dict[str, tuple[int, float]] = {}
        self._confidence: dict[str, tuple[ClaimConfidence, int]] = {}
        self._layer = config.base.layer
        self._train = {
            layer: _train_activations(run, layer) for layer in config.base.described_layers
        }
        self._views, self._mean = config.base.views, view_mean(run)
        model = load_backbone(config.base) if model is None else model
        for name in names:
            manifest = run.require(name)
            # SFT samples nothing while it trains: it is decoded as this configuration's GRPO is.
            settings = manifest.config.get("grpo", vars(config.grpo))
            self._decoding[name] = settings["max_new_tokens"], settings["temperature"]
            with run.local_copy(name, manifest, "adapter") as folder:
                self._verbalizers[name] = Verbalizer.load(
                    config.base, folder, model=model, neighbours=manifest.model["neighbours"]
                )
            if learned := find_claim_confidence(run, name):
                samples = learned.config["claim_confidence"]["samples"]
                with run.local_copy(config.claim_confidence_artifact, learned) as folder:
                    self._confidence[name] = ClaimConfidence.load(folder), samples

    def describe(
        self,
        name: str,
        activations: np.ndarray,
        sampling: Sampling,
        injected: np.ndarray | None = None,
        layer: int | None = None,
    ) -> list[DescriptionBody]:
        """`samples` descriptions of each row of [n, d_model], ordered by (row, sample).

        `injected` [n, vectors, d_model]: what stands for each in the prompt; None: what follows
        from the activation alone. `layer`: which they are of; None: the base's.
        """
        if injected is None:
            rows = torch.from_numpy(activations)
            injected = view_activations(self._views, rows, mean=self._mean).numpy()
        longest, temperature = self._decoding[name]
        if sampling.temperature is not None or sampling.samples == 1:
            temperature = sampling.temperature or 0.0
        least = sampling.min_claim_confidence
        with self._lock:
            written = self._verbalizers[name].describe(
                torch.from_numpy(injected),
                max_new_tokens=sampling.max_new_tokens or longest,
                temperature=temperature,
                seed=sampling.seed,
                group_size=sampling.samples,
                with_claims=least is not None,
                layer=layer,
            )
            likely = (
                []
                if least is None
                else self._by_claim(name, activations, injected, written, sampling)
            )
        places = self._places(activations, self._layer if layer is None else layer)
        bodies = [
            DescriptionBody(
                description=sample.text,
                closed=sample.closed,
                num_tokens=sample.num_sampled,
                typicality=places[number // sampling.samples],
            )
            for number, sample in enumerate(written)
        ]
        if least is None:
            return bodies
        return [
            _without_unlikely(body, row, least) for body, row in zip(bodies, likely, strict=True)
        ]

    def _places(self, activations: np.ndarray, layer: int) -> list[TypicalityBody | None]:
        """Where each row of [n, d_model] lies among train activations; None without those."""
        train = self._train[layer]
        if train is None:
            return [None] * len(activations)
        return [
            TypicalityBody(
                norm_quantile=place.norm_quantile,
                distance_quantile=place.distance_quantile,
                nearest=[
                    NearActivation(activation_id=name, centred_cosine=cosine)
                    for name, cosine in place.nearest
                ],
                nearest_quantile=place.nearest_quantile,
                unlike_training=place.is_unlike,
            )
            for place in train.place(torch.from_numpy(activations))
        ]

    def _by_claim(
        self,
        name: str,
        activations: np.ndarray,
        injected: np.ndarray,
        written: Sequence[Description],
        sampling: Sampling,
    ) -> list[dict[str, float]]:
        """The probability of each claim of greedy descriptions; samples are drawn for it.

        They are drawn as long as those that it was learned with, and of every activation by the
        same seed: what it is depends on no other activation of the request.
        """
        longest, temperature = self._decoding[name]
        confidence, count = self._confidence[name]
        rows = torch.from_numpy(activations)
        drawn = self._verbalizers[name].describe(
            torch.from_numpy(injected),
            max_new_tokens=longest,
            temperature=temperature,
            seed=sampling.seed,
            rows=[0] * len(rows),
            group_size=count,
        )
        texts = [sample.text for sample in drawn]
        return confidence.by_claim(
            rows,
            [description.text for description in written],
            [description.claim_log_probs or {} for description in written],
            [texts[start : start + count] for start in range(0, len(texts), count)],
        )

    async def ping(self) -> str:
        """Answer when the replica can."""
        return "ok"


def _train_activations(run: Run, layer: int) -> TrainActivations | None:
    """What described activations are placed among; None, said in the log, where there is none."""
    if run.find("activations") is None:
        return None
    try:
        return load_train_activations(run, layer=layer)
    except (ValueError, KeyError) as error:
        logger.warning("typicality: not told, because of the train activations: %s", error)
        return None


class ScorerService:
    """Scorers of one run by name; they share one loaded base."""

    def __init__(self, config: RunConfig, names: Sequence[str], model: Any = None) -> None:
        """`model`: a loaded base to share, which gets the scorers' adapters; None loads one."""
        torch.set_num_threads(config.compute.threads)
        run = Run(config)
        self._lock, self._reconstructors = threading.Lock(), {}
        self._batch_size = config.evaluation.batch_size
        for name in names:
            artifact = f"{name}_scorer"
            with run.local_copy(artifact, run.require(artifact)) as folder:
                self._reconstructors[name] = Reconstructor.load(
                    config.base, folder, adapter=name, model=model
                )
            model = self._reconstructors[name].model

    @property
    def model(self) -> Any:
        """The loaded base with the scorers' adapters in it, to be shared."""
        return next(iter(self._reconstructors.values())).model

    def score(
        self, names: Sequence[str], descriptions: Sequence[str], activations: np.ndarray
    ) -> list[dict[str, ScoreBody]]:
        """Scores of n descriptions by scorer name, each against its row of [n, d_model].

        A scorer reconstructs every description once.
        """
        original = torch.from_numpy(activations)
        scores: list[dict[str, ScoreBody]] = [{} for _ in descriptions]
        for name in names:
            reconstruction, mean = self._reconstruct(name, descriptions)
            columns = zip(
                vectors.cosine(reconstruction, original).tolist(),
                vectors.centred_cosine(reconstruction, original, mean).tolist(),
                vectors.squared_error(reconstruction, original).tolist(),
                strict=True,
            )
            for by_scorer, (cosine, centred, error) in zip(scores, columns, strict=True):
                by_scorer[name] = ScoreBody(
                    cosine=cosine, centred_cosine=centred, squared_error=error
                )
        return scores

    def choose(
        self, name: str, descriptions: Sequence[str], activations: np.ndarray
    ) -> list[SampleChoice]:
        """The best sample of each row of [n, d_model].

        `descriptions`: at least two samples a row, ordered by (row, sample).
        """
        reconstruction, mean = self._reconstruct(name, descriptions)
        grouped = reconstruction.unflatten(0, (len(activations), -1))
        best = best_of(grouped, torch.from_numpy(activations), mean).tolist()
        confidences = agreement(grouped, mean).tolist()
        return [
            SampleChoice(best=sample, confidence=confidence)
            for sample, confidence in zip(best, confidences, strict=True)
        ]

    def _reconstruct(
        self, name: str, descriptions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One scorer's reconstructions [n, d_model] and train mean direction [d_model], on CPU."""
        reconstructor = self._reconstructors[name]
        with self._lock:
            return (
                reconstructor.reconstruct(descriptions, self._batch_size),
                reconstructor.mean.cpu(),
            )

    async def ping(self) -> str:
        """Answer when the replica can."""
        return "ok"


class CaptureService:
    """The base's first blocks, without adapters: text in, activations of chosen positions out."""

    def __init__(self, config: RunConfig, model: Any = None) -> None:
        """`model`: a loaded base to share, adapters or not; None loads the blocks it needs."""
        torch.set_num_threads(config.compute.threads)
        self._base, self._lock = config.base, threading.Lock()
        self._tokenizer = load_tokenizer(config.base)
        self._chat = ChatEncoder(self._tokenizer, config.base.model)
        layers = read_layers(config.base)
        blocks = layers[-1] + 1
        self._model = load_backbone(config.base, num_blocks=blocks) if model is None else model
        with adapter_active(self._model, None):
            check_reading(self._model, layers)
        self._reader, self._mean = ResidualReader(self._model, layers), view_mean(Run(config))

    @torch.no_grad()
    def capture(self, text: str, positions: Sequence[int], layer: int | None = None) -> Captured:
        """Activations at positions of the chat-formatted prompt, at a layer (None: the base's).

        No activation when the prompt is too long or a position is outside it.
        """
        encoded = self._chat.encode(text)
        ids = encoded.ids
        chosen = [position + len(ids) if position < 0 else position for position in positions]
        outside = any(not 0 <= position < len(ids) for position in chosen)
        if len(ids) > self._base.max_tokens or outside:
            return Captured(
                num_tokens=len(ids),
                positions=[],
                tokens=[],
                activations=np.zeros((0, 0), np.float32),
                injected=np.zeros((0, 0, 0), np.float32),
            )
        with self._lock, adapter_active(self._model, None):
            activations, injected = read_prompt(
                self._base, self._reader, encoded, chosen, self._mean, layer
            )
        tokens = [self._tokenizer.decode([ids[position]]) for position in chosen]
        return Captured(
            num_tokens=len(ids),
            positions=chosen,
            tokens=tokens,
            activations=activations.numpy(),
            injected=injected.numpy(),
        )

    async def ping(self) -> str:
        """Answer when the replica can."""
        return "ok"


class Endpoint:
    """The HTTP interface: checks a request, calls the services, answers.

    `verbalizer`, `scorer`, `capture`: handles whose methods are called with `.remote(...)`.
    """

    def __init__(
        self,
        settings: ServeConfig,
        models: ModelsResponse,
        verbalizer: Any,
        scorer: Any,
        capture: Any,
    ) -> None:
        self._settings, self._models = settings, models
        self._verbalizer, self._scorer, self._capture = verbalizer, scorer, capture
        self._verbalizers = [model.name for model in models.verbalizers]
        self._scorers = [model.name for model in models.scorers]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica has its handles."""
        return build_api(self)

    @property
    def _base(self) -> BaseBody:
        return self._models.base

    async def describe(self, request: DescribeRequest) -> DescribeResponse:
        """Describe activations, or the activations at the end of texts."""
        name = schema.choose_name("verbalizer", request.verbalizer, self._verbalizers)
        layer = schema.described_layer(request.layer, self._base)
        self._check_sampling(name, request)
        schema.check_inputs(request)
        schema.check_further_layer(request, layer, self._base)
        if request.vectors is not None:
            descriptions = await self._describe_vectors(name, request.vectors, request, layer)
        elif request.activations is not None:
            schema.check_injected("activations", self._base.injected)
            activations = self._array("activations", request.activations)
            descriptions = await self._describe_rows(name, activations, None, request, layer)
        else:
            ends = await self.capture_ends(request.texts or [], layer)
            descriptions = await self._describe_rows(
                name, ends.activations, ends.injected, request, layer
            )
        return DescribeResponse(verbalizer=name, layer=layer, descriptions=descriptions)

    async def capture_ends(self, texts: Sequence[str], layer: int | None = None) -> CapturedEnds:
        """The activations that end the texts' prompts, and what is injected for them.

        `layer`: at which one; None: the served one.
        """
        layer = schema.described_layer(layer, self._base)
        schema.check_batch("texts", len(texts), self._settings.max_batch)
        named = {f"texts[{index}]": text for index, text in enumerate(texts)}
        for what, text in named.items():
            schema.check_text(what, text, self._settings.max_text_chars)
        captured = await asyncio.gather(
            *(self._captured(what, text, [-1], layer) for what, text in named.items())
        )
        return CapturedEnds(
            activations=np.concatenate([capture.activations for capture in captured]),
            injected=np.concatenate([capture.injected for capture in captured]),
        )

    async def _describe_vectors(
        self,
        name: str,
        prompts: Sequence[Sequence[Activation]],
        request: DescribeRequest,
        layer: int,
    ) -> list[DescriptionBody]:
        """Describe what the caller puts into the prompts, vector by vector.

        Prompts of as many vectors are written together.
        """
        schema.check_batch("vectors", len(prompts), self._settings.max_batch)
        schema.check_vectors(prompts, request.max_new_tokens, self._base)
        rows = [self._array(f"vectors[{number}]", prompt) for number, prompt in enumerate(prompts)]
        by_count: dict[int, list[int]] = {}
        for number, prompt in enumerate(rows):
            by_count.setdefault(len(prompt), []).append(number)
        described: dict[int, DescriptionBody] = {}
        for numbers in by_count.values():
            injected = np.stack([rows[number] for number in numbers])
            bodies = await self._describe_rows(name, injected[:, 0], injected, request, layer)
            described |= zip(numbers, bodies, strict=True)
        return [described[number] for number in range(len(rows))]

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Reconstruct each description once and compare it with its activation."""
        names = schema.choose_names("scorers", request.scorers, self._scorers)
        schema.require_served_layer(request.layer, self._base.layer)
        activations = self._array(
            "items", [item.activation for item in request.items], "items[{}].activation"
        )
        for index, item in enumerate(request.items):
            schema.check_description(
                f"items[{index}].description", item.description, self._settings.max_text_chars
            )
        scores = await self._scorer.score.remote(
            names, [item.description for item in request.items], activations
        )
        return ScoreResponse(layer=self._base.layer, scores=scores)

    async def explain(self, request: ExplainRequest) -> ExplainResponse:
        """Capture a text's activations at the chosen positions; describe and score each."""
        name = schema.choose_name("verbalizer", request.verbalizer, self._verbalizers)
        scorers = schema.choose_names("scorers", request.scorers, self._scorers)
        layer = schema.described_layer(request.layer, self._base)
        self._check_sampling(name, request)
        schema.check_further_layer(request, layer, self._base, request.scorers)
        schema.check_text("text", request.text, self._settings.max_text_chars)
        schema.check_batch("positions", len(request.positions), self._settings.max_batch)
        captured = await self._captured("text", request.text, request.positions, layer)
        described = await self._describe_rows(
            name, captured.activations, captured.injected, request, layer
        )
        scores: dict[int, dict[str, ScoreBody]] = {}
        if layer == self._base.layer:
            sure = [row for row, description in enumerate(described) if not description.unsure]
            scored = await self._scorer.score.remote(
                scorers, [described[row].description for row in sure], captured.activations[sure]
            )
            scores = dict(zip(sure, scored, strict=True))
        explanations = [
            Explanation(
                **description.model_dump(),
                position=captured.positions[row],
                token=captured.tokens[row],
                scores=scores.get(row, {}),
            )
            for row, description in enumerate(described)
        ]
        return ExplainResponse(
            verbalizer=name, layer=layer, num_tokens=captured.num_tokens, explanations=explanations
        )

    async def models(self) -> ModelsResponse:
        """What is served."""
        return self._models

    async def health(self) -> JSONResponse:
        """200 when verbalizer, scorer and capture answer within ten seconds; else 503."""
        handles = {"verbalizer": self._verbalizer, "scorer": self._scorer, "capture": self._capture}
        answers = await asyncio.gather(
            *(_ping_answer(handle.ping.remote()) for handle in handles.values())
        )
        deployments = dict(zip(handles, answers, strict=True))
        healthy = all(answer == "ok" for answer in answers)
        body = HealthResponse(status="ok" if healthy else "failing", deployments=deployments)
        return JSONResponse(body.model_dump(), status_code=200 if healthy else 503)

    def _check_sampling(self, verbalizer: str, sampling: Sampling) -> None:
        schema.check_length(sampling.max_new_tokens, self._base.max_new_tokens)
        [served] = [model for model in self._models.verbalizers if model.name == verbalizer]
        schema.check_claim_confidence(sampling, served)
        schema.check_choice(sampling, self._scorers)

    async def _describe_rows(
        self,
        name: str,
        activations: np.ndarray,
        injected: np.ndarray | None,
        request: Sampling,
        layer: int,
    ) -> list[DescriptionBody]:
        """One answer for each row of [n, d_model], as `VerbalizerService.describe` takes it.

        It is the row's only sample, or the best of several by the reward scorer.
        """
        sampling = Sampling.model_validate(request.model_dump(include=set(Sampling.model_fields)))
        written = await self._verbalizer.describe.remote(
            name, activations, sampling, injected, layer
        )
        if sampling.samples == 1:
            return written
        choices = await self._scorer.choose.remote(
            schema.CHOOSER, [sample.description for sample in written], activations
        )
        return [
            _answer(written[row * sampling.samples + choice.best], choice.confidence, sampling)
            for row, choice in enumerate(choices)
        ]

    def _array(
        self, what: str, activations: Sequence[Sequence[float]], item: str | None = None
    ) -> np.ndarray:
        """Checked activations: [n, d_model] float32.

        `item`: the name of an activation in a refusal, with {} for its index.
        """
        schema.check_batch(what, len(activations), self._settings.max_batch)
        item = item or f"{what}[{{}}]"
        for index, activation in enumerate(activations):
            schema.check_activation(item.format(index), activation, self._base.d_model)
        return np.asarray(activations, dtype=np.float32)

    async def _captured(self, what: str, text: str, positions: list[int], layer: int) -> Captured:
        captured = await self._capture.capture.remote(text, positions, layer)
        if captured.num_tokens > self._base.max_tokens:
            raise Refusal(
                what,
                f"{captured.num_tokens} tokens with the chat template",
                f"at most {self._base.max_tokens} tokens",
            )
        if not captured.positions:
            raise Refusal(
                "positions",
                positions,
                f"-{captured.num_tokens} to {captured.num_tokens - 1}, the prompt's tokens",
            )
        return captured


def _answer(best: DescriptionBody, confidence: float, sampling: Sampling) -> DescriptionBody:
    """The best sample, withheld where the samples agree less than was asked for."""
    unsure = sampling.min_confidence is not None and confidence < sampling.min_confidence
    return best.model_copy(
        update={
            "description": None if unsure else best.description,
            "unsure": unsure,
            "confidence": confidence,
            "samples": sampling.samples,
        }
    )


def _without_unlikely(
    body: DescriptionBody, likely: Mapping[str, float], least: float
) -> DescriptionBody:
    """The description without claims that are less likely than this, and all of them named."""
    description = without_unlikely(body.description or "", likely, least)
    kept = claim_spans(description)
    claims = [
        ClaimBody(claim=claim, confidence=confidence, kept=claim in kept)
        for claim, confidence in likely.items()
    ]
    return body.model_copy(update={"description": description, "claims": claims})


async def _ping_answer(answer: Awaitable[str]) -> str:
    """The deployment's answer, or the error in its stead: health reports and never raises."""
    try:
        return await asyncio.wait_for(_awaited(answer), _PING_SECONDS)
    except Exception as error:
        return schema.shorten(f"{type(error).__name__}: {error}")


async def _awaited(answer: Awaitable[str]) -> str:
    """A coroutine, which `asyncio.wait_for` asks for, of Serve's awaitable response."""
    return await answer


def build_api(endpoint: Endpoint) -> FastAPI:
    """Routes, OpenAPI page and the form of refusals."""
    api = FastAPI(
        title="nla_ray",
        version=nla_ray.__version__,
        description="Descriptions of a language model's activations, and scores of them.",
    )
    refused: dict[int | str, dict[str, Any]] = {
        422: {"model": ErrorBody, "description": "Refused: what, got, expected."}
    }
    for path, answer, body in (
        ("/v1/describe", endpoint.describe, DescribeResponse),
        ("/v1/score", endpoint.score, ScoreResponse),
        ("/v1/explain", endpoint.explain, ExplainResponse),
    ):
        api.add_api_route(path, answer, methods=["POST"], response_model=body, responses=refused)
    api.add_api_route("/v1/models", endpoint.models, methods=["GET"], response_model=ModelsResponse)
    api.add_api_route(
        "/healthz",
        endpoint.health,
        methods=["GET"],
        response_model=HealthResponse,
        responses={503: {"model": HealthResponse}},
    )
    api.add_exception_handler(Refusal, _answer_refusal)
    api.add_exception_handler(RequestValidationError, _answer_validation)
    return api


async def _answer_refusal(request: Request, refusal: Refusal) -> JSONResponse:
    return _refused(refusal)


async def _answer_validation(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first error in the body's form, answered as every refusal is."""
    return _refused(refusal_of(error.errors()))


def refusal_of(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """The first of pydantic's errors as a refusal."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    missing = first["type"] == "missing"
    return Refusal(field, "nothing" if missing else first.get("input"), first["msg"])


def _refused(refusal: Refusal) -> JSONResponse:
    body = ErrorBody(what=refusal.what, got=refusal.got, expected=refusal.expected)
    return JSONResponse(body.model_dump(), status_code=422)
