"""nla_ray: natural language autoencoders on Ray. Reads activations in plain words, and checks them.

The tour: one text becomes an activation, a description and a score in ten steps.
`jobs/tour.py` takes them for one text of a finished run and prints what every step makes.

 1. A document is cut into chunks; its id is its split. text/stage.py::build_corpus
 2. A chunk becomes a chat prompt and a position.       activation/positions.py::TextEncoder
 3. Blocks 0..K leave an activation there: v [d_model]. activation/capture.py::ActivationReader
 4. Teachers describe the chunk in bullets: a label.    label/stage.py::label_texts
 5. v is injected as a token, at the injection norm.    activation/injection.py::as_embeddings
 6. SFT teaches an adapter to write labels after it.    training/sft.py::train_sft
 7. The verbalizer says what it reads: a description.   description/verbalizer.py::Verbalizer
 8. A reconstructor reads it and makes a vector: r.     score/reconstructor.py::Reconstructor
 9. The score: cosine(r, v) against cosine(r, others).  score/scorer.py::compare
10. GRPO pays score(right) less score(wrong).           reinforce/rewards.py::contrast

For answers instead of the tour:

    loaded = nla_ray.load("runs/nano")
    loaded.describe(["def add(a, b): return a + b"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nla_ray.serve.local import LoadedRun

__version__ = "0.1.0"


def load(run_dir: str) -> LoadedRun:
    """A finished run, ready to `describe`, `score` and `explain` in this process.

    `run_dir`: a folder or URI that holds the run's artifacts. Raises ValueError for a run without
    a verbalizer or scorers.
    """
    from nla_ray.serve.local import LoadedRun, run_config

    return LoadedRun(run_config(run_dir))
