"""A look at a base before training: its marker, its norms, and the ceiling of each layer."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import INSPECTION_NAME
    from nla_ray.score.ceiling import describe_inspection
    from nla_ray.score.stage import inspect_base

    for line in describe_inspection(inspect_base(run)):
        print(line)
    print(f"written to {run.root / INSPECTION_NAME}")


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
