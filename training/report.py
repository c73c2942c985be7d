"""Write the report: one HTML page with the charts and tables of all measured results. It needs no network.

    python -m training.report                       # writes assets/results/report.html
    python -m training.report --out somewhere.html

Every number comes from the JSON files in assets/results and assets/exits, and from training/published.json. Sentences
and tables are in training/templates/report.html. The same files always give the same page. `app.py` serves it at
/report.
"""

import argparse
from pathlib import Path

from training import comparison, findings, pictures
from training.results import ROOT, read_all, templates

OUT = ROOT / "assets" / "results" / "report.html"


def page(root: Path = ROOT) -> str:
    """Render the report from the JSON files below `root`. Returns HTML. Results that are missing leave sections out."""
    figures = read_all(root)
    measured = [result for result, _ in comparison.measured_exits(figures)]
    environment = templates(autoescape=True)
    environment.globals |= {name: getattr(module, name) for module, names in (
        (pictures, ("quality_chart", "calibration_chart", "reliability_chart", "depth_chart", "context_chart",
                    "output_chart", "speed_bars")), (findings, ("file_name",))) for name in names}
    return environment.get_template("report.html").render(
        figures, figures=figures, files=findings.files_of(figures), benchmarks=findings.benchmarks_of(figures),
        calibration=findings.calibration_of(figures), said=findings.conclusions(figures),
        gaps=findings.gaps(figures), unused=findings.unused_files(figures),
        exits_beside=comparison.exits_beside(figures), speeds_beside=comparison.speeds_beside(figures),
        measured_exits=measured, texts=list(dict.fromkeys(text for result in measured for text in result["texts"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="HTML file to write")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
