"""The corpus: texts of the embedded default, or your own with `--corpus.path`; cut, without
duplicates, split."""

from nla_ray.cluster import run_job


def body(run) -> None:
    from nla_ray.corpus.build import build_corpus

    build_corpus(run)


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
