"""Capture, generation and a step of GRPO, measured side by side with plain transformers.

As the first word, without a run: `gpu` measures what a GPU does with the 7B shape; `generate` sets
all engines side by side; `families` runs every stage on a random base of every architecture.
"""

import sys

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.bench.stage import describe_results
    from nla_ray.run.stages import BENCHMARK_NAME, make_stages

    *_, (_, results) = make_stages(run, "benchmark", strict=True)
    for line in describe_results(results):
        print(line)
    print(f"written to {run.root / BENCHMARK_NAME}")


if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:
    from nla_ray.bench.gpu import main

    main(sys.argv[2:])
elif __name__ == "__main__" and sys.argv[1:2] == ["generate"]:
    from nla_ray.bench.engines import benchmark_engines

    benchmark_engines(sys.argv[2:])
elif __name__ == "__main__" and sys.argv[1:2] == ["families"]:
    from nla_ray.bench.families import benchmark_families

    benchmark_families(sys.argv[2:])
elif __name__ == "__main__":
    run_job(__doc__, body, ray=False)
