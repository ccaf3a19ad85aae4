"""The plan of a job as text: its base, then its stages in the order of the table.

Figures come from the formulas; what an artifact on disk tells already (rows) is read from it.
Protects the rule that a plan refuses what the job would refuse, by the job's own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nla_ray.base.config_files import local_file
from nla_ray.base.families import check_layer
from nla_ray.base.prompts import marker_token
from nla_ray.plan.facts import PlanFacts, Processes, StagePlan
from nla_ray.plan.formulas import FORMULAS
from nla_ray.plan.units import format_bytes, format_seconds
from nla_ray.run.artifact import Run
from nla_ray.run.stages import INSPECTION_JOB, Stage, is_superfluous, stages_of_job, steps_of_job
from nla_ray.settings.config import RunConfig
from nla_ray.settings.fit import check_stage


def describe_plan(config: RunConfig, job: str) -> str:
    """The plan of a job as text.

    Raises ValueError when a file that the configuration names is missing, when the sizes of the
    base cannot be known, and for a base, a layer, a marker or a batch that the job would refuse.
    """
    run, stages = Run(config), [stage for stage in stages_of_job(job) if stage.is_wanted(config)]
    _require_files(run)
    facts = PlanFacts.of(run)
    lines = [
        f"plan of {job!r}, preset {config.preset}, run directory {run.root} (nothing is started)"
    ]
    if not stages or any("base" in stage.sections or stage.kind is None for stage in stages):
        _require_base(facts, job)
        lines += _base_lines(facts)
    lines.append(
        f"  {facts.texts:,} texts{'' if facts.texts_counted else ' at most'}, about"
        f" {facts.text_tokens:.0f} tokens each; ZeRO stage {config.compute.zero_stage},"
        f" {config.compute.trainer_workers} trainer workers"
    )
    if not stages:
        lines.append("  nothing is made: the job reads what a run holds")
    for stage, made_for in steps_of_job(run, job):
        artifact = stage.artifact_of_job(job, made_for.config)
        title = stage.name if made_for is run else artifact
        skipped = _reason_to_skip(run, artifact, stage, stages)
        if not skipped:
            check_stage(made_for.config, stage.name)
        lines.append(f"{title}{skipped}")
        lines += _stage_lines(FORMULAS[stage.name](facts), facts)
    return "\n".join(lines)


def _reason_to_skip(run: Run, artifact: str, stage: Stage, stages: Sequence[Stage]) -> str:
    """What follows the name of a stage that the job does not make; the empty string for others."""
    if run.find(artifact) is not None:
        return "  (complete: skipped)"
    if is_superfluous(run, stage, stages):
        return "  (what is made from it exists already: skipped)"
    return ""


def _require_files(run: Run) -> None:
    for artifact, flag, path in (
        ("corpus", "--corpus.path", run.config.corpus.path),
        ("labels", "--label.import-path", run.config.label.import_path),
    ):
        if path is not None and run.find(artifact) is None and not Path(path).expanduser().exists():
            raise ValueError(
                f"{flag} {path}: got nothing there, expected a file or a folder. Correct the path."
            )


def _require_base(facts: PlanFacts, job: str) -> None:
    """Raise the error that the job would raise: for the base, a layer of it, or the marker."""
    config, num_layers = facts.config, facts.sizes.num_layers
    for layer in config.capture.layers:
        check_layer(layer, num_layers, "capture.layers")
    if job == INSPECTION_JOB:  # it proposes a layer and a marker
        return
    check_layer(config.base.layer, num_layers)
    tokenizer = local_file(config.base.model, "tokenizer.json")
    if tokenizer is not None:
        marker_token(_TokenizerFile(tokenizer), config.base.marker)


class _TokenizerFile:
    """A tokenizer as `marker_token` asks it; transformers' own would import torch."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(path))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def convert_ids_to_tokens(self, token: int) -> str:
        return self._tokenizer.id_to_token(token)


def _base_lines(facts: PlanFacts) -> list[str]:
    base, sizes = facts.config.base, facts.sizes
    depth = (base.layer + 1) / sizes.num_layers
    below = sizes.parameters_up_to(base.layer)
    packed = ""
    if sizes.quantisation is not None:
        weights = format_bytes(facts.weights_bytes())
        packed = f", matrices of {sizes.quantisation.bits} bits, {weights} in all"
    return [
        f"  base {base.model}: {sizes.parameters / 1e9:.3g} billion parameters,"
        f" {sizes.num_layers} blocks, d_model {sizes.d_model}, {base.dtype}{packed}",
        f"  layer {base.layer} ({depth:.0%} depth), injection norm {base.injection_norm:g};"
        f" {below / 1e9:.3g} billion parameters up to there",
        *(
            f"  further layer {layer}, injection norm {base.norm_of(layer):g}"
            for layer in base.further_layers
        ),
    ]


def _memory(process: Processes) -> str:
    """`29.4 GB GPU memory each (42.4 GB while weights change), 18.2 GB host memory each`."""
    name = "GPU memory" if process.on_gpu else "memory"
    if process.gpus > 1:
        name += f" on {process.gpus:g} GPUs"
    memory = f"{format_bytes(process.bytes)} {name} each"
    if process.changing_bytes:
        most = process.bytes + process.changing_bytes
        memory += f" ({format_bytes(most)} while weights change)"
    if process.on_gpu:
        memory += f", {format_bytes(process.host_bytes)} host memory each"
    return memory


def _gpus(processes: Sequence[Processes]) -> str | None:
    """How many GPUs of which memory are enough for these processes, which run at the same time.

    None: they ask for none.

    Processes with parts of a GPU may meet on any: each then needs no more than its part of it,
    unless one GPU holds them all.
    """
    on_gpu = [process for process in processes if process.on_gpu]
    if not on_gpu:
        return None
    booked = sum(process.count * process.gpus for process in on_gpu)
    most = [(process, process.bytes + process.changing_bytes) for process in on_gpu]
    if booked <= 1:
        return f"1 with {format_bytes(sum(process.count * size for process, size in most))} is"
    number = 0
    for process in on_gpu:
        on_one = max(1, int(1 / process.gpus + 1e-9))
        number += -(-process.count // on_one) * max(1, int(process.gpus))
    size = max(size / min(1.0, process.gpus) for process, size in most)
    return f"{number} with {format_bytes(size)} each are"


def _stage_lines(plan: StagePlan, facts: PlanFacts) -> list[str]:
    lines = []
    for process in plan.processes:
        amounts = [f"{amount:g} {name}" for name, amount in process.resources.items()]
        lines.append(
            f"  processes  {process.count} x {process.kind}:"
            f" {', '.join(amounts) or 'no resources of Ray'}; about {_memory(process)}"
        )
    gpus = _gpus(plan.processes)
    if gpus is not None:
        lines.append(f"  GPUs       {gpus} enough")
    if plan.tokens:
        workers = plan.processes[0]
        speed = facts.flops_per_second(workers)
        seconds = plan.flops / (speed * workers.count)
        lines += [
            f"  work       {plan.tokens:,.0f} tokens, {plan.flops:.2g} FLOP",
            f"  time       about {format_seconds(seconds)} at {speed:.2g} FLOP/s in each of"
            f" {workers.count} x {workers.kind}",
        ]
    return [*lines, *plan.lines, f"  files      {plan.files}"]
