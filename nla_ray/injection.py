"""An activation is a token: marker, neighbour check, virtual ids and the embedding that looks them
up.

Id `vocab_size + row` stands for row `row` of an activation bank. Ids, not tensors, then travel
through padding, shuffling, micro-batching and generation, so that a vector cannot be paired with
the wrong sample. Protects the rule: no id >= vocab_size reaches a tokenizer, a logits processor or
a saved file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from nla_ray import prompts, vectors


def marker_token(tokenizer, marker: str) -> int:
    """The marker's id. Raises ValueError unless the tokenizer makes exactly one token of it."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"marker {marker!r} is not one token: got {ids}, expected exactly one id. "
            "Choose another --base.marker for this tokenizer."
        )
    return ids[0]


def find_marker(tokenizer) -> str:
    """A marker for a tokenizer that has none yet: its rarest one-token character that keeps to
    itself in both prompts.

    Rare: of the highest id, since byte-level vocabularies are ordered by frequency. Raises
    ValueError when there is none.
    """
    for token in range(len(tokenizer) - 1, -1, -1):
        marker = tokenizer.decode([token])
        if (
            len(marker) != 1
            or marker.isascii()
            or marker == "\ufffd"
            or tokenizer.encode(marker, add_special_tokens=False) != [token]
        ):
            continue
        try:
            build_injection_prompt(tokenizer, marker)
        except ValueError:
            continue
        if tokenizer.encode(prompts.reconstructor_prompt("- a description.", marker))[-1] == token:
            return marker
    raise ValueError(
        f"marker: got no character of {len(tokenizer)} tokens that is one token in both prompts,"
        " expected at least one. Add one to the tokenizer, or choose another base."
    )


@dataclass(frozen=True, kw_only=True)
class InjectionPrompt:
    """The verbalizer's prompt as ids, cut at the marker.

    Example: prefix_ids=(1, 40, 8), marker_id=7, suffix_ids=(2, 3, 1); row 5 of a bank under
    vocab_size 100 encodes to [1, 40, 8, 105, 2, 3, 1].
    """

    prefix_ids: tuple[int, ...]
    """Before the marker: the same for every activation."""
    marker_id: int
    suffix_ids: tuple[int, ...]
    """After the marker: end of turn, generation prompt, opening tag."""

    @property
    def neighbours(self) -> tuple[int, int]:
        """Ids left and right of the marker, recorded in manifests: a changed tokenizer or template
        shows here."""
        return self.prefix_ids[-1], self.suffix_ids[0]

    def encode(self, row: int, vocab_size: int) -> list[int]:
        """The prompt with the marker replaced by the virtual id of `row`."""
        return [*self.prefix_ids, vocab_size + row, *self.suffix_ids]

    def __len__(self) -> int:
        return len(self.prefix_ids) + 1 + len(self.suffix_ids)


def build_injection_prompt(
    tokenizer, marker: str, neighbours: Sequence[int] | None = None
) -> InjectionPrompt:
    """Tokenise the verbalizer's prompt and check the marker.

    Raises ValueError when the marker does not occur exactly once, or when its neighbours differ
    from the recorded ones.
    """
    marker_id = marker_token(tokenizer, marker)
    ids = tokenizer.encode(prompts.verbalizer_prompt(tokenizer, marker), add_special_tokens=False)
    count = ids.count(marker_id)
    if count != 1:
        raise ValueError(
            f"verbalizer prompt: got {count} markers {marker!r} in {len(ids)} tokens, expected"
            " exactly 1. The chat template changes the user's turn; choose another --base.marker."
        )
    place = ids.index(marker_id)
    prompt = InjectionPrompt(
        prefix_ids=tuple(ids[:place]), marker_id=marker_id, suffix_ids=tuple(ids[place + 1 :])
    )
    if neighbours is not None and tuple(neighbours) != prompt.neighbours:
        raise ValueError(
            f"neighbours of the marker: got {prompt.neighbours}, expected {tuple(neighbours)} as"
            " recorded in the adapter's manifest. The tokenizer or template differs from the one"
            " it was trained with; load that one."
        )
    return prompt


class ActivationEmbedding(nn.Module):
    """A token embedding that also knows activations.

    `forward(ids)`: ids below vocab_size are looked up in the wrapped embedding; id `vocab_size +
    row` gives row `row` of the bank, its L2 norm made equal to the injection norm in float32 before
    it is cast to the embedding's type. The bank ([rows, d_model] float32, on CPU, may be
    memory-mapped) is neither parameter nor buffer: it is never moved, cast, sharded or saved with
    the model.
    """

    def __init__(self, embedding: nn.Embedding, bank: Tensor, injection_norm: float) -> None:
        super().__init__()
        self.embedding = embedding
        self.vocab_size = embedding.num_embeddings
        self.injection_norm = injection_norm
        self.set_bank(bank)

    def set_bank(self, bank: Tensor) -> None:
        """Replace the activations that virtual ids refer to: [rows, d_model] float32."""
        if bank.ndim != 2 or bank.shape[1] != self.embedding.embedding_dim:
            raise ValueError(
                f"activation bank: got shape {tuple(bank.shape)}, expected [rows,"
                f" {self.embedding.embedding_dim}]. The activations come from another model;"
                " capture them again."
            )
        self._bank = (bank,)  # a tuple hides it from nn.Module

    @property
    def bank(self) -> Tensor:
        return self._bank[0]

    @property
    def weight(self) -> Tensor:
        """The wrapped table: callers that tie or inspect embeddings see the ordinary one."""
        return self.embedding.weight

    @property
    def num_embeddings(self) -> int:
        return self.vocab_size

    @property
    def embedding_dim(self) -> int:
        return self.embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, seq] int64 -> [batch, seq, d_model]. Raises IndexError for a row that the bank
        does not have."""
        virtual = ids >= self.vocab_size
        embedded = self.embedding(ids.masked_fill(virtual, 0))
        if not virtual.any():
            return embedded
        rows = (ids[virtual] - self.vocab_size).to(self.bank.device)
        if int(rows.max()) >= len(self.bank):
            raise IndexError(
                f"virtual token: got row {int(rows.max())}, expected below {len(self.bank)}, the"
                " size of the activation bank. The prompts were encoded against another bank;"
                " encode them again."
            )
        injected = vectors.rescale(self.bank[rows], self.injection_norm).to(
            device=embedded.device, dtype=embedded.dtype
        )
        return embedded.masked_scatter(virtual.unsqueeze(-1), injected)


def attach_activations(model, bank: Tensor, injection_norm: float) -> ActivationEmbedding:
    """Wrap the model's input embedding so that virtual ids of `bank` can be fed; returns the
    wrapper.

    A model that is already wrapped keeps its wrapper and gets the new bank.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, ActivationEmbedding):
        embedding.set_bank(bank)
        return embedding
    wrapper = ActivationEmbedding(embedding, bank, injection_norm)
    model.set_input_embeddings(wrapper)
    return wrapper


def detach_activations(model) -> None:
    """Give the model its plain embedding back (before saving, for example)."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, ActivationEmbedding):
        model.set_input_embeddings(embedding.embedding)


@contextmanager
def activations_attached(
    model, bank: Tensor, injection_norm: float
) -> Iterator[ActivationEmbedding]:
    """`attach_activations` for the length of a with-block."""
    try:
        yield attach_activations(model, bank, injection_norm)
    finally:
        detach_activations(model)
