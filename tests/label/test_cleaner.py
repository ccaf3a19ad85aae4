"""Raw labels become bullets."""

import pytest
from tiny import WORD_STATISTICS, WORDY_TEXT

from nla_ray.label.cleaner import clean_label
from nla_ray.label.teacher import make_teachers


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        pytest.param(
            '1. **"Use a lock"**: The model is likely preparing to name the remedy.\n\n2. **"Or a'
            ' queue"**: It predicts a second way. More.',
            "- Use a lock: name the remedy\n- Or a queue: a second way",
            id="numbered list with bold headings",
        ),
        pytest.param(
            "1. 'A lock' – the model expects the usual remedy. 2. 'A queue' – a second way. 3."
            " 'Neither",
            "- A lock: the usual remedy\n- A queue: a second way",
            id="one paragraph, cut off",
        ),
        pytest.param(
            "“Take a lock.” The model expects a remedy. “Or use a queue?” A second way is offered.",
            "- Take a lock: a remedy\n- Or use a queue?: A second way is offered",
            id="quotations and remarks",
        ),
        pytest.param(
            "- first point.\n- second point.\n- third point.\n- fourth point.",
            "- first point\n- second point\n- third point",
            id="more bullets than three",
        ),
        pytest.param("- the only point.", "- the only point", id="a single bullet"),
        pytest.param(
            "This text appears to be about locks. It is long.",
            "- about locks\n- It is long",
            id="sentences",
        ),
        pytest.param("Same thing. Same thing.", "- Same thing", id="repeated"),
        pytest.param(
            "As in 2. The lock is held.",
            "- As in 2\n- The lock is held",
            id="a number that counts nothing",
        ),
        pytest.param("", "", id="nothing"),
        pytest.param("** **", "", id="only markup"),
    ],
)
def test_raw_labels_become_bullets(raw: str, clean: str) -> None:
    assert clean_label(raw) == clean


def test_a_long_label_is_capped_at_the_end_of_a_clause() -> None:
    raw = "1. one two three four, five six seven eight nine ten.\n2. short."
    assert clean_label(raw, max_words=12) == "- one two three four\n- short"


def test_cleaning_a_clean_label_changes_nothing() -> None:
    for teacher in make_teachers(
        ["offline-content-first", "offline-format-first"], WORD_STATISTICS
    ):
        once = clean_label(teacher.describe(WORDY_TEXT, "python_test"))
        assert clean_label(once) == once
