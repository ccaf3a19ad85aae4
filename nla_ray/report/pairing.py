"""Which verbalizers a report compares row by row, and which it may not.

A difference is made within one generation protocol (`description/protocol.py` says what that is).
Where a protocol is not recorded, the run's own verbalizers are compared all the same: one report
described them. One from elsewhere is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nla_ray.description.protocol import GenerationProtocol, require_same_protocol
from nla_ray.report.controls import pairs_of

NOT_RECORDED = "not recorded"
"""In place of a protocol."""


def comparable_pairs(
    verbalizers: Sequence[str],
    protocols: Mapping[str, GenerationProtocol | None],
    from_elsewhere: Collection[str],
) -> list[tuple[str, str]]:
    """The pairs that are compared.

    Raises ValueError, saying what differs, for a pair of two protocols.
    """
    pairs = []
    for pair in pairs_of(verbalizers):
        first, second = (protocols.get(name) for name in pair)
        if first is not None and second is not None:
            require_same_protocol(pair, first, second)
        elif not set(pair).isdisjoint(from_elsewhere):
            continue
        pairs.append(pair)
    return pairs


def protocol_notes(
    protocols: Mapping[str, GenerationProtocol | None], from_elsewhere: Collection[str]
) -> list[str]:
    """What is not known of how descriptions were generated, and what follows."""
    unknown = [name for name in protocols if protocols[name] is None]
    own = [name for name in unknown if name not in from_elsewhere]
    notes = [
        f"{name}: how it was generated is not recorded, so it is in no paired difference."
        for name in unknown
        if name in from_elsewhere
    ]
    if own:
        notes.append(
            f"{', '.join(own)}: an earlier version described them and did not record how; they are"
            " compared because one report described them all."
        )
    return notes


def protocol_records(protocols: Mapping[str, GenerationProtocol | None]) -> dict[str, Any]:
    """verbalizer -> its protocol as a report holds it, with the hash of what a comparison asks."""
    records: dict[str, Any] = {}
    for name, protocol in protocols.items():
        record = NOT_RECORDED if protocol is None else protocol.to_record()
        if protocol is not None and isinstance(record, dict):
            record["comparison"] = protocol.comparison_hash
        records[name] = record
    return records
