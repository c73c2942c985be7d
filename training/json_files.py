"""JSON files that stay valid when a process is killed: whole files, and lists of results that grow row by row."""

import json
import os
from pathlib import Path

from cascadeexit.artifact import read_object


def save_json(path: Path, content: dict) -> None:
    """Write a JSON file. An older file is replaced only when the new file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict | None:
    """Read a JSON file. Returns None if there is no such file, and raises ValueError for a damaged one."""
    return read_object(path) if path.exists() else None


def read_lines(path: Path) -> list[dict]:
    """Read the records of a JSON-lines file. Returns [] if there is no such file.

    A last line that is incomplete, because the process was killed, is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class ResumableRows:
    """Results of a long measurement, one row after another, so that an interrupted measurement can continue.

    The rows are in a JSON-lines file until the measurement is complete. Rows that an interrupted run left in this file
    are used if the key in the file equals `key`. Else these rows are deleted.

    Args:
        path: the JSON-lines file. It is created if it does not exist.
        key: all that decides the results, such as the exits and the settings. It must be possible to save it as JSON.

    Attributes:
        rows: all rows so far, without the key.
    """

    def __init__(self, path: Path, key: dict | list):
        self._path, self._key = path, key
        self.rows = [{name: value for name, value in row.items() if name != "key"}
                     for row in read_lines(path) if row["key"] == key]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(map(self._line, self.rows)), encoding="utf-8")

    def append(self, row: dict) -> None:
        """Add a row and write it to the file at once."""
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._line(row))

    def finish(self) -> None:
        """Delete the file. Call this after the results were saved elsewhere."""
        self._path.unlink(missing_ok=True)

    def _line(self, row: dict) -> str:
        return json.dumps({"key": self._key} | row) + "\n"
