"""A finished run for other tools: whole models, an adapter with a card, or data sets.

$ python jobs/export.py --to reference     # verbalizer and judge in the reference layout
$ python jobs/export.py --to peft          # the verbalizer's adapter, and how to inject
$ python jobs/export.py --to dataset       # activations and labels as Parquet
"""

from nla_ray.cluster.job import run_job
from nla_ray.settings.config import ExportRunConfig


def body(run) -> None:
    from nla_ray.export.stage import export_run

    print("\n".join(export_run(run, run.config.export)))


if __name__ == "__main__":
    run_job(__doc__, body, config_class=ExportRunConfig, ray=False, lock=False)
