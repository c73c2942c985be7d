"""Budgets: target values for measurements on a GPU. They are compared with the results of `training.gpu`."""

from collections.abc import Callable
from dataclasses import dataclass

from training.contenders import STATIC_CACHE

MINUTES = 25                    # time limit of the whole measurement


@dataclass(frozen=True)
class Budget:
    """A target for one measured figure.

    Attributes:
        what: description of the figure.
        target: the value that the figure must reach.
        value: function that reads the figure from {step name: result}. If the result of a step is missing, the function
            may raise KeyError or TypeError, or return None.
        at_least: True if the figure must be `target` or more, False if it must be `target` or less.
    """

    what: str
    target: float
    value: Callable[[dict[str, dict]], float]
    at_least: bool = True

    def check(self, results: dict[str, dict]) -> dict:
        """Compare the measured figure with the target.

        Args:
            results: {step name: result}.

        Returns {"what": ..., "target": ..., "at_least": ..., "measured": the figure, "met": True or False}. The last
        two are None if the figure was not measured.
        """
        try:
            measured = self.value(results)
        except (KeyError, TypeError, ZeroDivisionError):
            measured = None
        met = None if measured is None else (measured >= self.target if self.at_least else measured <= self.target)
        return {"what": self.what, "target": self.target, "at_least": self.at_least, "measured": measured, "met": met}


def _row(step: str, row: str, name: str) -> Callable[[dict], float]:
    return lambda results: results[step]["rows"][row][name]


def _failed_tests(results: dict[str, dict]) -> int | None:
    """Return how many tests failed. Returns None if all tests were skipped, as on a machine without a GPU."""
    tests = results["tests"]
    return tests["failed"] if tests["passed"] or tests["failed"] else None


def budgets(gpu: str) -> list[Budget]:
    """Return the list of budgets for a GPU.

    One figure is the roofline multiple: the measured speed / the speed if a token took only the time to read the
    weights. Its target is 0.80 for an H100, and 0.75 for any other GPU: if a GPU has faster memory than an H100, kernel
    launches take a larger share of the time.

    Args:
        gpu: name of the GPU, as torch gives it.
    """
    roofline = 0.80 if "H100" in gpu else 0.75
    return [
        Budget("3B `full`, roofline multiple", roofline, _row("replay 3B", "full", "roofline_multiple")),
        Budget("3B `cascade`, share of the speed-up that bytes allow", 0.95,
               _row("replay 3B", "cascade", "of_allowed")),
        Budget("3B `verified`, x `full`", 1.76, _row("replay 3B", "verified", "over_full")),
        Budget("bundled model, `full` over transformers with static cache and compile", 3.0,
               lambda results: results["race"]["rows"]["full"]["tokens_per_second"]
               / results["race"]["rows"][STATIC_CACHE]["tokens_per_second"]),
        *(Budget(f"{dtype}, tokens of `verified` that differ", 0,
                 lambda results, step=f"lossless {dtype}": results[step]["verified_differing_tokens"], at_least=False)
          for dtype in ("bf16", "fp16")),
        Budget("failed GPU tests", 0, _failed_tests, at_least=False),
        Budget("visitors' runs that failed", 0, lambda results: len(results["visitors"]["errors"]), at_least=False)]
