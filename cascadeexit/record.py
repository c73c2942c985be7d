"""Records: a race on file, for another page to replay. Checked when it is read, since it comes from anywhere.

A file is one JSON object {"format": 1, "records": [...]}; its records are the lines of `TokenStream`, described there.
"""

import json
import re

from cascadeexit.stream import CASCADE, FORMAT, FULL, write_line

MAX_BYTES, MAX_RECORDS = 8_000_000, 60_000
_NUMBER = (int, float)
_TOKEN = {"side": str, "i": int, "id": int, "status": str}
# What a page needs of each kind of record; fields that are not named here may be missing.
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
_SAID = {"text": str, "exit": int, "t": _NUMBER, "conf": list}
_STATUS = ("emitted", "draft", "accepted", "rejected")


def dump(stream: str) -> str:
    """A finished stream as the content of a file."""
    records = [json.loads(line) for line in stream.splitlines()]
    return json.dumps({"format": FORMAT, "records": records}, separators=(",", ":"))


def load(content: bytes | str) -> str:
    """The stream of a recorded race, ready to be drawn.

    Raises ValueError that says what was expected and what came.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"this file has {len(content):,} bytes, the limit is {MAX_BYTES:,}")
    try:
        file = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this file is not JSON ({error}). Give one that Save wrote.") from None
    if not isinstance(file, dict) or not isinstance(file.get("records"), list):
        raise ValueError('this is no recorded run: expected {"format": ..., "records": [...]}. Give one that Save '
                         "wrote.")
    if file.get("format") != FORMAT:
        raise ValueError(f"this record has format {file.get('format')!r}; this page reads format {FORMAT}")
    if not 2 <= len(file["records"]) <= MAX_RECORDS:
        raise ValueError(f"a record has 2 to {MAX_RECORDS:,} entries, this one {len(file['records']):,}")
    model = file["records"][0]
    for number, record in enumerate(file["records"]):
        _check(number, record)
    if [r["type"] for r in file["records"][:2]] != ["model", "run"]:
        raise ValueError("a record begins with a model and a run")
    if not all(isinstance(e, dict) and isinstance(e.get("layer"), int) for e in model["exits"]):
        raise ValueError('entry 0 (model): exits should be a list of {"layer": ...}')
    # Colours become styles of the page, where anything else than a colour could fetch something.
    if not all(isinstance(c, str) and re.fullmatch("#[0-9A-Fa-f]{6}", c) for c in model["colours"]):
        raise ValueError("entry 0 (model): colours should be written as #RRGGBB")
    for number, record in enumerate(file["records"]):
        if not 0 <= record.get("exit", 0) <= len(model["exits"]):
            raise ValueError(f"entry {number}: exit should be 0 to {len(model['exits'])}, got {record['exit']}")
    return "".join(write_line(**record) for record in file["records"])


def _check(number: int, record) -> None:
    kind = record.get("type") if isinstance(record, dict) else None
    if kind not in _FIELDS:
        raise ValueError(f"entry {number}: expected a type among {', '.join(_FIELDS)}, got {kind!r}")
    fields = dict(_FIELDS[kind])
    if kind == "token" and record.get("status") != "rejected":
        fields |= _SAID
    for name, wanted in fields.items():
        value = record.get(name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"entry {number} ({kind}): {name} should be {_name(wanted)}, got {value!r}"[:300])
    if record.get("side", CASCADE) not in (CASCADE, FULL):
        raise ValueError(f"entry {number}: side should be {CASCADE} or {FULL}, got {record['side']!r}"[:300])
    if kind == "token" and record["status"] not in _STATUS:
        raise ValueError(f"entry {number}: status should be among {', '.join(_STATUS)}, got {record['status']!r}"[:300])


def _name(wanted) -> str:
    return {str: "text", int: "a whole number", list: "a list", bool: "true or false"}.get(wanted, "a number")
