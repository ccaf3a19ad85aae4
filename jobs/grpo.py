"""Contrastive GRPO of the verbalizer, and before it whatever artifacts it is made from and that are
missing.

python jobs/grpo.py                          # preset nano, in runs/nano
python jobs/grpo.py --grpo.contrast none     # the ablation arm: plain cosine to the right
                                             activation
ray job submit --working-dir . -- python jobs/grpo.py
"""

from nla_ray.cluster import run_job


def body(run) -> None:
    """Every stage skips what is complete."""
    from nla_ray.activations import capture_activations
    from nla_ray.corpus.build import build_corpus
    from nla_ray.labels.stage import label_texts
    from nla_ray.training.grpo import train_grpo
    from nla_ray.training.reconstruction import train_scorer
    from nla_ray.training.sft import train_sft

    build_corpus(run)
    capture_activations(run)
    label_texts(run)
    train_scorer(run, "reward_scorer")
    train_scorer(run, "judge_scorer")
    train_sft(run)
    train_grpo(run)


if __name__ == "__main__":
    run_job(__doc__.splitlines()[0], body)
