"""The report on test documents, and whatever it is made from: figures, controls and gates."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.report.stage import check_corpus, show_report
    from nla_ray.run.stages import make_stages

    for stage, _ in make_stages(run, "evaluate"):
        if stage.name == "corpus":
            check_corpus(run)
    show_report(run)


if __name__ == "__main__":
    run_job(__doc__, body)
