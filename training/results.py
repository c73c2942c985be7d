"""Write the pages that quote measured results. Their numbers come from result files, which other commands wrote.

    python -m training.results            # write the pages
    python -m training.results --check    # write nothing; fail if a page is out of date

The pages are assets/results/README.md, the model card of each shipped exits folder, and the marked sections of
README.md. Their sentences and table layouts are Jinja templates in training/templates. This file only reads the JSON
files and formats numbers.
"""

import argparse
import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cascadeexit.hub import DEFAULT_MODEL

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).parent / "published.json"       # figures of the original CascadeExit
SECTION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)

# -- result files ------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict | None:
    """Read a JSON file. Returns None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def exits_folders(root: Path) -> list[Path]:
    """List the folders of the shipped exits: the default exits, then other exits of the same model, then the rest."""
    folders = sorted(path.parent for path in (root / "assets" / "exits").glob("*/config.json"))
    return sorted(folders, key=lambda folder: (folder.name != DEFAULT_MODEL, DEFAULT_MODEL not in folder.name))


def read_artifact(folder: Path) -> dict:
    """Read the JSON reports in a folder of shipped exits.

    Returns {name of the report: report, or None if there is no such file} with three more entries: `folder` is the name
    of the folder, `runs` lists the training runs of the exits, and `drafter_runs` lists the training runs of the
    drafter. Both lists begin with the newest run.
    """
    artifact = {name: read(folder / f"{name}.json") for name in
                ("about", "config", "distill", "drafter", "confidence", "calibration")}
    return artifact | {"folder": folder.name, "runs": training_runs(artifact["distill"]),
                       "drafter_runs": drafter_runs(artifact["drafter"])}


def training_runs(report: dict | None) -> list[dict]:
    """List all training runs of adapters that led to a report, the newest first. Returns [] if there is no report.

    Each run is a report with an entry `layers`: the layers of the exits that the run trained. If a run continued
    another run, `went_on_from` holds the report of the other run. If exits were joined by `training.join`, `parts`
    holds one report for each layer; equal reports are merged into one run.

    Args:
        report: content of `distill.json`; None without that file.
    """
    if report is None:
        return []
    if "parts" not in report:
        layers = report["settings"].get("only") or report["settings"]["layers"]
        run = report | {"layers": [layer for layer in layers if layer not in report.get("stays", ())]}
        return [run, *(training_runs(report["went_on_from"]) if report.get("went_on_from") else ())]
    joined: list[tuple[dict, list[int]]] = []
    for part in report["parts"]:
        same = next((layers for run, layers in joined if run == part | {"layer": run["layer"]}), None)
        if same is None:
            joined.append((part, [part["layer"]]))
        else:
            same.append(part["layer"])
    return [older for run, layers in joined for older in (run | {"layers": layers}, *training_runs(run)[1:])]


def drafter_runs(report: dict | None) -> list[dict]:
    """List the reports of all training runs of a drafter, the newest first. Returns [] if there is no drafter.

    Args:
        report: content of `drafter.json`; None without a drafter.
    """
    return [report, *drafter_runs(report.get("went_on_from"))] if report else []


def read_all(root: Path) -> dict:
    """Read every measured figure below `root`, and the published ones. Templates get the result as their variables.

    Returns a dict: one entry for each file in assets/results ("benchmark_cpu" for benchmark-cpu.json), and
    - `artifacts`: the reports of each folder of shipped exits, from `read_artifact`.
    - `gpus`: the results of `training.gpu`.
    - `shipped`: fingerprints of the exits that ship now, as far as a file names them. The default exits come first.
    - `published`: figures of the original CascadeExit.
    """
    results = {path.stem.replace("-", "_"): read(path) for path in sorted((root / "assets" / "results").glob("*.json"))}
    artifacts = [read_artifact(folder) for folder in exits_folders(root)]
    of_shipped = [*(a["calibration"] for a in artifacts), results.get("decode"), results.get("exits_swiglu")]
    return results | {
        "artifacts": artifacts,
        "gpus": [result for name, result in results.items() if name.startswith("gpu_")],
        "shipped": [result["exits"] for result in of_shipped if result],
        "published": read(PUBLISHED)}


# -- formats -----------------------------------------------------------------------------------------------------------


def fixed(value: float | None, digits: int = 2) -> str:
    """Format 12.3456 as 12.35, and a value that was not measured as '-'."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """Format 0.1234 as 12.3%, and a value that was not measured as '-'."""
    return "-" if share is None else f"{share:.{digits}%}"


def percents(shares: float | list[float]) -> str:
    """Format one share, or a list of shares: [0.5, 0.75] as 50.0% / 75.0%. Equal shares appear once."""
    each = shares if isinstance(shares, list) else [shares]
    return " / ".join(dict.fromkeys(map(percent, each)))


def thousands(count: int) -> str:
    """Format 1234567 as 1,234,567."""
    return f"{count:,}"


def command(result: dict) -> str:
    """Return the command that made a result, without `--data-note`. The model card prints that note separately."""
    return re.sub(r" --data-note .*", "", result["provenance"]["command"])


def source(result: dict) -> str:
    """Describe in one line how a result was made: date, commit, machine, versions, seed."""
    p = result["provenance"]
    versions = ", ".join(f"{name} {value}" for name, value in p["versions"].items())
    return f"{p['date']}, commit {p['commit']}, {p['machine']}; {versions}; seed {p['seed']}"


FILTERS = (fixed, percent, percents, thousands, command, source)

# -- pages -------------------------------------------------------------------------------------------------------------


def templates(autoescape: bool = False) -> Environment:
    """Open the folder of the templates, with the formats of this file as filters.

    autoescape: True escapes every value, for templates of HTML.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=autoescape)
    environment.filters |= {function.__name__: function for function in FILTERS}
    return environment


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Render every page from the JSON files below `root`. Returns {path of the page: content}."""
    environment, figures = templates(), read_all(root)

    def render(template: str, **values) -> str:
        text = environment.get_template(f"{template}.md").render(figures, **values)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    readme = (root / "README.md").read_text(encoding="utf-8")
    return {
        root / "README.md": SECTION.sub(lambda m: m[1] + render(f"readme_{m[2]}") + m[3], readme),
        root / "assets" / "results" / "README.md": render("results"),
        **{folder / "README.md": render("card", **artifact)
           for folder, artifact in zip(exits_folders(root), figures["artifacts"], strict=True)}}


def outdated(root: Path = ROOT) -> list[Path]:
    """List the pages that are missing or differ from the result of `pages`, as paths relative to `root`."""
    return [path.relative_to(root) for path, wanted in pages(root).items()
            if not path.exists() or path.read_text(encoding="utf-8") != wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    if parser.parse_args().check:
        if old := outdated():
            raise SystemExit(f"out of date: {', '.join(map(str, old))}. Run python -m training.results.")
        return
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
