"""The stage `base`: the small base of the embedded default, with tokenizer and card.

It prepares packed rows once, then trains with single-threaded processes that share every step, and
continues from its last checkpoint when it is run again. Protects the rule that every document it
learned from belongs to the train split, and that the card lists them all, so that a report can
prove it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn

from nla_ray.base.pretrained import digest
from nla_ray.base.sources import EMBEDDED_DIR
from nla_ray.nano.pretrain.model import (
    LOSS_NAMES,
    Optimizers,
    build_model,
    list_repeats,
    training_losses,
    word_precision,
)
from nla_ray.nano.pretrain.rows import (
    ANSWER,
    DOCUMENT,
    RAW,
    Rows,
    build_chats,
    pack_rows,
    raw_segments,
)
from nla_ray.nano.pretrain.texts import PretrainTexts, gather_texts
from nla_ray.nano.pretrain.tokenizer import train_tokenizer
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of, split_of
from nla_ray.run.log import configure_worker_logging, get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import PretrainConfig, PretrainRunConfig, require

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

logger = get_logger(__name__)


LOG_STEPS = 20
CHECK_TEXTS = 60
"""Validation texts looked at before a checkpoint."""
_METRICS = ("tokens_seen", "final_losses_nats", "validation_word_precision", "seconds")
"""Entries of the card that the manifest repeats."""
_PREPARED, _TEXTS, _STATE, _TOKENIZER = "prepared", "texts.pickle", "state.pt", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process of the training needs."""

    config: PretrainConfig
    read_layer: int
    folder: Path
    """Prepared data and checkpoints."""
    target: Path
    """Where the finished model goes."""
    rendezvous: Path


def pretrain(run: Run) -> Manifest:
    """The stage: config, bf16 weights, tokenizer and card.json. Skipped when complete.

    With `pretrain.install` the model is also copied into the package. Whole processes, not threads,
    share a step: a thread that loses its core stalls every operation of the other threads, a
    process only the end of the step.
    """
    run_config = PretrainRunConfig.of(run.config)
    install = run_config.pretrain.install
    # A copy in the package is no other model.
    config = dataclasses.replace(run_config.pretrain, install=False)
    run = Run(dataclasses.replace(run_config, pretrain=config))
    artifact = run.open("base")
    _check_shape(config, run.config.base.layer)
    manifest = artifact.manifest
    if manifest is None:
        with artifact.local_folder() as folder:
            doc_ids = _make_model(run, config, folder)
            card = json.loads((folder / "card.json").read_text())
        metrics = {name: card[name] for name in _METRICS}
        manifest = artifact.publish(documents={"train": doc_ids}, metrics=metrics)
    if install:
        with run.local_copy("base", manifest) as folder:
            install_model(folder)
    return manifest


def _make_model(run: Run, config: PretrainConfig, folder: Path) -> list[str]:
    """Prepare the data if that is not done yet, and train; returns the documents learned from."""
    work = Work(
        config=config,
        read_layer=run.config.base.layer,
        folder=folder / "scratch",
        target=folder,
        rendezvous=folder / "scratch" / f"rendezvous-{os.getpid()}",
    )
    if not (work.folder / _PREPARED).exists():
        prepare_data(gather_texts(config), config, run.config.base.marker, work.folder)
    work.rendezvous.unlink(missing_ok=True)
    spawn(pretrain_worker, (work,), nprocs=config.num_processes)
    texts: PretrainTexts = pickle.loads((work.folder / _TEXTS).read_bytes())
    return texts.doc_ids


def prepare_data(texts: PretrainTexts, config: PretrainConfig, marker: str, folder: Path) -> None:
    """Write everything the processes read: packed rows, tokenizer, texts for validation."""
    from transformers import Qwen2Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    check_train_only(texts.doc_ids)
    logger.info(
        "pretrain: %d chunks, %d raw texts, %d documents",
        len(texts.chunks),
        len(texts.raw),
        len(texts.doc_ids),
    )
    if config.start_from is None:
        learn_from = [text for _, text in texts.chunks] + texts.raw
        tokenizer = train_tokenizer(learn_from, vocab_size=config.vocab_size, marker=marker)
    else:
        tokenizer = Qwen2Tokenizer.from_pretrained(config.start_from)
    chats = build_chats(texts, tokenizer, config)
    raw = raw_segments(texts.raw, tokenizer, seed_of(config.seed, "raw"))
    rows = pack_rows(chats, raw, config.steps * config.rows_per_step, config)
    shares = {
        part: round(float((rows.parts == part).mean()), 3) for part in (RAW, DOCUMENT, ANSWER)
    }
    logger.info(
        "pretrain: %d chats, %d rows, shares of tokens (raw, document, answer) %s",
        len(chats),
        len(rows.tokens),
        tuple(shares.values()),
    )
    rows.save(folder)
    tokenizer.save_pretrained(folder / _TOKENIZER)
    (folder / _TEXTS).write_bytes(pickle.dumps(texts))
    (folder / _PREPARED).touch()


def check_train_only(doc_ids: Iterable[str]) -> None:
    """Raise RuntimeError unless every document belongs to the train split."""
    held_out = [doc_id for doc_id in doc_ids if split_of(doc_id) != "train"]
    if held_out:
        raise RuntimeError(
            f"pretraining: got {len(held_out)} documents outside the train split (first:"
            f" {held_out[0]}), expected none. The choice of documents and the split function"
            " disagree."
        )


def pretrain_worker(rank: int, work: Work) -> None:
    """A process of the training; the first logs, checkpoints, and writes the finished model."""
    from transformers import Qwen2Tokenizer

    configure_worker_logging()
    torch.set_num_threads(1)
    config = work.config
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work.rendezvous}", rank=rank, world_size=config.num_processes
    )
    texts: PretrainTexts = pickle.loads((work.folder / _TEXTS).read_bytes())
    tokenizer = Qwen2Tokenizer.from_pretrained(work.folder / _TOKENIZER)
    model = build_model(config, tokenizer)
    if config.start_from is not None:
        model.load_state_dict(
            type(model).from_pretrained(config.start_from, dtype=torch.float32).state_dict()
        )
    few = texts.validation[:CHECK_TEXTS]
    check = partial(
        word_precision, model, tokenizer, few, texts.statistics, config, work.read_layer
    )
    progress = train(model, Rows.load(work.folder), work, rank, check)
    if rank == 0:
        precision = word_precision(
            model, tokenizer, texts.validation, texts.statistics, config, work.read_layer
        )
        repeats = list_repeats(model, tokenizer, few, config)
        logger.info(
            "pretrain: done; on validation texts, precision of salient words %s, labels that repeat"
            " a word %.2f",
            precision,
            repeats,
        )
        figures = {"validation_word_precision": precision, "validation_label_repeats": repeats}
        save_model(model, tokenizer, pretrain_card(work, texts, progress, figures), work.target)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@dataclass
class Progress:
    """How far the training is: what a checkpoint keeps apart from weights and optimizers."""

    step: int
    seconds: float
    history: list[dict[str, float]]


def train(
    model: Qwen2ForCausalLM,
    rows: Rows,
    work: Work,
    rank: int,
    check: Callable[[], dict[str, float]],
) -> Progress:
    """All steps from the last checkpoint on. Every process sees its share of each step's rows.

    `check` is called, and what it returns logged, before each checkpoint.
    """
    config = work.config
    optimizers = Optimizers(model, config)
    progress = _load_state(model, optimizers, work.folder / _STATE)
    losses = torch.compile(training_losses, dynamic=False) if config.compile else training_losses
    share = config.rows_per_step // config.num_processes
    window: list[np.ndarray] = []
    started = saved = time.monotonic() - progress.seconds
    for step in range(progress.step, config.steps):
        first = step * config.rows_per_step + rank * share
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, means = losses(
                model, rows.batch(slice(first, first + share)), config, work.read_layer
            )
        loss.backward()
        average_gradients(model, config.num_processes)
        norm = optimizers.step(model, step)
        window.append(means.numpy())
        progress.step, progress.seconds = step + 1, time.monotonic() - started
        if (step + 1) % LOG_STEPS == 0 or step + 1 == config.steps:
            progress.history.append(_mean_losses(step + 1, window))
            window = []
            if rank == 0:
                logger.info(
                    "pretrain: step %d of %d, %.0f s, gradient norm %.2f, %s",
                    step + 1,
                    config.steps,
                    progress.seconds,
                    norm,
                    progress.history[-1],
                )
        if rank == 0 and time.monotonic() - saved > config.checkpoint_seconds:
            logger.info(
                "pretrain: checkpoint at step %d, precision of salient words %s", step + 1, check()
            )
            _save_state(model, optimizers, progress, work.folder / _STATE)
            saved = time.monotonic()
    return progress


def average_gradients(model: Qwen2ForCausalLM, num_processes: int) -> None:
    """Replace each gradient by its mean over the processes, in one message."""
    if num_processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(num_processes)
    torch.distributed.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _mean_losses(step: int, window: Sequence[np.ndarray]) -> dict[str, float]:
    means = np.mean(window, axis=0)
    return {
        "step": step,
        **{name: round(float(value), 4) for name, value in zip(LOSS_NAMES, means, strict=True)},
    }


def _save_state(
    model: Qwen2ForCausalLM, optimizers: Optimizers, progress: Progress, path: Path
) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizers": optimizers.state_dict(),
            "progress": asdict(progress),
        },
        temporary,
    )
    os.replace(temporary, path)


def _load_state(model: Qwen2ForCausalLM, optimizers: Optimizers, path: Path) -> Progress:
    """Put the last checkpoint into model and optimizers; without one, start at the beginning."""
    if not path.exists():
        return Progress(step=0, seconds=0.0, history=[])
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    logger.info("pretrain: going on from step %d", state["progress"]["step"])
    return Progress(**state["progress"])


def pretrain_card(
    work: Work, texts: PretrainTexts, progress: Progress, figures: dict[str, Any]
) -> dict[str, Any]:
    """What the model is and what it was made from.

    `doc_id_digests` lists every document that it or its start learned from, `twin_digests` the
    held-out documents that nearly repeat one of those.
    """
    config = work.config
    digests, twins = set(map(digest, texts.doc_ids)), set(map(digest, texts.twins))
    start = None
    if config.start_from is not None:
        start = json.loads((Path(config.start_from) / "card.json").read_text())
        digests.update(start.pop("doc_id_digests"))
        twins.update(start.pop("twin_digests"))
    return {
        "what": (
            "Qwen2-architecture chat model of the embedded default, trained to describe the user's"
            " document"
        ),
        "settings": {**asdict(config), "read_layer": work.read_layer},
        "num_chunks": len(texts.chunks),
        "num_documents": len(digests),
        "splits": ["train"],
        "tokens_seen": config.steps * config.rows_per_step * config.row_tokens,
        "final_losses_nats": progress.history[-1],
        "history": progress.history[:: max(1, len(progress.history) // 50)],
        **figures,
        "num_validation_chunks": len(texts.validation),
        "seconds": round(progress.seconds),
        "torch": torch.__version__,
        "started_from": start,
        "doc_id_digests": sorted(digests),
        "twin_digests": sorted(twins),
    }


def save_model(model: Qwen2ForCausalLM, tokenizer: Any, card: dict[str, Any], folder: Path) -> None:
    """bf16 safetensors, configuration, tokenizer and card.json into an existing folder."""
    # The output matrix is the embedding matrix: written once.
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name: value.detach().to(torch.bfloat16) for name, value in state.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n"
    )
    tokenizer.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def install_model(folder: Path) -> Path:
    """Copy a finished base into the package, whole; returns its folder there.

    The folder's README.md, which people write, stays: a test compares it with the new card.
    """
    target = EMBEDDED_DIR / "nano_base"
    staging = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(
        folder, staging, ignore=shutil.ignore_patterns("scratch", "manifest.json", "started.json")
    )
    if (target / "README.md").is_file():
        shutil.copy2(target / "README.md", staging)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(staging, target)
    return target


def _check_shape(config: PretrainConfig, read_layer: int) -> None:
    require(
        config.rows_per_step % config.num_processes == 0,
        "pretrain.rows_per_step",
        config.rows_per_step,
        f"a multiple of pretrain.num_processes ({config.num_processes})",
        "Change one of them.",
    )
    require(
        read_layer < config.num_layers,
        "base.layer",
        read_layer,
        f"a block below pretrain.num_layers ({config.num_layers})",
        "Set --base.layer.",
    )
