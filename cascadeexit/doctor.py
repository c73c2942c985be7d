"""Doctor: prints how this machine runs a model, what is missing, and what to do about it.

    python -m cascadeexit.doctor                      the bundled model
    python -m cascadeexit.doctor --model ./my-llama   another model
    python -m cascadeexit.doctor --json               the same as JSON, for programs

The exit status is 0 if all is well, and 1 if something needs attention.
"""

import argparse
import json
import logging
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cascadeexit import accelerator, backends, hub, machine
from cascadeexit.backends.weights import outer_weights
from cascadeexit.payoff import Payoff
from cascadeexit.selfcheck import SelfCheck

_MEGABYTES = 256            # read to measure the bandwidth


@dataclass
class Report:
    """Report about this machine: facts, as {name: fact}, and problems. Each problem comes with advice."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the report as text to print, with one fact or problem per line."""
        width = max(map(len, self.facts), default=0)
        lines = [f"{name:{width}}  {value}" for name, value in self.facts.items()]
        lines += ["", "All is well." if not self.problems else "Needs attention:", *(f"- {p}" for p in self.problems)]
        return "\n".join(lines)


def examine(model: str | None = None, exits: str | None = None, *, device: str | None = None,
            dtype: str | None = None) -> Report:
    """Examine this machine, load a model on it, and return a report.

    `hub.load` explains the arguments. An error while loading becomes a problem in the report and is not raised.
    """
    report = Report()
    _examine_machine(report)
    try:
        place = hub.find_device(device)
        _examine_device(report, place)
        started = time.perf_counter()
        base = hub.load_model(model, device=device, dtype=dtype)[0]
        refused = backends.why_not(base)
        wanted = outer_weights(base).dtype
        del base
        engine, _ = hub.load(model, exits, device=device, dtype=dtype)
        seconds = time.perf_counter() - started
    except (hub.ModelUnavailable, RuntimeError, ValueError, OSError) as error:
        report.problems.append(str(error))
        return report
    name = engine.model.backend.name
    report.facts["model"] = (f"{engine.model.name}, {str(wanted).removeprefix('torch.')}, "
                             f"{engine.model.weight_bytes / 1e6:.0f} MB of weights, loaded in {seconds:.1f} s")
    layers = ", ".join(map(str, engine.model.exit_layers))
    report.facts["exits"] = (f"after layers {layers} of {engine.model.num_layers}, "
                             f"{'trained' if engine.bank.config.trained else 'untrained'}")
    report.facts["backend"] = name
    for other, reason in refused.items():
        report.facts[f"not {other}"] = reason
    for other in backends.BACKENDS:
        report.facts |= {f"{other}: {fact}": value for fact, value in backends.facts(other).items()}
    _examine_check(report, engine.self_check, engine.notice)
    _examine_payoff(report, engine.payoff)
    if place.type == "cpu" and "cpu" in refused and wanted is torch.bfloat16:
        report.problems.append(f"The fast CPU kernels are not used: {refused['cpu']}.")
    resident = machine.resident_bytes()
    report.facts["memory of this process"] = "unknown" if resident is None else f"{resident / 1e6:.0f} MB"
    return report


def _examine_machine(report: Report) -> None:
    driver, cuda = accelerator.nvidia_driver(), torch.version.cuda
    report.facts |= {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
                  f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "memory": _main_memory(),
        "torch": f"{torch.__version__}, built for {'the CPU' if cuda is None else f'CUDA {cuda}'}",
        "NVIDIA driver": driver or "none"}
    problem = accelerator.space_problem() or accelerator.cuda_problem()
    if problem:
        report.problems.append(problem)


def _main_memory() -> str:
    try:
        kilobytes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, all_of_it = (int(kilobytes[name].split()[0]) / 1e6 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return "unknown"
    return f"{free:.1f} of {all_of_it:.1f} GB free"


def _examine_device(report: Report, place: torch.device) -> None:
    report.facts["device"] = str(place)
    if place.type == "cuda":
        found, (free, total) = torch.cuda.get_device_properties(place), torch.cuda.mem_get_info(place)
        report.facts["device"] += f", {found.name}"
        report.facts["compute capability"] = f"{found.major}.{found.minor}"
        report.facts["device memory"] = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    bandwidth = machine.read_bandwidth(place, _MEGABYTES)
    report.facts["read bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s, measured by a sum over {_MEGABYTES} MB"


def _examine_check(report: Report, check: SelfCheck | None, notice: str) -> None:
    if check is None:
        return
    compared = f"{check.layers} layers compared with torch, " if check.layers else ""
    report.facts["self-check"] = (f"{'passed' if check.passed else 'failed'} in {check.seconds:.2f} s: {compared}"
                                  f"{check.tokens} tokens of verified equal to full")
    if check.error is not None:
        report.facts["largest error"] = f"{check.error:.0%} of what the self-check allows"
    if notice:
        report.problems.append(f"{notice} Please report this with the lines above.")


def _examine_payoff(report: Report, found: Payoff) -> None:
    report.facts["one token of full"] = f"{1000 * found.token_seconds:.1f} ms"
    report.facts["asking each exit"] = ", ".join(f"{1000 * exit.asked:.2f} ms" for exit in found.exits)
    report.facts["switched off"] = " ".join(found.sentences()) or "nothing: all exits and drafts pay here"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --model, --exits, --device and --dtype to a parser, with the defaults of `hub.load`."""
    parser.add_argument("--model", help="bundled name, Hub id, local folder or GGUF file "
                        f"(default: $CASCADEEXIT_MODEL, else {hub.DEFAULT_MODEL})")
    parser.add_argument("--exits", help="folder or Hub id of trained exits (default: those shipped for the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="default: bfloat16, or float16 on a GPU that only emulates bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how this machine runs a model, and what to do if something "
                                     "is missing. Exit status 0: all is well. 1: something needs attention.")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print facts and problems as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    report = examine(args.model, args.exits, device=args.device, dtype=args.dtype)
    print(json.dumps(dict(facts=report.facts, problems=report.problems), indent=2) if args.json else report.text())
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
