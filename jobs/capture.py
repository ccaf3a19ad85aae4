"""Capture the activations of a run's corpus."""

from nla_ray.cluster import run_job


def body(run) -> None:
    from nla_ray.activations import capture_activations

    manifest = capture_activations(run)
    metrics = manifest.metrics
    print(
        f"{metrics['activations']} activations of {metrics['texts']} texts in"
        f" {run.root / 'activations'} ({100 * metrics['padding']:.1f} % padding; left out:"
        f" {metrics['skipped'] or 'none'})"
    )


if __name__ == "__main__":
    run_job(__doc__, body)
