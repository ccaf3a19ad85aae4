"""The whole system: corpus, capture, labels, reconstructors, SFT, contrastive GRPO and the report,
in one command."""

import json
import time
from importlib import import_module

from nla_ray.cluster import run_job
from nla_ray.runlog import get_logger

STAGES = (
    ("corpus", "nla_ray.corpus.build", "build_corpus"),
    ("activations", "nla_ray.activations", "capture_activations"),
    ("labels", "nla_ray.labels.stage", "label_texts"),
    ("reward_scorer", "nla_ray.training.reconstruction", "train_scorer"),
    ("judge_scorer", "nla_ray.training.reconstruction", "train_scorer"),
    ("linear_scorer", "nla_ray.training.linear", "fit_linear_scorer"),
    ("sft", "nla_ray.training.sft", "train_sft"),
    ("grpo", "nla_ray.training.grpo", "train_grpo"),
    ("report", "nla_ray.evaluation.report", "evaluate"),
)
logger = get_logger("pipeline")


def body(run) -> None:
    from nla_ray.evaluation.report import check_corpus, show_report
    from nla_ray.models.backbone import base_info, load_model_config
    from nla_ray.models.decoder import decoder_shape

    info = base_info(run.config.base)
    decoder_shape(
        load_model_config(run.config.base)
    )  # what the engine cannot run is refused now, not after the capture
    logger.info(
        "base %s: layer %d of %d, d_model %d, marker %r",
        info.name,
        info.layer,
        info.num_layers,
        info.d_model,
        info.marker,
    )
    place = run.root / "timings.json"
    timings = json.loads(place.read_text()) if place.exists() else {}
    for number, (name, module, function) in enumerate(STAGES, 1):
        artifact = {
            "sft": run.config.sft.artifact,
            "grpo": run.config.grpo.artifact,
            "report": run.config.report_artifact,
        }.get(name, name)
        complete, started = run.find(artifact) is not None, time.monotonic()
        logger.info("[%d/%d] %s%s", number, len(STAGES), name, ": complete" if complete else "")
        make = getattr(import_module(module), function)
        make(run, name) if function == "train_scorer" else make(run)
        if name == "corpus":
            check_corpus(run)
        seconds = round(time.monotonic() - started, 1)
        if not complete:  # of an interrupted stage this is the attempt that completed it
            timings[artifact] = seconds
            place.write_text(json.dumps(timings, indent=1) + "\n")
            logger.info("[%d/%d] %s: %.1f s", number, len(STAGES), name, seconds)
    show_report(run)
    logger.info("all stages together: %.1f s (%s)", sum(timings.values()), place)


if __name__ == "__main__":
    run_job(__doc__, body)
