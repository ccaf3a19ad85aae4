"""The HTTP interface as types: requests, responses, and the one form of refusals and errors.

Knows neither Serve nor models. Checks that need only facts of the served base (width, layer,
limits) are functions here. Each raises `Refusal`, which is answered with its status, 422 unless it
says another, and `{what, got, expected}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from nla_ray.settings.views import View

MIN_NORM = 1e-6
"""An activation shorter than this has no direction."""
MAX_NORM = 1e18
"""Of a longer activation the squared norm leaves float32."""
MAX_FLOAT32 = 3.4028234663852886e38
MIN_TEMPERATURE = 0.01
"""A lower one that is not 0 makes logits infinite, and is greedy in all but name."""
MAX_SAMPLES = 16
"""Most descriptions drawn of one activation: a CPU writes a full batch of them in seconds."""
CHOOSER = "reward"
"""The scorer that chooses among samples. The judge never does: it stays independent."""
MAX_VECTORS = 16
"""Most vectors in one prompt: a description of any usual length has room behind them."""
_SHOWN_CHARS = 120

Activation = Annotated[
    list[float],
    Field(
        description=(
            "A raw residual-stream vector at the served layer: d_model numbers, not normalised."
        )
    ),
]


class Refusal(ValueError):
    """A request that cannot be answered; `what`, `got` and `expected` are the response's body."""

    def __init__(
        self,
        what: str,
        got: object,
        expected: str,
        *,
        status: int = 422,
        retry_seconds: int | None = None,
    ) -> None:
        """`status`: of HTTP. `retry_seconds`: when the same request may be answered."""
        self.what, self.got, self.expected = what, shorten(got), expected
        self.status, self.retry_seconds = status, retry_seconds
        super().__init__(f"{self.what}: got {self.got}, expected {self.expected}")


def shorten(value: object) -> str:
    """A value as text of bounded length."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of too many levels"
    # A lone surrogate would break the answer itself.
    text = text.encode("utf-8", "backslashreplace").decode()
    return (
        text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"
    )


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorBody(_Message):
    """Body of every refusal and every error."""

    what: str = Field(description="The field, limit or part concerned.")
    got: str
    expected: str


# Requests -----------------------------------------------------------------------------------------


class Sampling(_Message):
    """How a description is written, and chosen where several are drawn."""

    temperature: float | None = Field(
        None,
        ge=0.0,
        le=2.0,
        allow_inf_nan=False,
        description=(
            "0 is greedy decoding. By default 0 for one sample and, for several, the temperature"
            " that training sampled at: greedy samples of one activation would all be the same, so"
            f" 0 is refused there. Between 0 and {MIN_TEMPERATURE} nothing is sampled, and refused."
        ),
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest description in tokens; by default what training used."
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description=(
            "Seed of sampling; without effect at temperature 0. It belongs to each activation: what"
            " is drawn of one does not depend on what else is asked, here or by others."
        ),
    )
    samples: int = Field(
        1,
        ge=1,
        le=MAX_SAMPLES,
        description=(
            "Descriptions drawn of each activation. Of several, the answer is the one whose"
            " reconstruction by the reward scorer has the highest centred cosine with the"
            " activation."
        ),
    )
    min_confidence: float | None = Field(
        None,
        ge=-1.0,
        le=1.0,
        allow_inf_nan=False,
        description=(
            "Needs at least 2 samples. An activation whose samples agree less than this is answered"
            " `unsure`, without a description."
        ),
    )
    min_claim_confidence: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description=(
            "Claims that are less likely than this to be in the activation's text are left out;"
            " `claims` names them. Needs greedy decoding (1 sample, temperature 0), which their"
            " confidence was learned from, and a verbalizer whose `claim_confidence` is true."
            " Samples are drawn beside the description to ask what they agree on."
        ),
    )


class DescribeRequest(Sampling):
    """Activations, texts, or vectors of prompts to describe; exactly one of the three."""

    activations: list[Activation] | None = Field(
        None, description="Activations captured at the served layer."
    )
    texts: list[str] | None = Field(
        None, description="Texts whose activation at the end of the generation prompt is described."
    )
    vectors: list[list[Activation]] | None = Field(
        None,
        description=(
            "What stands in the marker's place of each prompt, vector by vector: several"
            " activations at once, or a verbalizer's own `injected` vectors (/v1/models). It"
            " learned prompts of as many as those. `typicality` is that of the first. Without"
            " `samples` and `min_claim_confidence`."
        ),
    )
    layer: int | None = Field(
        None,
        description=(
            "Layer the activations come from, or at which texts are read: the served one, or one of"
            " `further_layers` (/v1/models), without `samples` and `min_claim_confidence`."
        ),
    )
    verbalizer: str | None = Field(
        None, description="Name of a verbalizer of /v1/models; by default the first."
    )


class ScoreItem(_Message):
    """One description and the activation it is held against."""

    description: str = Field(
        description="Bullets, without tags. The empty string is a description."
    )
    activation: Activation


class ScoreRequest(_Message):
    """Descriptions to compare with activations."""

    items: list[ScoreItem]
    layer: int | None = Field(
        None, description="Layer the activations come from; refused unless it is the served one."
    )
    scorers: list[str] | None = Field(
        None, description="Names of scorers of /v1/models; by default all."
    )


class ExplainRequest(Sampling):
    """A text whose activations are captured, described and scored."""

    text: str
    positions: list[int] = Field(
        default_factory=lambda: [-1],
        description=(
            "Token indices in the chat-formatted prompt; negative ones count from its end. -1, the"
            " end of the generation prompt, is what the verbalizer was trained on unless its preset"
            " says otherwise."
        ),
    )
    layer: int | None = Field(
        None,
        description=(
            "The served one, or one of `further_layers` (/v1/models), which no scorer reads:"
            " without `scorers`, `samples` and `min_claim_confidence`."
        ),
    )
    verbalizer: str | None = None
    scorers: list[str] | None = None


# Responses ----------------------------------------------------------------------------------------


class ClaimBody(_Message):
    """A word, number, name or quotation that a verbalizer said is in the activation's text."""

    claim: str
    confidence: float = Field(
        description=(
            "Probability that the text has it, of activations like those it was learned from: 0 to"
            " 1."
        )
    )
    kept: bool = Field(
        description=(
            "False: it was left out of the description, for itself or with the item or line that"
            " another stands in."
        )
    )


class NearActivation(_Message):
    """A train activation near to the one that was described."""

    activation_id: str = Field(description="text id, layer and position of the run's activation.")
    centred_cosine: float


class TypicalityBody(_Message):
    """The place of an activation among those that the verbalizer has learned from."""

    norm_quantile: float = Field(
        description=(
            "Share of train activations that are shorter. The verbalizer does not see it: every"
            " activation is injected at one norm."
        )
    )
    distance_quantile: float = Field(
        description="Share of train activations whose direction is nearer to the mean direction."
    )
    nearest: list[NearActivation] = Field(description="Nearest first, of a sample of them.")
    nearest_quantile: float = Field(
        description="Share of train activations that are farther from their own nearest one."
    )
    unlike_training: bool = Field(
        description=(
            "True: its direction is farther from the mean, nearer to it, or more alone, than all"
            " but a thousandth of train activations. What is said of it then was never learned."
        )
    )


class DescriptionBody(_Message):
    """What a verbalizer wrote about one activation: its only sample, or the best of several."""

    description: str | None = Field(description="null when, and only when, `unsure` is true.")
    unsure: bool = Field(
        False,
        description=(
            "True: `confidence` is below the request's `min_confidence`, and the best sample is"
            " withheld."
        ),
    )
    confidence: float | None = Field(
        None,
        description=(
            "How far the samples mean the same: the mean centred cosine of the pairs of their"
            " reconstructions by the reward scorer, -1 to 1; null for one sample. 1: all mean the"
            " same; about 0: nothing in common. Not a probability of being right: samples may agree"
            " on what is wrong."
        ),
    )
    claims: list[ClaimBody] | None = Field(
        None,
        description=(
            "Every claim that was written, also what was left out; null without"
            " `min_claim_confidence`."
        ),
    )
    typicality: TypicalityBody | None = Field(
        None, description="null where the run's activations are not there."
    )
    samples: int = Field(1, description="Descriptions drawn, this one among them.")
    unread: str | None = Field(
        None,
        description=(
            "Of the best of several: what kept the reward scorer, which chose it, from reading it"
            " as it is. null: it read all, or there was no choice."
        ),
    )
    closed: bool = Field(description="False: it ran into the token limit before its closing tag.")
    num_tokens: int


class DescribeResponse(_Message):
    """Descriptions in the order of the request."""

    verbalizer: str
    layer: int
    descriptions: list[DescriptionBody]


class ScoreBody(_Message):
    """How close the activation reconstructed from a description is to the original."""

    cosine: float = Field(description="cos(r, v); the train mean alone often reaches 0.95.")
    centred_cosine: float = Field(
        description="The same with the train mean direction taken out; 0 is chance."
    )
    squared_error: float = Field(description="|n(r) - n(v)|^2, 0 to 4.")
    unread: str | None = Field(
        None,
        description=(
            "What kept the scorer from reading the description as it is: it reads the first"
            " `max_tokens` tokens (/v1/models), and leaves out the character that is its marker."
            " null: it read all. /v1/score refuses such descriptions."
        ),
    )


class ScoreResponse(_Message):
    """Scores by scorer name, in the order of the request."""

    layer: int
    scores: list[dict[str, ScoreBody]]


class Explanation(DescriptionBody):
    """One position of the text: its token, its description and the description's scores."""

    position: int = Field(description="0-based index in the chat-formatted prompt.")
    token: str
    scores: dict[str, ScoreBody] = Field(
        description=(
            "By scorer name; empty when `unsure`, where there is no description to score, and at a"
            " further layer."
        )
    )


class ExplainResponse(_Message):
    """Explanations in the order of the requested positions."""

    verbalizer: str
    layer: int
    num_tokens: int = Field(description="Tokens of the chat-formatted prompt.")
    explanations: list[Explanation]


class BaseBody(_Message):
    """The base model whose activations are understood."""

    name: str
    digest: str
    layer: int = Field(
        description=(
            "0-based: the output of this decoder block, before any final norm; transformers'"
            " hidden_states[layer + 1], but for the last block."
        )
    )
    d_model: int
    num_layers: int
    max_tokens: int = Field(description="Longest text in tokens, chat template included.")
    max_new_tokens: int = Field(
        description="Longest description in tokens that the base's context has room for."
    )
    injection_norm: float
    injected: list[str] = Field(
        description=(
            "What stands in a verbalizer's prompt for an activation, a token each: itself, its"
            " `centred` direction, the mean over its text, or the same position at another layer."
        )
    )
    further_layers: list[int] = Field(
        default_factory=list,
        description="Layers beside `layer` that the verbalizers have learned to describe.",
    )


class ModelBody(_Message):
    """A served adapter."""

    name: str
    kind: str = Field(description="verbalizer or scorer")
    fingerprint: str = Field(description="Identity of the artifact; see its manifest.")
    created: str
    claim_confidence: bool = Field(
        False, description="Whether `min_claim_confidence` may be asked of it."
    )
    max_new_tokens: int | None = Field(
        None,
        description="Longest description of a verbalizer, in tokens, where a request names none.",
    )
    max_tokens: int | None = Field(
        None, description="Longest description that a scorer reads, in tokens."
    )


class ModelsResponse(_Message):
    """Everything that is served."""

    base: BaseBody
    verbalizers: list[ModelBody]
    scorers: list[ModelBody]


class HealthResponse(_Message):
    """`ok`: the endpoint answers, whatever the models do."""

    status: str
    waiting: int = Field(
        description="Activations that are worked on or wait, each as often as it is sampled."
    )


class ReadyResponse(_Message):
    """`ok` when every deployment answers."""

    status: str
    deployments: dict[str, str]


# Checks -------------------------------------------------------------------------------------------


def check_batch(what: str, size: int, largest: int) -> None:
    """Refuse an empty batch and one above the limit."""
    if not 1 <= size <= largest:
        raise Refusal(what, f"{size} items", f"1 to {largest} items")


def require_served_layer(layer: int | None, served: int) -> None:
    """Refuse a layer other than the served one; None is the served one."""
    if layer is not None and layer != served:
        raise Refusal("layer", layer, f"{served}, the layer that this endpoint serves")


def described_layer(layer: int | None, base: BaseBody) -> int:
    """The layer that is to be described, by default the served one. Refuses one not learned."""
    if layer is not None and layer not in (base.layer, *base.further_layers):
        expected = f"{base.layer}, the layer that this endpoint serves"
        if base.further_layers:
            expected += f", or a further one that was learned: {base.further_layers}"
        raise Refusal("layer", layer, expected)
    return base.layer if layer is None else layer


def check_further_layer(
    sampling: Sampling, layer: int, base: BaseBody, scorers: Sequence[str] | None = None
) -> None:
    """Refuse at a further layer what scorers, or what was learned of claims, are needed for."""
    if layer == base.layer:
        return
    asked = {
        "samples": sampling.samples > 1,
        "min_claim_confidence": sampling.min_claim_confidence is not None,
        "scorers": bool(scorers),
    }
    for what in (name for name, is_asked in asked.items() if is_asked):
        raise Refusal(
            what, f"{what} at layer {layer}", f"none of it: scorers read layer {base.layer} alone"
        )


def check_length(max_new_tokens: int | None, longest: int) -> None:
    """Refuse a description longer than the context has room for; None is what training used."""
    if max_new_tokens is not None and max_new_tokens > longest:
        raise Refusal(
            "max_new_tokens",
            max_new_tokens,
            f"at most {longest}, what the base's context has room for",
        )


def check_request_tokens(asked: int, most: int, sampling: Sampling, longest: int) -> None:
    """Refuse more tokens than one request may have written, of `asked` activations.

    `longest`: the length of a description where the request names none.
    """
    tokens = sampling.max_new_tokens or longest
    if asked * sampling.samples * tokens > most:
        raise Refusal(
            "max_new_tokens",
            f"{asked} activations x {sampling.samples} samples x {tokens} tokens ="
            f" {asked * sampling.samples * tokens}",
            f"at most {most} tokens in a request",
        )


def check_temperature(temperature: float | None) -> None:
    """Refuse a temperature at which nothing is sampled, and which is not 0."""
    if temperature is not None and 0 < temperature < MIN_TEMPERATURE:
        raise Refusal("temperature", temperature, f"0, which is greedy, or {MIN_TEMPERATURE} to 2")


def check_choice(sampling: Sampling, scorers: Sequence[str]) -> None:
    """Refuse several samples without a chooser or without a temperature, and confidence in one."""
    if sampling.samples > 1 and CHOOSER not in scorers:
        raise Refusal(
            "samples",
            sampling.samples,
            f"1: the scorer {CHOOSER!r}, which chooses among several, is not served; train it with"
            " jobs/sft.py",
        )
    if sampling.samples > 1 and sampling.temperature == 0:
        raise Refusal(
            "temperature",
            sampling.temperature,
            "a temperature above 0, or none for the default: greedy samples of one activation are"
            " all the same; for greedy decoding ask for samples 1",
        )
    if sampling.samples == 1 and sampling.min_confidence is not None:
        raise Refusal(
            "min_confidence",
            f"{sampling.min_confidence} with 1 sample",
            f"samples of 2 to {MAX_SAMPLES} beside it: confidence is how far samples agree",
        )


def check_claim_confidence(sampling: Sampling, verbalizer: ModelBody) -> None:
    """Refuse confidence by claim of what it was not learned from."""
    if sampling.min_claim_confidence is None:
        return
    if not verbalizer.claim_confidence:
        raise Refusal(
            "min_claim_confidence",
            f"{sampling.min_claim_confidence} of {verbalizer.name}",
            "a verbalizer of /v1/models whose claim_confidence is true; jobs/evaluate.py learns it"
            " for the one that GRPO trained",
        )
    if sampling.min_confidence is not None:
        raise Refusal(
            "min_claim_confidence",
            "min_confidence beside it",
            "one of the two: min_claim_confidence is about the claims of one greedy description,"
            " min_confidence about the choice among samples",
        )
    if sampling.samples > 1 or sampling.temperature:
        raise Refusal(
            "min_claim_confidence",
            f"{sampling.samples} samples at temperature {sampling.temperature or 'by default'}",
            "1 sample at temperature 0: confidence was learned from greedy descriptions",
        )


def check_activation(what: str, activation: Sequence[float], d_model: int) -> None:
    """Refuse a width or a value that the base cannot have, and a vector without a direction."""
    if len(activation) != d_model:
        raise Refusal(what, f"{len(activation)} numbers", f"{d_model} numbers, the base's d_model")
    # NaN is not below the limit either.
    bad = next(
        (index for index, value in enumerate(activation) if not abs(value) <= MAX_FLOAT32), None
    )
    if bad is not None:
        raise Refusal(f"{what}[{bad}]", str(activation[bad]), "a finite float32 number")
    length = math.hypot(*activation)
    if length < MIN_NORM:
        raise Refusal(
            what,
            f"a vector of norm {length:g}",
            f"a norm of at least {MIN_NORM:g}: zero has no direction",
        )
    if length > MAX_NORM:
        raise Refusal(
            what,
            f"a vector of norm {length:g}",
            f"a norm of at most {MAX_NORM:g}: its square must be a float32 number",
        )


def check_inputs(request: DescribeRequest) -> None:
    """Refuse anything but one kind of input, and of vectors what an activation is needed for."""
    kinds = ("activations", "texts", "vectors")
    given = [kind for kind in kinds if getattr(request, kind) is not None]
    if len(given) != 1:
        raise Refusal("body", " and ".join(given) or "none", f"exactly one of {', '.join(kinds)}")
    if request.vectors is None:
        return
    if request.samples > 1 or request.min_claim_confidence is not None:
        what = "samples" if request.samples > 1 else "min_claim_confidence"
        raise Refusal(
            what, getattr(request, what), "none of it beside vectors, which are no activation"
        )


def check_vectors(
    prompts: Sequence[Sequence[Activation]], max_new_tokens: int | None, base: BaseBody
) -> None:
    """Refuse prompts of no vector, of too many, and descriptions too long for what is left."""
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= MAX_VECTORS:
            raise Refusal(f"vectors[{number}]", f"{len(prompt)} vectors", f"1 to {MAX_VECTORS}")
        check_length(max_new_tokens, base.max_new_tokens + len(base.injected) - len(prompt))


def check_injected(what: str, injected: Sequence[str]) -> None:
    """Refuse activations where the verbalizer is given more than follows from them."""
    others = [value for value in injected if not View.of(value).is_of_activation]
    if others:
        raise Refusal(
            what, "activations alone", f"texts: the verbalizer reads {', '.join(others)} as well"
        )


def check_text(what: str, text: str, max_chars: int) -> None:
    """Refuse a text with no visible character, outside UTF-8, or above the limit."""
    if not text.strip():
        raise Refusal(what, repr(text[:20]), "a text with at least one visible character")
    check_description(what, text, max_chars)


def check_description(what: str, text: str, max_chars: int) -> None:
    """Refuse a description outside UTF-8 or above the limit; the empty string is a description."""
    if len(text) > max_chars:
        raise Refusal(what, f"{len(text)} characters", f"at most {max_chars} characters")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refusal(what, "a lone surrogate", "text that UTF-8 can hold")


def choose_name(what: str, name: str | None, served: Sequence[str]) -> str:
    """A served name: the one that is asked for, by default the first. Refuses any other name."""
    if name is None:
        return served[0]
    if name not in served:
        raise Refusal(what, name, f"one of {', '.join(served)}")
    return name


def choose_names(what: str, names: Sequence[str] | None, served: Sequence[str]) -> list[str]:
    """Served names: those that are asked for, by default all. Refuses any other name."""
    if names is None:
        return list(served)
    check_batch(what, len(names), len(served))
    return [choose_name(what, name, served) for name in names]
