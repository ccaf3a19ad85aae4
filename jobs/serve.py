"""Serves a trained run over HTTP (Ray Serve): descriptions of activations and texts, and scores.
Ctrl-C stops it."""

import os

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.serve.application import serve_run

    serve_run(run)


def cleanup() -> None:
    if "RAY_ADDRESS" in os.environ:  # an embedded Ray takes Serve with it when it ends
        from nla_ray.serve.application import stop

        stop()


if __name__ == "__main__":
    run_job(__doc__, body, lock=False, cleanup=cleanup)
