"""The verbalizer's SFT and the three scorers, and before them whatever they are made from."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    for stage, manifest in make_stages(run, "sft"):
        if stage.job == "sft":
            metrics = sorted(manifest.metrics.items())
            figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics)
            print(f"{run.root / manifest.name}: {figures}")


if __name__ == "__main__":
    run_job(__doc__, body)
