"""Generated pages agree with the committed result files, and no other page has measured numbers."""

import json
import re
import shutil

import pytest

from cascadeexit.exits import ExitBank
from training import results

ASSETS = results.ROOT / "assets"
RESULT_FILES = [path.relative_to(results.ROOT) for path in sorted((ASSETS / "results").glob("*.json"))]
REPORTS = [path.relative_to(results.ROOT) for folder in results.exits_folders(results.ROOT)
           for path in sorted(folder.glob("*.json")) if path.name != "about.json"]      # words, no numbers
MEASURED = r"\d+(\.\d+)?\s?(x\b|%|tokens/s|GB/s|ms\b)"          # 1.55x, 90%, 4.7 ms


def test_the_committed_pages_are_those_of_the_committed_files():
    assert results.outdated() == []


@pytest.fixture
def copy(tmp_path):
    """A root with copies of everything that the pages are made from."""
    shutil.copytree(ASSETS / "results", tmp_path / "assets" / "results")
    shutil.copytree(ASSETS / "exits", tmp_path / "assets" / "exits", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(results.ROOT / "README.md", tmp_path)
    return tmp_path


def bent(value):
    """Change the numbers of some JSON."""
    if isinstance(value, dict):
        return {name: bent(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [bent(inner) for inner in value]
    if isinstance(value, float):
        return 0.7 * value + 0.1
    return value + 32 if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("path", RESULT_FILES + REPORTS, ids=str)
def test_other_numbers_in_a_file_make_a_page_outdated(path, copy):
    file = copy / path
    assert results.outdated(copy) == []
    file.write_text(json.dumps(bent(results.read(file))), encoding="utf-8")
    assert results.outdated(copy)


def test_the_headline_and_the_table_of_the_readme_follow_the_benchmark(copy):
    file = copy / "assets" / "results" / "benchmark-cpu.json"
    content = results.read(file)
    content["rows"]["verified"] |= {"over_full": 3.21, "over_generate": 45.67}
    file.write_text(json.dumps(content), encoding="utf-8")
    readme = results.pages(copy)[copy / "README.md"]
    assert "at 3.21x the speed of our own full pass and 45.7x that of" in readme
    assert "| 3.21 | 45.67 |" in readme


def test_no_measured_number_is_typed_by_hand():
    readme = results.SECTION.sub("", (results.ROOT / "README.md").read_text(encoding="utf-8"))
    assert not re.search(MEASURED, readme.split("\n---\n", 1)[1])
    for file in sorted((results.ROOT / "training" / "templates").glob("*.md")):
        typed = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", file.read_text(encoding="utf-8"))
        lines = [line for line in typed.splitlines() if re.search(MEASURED, line)]
        assert all("published" in line for line in lines), lines


def test_the_check_fails_and_says_which_page_is_old(copy, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results", "--check"])
    monkeypatch.setattr(results, "outdated", lambda: [(copy / "README.md").relative_to(copy)])
    with pytest.raises(SystemExit, match=r"out of date: README.md. Run python -m training.results."):
        results.main()


def test_limits_of_the_readme_are_those_of_the_files():
    readme = (results.ROOT / "README.md").read_text(encoding="utf-8")
    devices = {content["device"] for path in RESULT_FILES if "device" in (content := results.read(results.ROOT / path))}
    assert ("Nothing was ever measured on a GPU" in readme) == (devices == {"cpu"})


def test_links_of_the_generated_pages_lead_somewhere():
    for page, text in results.pages().items():
        if page != results.ROOT / "README.md":          # tests/test_readme.py reads that one
            for target in re.findall(r"\]\(([^)]+)\)", text):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_results_carry_their_provenance():
    for path in [*RESULT_FILES, *(p for p in REPORTS if p.name != "config.json")]:
        found = results.read(results.ROOT / path)["provenance"]
        assert {"command", "commit", "date", "machine", "seed", "versions"} <= set(found), path


def test_quality_and_speed_are_those_of_the_shipped_exits():
    folder = results.exits_folders(results.ROOT)[0]
    shipped = ExitBank.load(folder)
    for name in ("benchmark-cpu", "benchmark-cpu-avx2", "decode", "defaults", "exits"):
        made = results.read(ASSETS / "results" / f"{name}.json")
        assert made["exits"] == shipped.fingerprint(), f"{name}.json is of other exits"
        if name.startswith("benchmark"):
            assert made["drafter"] == shipped.drafter_fingerprint(), "its drafts are of another drafter"


def test_training_runs_are_listed_newest_first_and_joined_ones_once():
    def run(step: int, layers: list[int], **more) -> dict:
        return {"settings": {"layers": [0, 3, 5], "only": layers}, "steps": step, **more}

    joined = {"parts": [run(1, [], settings={"layers": [0]}, layer=0)] + [
        run(2, [], settings={"layers": [3, 5]}, layer=layer) for layer in (3, 5)]}
    report = run(9, [3, 5], stays=[5], went_on_from=run(8, [], went_on_from=joined))
    assert [(r["steps"], r["layers"]) for r in results.training_runs(report)] == [
        (9, [3]), (8, [0, 3, 5]), (1, [0]), (2, [3, 5])]
