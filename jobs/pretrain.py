"""The small base model of preset nano, from the embedded corpus: about an hour on two cores.

$ python jobs/pretrain.py --run-dir runs/base                     # makes runs/base/base
$ python jobs/pretrain.py --run-dir runs/base --pretrain.install  # copies it into the package
"""

from nla_ray.cluster.job import run_job
from nla_ray.settings.config import PretrainRunConfig


def body(run) -> None:
    from nla_ray.run.stages import make_stages

    list(make_stages(run, "pretrain"))


if __name__ == "__main__":
    run_job(__doc__, body, config_class=PretrainRunConfig, ray=False)
