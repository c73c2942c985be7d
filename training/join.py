"""Put exits that were trained apart into one artifact.

    python -m training.join runs/deep runs/shallow --out runs/all

Each layer's exit comes from the first folder that has one, the trimmed head from the first folder. All must be made for
the same model with adapters of one shape. Estimators are left behind: fit them for the whole with training.confidence;
and so is a drafter: train one for these layers with training.drafter.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from cascadeexit.exits import ExitBank
from training.command import run_command
from training.provenance import provenance, save_json

_BY_LAYER = ("untrained_agreement", "held_out_agreement", "held_out_agreement_after_exits")


def join(banks: list[ExitBank]) -> ExitBank:
    """Adapters of all these banks, by layer. Raises ValueError when they do not belong together."""
    first = banks[0].config
    for other in (bank.config for bank in banks[1:]):
        for name in ("head_fingerprint", "hidden_size", "num_layers", "vocab_size", "adapter", "width"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"these exits do not belong together: {name} is {getattr(first, name)} in the first, "
                                 f"{getattr(other, name)} in another")
    adapters = {layer: adapter for bank in reversed(banks) for layer, adapter in zip(bank.config.layers, bank.adapters)}
    words = {layer: bank.config.words(s) for bank in reversed(banks) for s, layer in enumerate(bank.config.layers)}
    sizes = tuple(min(-(-words[layer] // 32) * 32, first.head_size) for layer in sorted(words))
    sizes = sizes if first.head_size and len(set(sizes)) > 1 else ()
    config = dataclasses.replace(first, head_sizes=sizes, layers=tuple(sorted(adapters)), confidence="softmax",
                                 sketch_size=0, trained=False, drafter_width=0)
    whole = ExitBank(config).to(banks[0].adapters[0].norm.weight.dtype)
    for into, layer in zip(whole.adapters, config.layers):
        into.load_state_dict(adapters[layer].state_dict())
    if config.head_size:
        whole.head_ids.copy_(banks[0].head_ids)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exits", type=Path, nargs="+", help="folders written by training.distill, the first leads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the joined artifact")
    args = parser.parse_args()
    banks = [ExitBank.load(folder) for folder in args.exits]
    reports = [json.loads((folder / "distill.json").read_text(encoding="utf-8")) for folder in args.exits]
    whole = join(banks)
    whole.save(args.out)
    parts, merged = [], {name: [] for name in _BY_LAYER}
    for layer in whole.config.layers:
        source = next(i for i, bank in enumerate(banks) if layer in bank.config.layers)
        at = banks[source].config.layers.index(layer)
        for name in _BY_LAYER:
            merged[name].append(reports[source][name][at])
        parts.append({"layer": layer, **{k: v for k, v in reports[source].items() if k not in _BY_LAYER}})
    save_json(args.out / "distill.json", {"provenance": provenance(None), "parts": parts, **merged})
    print(f"exits after layers {', '.join(map(str, whole.config.layers))} in {args.out}; next: training.confidence")


if __name__ == "__main__":
    run_command(main)
