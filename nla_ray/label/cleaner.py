"""Rewrites any raw label to two or three bullets in one common form, by deterministic rules.

Teachers answer in numbered lists, bold phrases and paragraphs, often cut off by their token limit.
The cleaner strips markup and the phrases that every label shares ("the model is likely ..."), drops
a last sentence that was cut off, and caps the length at the end of a clause. It adds no word of its
own, and knows neither the text nor the teacher.
"""

from __future__ import annotations

import re

MAX_BULLETS = 3
MAX_HEADING_CHARS = 160

_NUMBER = re.compile(r"(?:^|(?<=\s))(\d{1,2})[.)]\s+(?=\S)")
_BULLET_LINE = re.compile(r"^\s*[-*•]\s+", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)*]*\s+(?=[\"'“‘«(*`—]+\S|[A-Z0-9])")
_QUOTATION = re.compile(r"(?:(?<=\s)|^)(?:[\"“].{2,160}?[\"”]|['‘].{2,160}?['’])(?=[\s.,;:!?)]|$)")
_MARKUP = re.compile(r"\*{1,3}|__|^#{1,6}\s+|```\w*|`", re.MULTILINE)
_OUTER_QUOTES = re.compile(r"^[\"'“”‘’]+|[\"'“”‘’]+$")
_BOLD_HEADING = re.compile(r"\*\*(?P<heading>.+?)\*\*\s*[:\-–—]?\s*(?P<rest>.*)", re.DOTALL)
_QUOTED_HEADING = re.compile(
    r"(?:[\"“](?P<double>.{2,160}?)[\"”]|['‘](?P<single>.{2,160}?)['’])"
    r"(?:\s*[:;,\-–—]\s+|\s+(?=[A-Z]))(?P<rest>.*)",
    re.DOTALL,
)
_END_MARKS = (".", "!", "?", ":", "…")

_SURE = r"(?:also |then |now |most |very )*(?:likely |probably |possibly |currently |perhaps )?"
_SUBJECT = (
    r"(?:(?:(?:the|this|a) )?(?:language )?"
    r"(?:model|assistant|sequence|activation|response|reply|continuation|phrase|prediction)"
    r"(?:'s (?:next tokens?|response|output|activation))?|it|this text|this)"
)
_AUXILIARY = (
    r"(?:(?:is|was|will|would|could|can|may|might|appears|seems)(?: be| poised| about| ready)*(?:"
    r" likely)?(?: to)? )?"
)
_VERB = (
    r"(?:prepar(?:es?|ing)|read(?:s|ing)|continu(?:es?|ing) with|start(?:s|ing)?"
    r" (?:with|by)|be|predict(?:s|ing)?|"
    r"anticipat(?:es?|ing)|expect(?:s|ing)?|generat(?:es?|ing)|introduc(?:es?|ing)|suggest(?:s|ing)?|focus(?:es|ing)?"
    r" on|aim(?:s|ing)? to|"
    r"recogni[sz]es|include?s?|provid(?:es?|ing)|signal(?:s|ing|ling)?|indicat(?:es?|ing)|reflect(?:s|ing)?)"
)
_BOILERPLATE = (
    re.compile(r"^(?:here (?:is|are)|sure|certainly|okay|based on)\b[^:]{0,80}:\s*", re.IGNORECASE),
    re.compile(
        r"^(?:likely|next|predicted|plausible) (?:continuation|sequence|tokens?|phrase|next"
        r" tokens?)s?:\s*",
        re.IGNORECASE,
    ),
    re.compile(
        rf"^{_SUBJECT} {_SURE}{_AUXILIARY}{_SURE}{_VERB} (?:that |to |for |this sequence to"
        r" )?(?=\S)",
        re.IGNORECASE,
    ),
    re.compile(rf"^{_SUBJECT} (?:appears|seems) to be {_SURE}(?=\S)", re.IGNORECASE),
)
_READS = re.compile(
    r"(?:is likely reading|appears to be) (?P<kind>[\w+ ]{2,40}) on "
    r"(?P<topics>nothing in particular|[a-z]+(?: and [a-z]+)?)\.?$"
)
"""How the offline teachers name the kind of document and its topics."""
_CONTINUES = re.compile(r"is likely to continue with (?P<form>.+?)\.?$")
_SALIENT = re.compile(r"^Salient tokens include (?P<words>.+?)\.?$")


def clean_label(raw: str, max_words: int = 70) -> str:
    """Bullets `- ...`, one a line, three at most; an empty string when nothing is left to say.

    >>> print(clean_label("1. **Tokens**: frame.\\n2. **Next**: the model is preparing a list."))
    - tokens: frame
    - next: a list
    """
    bullets: list[str] = []
    for item in _split_items(_drop_cut_off(raw.strip())):
        bullet = _clean_item(item)
        if bullet and bullet.lower() not in [earlier.lower() for earlier in bullets]:
            bullets.append(bullet)
        if len(bullets) == MAX_BULLETS:
            break
    budget = max(1, max_words // max(1, len(bullets)))
    return "\n".join(f"- {_cap_words(bullet, budget)}" for bullet in bullets)


def _split_items(raw: str) -> list[str]:
    """List items when the label is a list, else sentences.

    Numbers must count 1, 2, 3, so that "in 2. The" begins no item.
    """
    starts: list[tuple[int, int]] = []
    for match in _NUMBER.finditer(raw):
        if int(match.group(1)) == len(starts) + 1:
            starts.append(match.span())
    if len(starts) < 2:
        starts = [match.span() for match in _BULLET_LINE.finditer(raw)]
    if len(starts) < 2:
        sentences: list[str] = []
        for line in _BULLET_LINE.sub("", raw).splitlines():
            sentences += [piece for piece in _split_sentences(line) if piece.strip()]
        return sentences
    ends = [start for start, _ in starts[1:]] + [len(raw)]
    return [raw[begin:end] for (_, begin), end in zip(starts, ends, strict=True)]


def _split_sentences(text: str) -> list[str]:
    """Sentences; an end mark inside a quotation ends none."""
    quoted = [match.span() for match in _QUOTATION.finditer(text)]
    pieces, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if not any(begin < match.start() < end for begin, end in quoted):
            pieces.append(text[start : match.end()])
            start = match.end()
    return [*pieces, text[start:]]


def _drop_cut_off(raw: str) -> str:
    """Without its last sentence when that has no end mark and is not the only one."""
    if raw.rstrip("\"'”’*`) ").endswith(_END_MARKS):
        return raw
    ends = [match.end() for match in re.finditer(r"[.!?][\"'”’*`)]*(?=\s)", raw)]
    # "3." begins an item and ends no sentence; an ellipsis goes on.
    whole = [
        end
        for end in ends
        if not re.search(r"(?:(?:^|\s)\d{1,2}[.]|\.\.\.)[\"'”’*`)]*$", raw[:end])
    ]
    return raw[: whole[-1]] if len(whole) > 1 or (whole and "\n" in raw) else raw


def _clean_item(item: str) -> str:
    """One bullet: heading and first sentence, without markup, boilerplate and end mark."""
    heading, rest = _split_heading(item.strip())
    sentences = [sentence.strip() for sentence in _split_sentences(rest) if sentence.strip()]
    if sentences and (fact := _offline_fact(sentences[0])):
        return fact
    body = _strip_boilerplate(sentences[0]) if sentences else ""
    heading = heading.lower() if heading in ("Tokens", "Topic", "Next") else heading
    return f"{heading}: {body}" if heading and body else heading or body


def _split_heading(item: str) -> tuple[str, str]:
    """`**Heading**: rest` or `"Heading" - rest` -> both without markup; else an empty heading."""
    if match := _BOLD_HEADING.match(item):
        heading = match["heading"]
    elif match := _QUOTED_HEADING.match(item):
        heading = match["double"] or match["single"]
    if match is None or len(heading) > MAX_HEADING_CHARS:
        return "", _plain(item)
    return _unquoted(_plain(heading)).rstrip(".:…, "), _plain(match["rest"])


def _offline_fact(sentence: str) -> str:
    """A sentence of the offline teachers as its fact; empty for any other sentence.

    >>> _offline_fact("The model is likely reading unit test on frame and index.")
    'unit test: frame, index'
    """
    if match := _READS.search(sentence):
        return f"{match['kind']}: {match['topics'].replace(' and ', ', ')}"
    if match := _CONTINUES.search(sentence):
        return f"next: {match['form']}"
    if match := _SALIENT.search(sentence):
        return f"tokens: {match['words']}"
    return ""


def _strip_boilerplate(sentence: str) -> str:
    for pattern in _BOILERPLATE:
        sentence = pattern.sub("", sentence, count=1).strip() or sentence
    return _OUTER_QUOTES.sub("", sentence.rstrip(".!…:; ")).strip().rstrip(".")


def _plain(text: str) -> str:
    return " ".join(_MARKUP.sub("", text).split())


def _unquoted(text: str) -> str:
    """Without the one pair of quotation marks around it."""
    is_quoted = len(text) > 2 and text[0] + text[-1] in ('""', "''", "“”", "‘’")
    return text[1:-1] if is_quoted else text


def _cap_words(text: str, limit: int) -> str:
    """At most `limit` words, ended at the last clause in the second half when there is one."""
    words = text.split()
    if len(words) <= limit:
        return text
    clauses = [
        index
        for index in range(limit // 2, limit)
        if words[index].endswith((",", ";", ":", "–", "—"))
    ]
    last = max(clauses, default=limit - 1)
    return " ".join(words[: last + 1]).rstrip(",;:–— ")
