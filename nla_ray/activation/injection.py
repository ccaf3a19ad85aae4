"""An activation is a token: virtual ids, and the embedding that looks them up.

Id `vocab_size + row` stands for row `row` of an activation bank. Ids, not tensors, then travel
through padding, shuffling, micro-batching and generation, so that a vector cannot be paired with
the wrong sample. Protects the rule: no id >= vocab_size reaches a tokenizer, a logits processor or
a saved file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nla_ray.activation import vectors


class ActivationEmbedding(nn.Module):
    """A token embedding that also knows activations.

    `forward(ids)`: ids below vocab_size are looked up in the wrapped embedding; id `vocab_size +
    row` gives row `row` of the bank, its L2 norm made equal to the injection norm in float32 before
    it is cast to the embedding's type. The bank ([rows, d_model] float32, on CPU, may be
    memory-mapped) is neither parameter nor buffer: it is never moved, cast, sharded or saved with
    the model.
    """

    def __init__(
        self, embedding: nn.Embedding, bank: Tensor, injection_norm: float | Tensor
    ) -> None:
        """`injection_norm`: of all rows, or [rows], where they are of several layers."""
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
        """The activations that virtual ids refer to: [rows, d_model] float32."""
        return self._bank[0]

    @property
    def weight(self) -> Tensor:
        """The wrapped table: callers that tie or inspect embeddings see the ordinary one."""
        return self.embedding.weight

    @property
    def num_embeddings(self) -> int:
        """As the wrapped table has it: virtual ids do not count."""
        return self.vocab_size

    @property
    def embedding_dim(self) -> int:
        """d_model."""
        return self.embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, seq] int64 -> [batch, seq, d_model].

        Raises IndexError for a row that the bank does not have.
        """
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
        norms = self.injection_norm
        norms = norms[rows].unsqueeze(-1) if isinstance(norms, Tensor) else norms
        injected = as_embeddings(self.bank[rows], norms, like=embedded)
        return embedded.masked_scatter(virtual.unsqueeze(-1), injected)


def as_embeddings(activations: Tensor, injection_norm: float | Tensor, *, like: Tensor) -> Tensor:
    """What a model is fed in place of a token's embedding: THE injection, [..., d_model].

    Each activation's L2 norm is made equal to the injection norm, one of all or [..., 1], in
    float32, before it gets the
    type and the device of `like`. Training feeds it through ActivationEmbedding, the generation
    engine at the start of a description.
    """
    injected = vectors.rescale(activations, injection_norm)
    return injected.to(device=like.device, dtype=like.dtype)


def attach_activations(model, bank: Tensor, injection_norm: float | Tensor) -> ActivationEmbedding:
    """Wrap the model's input embedding so that it takes virtual ids of `bank`; the wrapper.

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
