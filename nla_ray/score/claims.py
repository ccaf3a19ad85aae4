"""What a description claims, and whether its text bears it out.

Items, repeats, claimed words, the domain it names. Pure string work on the standard library, so
that rewards may use it too. It knows neither models nor teachers; domain names are passed in. A
description has bullets; a bullet is free prose or a list under a heading (`- Python test: frame,
index`). The rule it protects: a description that claims nothing has precision 0, so that silence
never raises the figure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Literal

Mark = Literal["", "found", "missing"]

TOKENS_HEADING = "tokens"
NEXT_HEADING = "next"
PLACEHOLDERS = ("no word stands out", "no word in particular", "nothing in particular")
"""How a teacher says that it has nothing to name; no claim."""
MIN_WORD_LETTERS = 3
MAX_HEADING_WORDS = 4
MAX_ITEM_WORDS = 2
"""A bullet whose comma-separated parts are all this short is a list under a heading, else prose."""

FUNCTION_WORDS = frozenset(
    """a about above across after again against all almost also although always among an and another
    any anything are around as at be because been before being below between both but by can cannot
    could did do does doing done down during each either else etc even ever every everything few for
    from further get gets give given goes had has have having he her here hers him his how however
    if in indicating instead into is it its itself just least less let like likely lot made make
    makes making many may maybe me might more most much must my near need neither no nor not nothing
    now of off often on once one only onto or other our out over own per perhaps possibly probably
    quite rather same see seem seems several she should since so some something still such than that
    the their them then there these they this those though through thus to together too toward
    towards under until up upon us use used uses using very via was way we well were what when where
    whether which while who whom whose why will with within without would yet you your
    yours""".split()
)
"""English words without content of their own; they are true of every text."""
DESCRIBING_WORDS = frozenset(
    """activation answer assistant bullet content context continue continues continuation
    description discussion document explanation focus follow following followed format involving
    language likely mention mentions model next output passage pattern phrase preparing predict
    prediction related response salient sentence sequence starting structure suggests text token
    tokens tone topic topics word words""".split()
)
"""Words that describe any text rather than this one."""

_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+")
_QUOTED = re.compile(r"[\"“`]([^\"”`\n]{2,80})[\"”`]|(?<!\w)['‘]([^'’\n]{2,80})['’](?!\w)")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_IDENTIFIER = re.compile(r"[^\W\d][\w]*")
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_QUOTES = "\"“”`'‘’"
_NAME = re.compile(
    r"\b(?:[^\W\d_]+[\d_]\w*|[a-z]+[A-Z]\w*|[A-Z]+[a-z]+[A-Z]\w*)\b|(?<=[\w,;] )[A-Z][^\W\d_]+"
)
_CLAIM = re.compile(
    rf"{_QUOTED.pattern}|{_NUMBER.pattern}|[^\W\d_]*[^\W\d_A-Za-z][^\W\d_]*"
    rf"|{_CAMEL_PIECE.pattern}"
)
"""In running text: a quoted string, a number, a word beyond ASCII, or a piece of another."""
_HIDDEN_COMMA = "\0"
_TRIMMED = " \t.;:!?-*•"


def bullets(description: str) -> list[str]:
    """The lines of a description without their bullet marks; empty lines are left out."""
    lines = (_BULLET.sub("", line).strip() for line in description.splitlines())
    return [line for line in lines if line]


def split_heading(bullet: str) -> tuple[str, str]:
    """`Python test: frame, index` -> ("Python test", "frame, index"). Prose has an empty heading.

    A list under a heading has a heading of at most four words and comma-separated parts of at most
    two; `tokens:` and `next:` are headings whatever follows.
    """
    heading, colon, body = bullet.partition(":")
    heading, body = heading.strip(), body.strip()
    if colon and heading.casefold() in (TOKENS_HEADING, NEXT_HEADING):
        return heading, body
    is_list = all(len(part.split()) <= MAX_ITEM_WORDS for part in body.split(","))
    if colon and heading and len(heading.split()) <= MAX_HEADING_WORDS and is_list:
        return heading, body
    return "", bullet


def frame_of(description: str) -> tuple[str, str]:
    """The kind of text that a heading names first, and the continuation; "" for what it lacks.

    >>> frame_of("- tokens: frame\\n- Python test: index\\n- next: another check")
    ('Python test', 'another check')
    >>> frame_of("- licence: nothing in particular\\n- Next: a list")
    ('licence', 'a list')
    """
    kind = continuation = ""
    for bullet in bullets(description):
        for placeholder in PLACEHOLDERS:
            bullet = bullet.replace(placeholder, "")
        heading, body = split_heading(bullet)
        if heading.casefold() == NEXT_HEADING:
            continuation = continuation or body
        elif heading.casefold() != TOKENS_HEADING:
            kind = kind or heading
    return kind, continuation


def list_parts(body: str) -> list[str]:
    """A list cut at its commas, but for those that a quotation holds.

    >>> list_parts('"yes, sir", frame')
    ['"yes, sir"', ' frame']
    """
    hidden = _QUOTED.sub(lambda quoted: quoted[0].replace(",", _HIDDEN_COMMA), body)
    return [part.replace(_HIDDEN_COMMA, ",") for part in hidden.split(",")]


def items(description: str) -> list[str]:
    """The comma-separated parts of every bullet, headings left out, casefolded.

    >>> items("- Python test: frame, index\\n- next: another check")
    ['frame', 'index', 'another check']
    """
    bodies = (split_heading(bullet)[1] for bullet in bullets(description))
    parts = (part.strip(_TRIMMED).casefold() for body in bodies for part in list_parts(body))
    return [part for part in parts if part]


def item_spans(description: str) -> list[list[tuple[int, int]]]:
    """First character and end of every item, list by list; what `next:` forecasts is none.

    A list without an item is left out.

    >>> description = "- tokens: frame, index\\n- next: more"
    >>> [[description[begin:end] for begin, end in spans] for spans in item_spans(description)]
    [['frame', 'index']]
    """
    lists: list[list[tuple[int, int]]] = []
    offset = 0
    for line in description.splitlines(keepends=True):
        heading, body = split_heading(_BULLET.sub("", line).strip())
        if heading and heading.casefold() != NEXT_HEADING and body not in PLACEHOLDERS:
            spans = []
            at = offset + line.index(body, line.index(":"))
            for part in list_parts(body):
                begin = at + len(part) - len(part.lstrip())
                if part.strip():
                    spans.append((begin, begin + len(part.strip())))
                at += len(part) + 1
            lists += [spans] if spans else []
        offset += len(line)
    return lists


def repeats_item(description: str) -> bool:
    """Whether it lists an item twice, or says a word twice in a row in one ("assert assert")."""
    listed = items(description)
    if len(set(listed)) < len(listed):
        return True
    return any(first == second for item in listed for first, second in pairwise(item.split()))


def word_pieces(text: str) -> list[str]:
    """Words in order, casefolded; identifiers are cut at `_`, digits and camelCase.

    A word beyond ASCII stays whole.

    >>> word_pieces("readFrameIndex(df_test, x1)")
    ['read', 'frame', 'index', 'df', 'test', 'x']
    """
    pieces: list[str] = []
    for run in _LETTERS.findall(text):
        pieces += _CAMEL_PIECE.findall(run) if run.isascii() else [run]
    return [piece.casefold() for piece in pieces]


def found_words(text: str) -> frozenset[str]:
    """What a one-word claim may match in a source text, casefolded.

    These are identifiers, whole and in pieces, and numbers.
    """
    whole = (identifier.casefold() for identifier in _IDENTIFIER.findall(text))
    return frozenset([*word_pieces(text), *whole, *_NUMBER.findall(text)])


def claimed_words(description: str) -> frozenset[str]:
    """What a description claims to stand in THIS text, casefolded.

    These are content words, names, numbers and quoted strings. Left out are a list's heading (the
    kind of text: see `named_domain`) and everything under `next:`, which forecasts what is not in
    the text. Quoted strings keep their spaces and count as one claim.
    """
    claimed: set[str] = set()
    for bullet in bullets(description):
        for placeholder in PLACEHOLDERS:
            bullet = bullet.replace(placeholder, " ")
        heading, body = split_heading(bullet)
        if heading.casefold() == NEXT_HEADING:
            continue
        prose = _QUOTED.sub(" ", body)
        claimed.update(string for string in _quoted_strings(body) if string)
        claimed.update(_NUMBER.findall(prose))
        claimed.update(content_words(prose, listed=bool(heading)))
    return frozenset(claimed)


def specifics(description: str) -> frozenset[str]:
    """The claims that only reading THIS text can bear out, casefolded.

    These are quoted strings, numbers, names, and what `tokens:` lists. Names are identifiers with
    an inner capital, digit or underscore, and capitalised words inside a sentence.

    >>> sorted(specifics('mentions Alice and "two words" in 1984, near df_test'))
    ['1984', 'alice', 'df_test', 'two words']
    """
    claimed: set[str] = set()
    for bullet in bullets(description):
        heading, body = split_heading(bullet)
        if heading.casefold() == NEXT_HEADING:
            continue
        claimed.update(_quoted_strings(body))
        prose = _QUOTED.sub(" ", body)
        claimed.update(name.casefold() for name in _NAME.findall(prose))
        claimed.update(_NUMBER.findall(_NAME.sub(" ", prose)))
        if heading.casefold() == TOKENS_HEADING and not any(
            placeholder in body for placeholder in PLACEHOLDERS
        ):
            claimed.update(part.strip(_TRIMMED).casefold() for part in prose.split(","))
    return frozenset(claimed - {""})


def _quoted_strings(body: str) -> list[str]:
    """Casefolded, with single spaces."""
    return [
        " ".join((double or single).casefold().split()) for double, single in _QUOTED.findall(body)
    ]


def missing_specifics(description: str, text: str) -> tuple[int, int]:
    """(specifics that do not occur in the text, all specifics)."""
    claimed = specifics(description)
    found, flat = found_words(text), " ".join(text.casefold().split())
    missing = [claim for claim in claimed if not (claim in found or _stands_in(claim, flat))]
    return len(missing), len(claimed)


def source_recall(description: str, words: Collection[str]) -> float:
    """Share of a text's most salient words, which the caller gives, that the description names.

    0 for a text without any.
    """
    return len(claimed_words(description) & set(words)) / len(words) if words else 0.0


def similarity(first: str, second: str) -> float:
    """Jaccard overlap of two descriptions' content words, headings included.

    1 for the same template line, 0 for nothing shared.
    """
    first_words = frozenset(word_pieces(first)) - FUNCTION_WORDS
    second_words = frozenset(word_pieces(second)) - FUNCTION_WORDS
    union = first_words | second_words
    return len(first_words & second_words) / len(union) if union else 1.0


def quotes_something(description: str) -> bool:
    """Whether there is a quoted string in the description."""
    return _QUOTED.search(description) is not None


def strip_quotes(description: str) -> str:
    """The description without what it quotes: what is left must still pick out the activation."""
    if not quotes_something(description):
        return description
    stripped = "\n".join(_QUOTED.sub(" ", line) for line in description.splitlines())
    return re.sub(r"[ \t]+", " ", stripped).strip()


def strip_specifics(line: str) -> str:
    """A line of prose without its specifics, and without the marks that stood around them.

    >>> strip_specifics('explains ownership to Alice, "let t = s" (E0382), in steps')
    'explains ownership to, in steps'
    """
    for kind in (_QUOTED, _NAME, _NUMBER):
        line = kind.sub(" ", line)
    line = re.sub(r"\(\W*\)|\*+", " ", line)
    line = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", line))
    return re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", line).strip(_TRIMMED + ",")


def non_ascii_share(description: str) -> float:
    """Share of characters beyond ASCII.

    It rises when a verbalizer drifts into another language or into noise.
    """
    if not description:
        return 0.0
    return sum(not character.isascii() for character in description) / len(description)


def marked(description: str, text: str, without: str = "") -> list[tuple[str, Mark]]:
    """The description cut into pieces, each claim marked by whether the text bears it out.

    Joined, the pieces are the description. `without`: as in `found_claims`.

    >>> marked("- Python test: frame, qux", "def frame")
    [('- Python test: ', ''), ('frame', 'found'), (', ', ''), ('qux', 'missing')]
    """
    marks: dict[str, Mark] = {
        claim: "found" if is_found else "missing"
        for claim, is_found in found_claims(description, text, without).items()
    }
    pieces: list[tuple[str, Mark]] = []
    for line in re.split(r"(\n)", description):
        pieces += _marked_line(line, marks)
    return _joined(pieces)


def claim_spans(description: str) -> dict[str, tuple[int, int]]:
    """Every claim that has a place, with first character and end of where it is said first.

    >>> claim_spans("- Python test: frame, qux")
    {'frame': (15, 20), 'qux': (22, 25)}
    """
    spans: dict[str, tuple[int, int]] = {}
    offset = 0
    for piece, mark in marked(description, ""):
        if mark:
            spans.setdefault(claim_of(piece), (offset, offset + len(piece)))
        offset += len(piece)
    return spans


def claim_of(piece: str) -> str:
    """What a marked piece claims: without quotation marks, casefolded, with single spaces."""
    return " ".join(piece.strip(_QUOTES).casefold().split())


def _marked_line(line: str, marks: Mapping[str, Mark]) -> list[tuple[str, Mark]]:
    """A line cut into pieces; `marks`: of every claim of the description."""
    head = _BULLET.match(line)
    start = head.end() if head else 0
    heading, body = split_heading(line[start:].strip())
    if heading.casefold() == NEXT_HEADING:
        return [(line, "")]
    start = line.index(body, line.index(":", start)) if heading and body else start
    pieces: list[tuple[str, Mark]] = [(line[:start], "")]
    last = start
    for match in _CLAIM.finditer(line, start):
        claim = claim_of(match[0])
        if claim in marks:
            pieces.append((line[last : match.start()], ""))
            pieces.append((match[0], marks[claim]))
            last = match.end()
    return [*pieces, (line[last:], "")]


def _joined(pieces: Iterable[tuple[str, Mark]]) -> list[tuple[str, Mark]]:
    """Neighbours with the same mark as one piece; empty pieces are left out."""
    joined: list[tuple[str, Mark]] = []
    for text, mark in pieces:
        if text and joined and joined[-1][1] == mark == "":
            joined[-1] = (joined[-1][0] + text, mark)
        elif text:
            joined.append((text, mark))
    return joined


def content_words(text: str, listed: bool) -> Iterable[str]:
    """Word pieces of a text that say something, and so can be claimed.

    In a list even "next" or "model" is a word of the text, not about the text.
    """
    excluded = FUNCTION_WORDS if listed else FUNCTION_WORDS | DESCRIBING_WORDS
    return (
        piece
        for piece in word_pieces(text)
        if piece not in excluded and (len(piece) >= MIN_WORD_LETTERS or not piece.isascii())
    )


def claim_counts(description: str, text: str, without: str = "") -> tuple[int, int]:
    """(claims found in the text, claims made), each distinct claim once.

    A quoted string is found as a whole. `without`: as in `found_claims`.
    """
    found = found_claims(description, text, without)
    return sum(found.values()), len(found)


def found_claims(description: str, text: str, without: str = "") -> dict[str, bool]:
    """Every claim of a description, and whether the text bears it out.

    `without`: of a difference of two texts the second; what it has as well is not borne out.

    >>> found_claims("- tokens: frame", "the frame")
    {'frame': True}
    >>> found_claims("- tokens: frame", "the frame", without="a frame")
    {'frame': False}
    """
    claimed = claimed_words(description)
    found = _borne_out(claimed, text)
    if without:
        found -= _borne_out(found, without)
    return {claim: claim in found for claim in claimed}


def _borne_out(claimed: Collection[str], text: str) -> set[str]:
    found, flat = found_words(text), " ".join(text.casefold().split())
    return {claim for claim in claimed if claim in found or _stands_in(claim, flat)}


def claim_outcomes(description: str, text: str) -> dict[str, bool]:
    """Of every claim that has a place, in the order in which it is said, whether the text has it.

    >>> claim_outcomes("- tokens: frame, qux", "the frame")
    {'frame': True, 'qux': False}
    """
    found = found_claims(description, text)
    return {claim: found[claim] for claim in claim_spans(description)}


def _stands_in(claim: str, flat_text: str) -> bool:
    """Whether a quoted string with spaces or signs occurs between word boundaries.

    Words and numbers were looked up already.
    """
    if claim.isalpha() or _NUMBER.fullmatch(claim):
        return False
    return re.search(rf"(?<!\w){re.escape(claim)}(?!\w)", flat_text) is not None


def claim_precision(description: str, text: str, without: str = "") -> float:
    """Share of the claimed words that occur in the text; 0 for a description without claims.

    `without`: as in `found_claims`.
    """
    found, claimed = claim_counts(description, text, without)
    return found / claimed if claimed else 0.0


def named_domain(description: str, names: Mapping[str, str]) -> str | None:
    """The slug of the domain whose name comes first outside `tokens:` and `next:`, or None.

    `names`: slug -> human name. Of names that start at the same place the longest counts ("C++
    source file" before "C++ source").
    """
    spoken = "\n".join(
        bullet
        for bullet in bullets(description)
        if split_heading(bullet)[0].casefold() not in (TOKENS_HEADING, NEXT_HEADING)
    ).casefold()
    hits = []
    for slug, name in names.items():
        match = re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", spoken)
        if match:
            hits.append((match.start(), -len(name), slug))
    return min(hits)[2] if hits else None


def domain_named(description: str, domain: str, names: Mapping[str, str]) -> bool:
    """Whether the description names its text's true domain (before any other)."""
    return named_domain(description, names) == domain
