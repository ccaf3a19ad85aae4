"""An HTTP endpoint on a trained run: it describes activations and texts, and scores them."""

import os

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    list(make_stages(run, "serve"))


def cleanup() -> None:
    if "RAY_ADDRESS" in os.environ:  # an embedded Ray takes Serve with it when it ends
        from nla_ray.serve.application import stop

        stop()


if __name__ == "__main__":
    run_job(__doc__, body, lock=False, cleanup=cleanup)
