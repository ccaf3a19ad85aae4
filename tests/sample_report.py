"""A report, a gallery and training records made up by seed: what the renderers are tested with."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from nla_ray.report.claim_figures import CLAIM_FIGURES
from nla_ray.report.differences import DIFFERENCE_FIGURES
from nla_ray.report.matched import PROBE_FIGURES
from nla_ray.report.recovered import PATCH_FIGURES
from nla_ray.score.metrics import METRICS
from nla_ray.score.rewording import FORMS

VERBALIZERS = (
    "gold",
    "nearest_train_label",
    "sft",
    "grpo",
    "grpo_no_contrast",
    "shuffled",
    "read_by_a_human",
)
SCORERS = ("reward", "judge", "linear")
DOMAINS = ("licence", "python_test", "type_stub")
HOSTILE = (
    "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'> <!--"
    ' {{style}} **bold** \u2028 🙂 & "q"'
)


def figure(random: Random, scale: float = 1.0) -> dict[str, float | int]:
    value, width = random.uniform(-0.2, 1.0) * scale, random.uniform(0.001, 0.05) * scale
    return {
        "value": round(value, 6),
        "low": round(value - width, 6),
        "high": round(value + width, 6),
        "n": 60,
        "families": 33,
    }


def by_verbalizer(draw: Callable[[], Any]) -> dict[str, Any]:
    return {name: draw() for name in VERBALIZERS}


def by_scorer(draw: Callable[[], Any]) -> dict[str, Any]:
    return {name: draw() for name in SCORERS}


def minimal_report() -> dict[str, Any]:
    return {
        "preset": "tiny",
        "split": "test",
        "n": 60,
        "documents": 33,
        "documents_left_out": 2,
        "resamples": 300,
        "gates": [],
        "results": {},
        "claims": {},
        "base": {
            "name": "b",
            "digest": "d" * 32,
            "layer": 1,
            "num_layers": 3,
            "d_model": 8,
            "injection_norm": 4.0,
        },
    }


def full_report() -> dict[str, Any]:
    random = Random(0)
    metrics = (*METRICS, *PATCH_FIGURES, "a_metric_without_a_title")
    pairs = ("grpo-sft", "grpo-grpo_no_contrast")
    return {
        **minimal_report(),
        "results": by_verbalizer(
            lambda: by_scorer(lambda: {name: figure(random) for name in metrics})
        ),
        "claims": by_verbalizer(
            lambda: {
                name: figure(random, 30.0 if name == "tokens" else 1.0) for name in CLAIM_FIGURES
            }
        ),
        "chance": {"top1": 0.5, "top1_10way": 0.1},
        "paired": {
            pair: {
                scorer: {"top1": figure(random), "delta": {**figure(random), "low": -0.25}}
                for scorer in (*SCORERS, "claims")
            }
            for pair in pairs
        },
        "agreement": by_verbalizer(lambda: {"reward/judge": {"top1": 0.9, "centred_cosine": None}}),
        "domains": {
            domain: {
                name: {"precision": figure(random), "judge.centred_cosine": figure(random)}
                for name in ("gold", "grpo")
            }
            for domain in DOMAINS
        },
        "confusion": {
            "grpo": {"licence": {"licence": 11, "none": 2}, "python_test": {"licence": 3}}
        },
        "prefix": by_verbalizer(
            lambda: by_scorer(
                lambda: [{"tokens": count, "top1": figure(random)} for count in (0, 4, 8)]
            )
        ),
        "retrieval": by_verbalizer(
            lambda: by_scorer(lambda: [{"k": k, "top1": figure(random)} for k in (2, 10, 100)])
        ),
        "best_of": [
            {"samples": count, **by_scorer(lambda: {"top1": figure(random)})} for count in (1, 2, 4)
        ],
        "calibration": [
            {
                "confidence_low": low / 4,
                "confidence_high": (low + 1) / 4,
                "judge_top1": figure(random),
            }
            for low in range(4)
        ],
        "claim_confidence": {
            "claims": 40,
            "kept_50": {"share": figure(random), "precision": figure(random)},
            "kept_90": {"share": figure(random)},
            "brier": figure(random),
            "brier_constant": figure(random),
            "bins": [
                {"claims": 20, "confidence": 0.12, "found": figure(random)},
                {"claims": 20, "confidence": 0.93, "found": figure(random)},
            ],
            "calibration_error": 0.041,
        },
        "gates": [
            {
                "name": "grpo.judge.top1",
                "relation": ">=",
                "value": 0.987654,
                "threshold": 0.93,
                "passed": True,
            },
            {
                "name": "sft.claims.repeats",
                "relation": "<",
                "value": None,
                "threshold": 0.1,
                "passed": False,
            },
        ],
        "experiments": [
            {
                "changed": "no KL",
                "kept": "no",
                "n": 621,
                "minus_sft": {
                    "judge's centred cosine": {"value": -0.0123, "low": -0.02, "high": -0.004}
                },
            }
        ],
        "quotes": {
            "grpo": {
                "quoting": figure(random),
                **by_scorer(lambda: {"centred_cosine": figure(random)}),
            }
        },
        "selection": {"grpo": {"published_step": 40, "published": {}}},
        "examples": [
            {
                "activation_id": "doc7@4:7",
                "domain": "licence",
                "text": HOSTILE,
                "descriptions": {"gold": "", "grpo": HOSTILE},
            }
        ],
        "growth": {
            "labels": by_scorer(
                lambda: [{"at": count, "top1_2way": figure(random)} for count in (100, 200, 400)]
            ),
            "steps": {
                "grpo": [{"at": step, "claim_precision": {"value": step / 100}} for step in (0, 20)]
            },
            "layers": {
                "gold": [{"at": layer, "centred_cosine": figure(random)} for layer in (4, 8)]
            },
        },
        "lengths": {
            "grpo-sft": {
                view: {
                    "tokens": [figure(random, 30.0) for _ in range(2)],
                    **{name: {"top1": figure(random)} for name in (*SCORERS, "claims")},
                }
                for view in ("whole", "cut", "matched")
            }
        },
        "refreshed": {
            name: {
                scorer: {"centred_cosine": figure(random), "top1_10way": figure(random)}
                for scorer in ("reward", "refreshed", "difference")
            }
            for name in ("sft", "grpo", "grpo-sft")
        },
        "differences": {
            "pairs": 60,
            "chance": {"right_pair": 0.1, "right_second": 0.1},
            **{
                part: {
                    name: by_scorer(lambda: {name: figure(random) for name in DIFFERENCE_FIGURES})
                    for name in names
                }
                for part, names in (
                    ("results", ("gold", "sft", "sft_of_first", "shuffled")),
                    ("paired", ("sft-gold", "sft-sft_of_first")),
                )
            },
            "examples": [
                {
                    "activation_id": "doc7@4:7 - doc8@4:9",
                    "domain": "licence - type_stub",
                    "text": HOSTILE,
                    "descriptions": {"gold": "", "sft": HOSTILE},
                }
            ],
        },
        "seeds": {
            "grpo": {
                "seeds": {"grpo": 0, "grpo_seed1": 1},
                **{
                    part: {
                        scorer: {
                            "top1": {
                                "by_seed": {
                                    name: figure(random) for name in ("grpo", "grpo_seed1")
                                },
                                "mean": 0.5,
                                "spread": 0.1,
                            }
                        }
                        for scorer in ("judge", "claims")
                    }
                    for part in ("figures", "minus_sft")
                },
            }
        },
        "word_curve": {
            name: [{"words": words, "found": figure(random)} for words in (1.0, 1.9, 2.6)]
            for name in ("linear_probe", "grpo")
        },
        "probe": {
            name: {probed: figure(random, 3.0) for probed in PROBE_FIGURES}
            for name in ("gold", "sft", "grpo")
        },
        "wording": {
            name: {
                form: {
                    "changed": figure(random),
                    **by_scorer(lambda: {"centred_cosine": figure(random)}),
                }
                for form in FORMS
            }
            for name in ("gold", "grpo")
        },
        "protocols": {"gold": "not generated", "read_by_a_human": "not recorded"},
        "lineage": {
            "sft": {
                "fingerprint": "f",
                "config_hash": "c",
                "created": "t",
                "documents": {"train": 5141},
            }
        },
        "warnings": [HOSTILE],
        "notes": ["Greedy decoding."],
    }


def make_gallery(rows: int = 40) -> list[dict[str, Any]]:
    """Row i: domain by turns, scores of i/100, one found and i missing words.

    Row 7 is hostile, row 9 empty.
    """
    gallery = []
    for row in range(rows):
        lies = [part for number in range(row) for part in ([", ", ""], [f"lie{number}", "missing"])]
        segments = [["- tokens: ", ""], [f"word{row}", "found"], *lies]
        score = {
            "centred_cosine": row / 100,
            "cosine": 0.5,
            "top1": row % 2 == 0,
            "rank_10way": 1 + row % 10,
        }
        described = {
            "segments": segments,
            "closed": row != 3,
            "tokens": 5 + row,
            "scores": {scorer: score for scorer in SCORERS},
        }
        gallery.append(
            {
                "activation_id": f"doc{row}@4:{row}",
                "doc_id": f"doc{row}",
                "domain": DOMAINS[row % 3],
                "text": HOSTILE if row == 7 else f"source of word{row}",
                "descriptions": {
                    name: {**described, "segments": [] if row == 9 else segments}
                    for name in VERBALIZERS
                },
            }
        )
    gallery[7]["descriptions"]["grpo"] = {
        **described,
        "segments": [[HOSTILE, "missing"], [" x", ""]],
        "scores": {},
    }
    return gallery


def make_training() -> dict[str, list[dict[str, float]]]:
    def records(warned: float) -> list[dict[str, float]]:
        steps = [
            {"step": step, "reward": step / 10, "kl": 0.1, "completions/mean_length": 20.0}
            for step in range(1, 31)
        ]
        readings = [
            {
                "step": step,
                "monitor/judge_centred_cosine": 0.6,
                "monitor/judge_centred_cosine_low": 0.5,
                "monitor/judge_centred_cosine_high": 0.7,
                "monitor/rewarded": 0.4,
                "monitor/distinct_share": 1.0,
                "monitor/warned": warned if step == 20 else 0.0,
            }
            for step in (0, 10, 20)
        ]
        return steps + readings

    return {
        "grpo": records(0.0),
        "grpo_no_contrast": records(1.0),
        "sft": [{"step": 20, "loss": 1.5}, {"step": 40, "loss": 1.2}],
    }
