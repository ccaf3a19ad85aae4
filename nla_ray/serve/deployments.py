"""The served classes that hold models: verbalizer, scorer and capture.

Plain classes, of which `application.py` makes Serve deployments. Their methods are coroutines: the
models run in threads (`together.py`) that do the work of all waiting requests side by side, and a
call that is cancelled is left out from the next step or batch on. What they are given was checked
by the endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nla_ray.activation import vectors
from nla_ray.activation.positions import plan_batches
from nla_ray.activation.stage import load_train_activations, view_mean
from nla_ray.activation.typical import TrainActivations
from nla_ray.activation.views import read_layers, read_together, view_activations
from nla_ray.base.adapters import adapter_active
from nla_ray.base.encoding import ChatEncoder, EncodedChat
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
from nla_ray.serve.application import decoding_of, find_claim_confidence
from nla_ray.serve.schema import (
    ClaimBody,
    DescriptionBody,
    NearActivation,
    Sampling,
    ScoreBody,
    TypicalityBody,
)
from nla_ray.serve.together import BatchingThread, DescribingThread
from nla_ray.settings.config import RunConfig

_PROMPT_TOKENS = 16
"""Of a scorer's prompt, around the description; a few more or less change a batch's size alone."""
_BYTES_OF_TOKEN = 3
"""Of a text that is not encoded yet, about: it decides how many texts are taken together."""

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
class SampleChoice:
    """Which of one activation's samples is the best, and how far all of them agree.

    Example: the third sample is the best, and all agree well.

    >>> SampleChoice(best=2, confidence=0.71)
    SampleChoice(best=2, confidence=0.71, unread=None)
    """

    best: int
    """Index of the sample, from 0."""
    confidence: float
    """-1 to 1."""
    unread: str | None = None
    """What kept the scorer from reading the best sample as it is."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of descriptions by scorer name, in their order.

    Example: Scored(scores=[], unread={3: "120 tokens"}): the scorers do not read the fourth
    description as it is, which was asked for, and read none.
    """

    scores: list[dict[str, ScoreBody]]
    unread: dict[int, str]
    """What kept each description from being read as it is; of those that were refused for it."""


class VerbalizerService:
    """Verbalizers of one run by name: activations in, descriptions out."""

    def __init__(self, config: RunConfig, names: Sequence[str], model: Any = None) -> None:
        """`model`: a loaded base to share, with or without adapters in it; None loads one."""
        torch.set_num_threads(config.compute.threads)
        run = Run(config)
        self._thread, self._verbalizers = DescribingThread(), dict[str, Verbalizer]()
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
            self._decoding[name] = decoding_of(config, manifest)
            with run.local_copy(name, manifest, "adapter") as folder:
                self._verbalizers[name] = Verbalizer.load(
                    config.base, folder, model=model, neighbours=manifest.model["neighbours"]
                )
            if learned := find_claim_confidence(run, name):
                samples = learned.config["claim_confidence"]["samples"]
                with run.local_copy(config.claim_confidence_artifact, learned) as folder:
                    self._confidence[name] = ClaimConfidence.load(folder), samples

    async def describe(
        self,
        name: str,
        activations: np.ndarray,
        sampling: Sampling,
        injected: np.ndarray | None = None,
        layer: int | None = None,
    ) -> list[DescriptionBody]:
        """`samples` descriptions of each row of [n, d_model], ordered by (row, sample).

        `injected` [n, vectors, d_model]: what stands for each in the prompt; None: what follows
        from the activation alone. `layer`: which they are of; None: the base's. A seed belongs to
        each activation, whatever its row.
        """
        if injected is None:
            rows = torch.from_numpy(activations)
            injected = view_activations(self._views, rows, mean=self._mean).numpy()
        longest, temperature = self._decoding[name]
        if sampling.temperature is not None or sampling.samples == 1:
            temperature = sampling.temperature or 0.0
        verbalizer = self._verbalizers[name]
        writing = self._thread.describe(
            verbalizer.engine,
            torch.from_numpy(injected),
            max_new_tokens=sampling.max_new_tokens or longest,
            temperature=temperature,
            seed=sampling.seed,
            rows=[0] * len(injected),
            group_size=sampling.samples,
            ending=verbalizer.ending_of(layer),
        )
        if sampling.min_claim_confidence is None:
            written, drawn = await writing, []
        else:
            written, drawn = await asyncio.gather(
                writing, self._drawn_for_claims(name, injected, sampling)
            )
        return await asyncio.to_thread(
            self._bodies, name, activations, written, drawn, sampling, layer
        )

    def _bodies(
        self,
        name: str,
        activations: np.ndarray,
        written: Sequence[Description],
        drawn: Sequence[Description],
        sampling: Sampling,
        layer: int | None,
    ) -> list[DescriptionBody]:
        """`drawn`: of `_drawn_for_claims`, where that is asked for."""
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
        least = sampling.min_claim_confidence
        if least is None:
            return bodies
        likely = self._by_claim(name, activations, written, drawn)
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

    async def _drawn_for_claims(
        self, name: str, injected: np.ndarray, sampling: Sampling
    ) -> list[Description]:
        """Samples of each activation, whose agreement tells how likely a claim is.

        They are drawn as long as those that it was learned with.
        """
        longest, temperature = self._decoding[name]
        _, count = self._confidence[name]
        return await self._thread.describe(
            self._verbalizers[name].engine,
            torch.from_numpy(injected),
            max_new_tokens=longest,
            temperature=temperature,
            seed=sampling.seed,
            rows=[0] * len(injected),
            group_size=count,
        )

    def _by_claim(
        self,
        name: str,
        activations: np.ndarray,
        written: Sequence[Description],
        drawn: Sequence[Description],
    ) -> list[dict[str, float]]:
        """The probability of each claim of greedy descriptions."""
        confidence, count = self._confidence[name]
        with_claims = map(self._verbalizers[name].with_claim_log_probs, written)
        texts = [sample.text for sample in drawn]
        return confidence.by_claim(
            torch.from_numpy(activations),
            [description.text for description in written],
            [description.claim_log_probs or {} for description in with_claims],
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

    def __init__(
        self,
        config: RunConfig,
        names: Sequence[str],
        model: Any = None,
        batches: BatchingThread | None = None,
    ) -> None:
        """`model`: a loaded base to share, which gets the scorers' adapters; None loads one.

        `batches`: of all that run blocks of a shared base; None: one of its own.
        """
        torch.set_num_threads(config.compute.threads)
        run = Run(config)
        self._batches = batches or make_batches(config)
        self._reconstructors: dict[str, Reconstructor] = {}
        self._batch_size = config.evaluation.batch_size
        for name in names:
            artifact = f"{name}_scorer"
            with run.local_copy(artifact, run.require(artifact)) as folder:
                self._reconstructors[name] = Reconstructor.load(
                    config.base, folder, adapter=name, model=model
                )
            model = self._reconstructors[name].model
        self._compute = {name: partial(self._reconstruct, name) for name in names}
        """One object a scorer: batches hold calls of the same one."""

    @property
    def model(self) -> Any:
        """The loaded base with the scorers' adapters in it, to be shared."""
        return next(iter(self._reconstructors.values())).model

    async def score(
        self,
        names: Sequence[str],
        descriptions: Sequence[str],
        activations: np.ndarray,
        *,
        whole: bool = False,
    ) -> Scored:
        """Scores of n descriptions by scorer name, each against its row of [n, d_model].

        A scorer reconstructs every description once. `whole`: nothing is scored where one of the
        descriptions is not read as it is.
        """
        unread = await asyncio.to_thread(self._unread, names, descriptions)
        refused = {row: reason for (_, row), reason in unread.items() if whole}
        if refused:
            return Scored(scores=[], unread=refused)
        original = torch.from_numpy(activations)
        scores: list[dict[str, ScoreBody]] = [{} for _ in descriptions]
        for name in names:
            reconstruction, mean = await self._reconstructed(name, descriptions)
            columns = zip(
                vectors.cosine(reconstruction, original).tolist(),
                vectors.centred_cosine(reconstruction, original, mean).tolist(),
                vectors.squared_error(reconstruction, original).tolist(),
                strict=True,
            )
            for row, (cosine, centred, error) in enumerate(columns):
                scores[row][name] = ScoreBody(
                    cosine=cosine,
                    centred_cosine=centred,
                    squared_error=error,
                    unread=unread.get((name, row)),
                )
        return Scored(scores=scores, unread={})

    async def choose(
        self, name: str, descriptions: Sequence[str], activations: np.ndarray
    ) -> list[SampleChoice]:
        """The best sample of each row of [n, d_model].

        `descriptions`: at least two samples a row, ordered by (row, sample).
        """
        reconstruction, mean = await self._reconstructed(name, descriptions)
        grouped = reconstruction.unflatten(0, (len(activations), -1))
        best = best_of(grouped, torch.from_numpy(activations), mean).tolist()
        confidences = agreement(grouped, mean).tolist()
        samples = grouped.shape[1]
        chosen = [descriptions[row * samples + sample] for row, sample in enumerate(best)]
        unread = await asyncio.to_thread(self._unread, [name], chosen)
        return [
            SampleChoice(best=sample, confidence=confidence, unread=unread.get((name, row)))
            for row, (sample, confidence) in enumerate(zip(best, confidences, strict=True))
        ]

    def _unread(
        self, names: Sequence[str], descriptions: Sequence[str]
    ) -> dict[tuple[str, int], str]:
        """By scorer and row, what keeps a description from being read as it is."""
        found = {
            (name, row): self._reconstructors[name].unread(description)
            for name in names
            for row, description in enumerate(descriptions)
        }
        return {key: reason for key, reason in found.items() if reason is not None}

    async def _reconstructed(
        self, name: str, descriptions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One scorer's reconstructions [n, d_model] and train mean direction [d_model], on CPU."""
        reconstructor = self._reconstructors[name]
        longest = reconstructor.max_tokens
        # No tokenizer makes more tokens than bytes.
        sizes = [min(longest, len(text.encode())) + _PROMPT_TOKENS for text in descriptions]
        rows = await self._batches.answer(self._compute[name], descriptions, sizes)
        return torch.stack(rows), reconstructor.mean.cpu()

    def _reconstruct(self, name: str, descriptions: list[str]) -> Sequence[torch.Tensor]:
        return self._reconstructors[name].reconstruct(descriptions, self._batch_size).unbind(0)

    async def ping(self) -> str:
        """Answer when the replica can."""
        return "ok"


class CaptureService:
    """The base's first blocks, without adapters: text in, activations of chosen positions out."""

    def __init__(
        self, config: RunConfig, model: Any = None, batches: BatchingThread | None = None
    ) -> None:
        """`model`: a loaded base to share, adapters or not; None loads the blocks it needs.

        `batches`: as `ScorerService` takes it.
        """
        torch.set_num_threads(config.compute.threads)
        self._base, self._batches = config.base, batches or make_batches(config)
        self._batch_tokens = config.serve.batch_tokens
        self._tokenizer = load_tokenizer(config.base)
        self._chat = ChatEncoder(self._tokenizer, config.base.model)
        layers = read_layers(config.base)
        blocks = layers[-1] + 1
        self._model = load_backbone(config.base, num_blocks=blocks) if model is None else model
        with adapter_active(self._model, None):
            check_reading(self._model, layers)
        self._reader, self._mean = ResidualReader(self._model, layers), view_mean(Run(config))

    async def capture(
        self, texts: Sequence[str], positions: Sequence[int], layer: int | None = None
    ) -> list[Captured]:
        """Activations at the same positions of each text's chat-formatted prompt.

        `layer`: at which of those that are described; None: the base's. No activation of a prompt
        that is too long, or that a position is outside of.
        """
        items = [(text, tuple(positions), layer) for text in texts]
        sizes = [len(text.encode()) // _BYTES_OF_TOKEN + 1 for text in texts]
        return await self._batches.answer(self._read, items, sizes)

    @torch.no_grad()
    def _read(self, items: Sequence[tuple[str, tuple[int, ...], int | None]]) -> list[Captured]:
        encoded = [self._chat.encode(text) for text, _, _ in items]
        captured = [_nothing_captured(len(chat.ids)) for chat in encoded]
        prompts: dict[int, tuple[EncodedChat, list[int], int | None]] = {}
        for number, (chat, (_, positions, layer)) in enumerate(zip(encoded, items, strict=True)):
            found = [place + len(chat.ids) if place < 0 else place for place in positions]
            is_inside = all(0 <= place < len(chat.ids) for place in found)
            if len(chat.ids) <= self._base.max_tokens and is_inside:
                prompts[number] = chat, found, layer
        numbers = list(prompts)
        lengths = [max(places) + 1 for _, places, _ in prompts.values()]
        with adapter_active(self._model, None):
            for batch in plan_batches(lengths, self._batch_tokens):
                taken = [numbers[place] for place in batch]
                asked = [prompts[number] for number in taken]
                read = read_together(self._base, self._reader, asked, self._mean)
                for number, (chat, places, _), answer in zip(taken, asked, read, strict=True):
                    captured[number] = self._captured(chat, places, *answer)
        return captured

    def _captured(
        self, chat: EncodedChat, places: list[int], rows: torch.Tensor, injected: torch.Tensor
    ) -> Captured:
        return Captured(
            num_tokens=len(chat.ids),
            positions=places,
            tokens=[self._tokenizer.decode([chat.ids[place]]) for place in places],
            activations=rows.numpy(),
            injected=injected.numpy(),
        )

    async def ping(self) -> str:
        """Answer when the replica can."""
        return "ok"


def make_batches(config: RunConfig) -> BatchingThread:
    """The thread that capture or scorers read in."""
    settings = config.serve
    return BatchingThread(largest=settings.batch_tokens, window_seconds=settings.window_seconds)


def _nothing_captured(num_tokens: int) -> Captured:
    return Captured(
        num_tokens=num_tokens,
        positions=[],
        tokens=[],
        activations=np.zeros((0, 0), np.float32),
        injected=np.zeros((0, 0, 0), np.float32),
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
