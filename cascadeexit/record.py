"""Records: saves runs to files that the page can replay. Files are not trusted: `load` checks every value.

A file is one JSON object {"format": 1, "records": [...]}. `cascadeexit.stream` describes the records. In older files,
the record `run` has no field `sides`. Such a run has two sides (texts): `cascade` and `full`.
"""

import json
import re

from cascadeexit.events import COPIED
from cascadeexit.sides import CASCADE, FORKS, FULL, SECOND
from cascadeexit.stream import FORMAT
from cascadeexit.values import shown
from cascadeexit.wire import STATUSES, expand, write_line

MAX_BYTES, MAX_RECORDS = 8_000_000, 60_000
_CHOOSE = "Choose a file that the button Save run (JSON) wrote."
_PASSING = ("status", "replay")             # types of records that are not saved
_NUMBER = (int, float)
_LARGEST = 1e9              # larger numbers mean nothing here, and might not fit where they are shown
_TOKEN = {"side": str, "i": int, "id": int, "status": str}
# Fields that the page needs of each type of record; other fields may be missing.
_FIELDS = {
    "model": {"model": str, "layers": int, "exits": list, "trained": bool, "colours": list},
    "run": {"run": str, "mode": str, "thresholds": list, "max_new_tokens": int},
    "reading": {"side": str, "read": int, "total": int},
    "token": _TOKEN,
    "checked": {"side": str, "i": int, "ids": list},
    "tree": {"side": str, "i": int, "drafts": list},
    "text": {"side": str, "i": int, "text": str},
    "stats": {"side": str, "tokens": int, "seconds": _NUMBER, "routing_share": list},
    "versus": {"n": int, "positional": _NUMBER, "rolling": _NUMBER},
    "end": {},
    "fork": {"side": str, "of": str, "at": int, "id": int, "text": str, "title": str},
    "spread": {"side": str, "speedups": list, "tokens": int},
    "stopped": {}, "error": {"message": str},
}
_TOKEN_TEXT = {"text": str, "exit": int, "t": _NUMBER, "conf": list}
# Fields that may be missing or null; any other value must have this type.
_OPTIONAL = {
    "run": {"sides": list, "machine": str, "date": str, "prompt_tokens": int, "greedy": bool, "tolerance": _NUMBER,
            "settings": dict},
    "token": {"ms": _NUMBER, "read": _NUMBER, "bytes": str, "special": bool, "part": bool, "ran": list},
    "stats": dict.fromkeys(("copied_share", "cost", "tokens_per_second", "first_token_seconds", "token_seconds_p50",
                            "token_seconds_p90", "token_seconds_p99"), _NUMBER),
    "versus": {"side": str, "speedup": _NUMBER, "first_divergence": int},
    "end": {"side": str, "agreement": _NUMBER, "positional": _NUMBER, "first_divergence": int, "sequence": bool,
            "identical": bool, "differs": list, "moments": list, "loops": dict},
}
# Fields of the objects in lists, and of objects.
_SIDE = {"name": str, "mode": str, "thresholds": list, "tolerance": _NUMBER, "title": str}
_MOMENT = {"i": int, "id": int, "said": str, "full": str, "p_said": _NUMBER, "p_full": _NUMBER}
_LOOP = {"start": int, "period": int, "share": _NUMBER}


def dump(stream: str) -> str:
    """Convert the stream of a finished run (`TokenStream.text`) to the content of a file, which `load` reads.

    Raises ValueError if the stream has a line that is not JSON.
    """
    records = [record for record in map(expand, stream.splitlines()) if record["type"] not in _PASSING]
    return json.dumps({"format": FORMAT, "records": records}, separators=(",", ":"))


def load(content: bytes | str) -> str:
    """Read the content of a file that `dump` made. Returns the stream of the recorded run, which the page can play.

    Raises ValueError if the file is not such a file. The message says what was expected and what the file has instead.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"this file has {len(content):,} bytes, the limit is {MAX_BYTES:,}")
    try:
        file = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this file is not JSON ({error}). {_CHOOSE}") from None
    if not isinstance(file, dict) or not isinstance(file.get("records"), list):
        raise ValueError('this is not a recorded run: expected {"format": ..., "records": [...]}. ' + _CHOOSE)
    if file.get("format") != FORMAT:
        raise ValueError(f"this file has format {shown(file.get('format'))}; this page reads format {FORMAT}")
    if not 2 <= len(file["records"]) <= MAX_RECORDS:
        raise ValueError(f"records should have 2 to {MAX_RECORDS:,} entries, got {len(file['records']):,}")
    for number, record in enumerate(file["records"]):
        _check(number, record)
    _check_whole(file["records"])
    return "".join(write_line(**record) for record in file["records"])


def _check_whole(records: list[dict]) -> None:
    """Check that all records of a file fit together. Raises ValueError if they do not.

    `_check` must have accepted each record before.
    """
    kinds, model = [record["type"] for record in records], records[0]
    if kinds[:2] != ["model", "run"] or {"model", "run"} & {*kinds[2:]}:
        raise ValueError("records should begin with a model and a run, and have no other model or run")
    if not all(isinstance(e, dict) and isinstance(e.get("layer"), int) for e in model["exits"]):
        raise ValueError('entry 0 (model): exits should be a list of {"layer": ...}')
    exits = len(model["exits"])
    # Colours become styles of the page, where another value could make the browser fetch something.
    if len(model["colours"]) != exits + 1 or not all(
            isinstance(c, str) and re.fullmatch("#[0-9A-Fa-f]{6}", c) for c in model["colours"]):
        raise ValueError(f"entry 0 (model): colours should be {exits + 1} values written as #RRGGBB")
    written = {name: 0 for name in _side_names(records[1], exits)}
    for number, record in enumerate(records):
        _check_place(number, record, exits, written)


def _side_names(run: dict, exits: int) -> list[str]:
    """Return the names of the sides with which a run begins. Raises ValueError if these sides do not fit together.

    Args:
        run: the record of type `run`.
        exits: number of exits.
    """
    sides = run.get("sides")
    if sides is None:
        return [CASCADE, FULL]
    for side in sides:
        _check_fields("entry 1 (run): a side's", side, _SIDE)
        _check_numbers("entry 1 (run): a side's thresholds", side["thresholds"], exits)
    names = [side["name"] for side in sides]
    if names not in ([CASCADE, FULL], [CASCADE, SECOND, FULL]):
        raise ValueError(f"entry 1 (run): sides should be {CASCADE} and {FULL}, or {CASCADE}, {SECOND} and {FULL}, "
                         f"got {shown(names)}")
    return names


def _check_place(number: int, record: dict, exits: int, written: dict[str, int]) -> None:
    """Check that a record fits the records before it. Raises ValueError if it does not.

    Args:
        number: index of the record in its file.
        exits: number of exits.
        written: {name of a side: length of its text so far}; this function updates it.
    """
    kind, place = record["type"], f"entry {number} ({record['type']})"
    if kind == "token" and record["status"] != "rejected":
        if not COPIED <= record["exit"] <= exits:
            raise ValueError(f"entry {number}: exit should be 0 to {exits}, or {COPIED} for a copied token, got "
                             f"{record['exit']}")
        _check_numbers(f"entry {number}: conf", record["conf"], exits)
        if not all(c is None or 0 <= c <= 1 for c in record["conf"]):
            raise ValueError(f"{place}: conf should hold numbers from 0 to 1, got {shown(record['conf'])}")
    if kind == "run":
        _check_numbers(f"entry {number}: thresholds", record["thresholds"], exits)
    if kind == "stats":
        _check_numbers(f"entry {number}: routing_share", record["routing_share"], exits + 1)
    if kind == "fork":
        if record["side"] not in FORKS or record["side"] in written or record["of"] not in written:
            raise ValueError(f"{place}: a new fork should continue a side of this run, got {shown(record['side'])} of "
                             f"{shown(record['of'])}")
        if not 0 <= record["at"] < written[record["of"]]:
            raise ValueError(f"{place}: {written[record['of']]} tokens come before it, so it cannot begin at "
                             f"{record['at']}")
        written[record["side"]] = record["at"]
    if "side" in {**_FIELDS[kind], **_OPTIONAL.get(kind, {})} and record.get("side", CASCADE) not in written:
        raise ValueError(f"entry {number}: side should be one of {', '.join(written)}, got {shown(record['side'])}")
    if kind == "tree":
        _check_drafts(place, record["drafts"], exits)
    if kind not in ("token", "text", "checked", "tree"):
        return
    side, i = record["side"], record["i"]
    final = record.get("status") in ("emitted", "accepted")
    beyond = i + len(record["ids"]) > written[side] if kind == "checked" else kind == "text" and i >= written[side]
    if i < 0 or (final and i != written[side]) or beyond:
        raise ValueError(f"{place}: {written[side]} tokens of this side come before it, so its position cannot be {i}")
    written[side] += final


def _check_drafts(place: str, drafts: list, exits: int) -> None:
    """Check the drafts of a tree. Raises ValueError if one is wrong, or comes before its parent.

    A draft should be [id, text, parent, p, exit, accepted]. `place` names the record in error messages.
    """
    for n, draft in enumerate(drafts):
        fits = isinstance(draft, list) and len(draft) == 6 and all(
            map(_fits, draft, (int, str, int, (*_NUMBER, type(None)), int, bool)))
        if not fits or not -1 <= draft[2] < n or not COPIED <= draft[4] <= exits:
            raise ValueError(f"{place}: a draft should be [id, text, parent, p, exit, accepted], got {shown(draft)}")


def _check_numbers(place: str, values: list, length: int) -> None:
    if len(values) != length or not all(v is None or _fits(v, _NUMBER) for v in values):
        raise ValueError(f"{place} should be {length} numbers, got {shown(values)}")


def _check(number: int, record) -> None:
    """Check one record alone, without the records before it. Raises ValueError if it is wrong.

    number: index of the record in its file.
    """
    if not isinstance(record, dict):
        raise ValueError(f"entry {number} should be an object, got {shown(record)}")
    kind = record.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(f"entry {number}: type should be one of {', '.join(_FIELDS)}, got {shown(kind)}")
    place, fields = f"entry {number} ({kind}):", dict(_FIELDS[kind])
    if kind == "token" and record.get("status") != "rejected":
        fields |= _TOKEN_TEXT
    optional = {name: wanted for name, wanted in _OPTIONAL.get(kind, {}).items() if record.get(name) is not None}
    _check_fields(place, record, fields | optional)
    if kind == "token":
        _check_token(number, record)
    elif kind == "checked":
        _check_whole_numbers(place, "ids", record)
    elif kind == "spread":
        _check_numbers(f"{place} speedups", [x or "" for x in record["speedups"]], len(record["speedups"]))
    elif kind == "end":
        _check_whole_numbers(place, "differs", record)
        for moment in record.get("moments") or []:
            _check_fields(f"{place} a moment's", moment, _MOMENT)
        if record.get("loops") is not None:
            _check_fields(f"{place} loops:", record["loops"], _LOOP)


def _check_token(number: int, record: dict) -> None:
    """Check the values of a token's record whose type alone is not enough. Raises ValueError if one is wrong."""
    place = f"entry {number} (token):"
    if record["status"] not in STATUSES:
        raise ValueError(f"entry {number}: status should be one of {', '.join(STATUSES)}, got "
                         f"{shown(record['status'])}")
    for span in record.get("ran") or []:
        if not (isinstance(span, list) and len(span) == 3 and all(_fits(n, int) for n in span)):
            raise ValueError(f"{place} ran should hold [first, end, rows], got {shown(span)}")
    if not re.fullmatch("([0-9a-f]{2})+", record.get("bytes") or "00"):
        raise ValueError(f"{place} bytes should be hexadecimal digits, got {shown(record['bytes'])}")


def _check_whole_numbers(place: str, name: str, record: dict) -> None:
    if not all(_fits(i, int) for i in record.get(name) or []):
        raise ValueError(f"{place} {name} should hold whole numbers, got {shown(record[name])}")


def _check_fields(place: str, value, fields: dict) -> None:
    """Check that an object has these fields, and that each value has the right type. Raises ValueError if not.

    Args:
        place: names the object in error messages.
        fields: {name of a field: its type}.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place} fields should be an object, got {shown(value)}")
    for name, wanted in fields.items():
        if not _fits(value.get(name), wanted):
            raise ValueError(f"{place} {name} should be {_name(wanted)}, got {shown(value.get(name))}")


def _fits(value, wanted) -> bool:
    """Return True if a value has the wanted type. A number must also be finite and at most `_LARGEST`."""
    if isinstance(value, bool):             # Python counts True as a whole number
        return wanted is bool
    return isinstance(value, wanted) and not (isinstance(value, _NUMBER) and not abs(value) <= _LARGEST)


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a JSON number")


def _name(wanted) -> str:
    return {str: "text", int: "a whole number", list: "a list", dict: "an object", bool: "true or false"}.get(
        wanted, "a number")
