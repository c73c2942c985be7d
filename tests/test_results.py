"""What README and model card say is what the committed result files say."""

import sys

from cascadeexit.exits import ExitBank
from training import results


def test_tables_are_those_of_the_result_files(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results", "--check"])
    results.main()


def test_results_carry_their_provenance():
    files = [*results.RESULTS.glob("*.json"), *(results.EXITS / f"{made}.json" for made in ("distill", "confidence",
                                                                                              "drafter"))]
    for file in files:
        found = results.read(file)["provenance"]
        assert {"command", "commit", "date", "machine", "seed", "versions"} <= set(found), file.name


def test_quality_and_speed_are_those_of_the_shipped_exits():
    shipped = ExitBank.load(results.EXITS)
    for name in ("benchmark-cpu", "benchmark-cpu-avx2", "decode", "exits"):
        made = results.read(results.RESULTS / f"{name}.json")
        assert made["exits"] == shipped.fingerprint(), f"{name}.json is of other exits"
        if name.startswith("benchmark"):
            assert made["drafter"] == shipped.drafter_fingerprint(), "its drafts are of another drafter"
