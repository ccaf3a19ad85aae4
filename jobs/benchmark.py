"""Capture, generation and a step of GRPO, measured side by side with plain transformers."""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.bench.stage import describe_results, run_benchmarks
    from nla_ray.run.stages import BENCHMARK_NAME

    for line in describe_results(run_benchmarks(run)):
        print(line)
    print(f"written to {run.root / BENCHMARK_NAME}")


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
