"""Rewrites any raw label to two or three bullets in one common form, by deterministic rules.

Teachers answer in numbered lists, bold phrases and paragraphs, often cut off by their token limit. The cleaner
strips markup and the phrases that every label shares ("the model is likely ..."), drops a last sentence that
was cut off, and caps the length. It adds no word of its own, and knows neither the text nor the teacher.
"""

import re

MAX_BULLETS = 3
_NUMBER = re.compile(r"(?:^|(?<=\s))(\d{1,2})[.)]\s+(?=\S)")
_BULLET_LINE = re.compile(r"^\s*[-*•]\s+", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”)*]*\s+(?=[\"'“(*`]*[A-Z0-9])")
_MARKUP = re.compile(r"\*{1,3}|__|^#{1,6}\s+|```\w*", re.MULTILINE)
_OUTER_QUOTES = re.compile(r"^[\"'“”]+|[\"'“”]+$")
_MODEL_IS = (
    r"(?:the |this |a )?(?:language )?(?:model|assistant|sequence|activation|response|text)(?:'s (?:next tokens?|response|output|activation))? "
    r"(?:(?:is|was|will be|would be|may be|might be|appears to be|seems to be|seems|appears|will|would|may|might) )?"
    r"(?:(?:most )?(?:likely|probably|currently|about) )?(?:to )?"
)
_BOILERPLATE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(?:here (?:is|are)|sure|certainly|okay|based on)\b[^:]{0,80}:\s*",
        rf"^(?:likely|next|predicted) (?:continuation|sequence|token)s?:\s*",
        rf"^{_MODEL_IS}(?:preparing|prepare|reading|continue with|continuing with|start(?:ing)? (?:with|by)|be|predicting|predicts?|"
        r"anticipat(?:es|ing)|expect(?:s|ing)?|generat(?:e|es|ing)|introduc(?:e|es|ing)|suggest(?:s|ing)?|focus(?:es|ing)? on)?"
        r"(?: that)?(?: to)?\s+(?=\S)",
        r"^it (?:predicts?|anticipates?|expects?|may|might|will|would|could|likely)\s+(?:this|that|to)?\s*",
        r"^this (?:sequence|phrase|continuation|suggests?|indicates?|reflects?)\s+(?:that\s+)?",
    )
)
_SALIENT = re.compile(r"^(?:the )?salient tokens? (?:include|are)\s+", re.IGNORECASE)
_KIND_ON_TOPICS = re.compile(r"^(?:an? )?(?P<kind>[\w+ ]{2,24}) on (?P<first>[a-z]+)(?: and (?P<second>[a-z]+))?$")
_FIELD = re.compile(r"^(topic|tokens|next|kind|words|format|pattern): ", re.IGNORECASE)


def clean_label(raw: str, max_words: int = 70) -> str:
    """Bullets `- ...`, one a line, three at most; an empty string when nothing is left to say.

    Example: "1. **Tokens**: frame, index.\\n2. **Next**: the model is preparing a new sentence."
             -> "- tokens: frame, index\\n- next: a new sentence"
    """
    bullets: list[str] = []
    for item in _split_items(_drop_cut_off(raw.strip())):
        bullet = _clean_item(item)
        if bullet and bullet.lower() not in {known.lower() for known in bullets}:
            bullets.append(bullet)
        if len(bullets) == MAX_BULLETS:
            break
    budget = max(1, max_words // max(1, len(bullets)))
    return "\n".join(f"- {_cap_words(bullet, budget)}" for bullet in bullets)


def _split_items(raw: str) -> list[str]:
    """List items when the label is a list (numbers must count 1, 2, 3, so that "in 2. The" is none), else sentences."""
    starts: list[tuple[int, int]] = []
    for match in _NUMBER.finditer(raw):
        if int(match.group(1)) == len(starts) + 1:
            starts.append(match.span())
    if len(starts) < 2:
        starts = [match.span() for match in _BULLET_LINE.finditer(raw)]
    if len(starts) < 2:
        return [piece for line in raw.splitlines() for piece in _SENTENCE_END.split(line) if piece.strip()]
    ends = [start for start, _ in starts[1:]] + [len(raw)]
    return [raw[begin:end] for (_, begin), end in zip(starts, ends, strict=True)]


def _drop_cut_off(raw: str) -> str:
    """Without its last sentence when that has no end mark and something stands before it."""
    if not raw or raw.rstrip("\"'”*`) ").endswith((".", "!", "?", ":", "…")):
        return raw
    whole = [match.end() for match in re.finditer(r"[.!?][\"'”*`)]*(?=\s)", raw)]
    # A number such as "3." ends no sentence.
    whole = [end for end in whole if not re.search(r"(?:^|\s)\d{1,2}[.]$", raw[:end])]
    return raw[: whole[-1]] if whole and raw.count(".") > 1 else raw


def _clean_item(item: str) -> str:
    """One bullet: heading and first sentence, without markup, boilerplate and end mark."""
    heading, rest = _split_heading(item.strip())
    sentences = [_strip_boilerplate(sentence) for sentence in _SENTENCE_END.split(rest) if sentence.strip()]
    body = next((sentence for sentence in sentences if sentence), "")
    if heading.lower() in ("topic", "kind"):
        heading = ""
    if heading.lower() in ("tokens", "next"):
        heading = heading.lower()
    if not heading and sentences and (template := _offline_form(rest, body)):
        return template
    return f"{heading}: {body}" if heading and body else heading or body


def _split_heading(item: str) -> tuple[str, str]:
    """`**Heading**: rest` or `**Heading** rest` -> both without markup; no bold start: an empty heading."""
    match = re.match(r"\*\*(?P<heading>.+?)\*\*\s*[:\-–—]?\s*(?P<rest>.*)", item, re.DOTALL)
    if match is None:
        return "", _plain(item)
    return _plain(match.group("heading")).rstrip(".:… "), _plain(match.group("rest"))


def _offline_form(sentence: str, body: str) -> str:
    """`a Python test on frame and index` -> `Python test: frame, index`; named fields for the other two facts."""
    if match := _KIND_ON_TOPICS.match(body):
        topics = [topic for topic in (match["first"], match["second"]) if topic]
        return f"{match['kind']}: {', '.join(topics)}"
    if _SALIENT.match(sentence):
        return f"tokens: {_SALIENT.sub('', body)}"
    if re.search(r"\bcontinue with\b", sentence):
        return f"next: {body}"
    return ""


def _strip_boilerplate(sentence: str) -> str:
    sentence = sentence.strip()
    for pattern in _BOILERPLATE:
        shorter = pattern.sub("", sentence, count=1).strip()
        sentence = shorter or sentence
    return _OUTER_QUOTES.sub("", sentence.rstrip(".!…: ")).strip().rstrip(".")


def _plain(text: str) -> str:
    return _OUTER_QUOTES.sub("", " ".join(_MARKUP.sub("", text).replace("`", "").split())).strip()


def _cap_words(text: str, limit: int) -> str:
    words = text.split()
    return " ".join(words[:limit]).rstrip(",;:") if len(words) > limit else text
