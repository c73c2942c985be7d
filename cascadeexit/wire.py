"""Wire: converts each record of a stream to one line of text, and back.

Most records are tokens. A token is written as a short array, and every other record as an object. The array has these
values in this order. Nulls at its end are left out:

    [side, i, id, status, text, exit, t, conf, read, ms, ran, special, bytes, part]

    side           index in `SIDES`, the names of the texts that a run can have
    status         index in `STATUSES`
    t              in microseconds
    conf           each confidence x 100,000, -1 for null; one number n instead of a list means n times null
    read           x 100,000
    ms             in microseconds
    ran            [first, end, rows, first, end, rows, ...]
    special, part  1 or null
    all others     as in `cascadeexit.stream`

`assets/page/wire.js` expands the lines in the browser. Saved files hold objects only (`cascadeexit.record`).
"""

import json

from cascadeexit.sides import NAMES as SIDES

STATUSES = ("emitted", "draft", "accepted", "rejected")
_MICRO, _SHARE = 1_000_000, 100_000


def write_line(type: str, **record) -> str:
    """Convert one record of a stream to a line of text, which ends with a line break.

    Args:
        type: type of the record, such as "token".
        record: the other fields of the record, as `cascadeexit.stream` describes them.

    Lines are ASCII without '<', so they reach the page unchanged and no value can look like HTML.
    """
    # ASCII escapes carry lone surrogates safely; '<' is escaped so that no value can look like markup.
    value = _compact(record) if type == "token" else {"type": type, **record}
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c") + "\n"


def expand(line: str) -> dict:
    """Convert a line from `write_line` back to its record. Returns {name of a field: value}, with "type".

    Raises ValueError for a line that is not JSON.
    """
    values = json.loads(line)
    if not isinstance(values, list):
        return values
    values += [None] * (14 - len(values))
    side, i, token, status, text, exit, t, conf, read, ms, ran, special, data, part = values
    record = dict(type="token", side=SIDES[side], i=i, id=token, status=STATUSES[status])
    if text is not None:
        conf = [None] * conf if isinstance(conf, int) else [None if c < 0 else c / _SHARE for c in conf]
        record |= dict(text=text, exit=exit, t=t / _MICRO, conf=conf)
    optional = dict(read=None if read is None else read / _SHARE, ms=None if ms is None else ms / 1000,
                    ran=ran and [ran[k:k + 3] for k in range(0, len(ran), 3)],
                    special=special and True, bytes=data, part=part and True)
    return record | {name: value for name, value in optional.items() if value is not None}


def _compact(record: dict) -> list:
    """Convert the record of a token to a short array, as the docstring of this module describes."""
    values = [SIDES.index(record["side"]), record["i"], record["id"], STATUSES.index(record["status"])]
    if record["status"] != "rejected":
        conf = record["conf"]
        ran = [number for span in record.get("ran") or () for number in span]
        values += [record["text"], record["exit"], round(_MICRO * record["t"]),
                   [-1 if c is None else round(_SHARE * c) for c in conf] if {*conf} - {None} else len(conf),
                   _scaled(record.get("read"), _SHARE), _scaled(record.get("ms"), 1000), ran or None,
                   1 if record.get("special") else None, record.get("bytes"), 1 if record.get("part") else None]
    while values[-1] is None:
        values.pop()
    return values


def _scaled(value: float | None, factor: int) -> int | None:
    return None if value is None else round(factor * value)
