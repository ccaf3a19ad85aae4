"""The small base model of preset nano, trained from the embedded corpus' train documents; about an
hour on two cores.

python jobs/pretrain.py --run-dir runs/base                      # the model is then in
                                                                 runs/base/base
python jobs/pretrain.py --run-dir runs/base --pretrain.install   # and copied into the package
"""

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.nano.pretrain.stage import pretrain

    pretrain(run)


if __name__ == "__main__":
    run_job(__doc__, body, ray=False)
