"""The whole system: corpus, capture, labels, scorers, SFT, contrastive GRPO and the report."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.base.identity import base_info
    from nla_ray.report.stage import check_corpus, show_report
    from nla_ray.run.log import get_logger
    from nla_ray.run.stages import TIMINGS_NAME, make_stages, pipeline_timings

    logger = get_logger("pipeline")
    info = base_info(run.config.base)
    logger.info(
        "base %s: layer %d of %d, d_model %d, marker %r",
        info.name,
        info.layer,
        info.num_layers,
        info.d_model,
        info.marker,
    )
    for stage, _ in make_stages(run, "pipeline", strict=True):
        if stage.name == "corpus":
            check_corpus(run)
    show_report(run)
    seconds = sum(pipeline_timings(run).values())
    logger.info("all stages together: %.1f s (%s)", seconds, run.root / TIMINGS_NAME)


if __name__ == "__main__":
    run_job(__doc__, body)
