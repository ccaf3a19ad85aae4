"""Every description that a report is about: labels, controls, and what verbalizers write.

They are kept in `{verbalizer}.jsonl` files of the report's folder, which begin with the protocol
that they were generated under, are appended to and read back: an interrupted report goes on
description by description. It computes no figure. Protects the
rule that every test activation has exactly one description under every verbalizer, in the same
order, however bad.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nla_ray.activation.bank import ActivationTable
from nla_ray.activation.stage import activations_at
from nla_ray.base.adapter_files import adapter_digest
from nla_ray.base.encoding import encode_texts
from nla_ray.base.load import load_backbone, load_tokenizer
from nla_ray.base.reference import ReferenceFacts
from nla_ray.description.files import DescriptionFile
from nla_ray.description.protocol import (
    NOT_GENERATED,
    GenerationProtocol,
    checkpoint_protocol,
    generation_protocol,
    require_same_protocol,
)
from nla_ray.description.record import Description
from nla_ray.description.reference import load_verbalizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.label.stage import activation_subjects, drawn_labels
from nla_ray.report.compared import Compared, read_descriptions
from nla_ray.report.controls import (
    INJECTED,
    injected_means,
    injected_vectors,
    label_descriptions,
    nearest_train_labels,
    trained_in,
)
from nla_ray.report.differences import Differences, draw_differences
from nla_ray.report.matched import TrainWords, matched_descriptions
from nla_ray.report.reuse import OwnReport
from nla_ray.run.artifact import Run
from nla_ray.run.identity import seed_of
from nla_ray.run.manifest import Manifest
from nla_ray.score.readable import label_difference
from nla_ray.settings.config import to_dict

_CHUNK_BATCHES = 8
"""Activations handed to the engine at once, in batches.

Enough that its slots stay full, few enough that an interruption loses little.
"""

_SLOT_BATCHES = 4
"""Descriptions written at once, in batches: a step of decoding is a token of each.

Measured with nano on two threads: 256 at once take 0.74 of the time that 64 take.
"""


@dataclass(frozen=True, kw_only=True)
class Described:
    """Everything that is said of the test activations, in their order."""

    by_verbalizer: dict[str, list[Description]]
    protocols: dict[str, GenerationProtocol | None]
    """How they were generated, by verbalizer; None: that is not recorded."""
    samples: list[list[Description]]
    """Of each activation, by the arm of GRPO; empty when none were drawn."""
    differences: Differences | None
    """What is said of differences of two; None: none were asked for."""
    layers: Mapping[int, Tensor]
    """Further layer -> the activations [rows, d_model] of the same tokens there."""
    by_layer: dict[int, dict[str, list[Description]]]
    """Further layer -> what SFT and the arm say of them."""


def describe_all(
    run: Run,
    manifests: Mapping[str, Manifest],
    train: ActivationTable,
    test: ActivationTable,
    mean: Tensor,
    folder: Path,
    compared: Sequence[Compared],
    own_report: OwnReport,
    words: TrainWords,
) -> Described:
    """What labels, controls and verbalizers say of every test activation.

    Samples are drawn by the arm of GRPO, `evaluation.samples` of each activation. Adapters describe
    differences too, where some are asked for. All descriptions are written to `folder` as they
    come, or taken over from the run's own report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arm, base_digest = run.config.grpo.artifact, manifests["activations"].model["digest"]
    describer = Describer(run, base_digest, test, mean, folder, own_report)
    for name, texts in _label_controls(run, train, test, mean).items():
        describer.keep(name, texts, NOT_GENERATED)
    samples = _describe_trained(describer, run, manifests, train, test, mean)
    _describe_compared(describer, compared, test)
    as_long = describer.described[arm]
    matched = matched_descriptions(words, describer.tokenizer, test.texts, as_long)
    for name, texts in matched.items():
        describer.keep(name, texts, NOT_GENERATED)
    differences = describer.differences
    if differences is not None:
        gold = describer.described["gold"]
        differences = _with_said(differences, describer.of_two, gold, run.config.evaluation.seed)
    return Described(
        by_verbalizer=describer.described,
        protocols=describer.protocols,
        samples=samples,
        differences=differences,
        layers=describer.layers,
        by_layer=describer.by_layer,
    )


def _describe_trained(
    describer: Describer,
    run: Run,
    manifests: Mapping[str, Manifest],
    train: ActivationTable,
    test: ActivationTable,
    mean: Tensor,
) -> list[list[Description]]:
    """Describe by the run's own adapters; the arm's samples."""
    settings, arm = run.config.evaluation, run.config.grpo.artifact
    samples: list[list[Description]] = []
    for artifact in trained_in(manifests):
        injected = {artifact: test.injected}
        if artifact == "sft":
            means = injected_means(train, mean)
            injected |= {
                name: injected_vectors(name, test.ids, means, settings.seed) for name in INJECTED
            }
        neighbours = manifests[artifact].model["neighbours"]
        with run.local_copy(artifact, manifests[artifact], "adapter") as adapter:
            describer.describe(adapter, neighbours, injected, with_claims=artifact == arm)
            describer.describe_differences(adapter, neighbours, artifact)
            if artifact == arm and settings.samples:
                samples = describer.sample(
                    adapter, neighbours, f"{artifact}_samples", test.injected
                )
            if artifact in ("sft", arm):
                describer.describe_layers(adapter, neighbours, artifact)
    return samples


def _describe_compared(
    describer: Describer, compared: Sequence[Compared], test: ActivationTable
) -> None:
    """Describe by what is named on the command line."""
    for verbalizer in compared:
        name, path, manifest = verbalizer.name, verbalizer.path, verbalizer.manifest
        if verbalizer.is_file:
            texts, _ = read_descriptions(path, test.ids)
            describer.keep(name, texts, verbalizer.protocol)
        elif (facts := verbalizer.facts) is not None:
            describer.describe_whole(name, facts, verbalizer.digest, test.vectors)
        else:
            neighbours = manifest.model["neighbours"] if manifest else None
            describer.describe(path, neighbours, {name: test.injected})
            describer.describe_differences(path, neighbours, name)


def decoding(run: Run) -> Mapping[str, Any]:
    """How a report on an arm of GRPO decodes, which is how the arm sampled.

    Has `max_new_tokens`, and the `temperature` of samples. Where the arm is not trained yet: how it
    is going to sample.
    """
    arm = run.find(run.config.grpo.artifact)
    return to_dict(run.config)["grpo"] if arm is None else arm.config["grpo"]


def check_protocols(run: Run, compared: Sequence[Compared]) -> None:
    """Raise ValueError for a file of descriptions that may not be compared with the run's own."""
    files = [verbalizer for verbalizer in compared if verbalizer.is_file]
    recorded = {file.name: file.protocol for file in files if file.protocol is not None}
    if not recorded:
        return
    base, limit = run.config.base, decoding(run)["max_new_tokens"]
    ours = generation_protocol(
        base, load_tokenizer(base), max_new_tokens=limit, weights={"adapter": "of this run"}
    )
    for name, protocol in recorded.items():
        require_same_protocol((name, "the run's own"), protocol, ours)


def _label_controls(
    run: Run, train: ActivationTable, test: ActivationTable, mean: Tensor
) -> dict[str, list[str]]:
    """What the controls that need no model say of every test activation."""
    gold = drawn_labels(run, run.config.evaluation.split)
    train_labels = drawn_labels(run, "train")
    subjects = activation_subjects(run, test)
    texts = {
        name: label_descriptions(name, subjects, test.family_ids, gold, run.config.evaluation.seed)
        for name in ("gold", "shuffled", "generic")
    }
    learned_from = activation_subjects(run, train)
    nearest = nearest_train_labels(test.vectors, train.vectors, learned_from, train_labels, mean)
    return {**texts, "nearest_train_label": nearest}


def _with_said(
    differences: Differences,
    by_adapter: Mapping[str, list[str]],
    gold: Sequence[Description],
    seed: int,
) -> Differences:
    """With what adapters say of them, what only the first label does, and that of another pair."""
    labels = {
        pair_id: label_difference(gold[first].text, gold[second].text)
        for pair_id, first, second in zip(
            differences.ids, differences.firsts, differences.seconds, strict=True
        )
    }
    own, another = (
        label_descriptions(name, differences.ids, differences.family_ids, labels, seed)
        for name in ("gold", "shuffled")
    )
    said = {"gold": own, **by_adapter, "shuffled": another}
    return dataclasses.replace(differences, said=said)


def at_layer(verbalizer: str, layer: int) -> str:
    """The name of what a verbalizer says of a further layer's activations.

    >>> at_layer("sft", 2)
    'sft_layer2'
    """
    return f"{verbalizer}_layer{layer}"


class Describer:
    """Keeps files of descriptions, and makes what they lack with adapters over one loaded base."""

    def __init__(
        self,
        run: Run,
        base_digest: str,
        test: ActivationTable,
        mean: Tensor,
        folder: Path,
        own_report: OwnReport,
    ) -> None:
        """`mean`: mu. Raises ValueError for too few families, where differences are asked for."""
        settings = run.config.evaluation
        self._config, self._sampling, self._base_digest = run.config, decoding(run), base_digest
        self._ids, self._folder, self._own_report = test.ids, folder, own_report
        self.tokenizer, self._model = load_tokenizer(run.config.base), None
        self._max_slots = _SLOT_BATCHES * settings.batch_size
        self._num_tokens: dict[str, int] = {}
        self.described: dict[str, list[Description]] = {}
        """What is said of every activation, by verbalizer."""
        self.protocols: dict[str, GenerationProtocol | None] = {}
        """Of each of them."""
        self.differences = draw_differences(test, mean, settings.differences, settings.seed)
        """What adapters describe beside activations; None: none are asked for."""
        self.of_two: dict[str, list[str]] = {}
        """What adapters say of every difference."""
        self.layers = {
            layer: activations_at(run, settings.split, test, layer)
            for layer in run.config.base.further_layers
        }
        """Further layer -> the activations [rows, d_model] of the same tokens there."""
        self.by_layer: dict[int, dict[str, list[Description]]] = {}
        """Further layer -> what is said of every activation there, by verbalizer."""

    def keep(self, name: str, texts: Sequence[str], protocol: GenerationProtocol | None) -> None:
        """Write descriptions that cost nothing to make, one for each activation."""
        described = [self._described(text, closed=True) for text in texts]
        DescriptionFile(self._path(name), self._ids, protocol).write(described)
        self.described[name], self.protocols[name] = described, protocol

    def describe(
        self,
        adapter: Path,
        neighbours: Sequence[int] | None,
        injected: Mapping[str, Tensor],
        *,
        with_claims: bool = False,
    ) -> None:
        """What an adapter says, greedily, by the name of what is injected.

        `injected`: [rows, vectors, d_model], or one row for all alike. `with_claims`: with the
        log-probability of each claim.
        """
        protocol, load = self._protocol(adapter), partial(self._load, adapter, neighbours)
        for name, vectors in injected.items():
            described = self._complete(load, name, vectors, protocol, with_claims=with_claims)
            self.described[name], self.protocols[name] = described

    def describe_layers(self, adapter: Path, neighbours: Sequence[int] | None, name: str) -> None:
        """What an adapter says, greedily, of the activations of further layers."""
        for layer, vectors in self.layers.items():
            described, _ = self._complete(
                partial(self._load, adapter, neighbours),
                at_layer(name, layer),
                vectors,
                self._protocol(adapter, layer=layer),
                layer=layer,
            )
            self.by_layer.setdefault(layer, {})[name] = described

    def describe_whole(
        self, name: str, facts: ReferenceFacts, digest: str, activations: Tensor
    ) -> None:
        """What a verbalizer says that is trained whole, greedily, of activations [rows, d_model].

        `digest`: of its files. It is run in the type and by the engine of this report's base.
        """
        base = self._config.base
        prompt, _ = facts.prompt(load_tokenizer(facts.base_config()))
        protocol = checkpoint_protocol(
            base,
            facts,
            prompt,
            max_new_tokens=self._sampling["max_new_tokens"],
            weights={"checkpoint": digest},
        )
        load = partial(
            load_verbalizer,
            facts.folder,
            device=base.device,
            dtype=base.dtype,
            engine=base.engine,
            max_slots=self._max_slots,
        )
        described = self._complete(load, name, activations[:, None], protocol)
        self.described[name], self.protocols[name] = described

    def sample(
        self, adapter: Path, neighbours: Sequence[int] | None, name: str, injected: Tensor
    ) -> list[list[Description]]:
        """`evaluation.samples` seeded samples of every row, drawn as GRPO drew them."""
        count = self._config.evaluation.samples
        protocol = self._protocol(
            adapter,
            samples=count,
            temperature=self._sampling["temperature"],
            seed=seed_of(self._config.evaluation.seed, "samples"),
        )
        flat, _ = self._complete(partial(self._load, adapter, neighbours), name, injected, protocol)
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def describe_differences(
        self, adapter: Path, neighbours: Sequence[int] | None, name: str
    ) -> None:
        """What an adapter says, greedily, of differences, where there are some.

        They have files of their own, by their number.
        """
        if self.differences is None:
            return
        described, _ = self._complete(
            partial(self._load, adapter, neighbours),
            f"differences-{len(self.differences)}/{name}",
            self.differences.injected,
            self._protocol(adapter),
            ids=self.differences.ids,
        )
        self.of_two[name] = [description.text for description in described]

    def _protocol(self, adapter: Path, **decoded: Any) -> GenerationProtocol:
        return generation_protocol(
            self._config.base,
            self.tokenizer,
            max_new_tokens=self._sampling["max_new_tokens"],
            weights={"base": self._base_digest, "adapter": adapter_digest(adapter)},
            **decoded,
        )

    def _complete(
        self,
        load: Callable[[], Verbalizer],
        name: str,
        injected: Tensor,
        protocol: GenerationProtocol,
        *,
        with_claims: bool = False,
        ids: Sequence[str] | None = None,
        layer: int | None = None,
    ) -> tuple[list[Description], GenerationProtocol | None]:
        """All descriptions of a file, and how they were generated.

        What is missing is made and appended, chunk by chunk, by what `load` loads for it. `ids`: of
        what is described, where it is not the activations.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self._own_report.take_over(f"descriptions/{name}.jsonl", protocol, path)
        verbalizer: Verbalizer | None = None

        def describe(start: int, stop: int) -> list[Description]:
            nonlocal verbalizer
            verbalizer = verbalizer or load()
            is_same = len(injected) == 1
            rows = injected if is_same else injected[start:stop]
            written = verbalizer.describe_under(
                protocol, rows, start, with_claims=with_claims, layer=layer
            )
            fresh = [
                dataclasses.replace(
                    self._described(new.text, new.closed), claim_log_probs=new.claim_log_probs
                )
                for new in written
            ]
            return fresh * (stop - start) if is_same else fresh

        samples = protocol.decoding["samples"]
        chunk = max(1, self._config.evaluation.batch_size * _CHUNK_BATCHES // samples)
        file = DescriptionFile(path, self._ids if ids is None else ids, protocol)
        return file.complete(describe, chunk), file.protocol

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _load(self, adapter: Path, neighbours: Sequence[int] | None) -> Verbalizer:
        self._model = load_backbone(self._config.base) if self._model is None else self._model
        return Verbalizer.load(
            self._config.base,
            adapter,
            neighbours=neighbours,
            model=self._model,
            max_slots=self._max_slots,
        )

    def _described(self, text: str, closed: bool) -> Description:
        """A description with its length in tokens.

        Labels and controls repeat: the tokens of each text are counted once.
        """
        if text not in self._num_tokens:
            [ids] = encode_texts(self.tokenizer, [text])
            self._num_tokens[text] = len(ids)
        return Description.from_text(text, num_tokens=self._num_tokens[text], closed=closed)
