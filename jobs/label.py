"""The labels: every teacher's description of every text, cleaned to bullets; or imported ones.

$ python jobs/label.py
$ python jobs/label.py --import labels.jsonl     # labels made elsewhere
"""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    list(make_stages(run, "label"))


if __name__ == "__main__":
    run_job(__doc__, body, ray=lambda config: config.capture.needs_answers)
