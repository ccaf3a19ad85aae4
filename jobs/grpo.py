"""Contrastive GRPO of the verbalizer, and before it whatever it is made from.

$ python jobs/grpo.py                          # preset nano, in runs/nano
$ python jobs/grpo.py --grpo.contrast none     # the ablation: no wrong activations
$ python jobs/grpo.py --seeds 0 1 2            # three trainings from one SFT, for a report of them
$ ray job submit --working-dir . -- python jobs/grpo.py
"""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    list(make_stages(run, "grpo", strict=True))


if __name__ == "__main__":
    run_job(__doc__, body)
