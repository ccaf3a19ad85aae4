"""What every scorer reads in every text: one reconstruction a text and scorer.

It does not know which verbalizer wrote a text. The scorers share one loaded base. What a scorer has
read is kept in the report's folder until the report is published, so that an interrupted evaluation
reads nothing twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nla_ray.report.controls import SCORERS, artifact_of
from nla_ray.run.artifact import Run
from nla_ray.run.log import stage_progress
from nla_ray.run.manifest import Manifest
from nla_ray.score.linear import LinearReconstructor
from nla_ray.score.reconstructor import Reconstructor

_CHUNK_BATCHES = 8
"""Texts that are read between two updates of progress, in batches."""


class Readings:
    """Reconstructions of texts by scorer."""

    def __init__(self, texts: Sequence[str], by_scorer: Mapping[str, Tensor]) -> None:
        """`texts`: each once; `by_scorer`: [texts, d_model] in their order."""
        self._row_of_text = {text: row for row, text in enumerate(texts)}
        self._by_scorer = dict(by_scorer)

    @property
    def scorers(self) -> list[str]:
        """Who has read the texts."""
        return list(self._by_scorer)

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether every one of these texts was read."""
        return all(text in self._row_of_text for text in texts)

    def of(self, scorer: str, texts: Sequence[str]) -> Tensor:
        """[len(texts), d_model], in the order given."""
        rows = torch.tensor([self._row_of_text[text] for text in texts], dtype=torch.int64)
        return self._by_scorer[scorer][rows]


def reconstruct_texts(
    run: Run,
    manifests: Mapping[str, Manifest],
    texts: Iterable[str],
    scratch: Path,
    scorers: Sequence[str] = SCORERS,
) -> Readings:
    """The scorers' reconstructions of every text. `scratch`: a folder for what is read already."""
    # Sorted: texts that begin alike stand together, and a reconstructor reads their beginning once.
    unique = sorted(set(texts))
    digest = hashlib.sha256("\0".join(unique).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    scratch.mkdir(parents=True, exist_ok=True)
    by_scorer: dict[str, Tensor] = {}
    model = None
    with stage_progress("reconstruct", len(scorers) * len(unique)) as advance:
        for scorer in scorers:
            file = scratch / f"{scorer}-{digest}.safetensors"
            if file.is_file():
                by_scorer[scorer] = load_file(file)["read"]
                advance(len(unique), scorer)
                continue
            reconstructor = _load(run, manifests, scorer, model)
            model = reconstructor.model
            parts = []
            batch_size = run.config.evaluation.batch_size
            chunk = _CHUNK_BATCHES * batch_size
            for start in range(0, len(unique), chunk):
                parts.append(reconstructor.reconstruct(unique[start : start + chunk], batch_size))
                advance(len(parts[-1]), scorer)
            by_scorer[scorer] = torch.cat(parts)
            temporary = file.with_suffix(".tmp")
            save_file({"read": by_scorer[scorer]}, temporary)
            temporary.replace(file)
    return Readings(unique, by_scorer)


def _load(
    run: Run, manifests: Mapping[str, Manifest], scorer: str, model
) -> Reconstructor | LinearReconstructor:
    artifact = artifact_of(scorer)
    with run.local_copy(artifact, manifests[artifact]) as folder:
        if scorer == "linear":
            return LinearReconstructor.load(run.config.base, folder, model=model)
        return Reconstructor.load(run.config.base, folder, adapter=scorer, model=model)
