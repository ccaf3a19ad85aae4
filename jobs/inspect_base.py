"""Look at a base model before training on it: its marker, its norms, and how well labels can tell
the activations of several layers."""

from nla_ray.cluster import run_job


def body(run) -> None:
    from nla_ray.inspection import describe_inspection, inspect_base
    from nla_ray.runlog import INSPECTION_NAME

    for line in describe_inspection(inspect_base(run)):
        print(line)
    print(f"written to {run.root / INSPECTION_NAME}")


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
