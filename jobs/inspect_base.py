"""A look at a base before training: its marker, its norms, and the ceiling of each layer."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.base.families import decoder_shape
    from nla_ray.base.load import load_model_config
    from nla_ray.run.stages import INSPECTION_NAME, make_stages
    from nla_ray.score.ceiling import describe_inspection

    # What the engine cannot run is not worth an inspection.
    decoder_shape(load_model_config(run.config.base))
    *_, (_, results) = make_stages(run, "inspect_base", strict=True)
    for line in describe_inspection(results):
        print(line)
    print(f"written to {run.root / INSPECTION_NAME}")


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
