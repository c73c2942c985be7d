"""Log and checkpoint of a training run. A resumed run removes log records that are newer than the checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch

from training.json_files import read_lines


class RunFolder:
    """Folder of a training run, with the files `log.jsonl` and `checkpoint.pt`. Only the main process writes.

    The constructor reads the checkpoint, and removes newer records from the log. `restore` then loads the checkpoint
    into the objects that are trained.

    Args:
        folder: an existing folder.
        key: the settings that decide the result, {name: value}. The checkpoint stores them.
        resume: True continues from the checkpoint, if there is one. False starts from step 0.
        main: True in the main process.

    Raises SystemExit if the checkpoint was made with another key.
    """

    def __init__(self, folder: Path, key: dict, resume: bool, main: bool):
        self.log_file, self.checkpoint, self.key, self.main = folder / "log.jsonl", folder / "checkpoint.pt", key, main
        self._state: dict[str, Any] = {}
        if resume and self.checkpoint.exists():
            self._state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self._check_key(self._state["key"])
        if main:
            records = [r for r in self.records() if r["step"] <= self._state["step"]] if self._state else []
            self.log_file.write_text("".join(json.dumps(r) + "\n" for r in records))

    def _check_key(self, old: dict) -> None:
        if "config" in self.key:                                # settings that older checkpoints do not have
            old = {"only": [], "text_repeats": 1} | old
            old["config"] = {"head_sizes": (), "drafter_width": 0} | old["config"]
        changed = {k: (old.get(k), self.key.get(k)) for k in old | self.key if old.get(k) != self.key.get(k)}
        if changed:
            raise SystemExit(f"{self.checkpoint} was made with other settings, (old, new): {changed}. Give the old "
                             "settings, another --out, or --no-resume to start again from the first step.")

    def records(self) -> list[dict]:
        """Return all records of the log, the oldest first. A record is {"step": ..., ...}."""
        return read_lines(self.log_file)

    def log(self, **record) -> None:
        """Append a record to the log. It must have the entry `step`. Only the main process writes."""
        if self.main:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def restore(self, parts: dict[str, Any]) -> int:
        """Load the checkpoint: call `load_state_dict` of each object with the state that `save` stored under its name.

        Args:
            parts: {name: object}.

        Returns the number of steps done before the checkpoint. Without a checkpoint, nothing is loaded and the result
        is 0.
        """
        if not self._state:
            return 0
        for name, part in parts.items():
            part.load_state_dict(self._state[name])
        return self._state["step"]

    def save(self, step: int, parts: dict[str, Any]) -> None:
        """Write a checkpoint, which replaces the old one. Only the main process writes.

        Args:
            step: number of steps done.
            parts: {name: object}. The checkpoint gets the `state_dict()` of each object.
        """
        if self.main:
            state = {"step": step, "key": self.key} | {name: part.state_dict() for name, part in parts.items()}
            torch.save(state, self.checkpoint.with_suffix(".tmp"))
            self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)
