"""The corpus: embedded texts, or yours with `--corpus.path`; cut, split and without duplicates."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    list(make_stages(run, "corpus"))


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
