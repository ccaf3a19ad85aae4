"""Every stage on a random base of every family: `python jobs/benchmark.py families`.

A base of some ten thousand parameters is made for each row of the table of families, with all that
is special about its architecture: windows, experts, caps, norms of heads, fused matrices. Some
texts then go through the whole pipeline on it, and one through the verbalizer and the judge as an
endpoint reads them. What comes out says nothing of a language model and much of this code. A
stage that fails does not cost the others: its error is written in its place.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nla_ray.base.config_files import EMBEDDED_DIR
from nla_ray.base.families import FAMILIES, family_of
from nla_ray.bench.timing import RESULTS
from nla_ray.cluster.connect import connect
from nla_ray.run.artifact import Run
from nla_ray.run.stages import PIPELINE_JOB, stages_of_job
from nla_ray.serve.local import LoadedRun, run_config
from nla_ray.settings.config import (
    BaseConfig,
    ClaimConfidenceConfig,
    ComputeConfig,
    CorpusConfig,
    EvaluationConfig,
    GRPOSettings,
    LoraSettings,
    ReadableLabelsConfig,
    ReconstructorConfig,
    RefreshedScorerConfig,
    RunConfig,
    SFTConfig,
)

_TEXTS = 400
"""Documents: of them some twenty are for validation, which a choice among ten needs."""
_EXAMPLES = 64
"""Most that anything is trained on."""
_SERVED = "served"
"""The last column: one text described and scored."""
_LORA = LoraSettings(rank=4, alpha=8)


@dataclass(frozen=True, kw_only=True)
class FamilyBenchmark:
    """What `jobs/benchmark.py families` takes."""

    only: tuple[str, ...] = ()
    """Model types to run; none: all of the table."""
    output: str | None = None
    """The results file; None: `families.json` in the folder `nla_ray/bench/results`."""


def small_sizes(
    family: str, blocks: int = 3, width: int = 32, heads: int = 2, key_value_heads: int = 1
) -> dict[str, Any]:
    """Fields of a small configuration of a model type, with everything that is special about it."""
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }
    if family == "gpt2":
        return {"n_embd": width, "n_layer": blocks, "n_head": heads}
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]
    if family in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        sizes["head_dim"] = 24  # not width / heads
    if family in ("gemma2", "gemma3_text"):
        sizes["query_pre_attn_scalar"] = 24
    if family == "gemma3_text":
        sizes["sliding_window_pattern"] = 2
    if family == "smollm3":
        sizes["no_rope_layer_interval"] = 2
    if family == "qwen3_moe":
        sizes |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        }
    if family == "mixtral":
        sizes["num_local_experts"] = 4
    return sizes


def write_random_base(
    folder: Path, family: str, tokenizer: Any, *, seed: int = 0, **fields: Any
) -> None:
    """A random model of a model type with a tokenizer, by `write_model`.

    `fields`: of the configuration, over `small_sizes`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            **small_sizes(family),
            **fields,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_model(folder, AutoModelForCausalLM.from_config(config), tokenizer)


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """A new model with a tokenizer, as transformers saves them.

    Norms and biases are not what the library starts with, which would hide them.
    """
    import torch

    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_family(family: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Each stage's seconds, or its error, of one model type; Ray must be connected."""
    from transformers import AutoTokenizer

    from nla_ray.base.sources import quiet_loading

    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR / "nano_base")
        write_random_base(folder / "base", family, tokenizer)
    run = Run(_miniature(folder))
    results: dict[str, dict[str, Any]] = {}
    for name, make in _steps(run):
        started = time.perf_counter()
        try:
            make()
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            break
        results[name] = {"seconds": round(time.perf_counter() - started, 2)}
    return results


def _steps(run: Run) -> Iterator[tuple[str, Any]]:
    for stage in stages_of_job(PIPELINE_JOB):
        if stage.is_wanted(run.config):
            yield stage.name, lambda stage=stage: stage.make(run)
    yield _SERVED, lambda: _serve(run)


def _serve(run: Run) -> None:
    """One text, described and scored as an endpoint does it."""
    LoadedRun(run_config(str(run.root))).explain("def read(path):\n    return open(path).read()")


def _miniature(folder: Path) -> RunConfig:
    """Every stage with the least work."""
    scorer = ReconstructorConfig(
        lora=_LORA, epochs=1, batch_size=16, replaced_share=0.5, max_examples=_EXAMPLES
    )
    return RunConfig(
        run_dir=str(folder / "run"),
        base=BaseConfig(
            model=str(folder / "base"),
            layer=1,
            injection_norm=4.0,
            max_tokens=256,
            device="cpu",
            training_dtype="float32",
        ),
        corpus=CorpusConfig(max_chunks=_TEXTS, chunks_per_document=1),
        reward_scorer=scorer,
        judge_scorer=dataclasses.replace(scorer, document_half="odd", seed=1),
        readable_labels=ReadableLabelsConfig(least=0.0, fill_to=2),
        sft=SFTConfig(
            lora=_LORA, epochs=1, batch_size=16, claims="replaced", max_examples=_EXAMPLES
        ),
        grpo=GRPOSettings(
            steps=2,
            prompts_per_step=2,
            group_size=4,
            micro_batch_size=4,
            num_wrong=2,
            save_steps=1,
            monitor_steps=1,
            monitor_activations=24,
            max_new_tokens=16,
            soft_max_tokens=12,
            credit="line",
            beta=0.05,
        ),
        reward_scorer_refreshed=RefreshedScorerConfig(max_examples=8, max_new_tokens=16),
        claim_confidence=ClaimConfidenceConfig(samples=2, max_activations=8),
        evaluation=EvaluationConfig(
            max_activations=20,
            min_documents=5,
            bootstrap_resamples=100,
            samples=2,
            patch_rows=4,
            examples=1,
        ),
        compute=ComputeConfig(
            trainer_cpus=0.5, rollout_cpus=0.25, scorer_cpus=0.25, threads=1, zero_stage=0
        ),
    )


def describe_conformance(results: dict[str, Any]) -> Iterator[str]:
    """The table family x stage, as lines of Markdown: seconds, or `failed`."""
    rows = results["families"]
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row["stages"]))
    yield "| family | engine | adapters on | " + " | ".join(stages) + " |"
    yield "| --- " * (3 + len(stages)) + "|"
    for family, row in rows.items():
        cells = (_cell(row["stages"].get(stage)) for stage in stages)
        yield f"| {family} | {row['engine']} | {row['adapters']} | {' | '.join(cells)} |"


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    return f"{result['seconds']:.1f}" if "seconds" in result else "failed"


def benchmark_families(arguments: Sequence[str]) -> None:
    """Run what a command line asks for. Exits with status 1 where a stage failed."""
    import tyro

    settings = tyro.cli(FamilyBenchmark, args=list(arguments), description=__doc__)
    unknown = sorted(set(settings.only) - set(FAMILIES))
    if unknown:
        print(
            f"error: --only: got {', '.join(unknown)}, expected some of {', '.join(FAMILIES)}.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    output = Path(settings.output) if settings.output else RESULTS / "families.json"
    results = run_families(settings.only or tuple(FAMILIES), output)
    print("\n".join(describe_conformance(results)))
    print(f"written to {output}")
    stages = [stage for row in results["families"].values() for stage in row["stages"].values()]
    if any("error" in stage for stage in stages):
        raise SystemExit(1)


def run_families(families: Sequence[str], output: Path) -> dict[str, Any]:
    """Every stage on every one of these families, written as it comes."""
    from transformers import AutoConfig

    from nla_ray.description.engines.interface import engine_name

    results: dict[str, Any] = {"transformers": version("transformers"), "families": {}}
    with connect(ComputeConfig(threads=1)):
        for family in families:
            with tempfile.TemporaryDirectory(prefix="nla_ray_") as folder:
                stages = run_family(family, Path(folder))
                config = AutoConfig.from_pretrained(Path(folder) / "base")
            results["families"][family] = {
                "engine": engine_name(config),
                "adapters": ", ".join(family_of(config).projections),
                "stages": stages,
            }
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")
            for name, result in stages.items():
                if "error" in result:
                    print(f"{family}: {name} failed: {result['error'].splitlines()[0]}")
    return results
