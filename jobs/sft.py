"""Train both reconstructors, the linear one and the verbalizer's SFT from a run's activations and
labels."""

from nla_ray.cluster import run_job


def body(run) -> None:
    from nla_ray.training.linear import fit_linear_scorer
    from nla_ray.training.reconstruction import train_scorer
    from nla_ray.training.sft import train_sft

    for manifest in (
        train_scorer(run, "reward_scorer"),
        train_scorer(run, "judge_scorer"),
        fit_linear_scorer(run),
        train_sft(run),
    ):
        figures = ", ".join(
            f"{name} {value:.4g}" for name, value in sorted(manifest.metrics.items())
        )
        print(f"{run.root / manifest.name}: {figures}")


if __name__ == "__main__":
    run_job(__doc__, body)
