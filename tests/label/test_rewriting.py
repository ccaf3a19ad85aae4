"""A model as cleaner: checked, asked again with the reason, and replaced by the rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from teacher_server import teacher_server
from test_labels import all_labels, write_corpus

from nla_ray.label.rewriting import added_words, fault_of_rewriting
from nla_ray.label.stage import label_texts
from nla_ray.run.artifact import Run
from nla_ray.settings.config import LabelConfig

RAW = "1. **Use a lock**: the model is preparing to name the remedy, memoization of results."


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("- lock: the remedy\n- memoized results", ""),
        ("- tokens: lock\n- next: the remedy", ""),
        ("", "not 1 to 3 lines that begin with '- '"),
        ("Here they are:\n- lock", "not 1 to 3 lines that begin with '- '"),
        ("- lock\n\n- remedy", "not 1 to 3 lines that begin with '- '"),
        ("- lock\n- remedy\n- results\n- name", "not 1 to 3 lines that begin with '- '"),
        ("- the model names the remedy", "it speaks of the model"),
        ("- lock, remedy,", "its end is cut off"),
        ("- " + "lock " * 9, "more than 8 words"),
        ("- une serrure et un cache", "words that the label did not say: serrure, cache"),
    ],
)
def test_a_rewriting_is_taken_when_it_is_bullets_of_what_was_said(label: str, fault: str) -> None:
    assert fault_of_rewriting(label, RAW, 8) == fault


def test_other_forms_of_a_word_are_not_added_words() -> None:
    assert added_words("- licences permitted\n- shared", "A licence permits sharing.") == []
    assert added_words("- a licence for sale", "A licence.") == ["sale"]


def test_a_refused_rewriting_is_asked_for_again_and_then_made_by_the_rules(
    tiny_run: Callable[..., Run],
) -> None:
    texts = {f"doc{number}": f"word{number} rows columns" for number in range(6)}

    def reply(model: str, text: str) -> str:
        if model == "model-a":
            return f"1. **Tokens**: {text.split()[0]}.\n2. **Next**: the model is preparing rows."
        if "word5" in text or ("word4" in text and "[rewriting 1 was refused: " not in text):
            return "Sure, here they are."
        number = text.split("word")[1][0]
        return f"- tokens: word{number}\n- next: preparing rows"

    with teacher_server() as server:
        server.reply = reply
        endpoint = f"@{server.url}/v1"
        label = LabelConfig(
            teachers=(f"endpoint:model-a{endpoint}",), cleaner=f"endpoint:model-b{endpoint}"
        )
        run = tiny_run(label=label)
        write_corpus(run, texts)
        manifest = label_texts(run)
        asked = [body["messages"][0]["content"] for body in server.bodies]
    labels = {row["doc_id"]: row["label"] for row in all_labels(run)}
    by_model = {f"doc{n}": f"- tokens: word{n}\n- next: preparing rows" for n in range(5)}
    assert labels == {**by_model, "doc5": "- tokens: word5\n- next: rows"}
    assert manifest.metrics["asked"]["cleaner"] == {"rewritten": 5, "by_rules": 1}
    # Six texts, six rewritings; word4's again once, word5's twice; each with the last reason.
    assert len(asked) == len(set(asked)) == 6 + 6 + 1 + 2
    assert sum("[rewriting 2 was refused: not 1 to 3 lines" in message for message in asked) == 1
    assert set(manifest.config["inputs"]) == {"prompt", "cleaner_prompt"}


def test_a_cleaner_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'best', expected `rules`, `openai:MODEL`"):
        LabelConfig(cleaner="best")
    with pytest.raises(ValueError, match=r"^label\.cleaner: got 'openai:', expected"):
        LabelConfig(cleaner="openai:")
