"""What is behind the routes: checks a request, lets it in or refuses it, calls the three services.

It holds no model, and starts in a second. Protects the rules that nothing invalid reaches a model,
that no more waits than the settings allow, and that whoever leaves takes the work along.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_ray.serve import schema
from nla_ray.serve.schema import (
    Activation,
    BaseBody,
    DescribeRequest,
    DescribeResponse,
    DescriptionBody,
    ExplainRequest,
    ExplainResponse,
    Explanation,
    HealthResponse,
    ModelBody,
    ModelsResponse,
    ReadyResponse,
    Refusal,
    Sampling,
    ScoreRequest,
    ScoreResponse,
)
from nla_ray.settings.config import ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from nla_ray.serve.deployments import Captured, SampleChoice, Scored

_PING_SECONDS = 10.0
_LOADING_SECONDS = 1.0
"""How long a request waits to learn whether the models are loaded, where that is not known."""
_RETRY_SECONDS = 1
"""When what was refused for too much waiting may be asked again: requests take about as long."""
_RETRY_LOADING_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class CapturedEnds:
    """The activations at the ends of several prompts.

    Example: CapturedEnds(activations=array of shape [2, d_model], injected=array of shape
    [2, 1, d_model])
    """

    activations: np.ndarray
    injected: np.ndarray


class Endpoint:
    """The HTTP interface: checks a request, calls the services, answers.

    `verbalizer`, `scorer`, `capture`: handles whose methods are called with `.remote(...)`, which
    returns what can be awaited and cancelled.
    """

    def __init__(
        self,
        settings: ServeConfig,
        models: ModelsResponse,
        verbalizer: Any,
        scorer: Any,
        capture: Any,
        *,
        is_loaded: bool = False,
    ) -> None:
        """`is_loaded`: that the services answer is known, and not asked."""
        self.settings, self._models, self._is_loaded = settings, models, is_loaded
        self._verbalizer, self._scorer, self._capture = verbalizer, scorer, capture
        self._verbalizers = [model.name for model in models.verbalizers]
        self._scorers = [model.name for model in models.scorers]
        self._waiting = 0
        """Activations that are worked on or wait, each as often as it is sampled."""
        self._loading: asyncio.Task[dict[str, str]] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the replica has its handles."""
        from nla_ray.serve.routes import build_api

        return build_api(self)

    @property
    def _base(self) -> BaseBody:
        return self._models.base

    # requests -------------------------------------------------------------------------------------

    async def describe(self, request: DescribeRequest) -> DescribeResponse:
        """Describe activations, or the activations at the end of texts."""
        name = schema.choose_name("verbalizer", request.verbalizer, self._verbalizers)
        layer = schema.described_layer(request.layer, self._base)
        schema.check_inputs(request)
        schema.check_further_layer(request, layer, self._base)
        asked = request.activations or request.vectors or request.texts or []
        self._check_sampling(name, request, len(asked))
        async with self.let_in(len(asked) * request.samples):
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
        schema.check_batch("texts", len(texts), self.settings.max_batch)
        for index, text in enumerate(texts):
            schema.check_text(f"texts[{index}]", text, self.settings.max_text_chars)
        captured = await self._captured("texts[{}]", texts, [-1], layer)
        return CapturedEnds(
            activations=np.concatenate([capture.activations for capture in captured]),
            injected=np.concatenate([capture.injected for capture in captured]),
        )

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Reconstruct each description once and compare it with its activation."""
        names = schema.choose_names("scorers", request.scorers, self._scorers)
        schema.require_served_layer(request.layer, self._base.layer)
        activations = self._array(
            "items", [item.activation for item in request.items], "items[{}].activation"
        )
        for index, item in enumerate(request.items):
            schema.check_description(
                f"items[{index}].description", item.description, self.settings.max_text_chars
            )
        descriptions = [item.description for item in request.items]
        async with self.let_in(len(descriptions)):
            scored = await self._scores(names, descriptions, activations, whole=True)
        for index, unread in scored.unread.items():
            read = ", ".join(
                f"{model.max_tokens} tokens ({model.name})"
                for model in self._models.scorers
                if model.name in names
            )
            raise Refusal(
                f"items[{index}].description",
                unread,
                f"what the scorers read: at most {read}, without the character that is their"
                " marker. Shorten it",
            )
        return ScoreResponse(layer=self._base.layer, scores=scored.scores)

    async def explain(self, request: ExplainRequest) -> ExplainResponse:
        """Capture a text's activations at the chosen positions; describe and score each."""
        name = schema.choose_name("verbalizer", request.verbalizer, self._verbalizers)
        scorers = schema.choose_names("scorers", request.scorers, self._scorers)
        layer = schema.described_layer(request.layer, self._base)
        schema.check_further_layer(request, layer, self._base, request.scorers)
        schema.check_batch("positions", len(request.positions), self.settings.max_batch)
        self._check_sampling(name, request, len(request.positions))
        schema.check_text("text", request.text, self.settings.max_text_chars)
        async with self.let_in(len(request.positions) * request.samples):
            [captured] = await self._captured("text", [request.text], request.positions, layer)
            described = await self._describe_rows(
                name, captured.activations, captured.injected, request, layer
            )
            scores: Mapping[int, Any] = {}
            if layer == self._base.layer:
                scores = await self._scores_of_sure(scorers, described, captured.activations)
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

    async def health(self) -> HealthResponse:
        """200 while the endpoint answers, whether or not models work or are loaded."""
        return HealthResponse(status="ok", waiting=self._waiting)

    async def ready(self) -> ReadyResponse:
        """Whether verbalizer, scorer and capture answer within ten seconds."""
        answers = await self._pings(_PING_SECONDS)
        self._is_loaded = is_ready = all(answer == "ok" for answer in answers.values())
        return ReadyResponse(status="ok" if is_ready else "failing", deployments=answers)

    # who is let in --------------------------------------------------------------------------------

    def require_room(self, count: int) -> None:
        """Refuse what would make more wait than the settings allow; one request always may."""
        if self._waiting and self._waiting + count > self.settings.max_waiting:
            raise Refusal(
                "endpoint",
                f"{count} activations, samples counted, while {self._waiting} wait",
                f"at most {self.settings.max_waiting}. Ask again in {_RETRY_SECONDS} s",
                status=429,
                retry_seconds=_RETRY_SECONDS,
            )

    @asynccontextmanager
    async def let_in(self, count: int) -> AsyncIterator[None]:
        """Count a request's activations among those that wait, for as long as it is worked on."""
        self.require_room(count)
        self._waiting += count
        try:
            await self._require_loaded()
            yield
        finally:
            self._waiting -= count

    async def _require_loaded(self) -> None:
        """Refuse everything until all deployments have answered once."""
        if self._is_loaded:
            return
        if self._loading is None:
            self._loading = asyncio.create_task(self._pings(None))
        done, _ = await asyncio.wait([self._loading], timeout=_LOADING_SECONDS)
        if done:
            answers, self._loading = self._loading.result(), None
            self._is_loaded = all(answer == "ok" for answer in answers.values())
        if not self._is_loaded:
            raise Refusal(
                "endpoint",
                "models that are being loaded",
                f"all of them. /readyz says when. Ask again in {_RETRY_LOADING_SECONDS} s",
                status=503,
                retry_seconds=_RETRY_LOADING_SECONDS,
            )

    async def _pings(self, seconds: float | None) -> dict[str, str]:
        """The answer of every deployment, or the error in its stead."""
        handles = {"verbalizer": self._verbalizer, "scorer": self._scorer, "capture": self._capture}
        answers = await asyncio.gather(
            *(_ping_answer(handle.ping.remote(), seconds) for handle in handles.values())
        )
        return dict(zip(handles, answers, strict=True))

    # parts of requests ----------------------------------------------------------------------------

    def _check_sampling(self, verbalizer: str, sampling: Sampling, count: int) -> None:
        """`count`: activations that are described."""
        schema.check_length(sampling.max_new_tokens, self._base.max_new_tokens)
        schema.check_temperature(sampling.temperature)
        served = self._served(verbalizer)
        schema.check_claim_confidence(sampling, served)
        schema.check_choice(sampling, self._scorers)
        schema.check_request_tokens(
            count, self.settings.max_request_tokens, sampling, served.max_new_tokens or 0
        )

    def _served(self, verbalizer: str) -> ModelBody:
        [served] = [model for model in self._models.verbalizers if model.name == verbalizer]
        return served

    async def _describe_vectors(
        self,
        name: str,
        prompts: Sequence[Sequence[Activation]],
        request: DescribeRequest,
        layer: int,
    ) -> list[DescriptionBody]:
        """Describe what the caller puts into the prompts, vector by vector.

        Prompts of as many vectors are one call; the engine writes all calls side by side.
        """
        schema.check_batch("vectors", len(prompts), self.settings.max_batch)
        schema.check_vectors(prompts, request.max_new_tokens, self._base)
        rows = [self._array(f"vectors[{number}]", prompt) for number, prompt in enumerate(prompts)]
        by_count: dict[int, list[int]] = {}
        for number, prompt in enumerate(rows):
            by_count.setdefault(len(prompt), []).append(number)
        stacked = [np.stack([rows[number] for number in part]) for part in by_count.values()]
        answers = await asyncio.gather(
            *(self._describe_rows(name, part[:, 0], part, request, layer) for part in stacked)
        )
        described: dict[int, DescriptionBody] = {}
        for numbers, bodies in zip(by_count.values(), answers, strict=True):
            described |= zip(numbers, bodies, strict=True)
        return [described[number] for number in range(len(rows))]

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
        written = await _called(
            self._verbalizer.describe.remote(name, activations, sampling, injected, layer)
        )
        if sampling.samples == 1:
            return written
        choices = await _called(
            self._scorer.choose.remote(
                schema.CHOOSER, [sample.description for sample in written], activations
            )
        )
        return [
            _chosen(written[row * sampling.samples + choice.best], choice, sampling)
            for row, choice in enumerate(choices)
        ]

    async def _scores(
        self,
        names: Sequence[str],
        descriptions: Sequence[str],
        activations: np.ndarray,
        *,
        whole: bool = False,
    ) -> Scored:
        return await _called(
            self._scorer.score.remote(names, descriptions, activations, whole=whole)
        )

    async def _scores_of_sure(
        self, names: Sequence[str], described: Sequence[DescriptionBody], activations: np.ndarray
    ) -> Mapping[int, Any]:
        """Scores by row of the descriptions that are not withheld."""
        sure = [
            (row, body.description)
            for row, body in enumerate(described)
            if body.description is not None
        ]
        if not sure:
            return {}
        rows, texts = [row for row, _ in sure], [text for _, text in sure]
        scored = await self._scores(names, texts, activations[rows])
        return dict(zip(rows, scored.scores, strict=True))

    def _array(
        self, what: str, activations: Sequence[Sequence[float]], item: str | None = None
    ) -> np.ndarray:
        """Checked activations: [n, d_model] float32.

        `item`: the name of an activation in a refusal, with {} for its index.
        """
        schema.check_batch(what, len(activations), self.settings.max_batch)
        item = item or f"{what}[{{}}]"
        for index, activation in enumerate(activations):
            schema.check_activation(item.format(index), activation, self._base.d_model)
        return np.asarray(activations, dtype=np.float32)

    async def _captured(
        self, item: str, texts: Sequence[str], positions: Sequence[int], layer: int
    ) -> list[Captured]:
        """`item`: the name of a text in a refusal, with {} for its index where there are more."""
        found = await _called(self._capture.capture.remote(texts, positions, layer))
        for index, captured in enumerate(found):
            if captured.num_tokens > self._base.max_tokens:
                raise Refusal(
                    item.format(index),
                    f"{captured.num_tokens} tokens with the chat template",
                    f"at most {self._base.max_tokens} tokens",
                )
            if not captured.positions:
                raise Refusal(
                    "positions",
                    positions,
                    f"-{captured.num_tokens} to {captured.num_tokens - 1}, the prompt's tokens",
                )
        return found


def _chosen(best: DescriptionBody, choice: SampleChoice, sampling: Sampling) -> DescriptionBody:
    """The best sample, withheld where the samples agree less than was asked for."""
    unsure = sampling.min_confidence is not None and choice.confidence < sampling.min_confidence
    return best.model_copy(
        update={
            "description": None if unsure else best.description,
            "unsure": unsure,
            "confidence": choice.confidence,
            "unread": choice.unread,
            "samples": sampling.samples,
        }
    )


async def _called(response: Any) -> Any:
    """A service's answer; whoever stops waiting for it stops the work as well."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _ping_answer(answer: Awaitable[str], seconds: float | None) -> str:
    """The deployment's answer, or the error in its stead: health reports and never raises."""
    try:
        return await asyncio.wait_for(_called(answer), seconds)
    except Exception as error:
        return schema.shorten(f"{type(error).__name__}: {error}")
