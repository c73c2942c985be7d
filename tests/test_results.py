"""What README and model card say is what the committed result files say."""

import sys

from cascadeexit.exits import ExitBank
from training import results


def test_tables_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results", "--check"])
    results.main()


def test_results_carry_their_provenance():
    files = [*results.RESULTS.glob("*.json"), results.EXITS / "distill.json", results.EXITS / "confidence.json"]
    for file in files:
        found = results.read(file)["provenance"]
        assert {"command", "commit", "date", "machine", "seed", "versions"} <= set(found), file.name


def test_quality_and_speed_are_those_of_the_shipped_exits():
    shipped = ExitBank.load(results.EXITS).fingerprint()
    for name in ("benchmark-cpu", "decode", "exits"):
        assert results.read(results.RESULTS / f"{name}.json")["exits"] == shipped, f"{name}.json is of other exits"
