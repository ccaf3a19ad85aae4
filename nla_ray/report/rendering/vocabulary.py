"""What the report calls its figures, and what each of them is.

Every title and definition that a reader meets stands here; where it is shown is decided elsewhere.
"""

from __future__ import annotations

METRIC_TITLES = {
    "top1": "2-way top-1",
    "top1_2way": "2-way centred",
    "top1_10way": "10-way top-1",
    "top1_10way_hard": "10-way hard",
    "top1_100way": "100-way top-1",
    "top1_document": "in its document",
    "mrr_10way": "10-way MRR",
    "centred_cosine": "centred cosine",
    "correct_cosine": "cosine, correct",
    "garbage_cosine": "cosine, garbage",
    "delta": "delta",
    "fve": "FVE",
    "directional_error": "directional error",
    "raw_error": "raw error",
    "magnitude": "magnitude",
}
PATCH_TITLES = {
    "recovered": "recovered",
    "recovered_excess": "recovered, less shuffled",
    "patched_divergence": "KL, nats",
    "keeps_top": "same next token",
}
CLAIM_TITLES = {
    "precision": "words in text",
    "precision_shuffled": "in a shuffled text",
    "precision_excess": "in text, less shuffled",
    "hallucinated": "specifics not in text",
    "recall": "gold words named",
    "source_recall": "text's words named",
    "source_recall_shuffled": "a shuffled text's",
    "domain": "domain right",
    "repeats": "repeats an item",
    "distinct": "distinct",
    "similarity": "alike",
    "top_line": "commonest line",
    "non_ascii": "beyond ASCII",
    "unclosed": "unclosed",
    "empty": "empty",
    "tokens": "tokens",
}
DEFINITIONS = {
    "top1": (
        "share of cos(r, v) above cos(r, v'), v' a fixed activation of another document; a tie"
        " counts against; chance 0.5"
    ),
    "top1_2way": (
        "the same choice by centred cosine, because by raw cosine an activation near the mean fits"
        " every description better"
    ),
    "top1_10way": (
        "share of v ranked first among itself and 9 activations of other documents by centred"
        " cosine; chance 0.1"
    ),
    "top1_10way_hard": "the same among the 9 nearest activations of its domain",
    "top1_100way": "the same among 99 activations of other documents; chance 0.01",
    "top1_document": (
        "the same among the other positions of its document, over activations that have some"
    ),
    "mrr_10way": "mean of 1/rank in the 10-way choice; chance 0.29",
    "centred_cosine": (
        "mean cos(c(r), c(v)): what is left when the mean direction, which every activation shares,"
        " is taken away"
    ),
    "correct_cosine": "mean cos(r, v), raw: mostly the mean direction",
    "garbage_cosine": "mean cos(r, v'), raw",
    "delta": "correct - garbage",
    "fve": (
        "1 - sum |n(r) - n(v)|^2 / sum |n(v) - mean n(v)|^2: fraction of variance explained, not"
        " renormalised"
    ),
    "directional_error": "mean 1 - cos(r, v): says nothing of the length of v",
    "raw_error": (
        "sum |r - v|^2 / sum |v - mean v|^2, each r rescaled to the mean |v|, because scorers are"
        " trained on directions; 1 is the error of the mean activation itself"
    ),
    "magnitude": (
        "correlation of |r| with |v|: whether the length of the activation is recovered; 0 where"
        " all |r| are equal"
    ),
    "recovered": (
        "1 - KL(clean || r) / KL(clean || μ), both means over the patched activations: KL of the"
        " base's next-token distributions, r and μ at the length of v in its place; 1: nothing is"
        " lost, 0: no better than the mean direction"
    ),
    "recovered_excess": "the same less that of the shuffled label",
    "patched_divergence": "mean KL(clean || r) in nats",
    "keeps_top": "share of activations after which the likeliest next token stays the same",
    "precision": (
        "share of a description's salient words that occur in its text; 0 for a description that"
        " claims nothing"
    ),
    "precision_shuffled": "the same against the text of another document",
    "precision_excess": "the difference of the two",
    "hallucinated": (
        "share of quoted strings, numbers, names and listed tokens that the text does not have"
    ),
    "recall": "share of the gold label's salient words that the description names too",
    "source_recall": (
        "share of the text's twelve most salient words (tf-idf over train texts) that the"
        " description names"
    ),
    "source_recall_shuffled": "the same for the words of another document's text",
    "domain": "share of descriptions that name the true domain before any other",
    "repeats": "share that list an item twice or say a word twice in a row",
    "distinct": "distinct descriptions over descriptions",
    "similarity": (
        "mean word overlap (Jaccard) with the description of another document's activation"
    ),
    "top_line": "share of the descriptions that have the line which most of them have",
    "non_ascii": "share of characters beyond ASCII",
    "unclosed": "share cut off before their end",
    "empty": "share without a word",
    "tokens": "mean length of a description",
    "gold": "the label of the text: a ceiling",
    "source_text, source_summary": (
        "ceilings: the text itself, of which a scorer reads the tokens that it reads of a"
        " description; and the text's sentences with the most telling words, as many tokens as"
        " GRPO's description has"
    ),
    "nearest_train_label": (
        "the label of the nearest train activation: what a verbalizer must beat to be worth"
        " training"
    ),
    "sft, grpo, grpo_no_contrast": (
        "the verbalizer after supervised training, after contrastive GRPO, and after GRPO rewarded"
        " with the plain cosine"
    ),
    "linear_probe": (
        "the words with the highest scores of a ridge regression from c(v) to the words of train"
        " texts, each score divided by the standard deviation of its word; as many as GRPO's"
        " description claims"
    ),
    "grpo_confident": (
        "GRPO's descriptions without the claims of a lower confidence than"
        " `evaluation.min_claim_confidence`; one of which no claim is left has 0 words in text"
    ),
    "linear_label": (
        "the same words in the form of a label: below the kind of text and beside the continuation"
        " that ridge regressions choose among those of train labels"
    ),
    "shuffled, generic": "another document's label; one fixed sentence",
    "mean_activation, random_vector": "the SFT verbalizer given these instead of the activation",
    "reward, judge, linear": (
        "scorers: the one that GRPO is paid by; one trained on other documents; ridge regression"
        " from features of the plain base"
    ),
    "confidence": (
        "agreement of several samples: mean centred cosine between what the reward scorer reads in"
        " them; no probability"
    ),
}
"""What every figure, verbalizer and scorer is, in the signs of SIGNS."""
SIGNS = (
    "v is the original activation, r its reconstruction from a description, n(x) = x/|x|, μ the"
    " mean of n(v) over the train split, c(x) = n(x) − μ."
)
TITLES = METRIC_TITLES | PATCH_TITLES | CLAIM_TITLES
MAIN_METRICS = (
    "top1",
    "top1_2way",
    "top1_10way",
    "top1_10way_hard",
    "centred_cosine",
    "delta",
    "fve",
)
"""In the order of the tables; other metrics follow."""
TRAINING_TITLES = {
    "reward": "reward of a step",
    "monitor/judge_centred_cosine": "judge’s centred cosine, validation",
    "monitor/rewarded": "what the reward scorer pays, validation",
    "kl": "KL to the start",
    "completions/mean_length": "tokens of a completion",
    "monitor/distinct_share": "distinct descriptions, validation",
    "monitor/claim_precision": "words in text, validation",
}
"""Curves of GRPO."""
SUPERVISED_TITLES = {
    "loss": "loss",
    "eval_loss": "loss, validation",
    "eval_centred_cosine": "centred cosine, validation",
}
"""Curves of SFT and of the scorers."""


def spaced(name: str) -> str:
    """A name of the report as words: `nearest_train_label` -> `nearest train label`."""
    return name.replace("_", " ")


def title_of(name: str) -> str:
    """What a figure is called; of a dotted name the titles of its parts.

    >>> title_of("top1_10way"), title_of("judge.delta"), title_of("new_figure")
    ('10-way top-1', 'judge: delta', 'new figure')
    """
    return ": ".join(TITLES.get(part, spaced(part)) for part in name.split("."))
