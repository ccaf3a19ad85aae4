"""A run in which everything GRPO is made from lies ready, published by hand in about two seconds:
random activations of random documents, an SFT adapter and two scorers with random weights, all over
the tiny base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny import plain_nano

from nla_ray.activation import vectors
from nla_ray.activation.bank import activation_id, activation_schema
from nla_ray.base.adapters import add_lora, save_adapter
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_backbone
from nla_ray.run.artifact import Run
from nla_ray.run.identity import Split, split_of
from nla_ray.run.manifest import Manifest
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.settings.config import (
    BaseConfig,
    ComputeConfig,
    GRPOSettings,
    LoraSettings,
    ReconstructorConfig,
    RunConfig,
    SFTConfig,
)

LORA = LoraSettings(rank=4, alpha=8)
SETTINGS = GRPOSettings(
    steps=4,
    prompts_per_step=2,
    group_size=4,
    micro_batch_size=4,
    num_wrong=3,
    max_new_tokens=8,
    soft_max_tokens=6,
    learning_rate=1e-2,
    beta=0.05,
    save_steps=2,
    monitor_steps=2,
    monitor_activations=12,
)
TEXT = "def read(path):\n    with open(path) as file:\n        assert file.rows == 3\n"


def grpo_config(
    base: BaseConfig,
    run_dir: Path | str,
    *,
    zero_stage: int = 0,
    trainer_workers: int = 1,
    **settings: object,
) -> RunConfig:
    """Four steps of eight rollouts, a checkpoint and a reading after the second and the fourth."""
    scorer = ReconstructorConfig(lora=LORA, document_half="even", max_tokens=24, batch_size=8)
    return dataclasses.replace(
        plain_nano(),
        run_dir=str(run_dir),
        base=base,
        sft=SFTConfig(lora=LORA),
        grpo=dataclasses.replace(SETTINGS, **settings),
        reward_scorer=scorer,
        judge_scorer=dataclasses.replace(scorer, document_half="odd"),
        compute=ComputeConfig(
            threads=1, trainer_cpus=0.5, zero_stage=zero_stage, trainer_workers=trainer_workers
        ),
    )


def prepare_run(config: RunConfig) -> Run:
    """Publish activations, sft, reward_scorer and judge_scorer into the run's folder."""
    run = Run(config)
    corpus = run.open_artifact("corpus", "corpus").publish()
    activations = _publish_activations(run, corpus)
    parents = {
        "activations": activations,
        "labels": run.open_artifact("labels", "label", parents={"corpus": corpus}).publish(),
    }
    _publish_sft(run, parents)
    for seed, name in enumerate(("reward_scorer", "judge_scorer")):
        _publish_scorer(run, name, parents, seed)
    return run


def documents(split: Split, count: int) -> list[str]:
    """The first `count` names doc-N whose hash puts them into a split."""
    names = (f"doc-{number}" for number in range(100_000))
    return [name for name in names if split_of(name) == split][:count]


def _publish_activations(run: Run, corpus: Manifest) -> Manifest:
    stage = run.open_artifact("activations", "base", "capture", parents={"corpus": corpus})
    info = base_info(run.config.base)
    generator = torch.Generator().manual_seed(0)
    mean = 3.0 * torch.randn(info.d_model, generator=generator)
    rows, train = [], []
    for split, count in (("train", 12), ("validation", 8), ("test", 2)):
        for doc_id in documents(split, count):
            for text_id in (f"{doc_id}#0", f"{doc_id}#1"):
                vector = mean + torch.randn(info.d_model, generator=generator)
                train += [vector] if split == "train" else []
                rows.append(
                    {
                        "activation_id": activation_id(text_id, info.layer, 9),
                        "text_id": text_id,
                        "doc_id": doc_id,
                        "split": split,
                        "domain": "prose",
                        "text": TEXT,
                        "position": 9,
                        "token": 1,
                        "layer": info.layer,
                        "activation": vector.tolist(),
                    }
                )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=activation_schema(info.d_model)), sink)
    (stage.location / "part-00000.parquet").write_bytes(sink.getvalue().to_pybytes())
    stats = {
        "mean_direction": vectors.mean_direction(torch.stack(train)).tolist(),
        "count": len(train),
    }
    (stage.location / "stats.json").write_text(json.dumps({"layers": {str(info.layer): stats}}))
    return stage.publish(documents={"train": documents("train", 12)}, model=info.to_dict())


def random_adapter(base: BaseConfig, seed: int = 7):
    """The tiny base with an adapter that changes it: both factors are random."""
    model = add_lora(load_backbone(base), LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def _publish_sft(run: Run, parents: dict[str, Manifest]) -> Manifest:
    stage = run.open_artifact("sft", "base", "sft", parents=parents)
    with stage.local_folder() as folder:
        save_adapter(random_adapter(run.config.base), folder / "adapter")
    return stage.publish(
        documents={"train": documents("train", 12)}, model=base_info(run.config.base).to_dict()
    )


def _publish_scorer(run: Run, name: str, parents: dict[str, Manifest], seed: int) -> Manifest:
    stage = run.open_artifact(name, "base", name, parents=parents)
    stats = json.loads((run.root / "activations" / "stats.json").read_text())
    mean = torch.tensor(stats["layers"][str(run.config.base.layer)]["mean_direction"])
    reconstructor = Reconstructor.build(run.config.base, LORA, mean, max_tokens=24, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    reconstructor.head.weight.data = 0.02 * torch.randn(
        reconstructor.head.weight.shape, generator=generator
    )
    with stage.local_folder() as folder:
        reconstructor.save(folder)
    return stage.publish(
        documents={"train": documents("train", 12)[seed::2]},
        model=base_info(run.config.base).to_dict(),
    )
