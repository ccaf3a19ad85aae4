"""Pretrains the small base model of the embedded default, so that its activations carry a document's content.

A chat in which the assistant says what the user's document holds makes the residual stream at the generation
prompt a summary of the document, as it is in large instruction-tuned models. This module owns that mixture of
raw text and chats, the tokenizer, the loop and the card. It protects one rule: only documents of the train
split are read for training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from nla_ray.corpus.build import Chunk, embedded_chunks
from nla_ray.corpus.dedup import find_first_of_clusters
from nla_ray.corpus.embedded import cut_chunks, list_sources, read_source, seeded_order
from nla_ray.labels.cleaner import clean_label
from nla_ray.labels.offline import ContentFirstTeacher, FormatFirstTeacher, WordStatistics, observe, salient_words
from nla_ray.prompts import chat_prompt
from nla_ray.records import seed_of, split_of

logger = logging.getLogger(__name__)

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system prompt."""
RAW, DOCUMENT, ANSWER = 0, 1, 2
PART_NAMES = ("raw", "document", "answer")
ANSWER_SHARES = {"words": 0.50, "description": 0.35, "domain": 0.15}
"""How often each kind of answer is drawn. The target at the generation prompt is the expectation over them."""
SOFT_WIDTH = 16
"""Candidates of one soft target: 12 words, the bullet, the domain, and two spare."""
CHATS_PER_ROW = 4
HASHED_IDS = 16


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Everything that decides the base model."""

    vocab_size: int = 4_096
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 704
    max_positions: int = 512
    read_layer: int = 4
    """Block (0-based) whose output at the generation prompt is trained to name the document's words as well."""
    marker: str = "\u320e"
    row_tokens: int = 256
    rows_per_step: int = 32
    steps: int = 2_000
    peak_lr: float = 2e-3
    muon_lr: float = 0.02
    """Peak rate of the matrices inside the blocks, which Muon trains; AdamW trains embeddings and vectors."""
    warmup_steps: int = 60
    weight_decay: float = 0.1
    raw_share: float = 0.25
    """Least share of raw text in the tokens; it also fills what the chats leave of a row."""
    answer_weight: float = 2.5
    prompt_weight: float = 8.0
    """Weight of the soft target at the generation prompt, against 1 for a document token."""
    read_weight: float = 8.0
    """The same target, read from the output of `read_layer` through the final norm and the output matrix."""
    num_words: int = 12
    chunks_per_domain: int = 12_000
    documents_per_domain: int = 3_500
    num_processes: int = 2
    checkpoint_seconds: float = 180.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One tokenised chat and the soft target at its generation prompt.

    Example:
        Chat(prompt_ids=[1, 88, ...], answer_ids=[301, 14, 77, 2, 201], soft={301: 0.3, 77: 0.2, 15: 0.35, 90: 0.15})
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    soft: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed training rows; every array has the same first dimension.

    tokens, positions, segments, parts: [rows, row_tokens]; soft_positions: [rows, CHATS_PER_ROW], -1 where
    unused; soft_ids, soft_probabilities: [rows, CHATS_PER_ROW, SOFT_WIDTH].
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    parts: np.ndarray
    soft_positions: np.ndarray
    soft_ids: np.ndarray
    soft_probabilities: np.ndarray

    def batch(self, rows: slice) -> dict[str, torch.Tensor]:
        """Tensors of the chosen rows: int64, and float32 for probabilities."""
        tensors = {name: torch.from_numpy(np.array(getattr(self, name)[rows])) for name in self.__dataclass_fields__}
        return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()}

    def save(self, folder: Path) -> None:
        for name in self.__dataclass_fields__:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Rows:
        """The arrays stay on disk, mapped: all processes share one copy."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__})


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class PretrainTexts:
    """What the loop reads: `(domain, text)` pieces for chats, whole texts for raw reading, and their documents."""

    chunks: list[tuple[str, str]]
    raw: list[str]
    doc_ids: list[str]
    validation: list[Chunk]
    statistics: WordStatistics


def gather_texts(settings: PretrainSettings) -> PretrainTexts:
    """Chunks and raw text of train documents, many more than the corpus takes, without the held-out ones' twins."""
    corpus = embedded_chunks(seed=settings.seed)
    statistics = WordStatistics.fit(chunk.text for chunk in corpus if chunk.split == "train")
    held_out = [chunk.text for chunk in corpus if chunk.split != "train"]
    by_domain: dict[str, list] = {}
    for source in list_sources():
        if split_of(source.doc_id) == "train":
            by_domain.setdefault(source.domain, []).append(source)
    chunks, raw, doc_ids = [], [], []
    for domain, sources in sorted(by_domain.items()):
        known = {source.doc_id: source for source in sources}
        pieces: list[str] = []
        for doc_id in seeded_order(list(known), settings.seed)[: settings.documents_per_domain]:
            if (text := read_source(known[doc_id])) is not None:
                doc_ids.append(doc_id)
                draw = random.Random(seed_of(settings.seed, "pretrain", doc_id))
                pieces += _pieces_of(text, doc_id, draw)
                raw.append(_raw_window(text, draw))
        random.Random(seed_of(settings.seed, domain)).shuffle(pieces)
        chunks += [(domain, piece) for piece in pieces[: settings.chunks_per_domain]]
    keep = find_first_of_clusters(held_out + [text for _, text in chunks], threshold=0.7)[len(held_out) :]
    raw_keep = find_first_of_clusters(raw, threshold=0.7)
    validation = [chunk for chunk in corpus if chunk.split == "validation"]
    return PretrainTexts(
        chunks=[chunk for chunk, kept in zip(chunks, keep, strict=True) if kept],
        raw=[text for text, kept in zip(raw, raw_keep, strict=True) if kept],
        doc_ids=sorted(doc_ids), validation=validation, statistics=statistics,
    )


def _pieces_of(text: str, doc_id: str, draw: random.Random) -> list[str]:
    """Up to 24 pieces: two thirds as long as the corpus cuts them, one third shorter."""
    usual = cut_chunks(text[:60_000], seed_key=f"{doc_id}/pretrain")
    short = cut_chunks(text[:60_000], seed_key=f"{doc_id}/short", min_chars=60)
    draw.shuffle(usual)
    draw.shuffle(short)
    return usual[:40] + short[:20]


def _raw_window(text: str, draw: random.Random) -> str:
    start = draw.randrange(max(1, len(text) - 4_000))
    return text[start : start + 4_000]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, marker: str):
    """Byte-level BPE with ChatML; the marker is the last id, an ordinary token that decoding keeps.

    Words are split exactly as Qwen2's tokenizer splits them, because every loader builds that class for this
    architecture, whatever the files say.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    pattern = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=[TEXT_END, TURN_START, TURN_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    learned = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]], eos_token=TURN_END,
        pad_token=TEXT_END, unk_token=TEXT_END, extra_special_tokens=[TURN_START],
    )
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != vocab_size or tokenizer.convert_tokens_to_ids(marker) != vocab_size - 1:
        raise RuntimeError(
            f"tokenizer training gave {len(tokenizer)} tokens, expected {vocab_size}: the text is too small for that "
            "vocabulary. Lower vocab_size or give more text."
        )
    return tokenizer


def compose_answer(text: str, domain: str, statistics: WordStatistics, num_words: int, draw: random.Random) -> tuple[str, list[tuple[str, float]]]:
    """One drawn answer, and the document's salient words with their shares of the soft target.

    Words are listed in a random order in which a word comes first with a probability proportional to its
    tf-idf (Plackett-Luce), so the shares are exactly the expectation of the first word.
    """
    words = salient_words(text, statistics, num_words)
    total = sum(score for _, score in words) or 1.0
    shares = [(word, score / total) for word, score in words]
    kind = draw.choices(list(ANSWER_SHARES), weights=list(ANSWER_SHARES.values()))[0]
    if kind == "words" and words:
        order = sorted(words, key=lambda pair: -math.log(1.0 - draw.random()) / pair[1])
        return ", ".join(word for word, _ in order), shares
    if kind == "description":
        teacher = draw.choice((ContentFirstTeacher, FormatFirstTeacher))(statistics)
        return clean_label(teacher.describe(text, domain)), shares
    return observe(text, domain, statistics).kind, shares


def soft_target(first_id_of, shares: Sequence[tuple[str, float]], kind: str) -> dict[int, float]:
    """Next-token distribution at the generation prompt: the expectation over answer kinds and word orders.

    `first_id_of` maps a string to the id of its first token. Sums to 1.
    """
    target: dict[int, float] = {}
    without_words = ANSWER_SHARES["words"] if not shares else 0.0
    for string, share in (
        *((word, ANSWER_SHARES["words"] * part) for word, part in shares),
        ("- ", ANSWER_SHARES["description"]),
        (kind, ANSWER_SHARES["domain"] + without_words),
    ):
        token = first_id_of(string)
        target[token] = target.get(token, 0.0) + share
    return target


def build_chats(texts: PretrainTexts, tokenizer, settings: PretrainSettings) -> list[Chat]:
    """One chat a chunk, tokenised; chats longer than a row are left out."""
    first_ids: dict[str, int] = {}

    def first_id_of(string: str) -> int:
        if string not in first_ids:
            first_ids[string] = tokenizer(string)["input_ids"][0]
        return first_ids[string]

    answers, targets = [], []
    for index, (domain, text) in enumerate(texts.chunks):
        draw = random.Random(seed_of(settings.seed, "answer", str(index)))
        answer, shares = compose_answer(text, domain, texts.statistics, settings.num_words, draw)
        answers.append(f"{answer}{TURN_END}\n")
        targets.append(soft_target(first_id_of, shares, observe(text, domain, texts.statistics).kind))
    prompts = tokenizer([chat_prompt(tokenizer, text) for _, text in texts.chunks])["input_ids"]
    answer_ids = tokenizer(answers)["input_ids"]
    chats = [Chat(prompt_ids=p, answer_ids=a, soft=t) for p, a, t in zip(prompts, answer_ids, targets, strict=True)]
    return [chat for chat in chats if len(chat.prompt_ids) + len(chat.answer_ids) <= settings.row_tokens]


def raw_segments(texts: Sequence[str], tokenizer, seed: int) -> Iterator[list[int]]:
    """Endless supply of token lists, one text each, in a new seeded order every round."""
    end = tokenizer.pad_token_id
    encoded = [[*ids, end] for ids in tokenizer(list(texts))["input_ids"]]
    draw = random.Random(seed)
    while True:
        draw.shuffle(encoded)
        yield from encoded


def pack_rows(chats: list[Chat], raw: Iterator[list[int]], num_rows: int, settings: PretrainSettings) -> Rows:
    """Rows without padding: chats that fit together, the rest filled with raw text; every `1/raw_share`-th less.

    Attention never crosses samples: `segments` numbers them within a row and `positions` restart at 0.
    """
    rows = _empty_rows(num_rows, settings.row_tokens)
    draw = random.Random(seed_of(settings.seed, "pack"))
    waiting: list[Chat] = []
    pending: list[int] = []
    raw_tokens = 0
    for row in range(num_rows):
        start = segment = 0
        if raw_tokens >= settings.raw_share * row * settings.row_tokens:
            while segment < CHATS_PER_ROW:
                if not waiting:
                    waiting = chats[:]
                    draw.shuffle(waiting)
                index = _find_fitting(waiting, settings.row_tokens - start)
                if index is None:
                    break
                start = _place_chat(rows, row, segment, start, waiting.pop(index))
                segment += 1
        while start < settings.row_tokens:
            pending = pending or next(raw)
            piece, pending = pending[: settings.row_tokens - start], pending[settings.row_tokens - start :]
            start, raw_tokens = _place_raw(rows, row, segment, start, piece), raw_tokens + len(piece)
            segment += 1
    return rows


def _find_fitting(waiting: list[Chat], room: int, look: int = 24) -> int | None:
    """Index of the longest chat that fits, among the last `look` ones."""
    best, best_size = None, 0
    for index in range(max(0, len(waiting) - look), len(waiting)):
        size = len(waiting[index].prompt_ids) + len(waiting[index].answer_ids)
        if best_size < size <= room:
            best, best_size = index, size
    return best


def _empty_rows(num_rows: int, row_tokens: int) -> Rows:
    plane, prompts = (num_rows, row_tokens), (num_rows, CHATS_PER_ROW)
    return Rows(
        tokens=np.zeros(plane, np.int32), positions=np.zeros(plane, np.int16), segments=np.zeros(plane, np.int8),
        parts=np.zeros(plane, np.int8), soft_positions=np.full(prompts, -1, np.int16),
        soft_ids=np.zeros((*prompts, SOFT_WIDTH), np.int32),
        soft_probabilities=np.zeros((*prompts, SOFT_WIDTH), np.float32),
    )


def _place_raw(rows: Rows, row: int, segment: int, start: int, piece: list[int]) -> int:
    stop = start + len(piece)
    rows.tokens[row, start:stop] = piece
    rows.positions[row, start:stop] = np.arange(len(piece))
    rows.segments[row, start:stop] = segment
    rows.parts[row, start:stop] = RAW
    return stop


def _place_chat(rows: Rows, row: int, segment: int, start: int, chat: Chat) -> int:
    stop = _place_raw(rows, row, segment, start, chat.prompt_ids + chat.answer_ids)
    answer = start + len(chat.prompt_ids)
    rows.parts[row, start:answer] = DOCUMENT
    rows.parts[row, answer:stop] = ANSWER
    rows.soft_positions[row, segment] = answer - 1
    for slot, (token, share) in enumerate(chat.soft.items()):
        rows.soft_ids[row, segment, slot] = token
        rows.soft_probabilities[row, segment, slot] = share
    return stop


# -------------------------------------------------------------------------------------------- model


def build_model(settings: PretrainSettings, tokenizer) -> nn.Module:
    """A Qwen2-architecture model with tied embeddings and seeded weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=settings.vocab_size, hidden_size=settings.d_model, num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads, num_key_value_heads=settings.num_kv_heads,
        intermediate_size=settings.ffn_size, max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True, rope_theta=10_000.0, attn_implementation="sdpa", use_sliding_window=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def run_blocks(model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, read_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Final normed states and the raw output of `read_layer`, both [batch, seq, d_model]; attention within segments."""
    body = model.model
    same = segments[:, None, :, None] == segments[:, None, None, :]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    mask = same & causal
    states = body.embed_tokens(tokens)
    rotary = body.rotary_emb(states, positions)
    read = states
    for index, block in enumerate(body.layers):
        states = block(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        if index == read_layer:
            read = states
    return body.norm(states), read


def training_losses(model: nn.Module, batch: dict[str, torch.Tensor], settings: PretrainSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss, and the plain means [raw, document, answer, first token, first token at read_layer] in nats."""
    states, read = run_blocks(model, batch["tokens"], batch["positions"], batch["segments"], settings.read_layer)
    next_tokens, next_parts = batch["tokens"][:, 1:], batch["parts"][:, 1:]
    within = batch["segments"][:, 1:] == batch["segments"][:, :-1]
    logits = model.lm_head(states[:, :-1]).float()
    losses = functional.cross_entropy(logits.flatten(0, 1), next_tokens.flatten(), reduction="none").view_as(next_tokens)
    used = batch["soft_positions"] >= 0
    at = batch["soft_positions"].clamp(min=0)
    hard = within.float().scatter_add(1, at, -used.float()).clamp(min=0.0)
    weights = hard * torch.where(next_parts == ANSWER, settings.answer_weight, 1.0)
    row = torch.arange(at.shape[0], device=at.device)[:, None].expand_as(at)
    first = soft_cross_entropy(model.lm_head(states[row, at]), batch)
    first_read = soft_cross_entropy(model.lm_head(model.model.norm(read[row, at])), batch)
    count = used.float().sum().clamp(min=1.0)
    soft_sum = settings.prompt_weight * (first * used).sum() + settings.read_weight * (first_read * used).sum()
    total = ((losses * weights).sum() + soft_sum) / (weights.sum() + (settings.prompt_weight + settings.read_weight) * count)
    means = []
    for part in (RAW, DOCUMENT, ANSWER):
        chosen = hard * (next_parts == part)
        means.append((losses * chosen).sum() / chosen.sum().clamp(min=1.0))
    means += [(first * used).sum() / count, (first_read * used).sum() / count]
    return total, torch.stack(means).detach()


def soft_cross_entropy(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """-sum_i p_i log q_i over the candidates of each generation prompt, [batch, CHATS_PER_ROW]."""
    log_probabilities = functional.log_softmax(logits.float(), dim=-1).gather(-1, batch["soft_ids"])
    return -(batch["soft_probabilities"] * log_probabilities).sum(dim=-1)


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for embeddings and vectors, one schedule for both.

    Source: Jordan et al. 2024 (Muon); the schedule is linear warm-up, then linear decay to zero.
    """

    def __init__(self, model: nn.Module, settings: PretrainSettings) -> None:
        blocks = list(model.model.layers.named_parameters())
        matrices = [parameter for _, parameter in blocks if parameter.ndim == 2]
        inside = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        self.settings = settings
        self.muon = torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay, momentum=0.95)
        self.adam = torch.optim.AdamW(
            [{"params": [p for p in others if p.ndim == 2]}, {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}],
            lr=settings.peak_lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay,
        )

    def step(self, model: nn.Module, step: int) -> float:
        """Clip, update both, clear; returns the gradient norm before clipping."""
        factor = lr_factor(step, self.settings.warmup_steps, self.settings.steps)
        for optimizer, peak in ((self.muon, self.settings.muon_lr), (self.adam, self.settings.peak_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm


def lr_factor(step: int, warmup_steps: int, num_steps: int) -> float:
    """Share of the peak rate at a 0-based step: 1/w .. 1 during warm-up, then a line that ends at 0 after the last."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)


# --------------------------------------------------------------------------------------- validation


@torch.no_grad()
def word_precision(model: nn.Module, tokenizer, chunks: Sequence[Chunk], statistics: WordStatistics, settings: PretrainSettings) -> dict[str, float]:
    """Of the likeliest next tokens at the generation prompt, the share that begins a salient word of the document.

    As many tokens are looked at as the document has salient words (12 at most), bullet and domain left out.
    `final` reads the model's output, `read` the output of read_layer through the final norm.
    """
    hits = {"final": 0, "read": 0}
    wanted_total = 0
    bullet = tokenizer("- ")["input_ids"][0]
    model.eval()
    for chunk in chunks:
        words = [word for word, _ in salient_words(chunk.text, statistics, settings.num_words)]
        wanted = {tokenizer(word)["input_ids"][0] for word in words}
        banned = {bullet, tokenizer(observe(chunk.text, chunk.domain, statistics).kind)["input_ids"][0]} - wanted
        ids = tokenizer(chat_prompt(tokenizer, chunk.text))["input_ids"][-settings.max_positions :]
        tokens = torch.tensor([ids])
        states, read = run_blocks(model, tokens, torch.arange(len(ids))[None], torch.zeros_like(tokens), settings.read_layer)
        wanted_total += len(wanted)
        for name, last in (("final", states[0, -1]), ("read", model.model.norm(read[0, -1]))):
            logits = model.lm_head(last).float()
            logits[list(banned)] = -torch.inf
            hits[name] += len(wanted & set(logits.topk(len(wanted)).indices.tolist())) if wanted else 0
    model.train()
    return {name: count / max(1, wanted_total) for name, count in hits.items()}


# --------------------------------------------------------------------------------------------- loop


def pretrain(settings: PretrainSettings, work_dir: Path, checkpoint_dir: Path, target_dir: Path) -> None:
    """Prepare the data once, then train with one single-threaded process a core.

    Whole processes, not threads, share a step: a thread that loses its core stalls every operation of the
    other, a process only the end of the step.
    """
    if not (work_dir / "prepared").exists():
        prepare_data(settings, work_dir)
    rendezvous = work_dir / f"rendezvous-{os.getpid()}"
    arguments = (settings, work_dir, checkpoint_dir, target_dir, rendezvous)
    torch.multiprocessing.spawn(train_worker, arguments, nprocs=settings.num_processes)


def prepare_data(settings: PretrainSettings, work_dir: Path) -> None:
    """Everything the workers read: packed rows as memory-mapped arrays, tokenizer, validation texts."""
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    texts = gather_texts(settings)
    check_train_only(texts.doc_ids)
    logger.info("%d chunks, %d raw texts, %d documents", len(texts.chunks), len(texts.raw), len(texts.doc_ids))
    tokenizer = train_tokenizer(
        [text for _, text in texts.chunks] + texts.raw, vocab_size=settings.vocab_size, marker=settings.marker
    )
    chats = build_chats(texts, tokenizer, settings)
    raw = raw_segments(texts.raw, tokenizer, seed_of(settings.seed, "raw"))
    rows = pack_rows(chats, raw, settings.steps * settings.rows_per_step, settings)
    logger.info("%d chats, %d rows, token shares raw/document/answer %s", len(chats), len(rows.tokens),
                [round(float((rows.parts == part).mean()), 3) for part in (RAW, DOCUMENT, ANSWER)])
    rows.save(work_dir)
    tokenizer.save_pretrained(work_dir / "tokenizer")
    (work_dir / "texts.pickle").write_bytes(pickle.dumps(texts))
    (work_dir / "prepared").touch()


def train_worker(rank: int, settings: PretrainSettings, work_dir: Path, checkpoint_dir: Path, target_dir: Path, rendezvous: Path) -> None:
    """One process of the training; the first one logs, validates, checkpoints and installs the result."""
    from transformers import Qwen2Tokenizer

    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=settings.num_processes
    )
    texts = pickle.loads((work_dir / "texts.pickle").read_bytes())
    tokenizer = Qwen2Tokenizer.from_pretrained(work_dir / "tokenizer")
    model = build_model(settings, tokenizer)
    started = time.monotonic()
    history = _train(model, tokenizer, Rows.load(work_dir), texts, settings, checkpoint_dir, rank)
    if rank == 0:
        precision = word_precision(model, tokenizer, texts.validation, texts.statistics, settings)
        card = make_card(settings, texts, history, precision, time.monotonic() - started)
        save_model(model, tokenizer, card, checkpoint_dir)
        save_model(model, tokenizer, card, target_dir)
        logger.info("installed in %s: %s", target_dir, precision)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check_train_only(doc_ids: Sequence[str]) -> None:
    """Raise unless every document belongs to the train split."""
    strangers = [doc_id for doc_id in doc_ids if split_of(doc_id) != "train"]
    if strangers:
        raise RuntimeError(
            f"pretraining was given {len(strangers)} documents outside the train split (first: {strangers[0]}), "
            "expected none. The corpus and the split function disagree; rebuild the corpus."
        )


def _train(
    model: nn.Module, tokenizer, rows: Rows, texts: PretrainTexts, settings: PretrainSettings, checkpoint_dir: Path, rank: int
) -> list[dict]:
    optimizers = Optimizers(model, settings)
    compiled = torch.compile(training_losses, dynamic=False)
    share = settings.rows_per_step // settings.num_processes
    history: list[dict] = []
    window: list[np.ndarray] = []
    window_start = last_save = time.monotonic()
    for step in range(settings.steps):
        first = step * settings.rows_per_step + rank * share
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, means = compiled(model, rows.batch(slice(first, first + share)), settings)
        loss.backward()
        average_gradients(model, settings.num_processes)
        norm = optimizers.step(model, step)
        window.append(means.numpy())
        if (step + 1) % 20 == 0 or step + 1 == settings.steps:
            history.append(_log_window(step + 1, window, norm, time.monotonic() - window_start, settings))
            window, window_start = [], time.monotonic()
        if rank == 0 and time.monotonic() - last_save > settings.checkpoint_seconds:
            precision = word_precision(model, tokenizer, texts.validation[:60], texts.statistics, settings)
            logger.info("step %d validation precision %s", step + 1, precision)
            save_model(model, tokenizer, {"step": step + 1, "of": settings.steps, "precision": precision}, checkpoint_dir)
            last_save = window_start = time.monotonic()
    return history


def average_gradients(model: nn.Module, num_processes: int) -> None:
    """Replace each gradient by its mean over the processes, in one message."""
    if num_processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(num_processes)
    torch.distributed.all_reduce(flat)
    torch._foreach_copy_(gradients, [piece.view_as(gradient) for piece, gradient in zip(
        flat.split([gradient.numel() for gradient in gradients]), gradients, strict=True)])


def _log_window(step: int, window: list[np.ndarray], norm: float, seconds: float, settings: PretrainSettings) -> dict:
    means = np.mean(window, axis=0)
    names = (*PART_NAMES, "first", "first_read")
    entry = {"step": step, **{name: round(float(value), 4) for name, value in zip(names, means, strict=True)}}
    rate = len(window) * settings.rows_per_step * settings.row_tokens / seconds
    logger.info("step %d/%d %s grad %.2f %.0f tokens/s", step, settings.steps, entry, norm, rate)
    return entry


def make_card(settings: PretrainSettings, texts: PretrainTexts, history: list[dict], precision: dict, seconds: float) -> dict:
    """What the model is and what it was made from."""
    return {
        "what": "Qwen2-architecture chat model of the embedded default, trained to describe the user's document",
        "settings": asdict(settings),
        "num_chunks": len(texts.chunks),
        "num_documents": len(texts.doc_ids),
        "splits": ["train"],
        "doc_id_digests": [digest(doc_id) for doc_id in texts.doc_ids],
        "tokens_seen": settings.steps * settings.rows_per_step * settings.row_tokens,
        "final_losses_nats": history[-1],
        "history": history[:: max(1, len(history) // 50)],
        "validation_word_precision": precision,
        "num_validation_chunks": len(texts.validation),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }


def digest(doc_id: str) -> str:
    """Short identity of a document for the card: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(doc_id.encode()).hexdigest()[:HASHED_IDS]


def save_model(model: nn.Module, tokenizer, card: dict, target_dir: Path) -> None:
    """bf16 safetensors, tokenizer and card.json, swapped in as a whole folder."""
    staging = target_dir.with_name(target_dir.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    # The output matrix is the embedding matrix: written once.
    weights = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(staging)
    config = json.loads((staging / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (staging / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(staging)
    (staging / "card.json").write_text(json.dumps(card, indent=1))
    old = target_dir.with_name(target_dir.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target_dir.exists():
        os.rename(target_dir, old)
    os.rename(staging, target_dir)
    shutil.rmtree(old, ignore_errors=True)
