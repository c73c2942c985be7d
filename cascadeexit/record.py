"""Records: save races to files that the page can replay. Files are not trusted: `load` checks every value.

A file is one JSON object {"format": 1, "records": [...]}; the records are the lines of `TokenStream`, described there.
"""

import json
import math
import re

from cascadeexit.events import COPIED
from cascadeexit.stream import CASCADE, FORMAT, FULL, write_line

MAX_BYTES, MAX_RECORDS = 8_000_000, 60_000
_NUMBER = (int, float)
_TOKEN = {"side": str, "i": int, "id": int, "status": str}
# Fields that the page needs of each type of record; other fields may be missing.
_FIELDS = {
    "model": {"model": str, "layers": int, "exits": list, "trained": bool, "colours": list},
    "run": {"run": str, "mode": str, "thresholds": list, "max_new_tokens": int},
    "token": _TOKEN,
    "text": {"side": str, "i": int, "text": str},
    "stats": {"side": str, "tokens": int, "seconds": _NUMBER, "routing_share": list},
    "versus": {"n": int, "positional": _NUMBER, "rolling": _NUMBER},
    "end": {"positional": _NUMBER, "sequence": bool},
    "stopped": {}, "error": {"message": str},
}
_TOKEN_TEXT = {"text": str, "exit": int, "t": _NUMBER, "conf": list}
# Fields that may be missing or null; any other value must have this type.
_OPTIONAL = {
    "token": {"ms": _NUMBER, "read": _NUMBER, "bytes": str, "special": bool, "part": bool},
    "stats": dict.fromkeys(("copied_share", "cost", "tokens_per_second", "first_token_seconds", "token_seconds_p50",
                            "token_seconds_p90", "token_seconds_p99"), _NUMBER),
    "versus": {"speedup": _NUMBER, "first_divergence": int},
    "end": {"agreement": _NUMBER, "first_divergence": int, "identical": bool, "differs": list},
}
_STATUS = ("emitted", "draft", "accepted", "rejected")


def dump(stream: str) -> str:
    """Convert a finished stream to the content of the file that saves it; `load` reads it back."""
    records = [json.loads(line) for line in stream.splitlines()]
    return json.dumps({"format": FORMAT, "records": records}, separators=(",", ":"))


def load(content: bytes | str) -> str:
    """Read a file that `dump` made. Returns the stream of the recorded race, which the page can draw.

    Raises ValueError that names what was expected and what the file holds instead.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"this file has {len(content):,} bytes, the limit is {MAX_BYTES:,}")
    try:
        file = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this file is not JSON ({error}). Choose a file that Save wrote.") from None
    if not isinstance(file, dict) or not isinstance(file.get("records"), list):
        raise ValueError('this is not a recorded run: expected {"format": ..., "records": [...]}. Choose a file that '
                         "Save wrote.")
    if file.get("format") != FORMAT:
        raise ValueError(f"this record has format {file.get('format')!r}; this page reads format {FORMAT}")
    if not 2 <= len(file["records"]) <= MAX_RECORDS:
        raise ValueError(f"expected 2 to {MAX_RECORDS:,} entries, got {len(file['records']):,}")
    for number, record in enumerate(file["records"]):
        _check(number, record)
    _check_whole(file["records"])
    return "".join(write_line(**record) for record in file["records"])


def _check_whole(records: list[dict]) -> None:
    """Check that entries fit together, after `_check` accepted each one. Raises ValueError if they do not."""
    kinds, model = [record["type"] for record in records], records[0]
    if kinds[:2] != ["model", "run"] or {"model", "run"} & {*kinds[2:]}:
        raise ValueError("a record must begin with a model and a run, and hold no other model or run")
    if not all(isinstance(e, dict) and isinstance(e.get("layer"), int) for e in model["exits"]):
        raise ValueError('entry 0 (model): exits should be a list of {"layer": ...}')
    exits = len(model["exits"])
    # Colours become styles of the page, where another value could make the browser fetch something.
    if len(model["colours"]) != exits + 1 or not all(
            isinstance(c, str) and re.fullmatch("#[0-9A-Fa-f]{6}", c) for c in model["colours"]):
        raise ValueError(f"entry 0 (model): colours should be {exits + 1} values written as #RRGGBB")
    written = {CASCADE: 0, FULL: 0}
    for number, record in enumerate(records):
        if not COPIED <= record.get("exit", 0) <= exits:
            raise ValueError(f"entry {number}: exit should be 0 to {exits}, or {COPIED} for a copied token, got "
                             f"{record['exit']}")
        for name, length in (("conf", exits), ("thresholds", exits), ("routing_share", exits + 1)):
            values = record.get(name, [None] * length)
            if len(values) != length or not all(v is None or _fits(v, _NUMBER) for v in values):
                raise ValueError(f"entry {number}: {name} should be {length} numbers, got {values!r}"[:300])
        if record["type"] not in ("token", "text"):
            continue
        side, i = record["side"], record["i"]
        final = record.get("status") in ("emitted", "accepted")
        if i < 0 or (final and i != written[side]) or (record["type"] == "text" and i >= written[side]):
            raise ValueError(f"entry {number} ({record['type']}): {written[side]} tokens of this side come before it, "
                             f"so its position cannot be {i}")
        written[side] += final


def _check(number: int, record) -> None:
    """Check one entry without looking at the others. Raises ValueError if it is wrong."""
    kind = record.get("type") if isinstance(record, dict) else None
    if kind not in _FIELDS:
        raise ValueError(f"entry {number}: expected one of the types {', '.join(_FIELDS)}, got {kind!r}")
    fields = dict(_FIELDS[kind])
    if kind == "token" and record.get("status") != "rejected":
        fields |= _TOKEN_TEXT
    optional = {name: wanted for name, wanted in _OPTIONAL.get(kind, {}).items() if record.get(name) is not None}
    for name, wanted in (fields | optional).items():
        value = record.get(name)
        if not _fits(value, wanted):
            raise ValueError(f"entry {number} ({kind}): {name} should be {_name(wanted)}, got {value!r}"[:300])
    if not all(_fits(i, int) for i in record.get("differs") or []):
        raise ValueError(f"entry {number} ({kind}): differs should hold whole numbers")
    if not re.fullmatch("([0-9a-f]{2})+", record.get("bytes") or "00"):
        raise ValueError(f"entry {number} ({kind}): bytes should be hexadecimal digits, got {record['bytes']!r}"[:300])
    if record.get("side", CASCADE) not in (CASCADE, FULL):
        raise ValueError(f"entry {number}: side should be {CASCADE} or {FULL}, got {record['side']!r}"[:300])
    if kind == "token" and record["status"] not in _STATUS:
        raise ValueError(f"entry {number}: status should be one of {', '.join(_STATUS)}, got "
                         f"{record['status']!r}"[:300])


def _fits(value, wanted) -> bool:
    """Return True if a value has the wanted type; a number must also be finite."""
    if isinstance(value, bool):             # Python counts True as a whole number
        return wanted is bool
    return isinstance(value, wanted) and not (isinstance(value, float) and not math.isfinite(value))


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a JSON number")


def _name(wanted) -> str:
    return {str: "text", int: "a whole number", list: "a list", bool: "true or false"}.get(wanted, "a number")
