"""The labels: every teacher's description of every text, cleaned to bullets; or labels made elsewhere.

python jobs/label.py
python jobs/label.py --import labels.jsonl     # rows of doc_id, text or text_hash, teacher, label
"""

import sys

from nla_ray.cluster.job import run_job


def body(run) -> None:
    from nla_ray.run.stages import make

    list(make(run, "label"))


if __name__ == "__main__":
    sys.argv = [
        "--label.import-path" if argument == "--import" else argument for argument in sys.argv
    ]
    run_job(__doc__, body, ray=False)
