"""The same claims in another order or in other words: how much of a score is wording.

FORMS has one rewording a row. Pure string work; it knows neither models nor scorers. No rewording
adds or takes away a claim: order is drawn by a seed of the description alone, and a synonym means
what its word means in a description of a text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from nla_ray.run.identity import seed_of
from nla_ray.score.claims import NEXT_HEADING, split_heading

SYNONYMS = {
    "about": "on",
    "addressing": "dealing with",
    "advice": "guidance",
    "aligning": "agreeing",
    "aligns": "agrees",
    "another": "a further",
    "answer": "reply",
    "anticipates": "foresees",
    "API": "interface",
    "array": "vector",
    "assignment": "allocation",
    "body": "content",
    "buffer": "store",
    "call": "invocation",
    "check": "verification",
    "code": "program",
    "comment": "remark",
    "common": "usual",
    "concise": "brief",
    "configuration": "settings",
    "context": "background",
    "continuation": "rest",
    "conversational": "chatty",
    "data": "information",
    "default": "standard",
    "direct": "straight",
    "emotional": "sentimental",
    "emphasizing": "stressing",
    "error": "fault",
    "example": "illustration",
    "expects": "awaits",
    "explanation": "account",
    "file": "document",
    "focus": "attention",
    "formal": "official",
    "function": "routine",
    "graph": "network",
    "imagery": "pictures",
    "indented": "inset",
    "instruction": "direction",
    "issue": "problem",
    "item": "entry",
    "key": "name",
    "licence": "permit",
    "likely": "probably",
    "line": "row",
    "list": "enumeration",
    "logical": "rational",
    "maintaining": "keeping",
    "might": "may",
    "model": "network",
    "module": "unit",
    "narrative": "story",
    "new": "fresh",
    "next": "then",
    "object": "thing",
    "output": "result",
    "package": "bundle",
    "path": "route",
    "phrase": "expression",
    "playful": "humorous",
    "polite": "courteous",
    "practical": "useful",
    "predicts": "forecasts",
    "prediction": "forecast",
    "prepares": "readies",
    "question": "query",
    "reference": "manual",
    "reflects": "mirrors",
    "request": "demand",
    "response": "reply",
    "rest": "remainder",
    "script": "program",
    "sentence": "phrase",
    "sequence": "series",
    "size": "extent",
    "specific": "particular",
    "statement": "command",
    "step": "stage",
    "strategy": "plan",
    "string": "text",
    "suggests": "proposes",
    "technical": "specialised",
    "template": "pattern",
    "test": "trial",
    "text": "passage",
    "tokens": "words",
    "tone": "manner",
    "type": "kind",
    "user": "person",
    "value": "quantity",
    "values": "quantities",
}
"""Word -> synonym: the commonest words of labels that have one. Fixed before any score was seen."""
_WORD = re.compile(r"(?<![\w'])[A-Za-z]+(?![\w'])")
_MARK = re.compile(r"\s*(?:[-*•]|\d{1,2}[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_QUOTES = "\"“”`'‘’"


def bullets_reversed(description: str) -> str:
    """The last bullet first.

    >>> bullets_reversed("- a licence\\n- tokens: copy")
    '- tokens: copy\\n- a licence'
    """
    return "\n".join(reversed(_lines(description)))


def order_shuffled(description: str) -> str:
    """Bullets, sentences of a bullet, and items of a list in another order."""
    draw = random.Random(seed_of(0, "order", description))
    lines = [_shuffled_line(line, draw) for line in _lines(description)]
    draw.shuffle(lines)
    return "\n".join(lines)


def synonyms_put(description: str) -> str:
    """Every word of SYNONYMS as its synonym; a capital at its beginning stays.

    >>> synonyms_put("- Test of a function\\n- tokens: test_value")
    '- Trial of a routine\\n- words: test_value'
    """
    return _WORD.sub(lambda match: _synonym(match[0]), description)


FORMS: dict[str, Callable[[str], str]] = {
    "bullets_reversed": bullets_reversed,
    "order_shuffled": order_shuffled,
    "synonyms": synonyms_put,
}
"""Name -> rewording, in the order they are reported in."""


def _lines(description: str) -> list[str]:
    return [line for line in description.splitlines() if line.strip()]


def _shuffled_line(line: str, draw: random.Random) -> str:
    match = _MARK.match(line)
    mark, bullet = (match[0], line[match.end() :]) if match else ("", line)
    heading, body = split_heading(bullet)
    is_list = heading and heading.casefold() != NEXT_HEADING and not set(body) & set(_QUOTES)
    separator = ", " if is_list else " "
    parts = re.split(r",\s*", body) if is_list else _SENTENCE_END.split(body)
    draw.shuffle(parts)
    return f"{mark}{heading and f'{heading}: '}{separator.join(parts)}"


def _synonym(word: str) -> str:
    if word in SYNONYMS:
        return SYNONYMS[word]
    synonym = SYNONYMS.get(word.lower(), word)
    return synonym[0].upper() + synonym[1:] if word.istitle() else synonym
