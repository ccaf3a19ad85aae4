"""The report on test documents: figures with intervals, controls, gates. `--gate` exits non-zero on
a failed gate."""

from nla_ray.cluster import run_job


def body(run) -> None:
    from nla_ray.evaluation.report import evaluate, show_report

    evaluate(run)
    show_report(run)


if __name__ == "__main__":
    run_job(__doc__, body)
