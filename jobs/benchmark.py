"""Measure capture, generation and a step of GRPO side by side with plain transformers: python jobs/benchmark.py --preset nano."""

import os

from nla_ray.cluster import needs_hub, run_job, worker_environment


def body(run) -> None:
    # Both sides are measured as a worker process would run them; torch, which reads this, is not loaded yet.
    for name, value in worker_environment(run.config.compute.threads, offline=not needs_hub(run.config.base.model)).items():
        os.environ.setdefault(name, value)
    from nla_ray.benchmark import RESULTS_NAME, describe_results, run_benchmarks

    for line in describe_results(run_benchmarks(run)):
        print(line)
    print(f"written to {run.root / RESULTS_NAME}")


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
