"""Report: what the page shows of an evaluation of many prompts, while it runs and after a visitor cancelled it."""

import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cascadeexit import evaluation, views
from cascadeexit.config import DecodeConfig
from cascadeexit.evaluation import Result
from cascadeexit.folders import assets_folder

COLUMNS = ("prompt", "kind", "agreement", "match", "first difference", "speed-up", "layers used", "weights read",
           "problem")
_MEASURED = assets_folder() / "results" / "decode.json"


@dataclass(frozen=True)
class Progress:
    """A change of the evaluation tab. A field that is None leaves its part of the tab unchanged."""

    status: str | None = None
    kind: str = "busy"              # of the status: busy, done, stopped or error
    rows: list[list] | None = None  # of the table of results, in the order of `COLUMNS`
    figure: object = None           # a Plotly figure
    files: dict[str, Path] | None = None    # results so far, by kind of file: json, csv
    report: str | None = None       # id of the report that can be cancelled; "" for none


@dataclass
class Report:
    """The results of an evaluation so far, and how the evaluation tab shows them.

    The caller appends each new result to `results`, and then calls `progress`.

    Attributes:
        label: name of the model.
        config: config of the runs with exits.
        total: number of prompts.
        curve: earlier measurements of other thresholds, as `measured_curve` returns them.
    """

    label: str
    config: DecodeConfig
    total: int
    curve: Sequence[dict]
    results: list[Result] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _folder: Path | None = None

    @property
    def done(self) -> bool:
        return len(self.results) == self.total

    def begun(self) -> Progress:
        """Empty the tab, so that it does not show an earlier evaluation any more. Returns the change of the tab."""
        return Progress(self._summary(), rows=[], figure=self._figure(), report=self.id)

    def progress(self, left: float, drawn: bool) -> Progress:
        """Show all results so far. Returns the change of the tab.

        Args:
            left: estimated seconds until the evaluation is complete.
            drawn: also draw the figure; False leaves the figure as it is.
        """
        words = [self._summary(), *([f"about {left:.0f} s left"] if left > 1 else [])]
        return Progress(" · ".join(words), "done" if self.done else "busy", self._rows(),
                        self._figure() if drawn else None, self._files(), "" if self.done else self.id)

    def cancelled(self) -> Progress:
        """Show all results that were there when a visitor cancelled the evaluation. Returns the change of the tab."""
        return Progress(f"{self._summary()} · stopped", "stopped", self._rows(), self._figure(), self._files(), "")

    def _figure(self):
        return views.quality_speed_figure(self.results, self.curve)

    def _files(self) -> dict[str, Path] | None:
        """Write the results so far to a JSON file and a CSV file. Returns {'json': path, 'csv': path}.

        Returns None if there are no results. The files are deleted with this report.
        """
        if not self.results:
            return None
        contents = dict(json=evaluation.results_json(self.results, self.config, self.label),
                        csv=evaluation.results_csv(self.results))
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="cascadeexit-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        files = {kind: self._folder / f"evaluation.{kind}" for kind in contents}
        for kind, path in files.items():
            path.write_text(contents[kind], encoding="utf-8")
        return files

    def _rows(self) -> list[list]:
        """Return the rows of the results table. The cells of a row are in the order of `COLUMNS`."""
        def shown(value, form):
            return "" if value is None else format(value, form)
        return [[r.prompt[:80], r.kind, shown(r.agreement, ".1%"), shown(r.positional, ".0%"),
                 "" if r.error else "none" if r.first_divergence is None else r.first_divergence + 1,
                 shown(r.speedup, ".2f") + ("×" if r.speedup else ""), shown(r.average_depth, ".0%"),
                 shown(r.cost, ".0%"), r.error or ""]
                for r in self.results]

    def _summary(self) -> str:
        """Return one line of text about the results so far."""
        s = evaluation.summarize_results(self.results)
        words = [f"{len(self.results)} of {self.total} prompts"]
        if s.failed:
            words.append(f"{s.failed} could not run")
        if s.agreement is not None:
            words.append(f"agreement {s.agreement:.1%}")
        if s.speedup is not None:
            words.append(f"{s.speedup:.2f}× the full model's speed")
        if s.sequence is not None:
            words.append(f"{s.sequence:.0%} identical texts")
        return " · ".join(words)


def measured_curve(fingerprint: str) -> list[dict]:
    """Return what `training.evaluate decode` measured earlier for the exits with this fingerprint.

    Returns a list with a dict for each threshold of the first exit. Its keys include "threshold", "agreement" (in
    [0, 1]) and "cost" (weights read, as a share of what the full model reads). Returns [] if these exits were not
    measured.
    """
    if not _MEASURED.exists():
        return []
    measured = json.loads(_MEASURED.read_text(encoding="utf-8"))
    return measured["cascade"] if measured.get("exits") == fingerprint else []
