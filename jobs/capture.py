"""The activations of a run's texts, captured with Ray Data, and before them the corpus."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    *_, (_, manifest) = make_stages(run, "capture")
    metrics = manifest.metrics
    print(
        f"{metrics['activations']} activations of {metrics['texts']} texts in"
        f" {run.root / 'activations'} ({100 * metrics['padding']:.1f} % padding; left out:"
        f" {metrics['skipped'] or 'none'})"
    )


if __name__ == "__main__":
    run_job(__doc__, body)
