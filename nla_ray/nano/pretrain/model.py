"""The small base: its architecture, loss and optimizers, and how well it names a document's words.

Knows tensors and packed rows; files, processes and documents are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nla_ray.base.prompts import chat_prompt
from nla_ray.nano.offline_teachers import observe
from nla_ray.nano.pretrain.rows import ANSWER, CHATS_PER_ROW, DOCUMENT, RAW
from nla_ray.settings.config import PretrainConfig
from nla_ray.text.chunks import Chunk
from nla_ray.text.words import WordStatistics, salient_words

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

LOSS_NAMES = ("raw", "document", "answer", "first", "first_read", "next_word")
"""Plain means in nats: next token in raw text, in documents and in answers; the soft target at
generation prompts, final and at the read layer; the soft target inside word lists."""
MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
CLIP_NORM = 1.0


def build_model(config: PretrainConfig, tokenizer: Any) -> Qwen2ForCausalLM:
    """A Qwen2-architecture model in float32 with tied embeddings and seeded weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(config.seed)
    architecture = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        attn_implementation="sdpa",
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(architecture)


def run_blocks(
    model: Qwen2ForCausalLM, tokens: Tensor, positions: Tensor, segments: Tensor, read_layer: int
) -> tuple[Tensor, Tensor]:
    """States after the final norm and the output of block `read_layer`: both [batch, seq, d_model].

    All three inputs are [batch, seq]; a token sees the earlier tokens of its segment only.
    """
    body, seq = model.model, tokens.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    mask = same & torch.ones(seq, seq, dtype=torch.bool, device=tokens.device).tril()
    states = body.embed_tokens(tokens)
    rotary = body.rotary_emb(states, positions)
    read = states
    for index, block in enumerate(body.layers):
        states = block(
            states, attention_mask=mask, position_ids=positions, position_embeddings=rotary
        )
        if index == read_layer:
            read = states
    return final_norm(model)(states), read


def final_norm(model: Qwen2ForCausalLM) -> nn.Module:
    """The norm before the output matrix."""
    return model.model.norm


def training_losses(
    model: Qwen2ForCausalLM, batch: dict[str, Tensor], config: PretrainConfig, read_layer: int
) -> tuple[Tensor, Tensor]:
    """The weighted loss, and the plain means of LOSS_NAMES [6].

    At a generation prompt the soft target replaces the next token. It counts twice, for the model's
    output and for the output of `read_layer`, so that what the activation holds can be read from it
    directly.
    """
    states, read = run_blocks(
        model, batch["tokens"], batch["positions"], batch["segments"], read_layer
    )
    targets, parts = batch["tokens"][:, 1:], batch["parts"][:, 1:]
    used = batch["soft_positions"] >= 0
    at = batch["soft_positions"].clamp(min=0)
    within = (batch["segments"][:, 1:] == batch["segments"][:, :-1]).float()
    hard = within.scatter_add(1, at, -used.float()).clamp(min=0.0)
    logits = model.lm_head(states[:, :-1]).float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    weights = hard * torch.where(parts == ANSWER, config.answer_weight, 1.0)
    row = torch.arange(at.shape[0], device=at.device)[:, None]
    soft = soft_cross_entropy(model.lm_head(states[row, at]), batch) * used
    soft_read = soft_cross_entropy(
        model.lm_head(final_norm(model)(read[row, at[:, :CHATS_PER_ROW]])), batch
    )
    first, next_word = soft[:, :CHATS_PER_ROW].sum(), soft[:, CHATS_PER_ROW:].sum()
    first_read = (soft_read * used[:, :CHATS_PER_ROW]).sum()
    num_prompts = used[:, :CHATS_PER_ROW].sum().clamp(min=1)
    num_inside = used[:, CHATS_PER_ROW:].sum()
    total = (losses * weights).sum() + config.boundary_weight * next_word
    total = total + config.prompt_weight * first + config.read_weight * first_read
    soft_weight = (config.prompt_weight + config.read_weight) * num_prompts
    soft_weight = soft_weight + config.boundary_weight * num_inside
    total = total / (weights.sum() + soft_weight)
    chosen = [hard * (parts == part) for part in (RAW, DOCUMENT, ANSWER)]
    means = [(losses * mask).sum() / mask.sum().clamp(min=1.0) for mask in chosen]
    means += [first / num_prompts, first_read / num_prompts, next_word / num_inside.clamp(min=1)]
    return total, torch.stack(means).detach()


def soft_cross_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """-sum_i p_i log q_i over a target's candidates: [batch, slots, vocab] -> [batch, slots].

    The first `slots` soft targets of the batch are taken.
    """
    slots = logits.shape[1]
    log_probabilities = functional.log_softmax(logits.float(), dim=-1).gather(
        -1, batch["soft_ids"][:, :slots]
    )
    return -(batch["soft_probabilities"][:, :slots] * log_probabilities).sum(dim=-1)


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for embeddings and vectors, one schedule for both.

    Source: Jordan et al. 2024 (Muon).
    """

    def __init__(self, model: Qwen2ForCausalLM, config: PretrainConfig) -> None:
        self.config = config
        matrices = [
            parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2
        ]
        inside = {id(parameter) for parameter in matrices}
        outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        decayed = {"params": [parameter for parameter in outside if parameter.ndim == 2]}
        vectors = [parameter for parameter in outside if parameter.ndim < 2]
        self.muon = torch.optim.Muon(
            matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=MUON_MOMENTUM
        )
        self.adam = torch.optim.AdamW(
            [decayed, {"params": vectors, "weight_decay": 0.0}],
            lr=config.peak_lr,
            betas=ADAM_BETAS,
            weight_decay=config.weight_decay,
        )

    def step(self, model: Qwen2ForCausalLM, step: int) -> float:
        """Clip, update and clear; returns the norm before clipping. `step` counts from 0."""
        factor = lr_factor(step, self.config.warmup_steps, self.config.steps)
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item()
        for optimizer, peak in ((self.muon, self.config.muon_lr), (self.adam, self.config.peak_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def lr_factor(step: int, warmup_steps: int, num_steps: int) -> float:
    """Share of the peak rate: a rising line over the warm-up, then a line that falls to 0.

    It would reach 0 after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)


@torch.no_grad()
def list_repeats(
    model: Qwen2ForCausalLM,
    tokenizer: Any,
    chunks: Sequence[Chunk],
    config: PretrainConfig,
    max_tokens: int = 48,
) -> float:
    """Share of greedily written labels, begun by their bullet, that list a word twice."""
    repeats = 0
    for chunk in chunks:
        prompt = tokenizer(chat_prompt(tokenizer, chunk.text))["input_ids"][
            -(config.max_positions - max_tokens) :
        ]
        tokens = torch.tensor([[*prompt, *tokenizer("-")["input_ids"]]])
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        lines = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True).splitlines()
        lists = [line.partition(": ")[2].split(", ") for line in lines]
        repeats += any(len(words) != len(set(words)) for words in lists)
    return repeats / max(1, len(chunks))


@torch.no_grad()
def word_precision(
    model: Qwen2ForCausalLM,
    tokenizer: Any,
    chunks: Sequence[Chunk],
    statistics: WordStatistics,
    config: PretrainConfig,
    read_layer: int,
) -> dict[str, float]:
    """Share of the likeliest next tokens at the generation prompt that begin a salient word.

    As many tokens are looked at as the document has salient words (`num_words` at most); bullet and
    domain are left out. `final` reads the model's output, `read` the output of `read_layer` through
    the final norm.
    """
    hits = {"final": 0, "read": 0}
    num_wanted = 0
    bullet = tokenizer("- ")["input_ids"][0]
    for chunk in chunks:
        words = [word for word, _ in salient_words(chunk.text, statistics, config.num_words)]
        wanted = {tokenizer(word)["input_ids"][0] for word in words}
        kind = observe(chunk.text, chunk.domain, statistics).kind
        banned = {bullet, tokenizer(kind)["input_ids"][0]} - wanted
        ids = tokenizer(chat_prompt(tokenizer, chunk.text))["input_ids"][-config.max_positions :]
        tokens = torch.tensor([ids])
        states, read = run_blocks(
            model, tokens, torch.arange(len(ids))[None], torch.zeros_like(tokens), read_layer
        )
        num_wanted += len(wanted)
        for name, last in (("final", states[0, -1]), ("read", final_norm(model)(read[0, -1]))):
            logits = model.lm_head(last).float()
            logits[list(banned)] = -torch.inf
            likeliest = logits.topk(len(wanted)).indices.tolist() if wanted else []
            hits[name] += len(wanted & set(likeliest))
    return {name: count / max(1, num_wanted) for name, count in hits.items()}
