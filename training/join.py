"""Join exits that were trained separately into one exits folder.

    python -m training.join runs/deep runs/shallow --out runs/all

If several folders have an exit after the same layer, the exit of the first of these folders is used. The trimmed head
comes from the first folder. All exits must be made for the same model, with adapters of the same shape. The estimators
and the drafter are not copied: train new ones with training.confidence and training.drafter.
"""

import dataclasses
import json
from pathlib import Path

from cascadeexit.exits import ExitBank
from training.command import run_command
from training.json_files import save_json
from training.options import command_parser
from training.provenance import provenance

_BY_LAYER = ("untrained_agreement", "held_out_agreement", "held_out_agreement_after_exits")     # lists in distill.json


def join(banks: list[ExitBank]) -> ExitBank:
    """Make a bank with the exits of all these banks, sorted by layer.

    If several banks have an exit after the same layer, the exit of the first of these banks is used.

    Raises ValueError if the banks were made for different models or have adapters of different shapes.
    """
    first = banks[0].config
    for other in (bank.config for bank in banks[1:]):
        for name in ("head_fingerprint", "hidden_size", "num_layers", "vocab_size", "adapter", "width"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"these exits cannot be joined: {name} is {getattr(first, name)} in the first folder, "
                                 f"{getattr(other, name)} in another")
    adapters = {layer: adapter for bank in reversed(banks) for layer, adapter in zip(bank.config.layers, bank.adapters)}
    words = {layer: bank.config.words(s) for bank in reversed(banks) for s, layer in enumerate(bank.config.layers)}
    sizes = tuple(min(-(-words[layer] // 32) * 32, first.head_size) for layer in sorted(words))
    sizes = sizes if first.head_size and len(set(sizes)) > 1 else ()
    config = dataclasses.replace(first, head_sizes=sizes, layers=tuple(sorted(adapters)), confidence="softmax",
                                 sketch_size=0, trained=False, drafter_width=0)
    joined = ExitBank(config).to(banks[0].adapters[0].norm.weight.dtype)
    for into, layer in zip(joined.adapters, config.layers):
        into.load_state_dict(adapters[layer].state_dict())
    if config.head_size:
        joined.head_ids.copy_(banks[0].head_ids)
    return joined


def joined_report(banks: list[ExitBank], layers: tuple[int, ...], folders: list[Path]) -> dict:
    """Merge the `distill.json` files of the joined exits into one report.

    Args:
        banks: the exits that were joined.
        layers: layers of the joined exits.
        folders: the folder of each bank.

    Returns a dict. `untrained_agreement`, `held_out_agreement` and `held_out_agreement_after_exits` are lists with a
    value for each of `layers`. `parts` is a list with a dict for each of `layers`: the `layer`, and the entries of the
    `distill.json` in the folder of this exit, except these three lists.
    """
    reports = [json.loads((folder / "distill.json").read_text(encoding="utf-8")) for folder in folders]
    parts, merged = [], {name: [] for name in _BY_LAYER}
    for layer in layers:
        source = next(i for i, bank in enumerate(banks) if layer in bank.config.layers)
        at = banks[source].config.layers.index(layer)
        for name in _BY_LAYER:
            merged[name].append(reports[source][name][at])
        parts.append({"layer": layer, **{k: v for k, v in reports[source].items() if k not in _BY_LAYER}})
    return {"parts": parts, **merged}


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("exits", type=Path, nargs="+", help="folders written by training.distill; if several have an "
                        "exit after the same layer, the exit of the first such folder is used")
    parser.add_argument("--out", type=Path, required=True, help="folder for the joined exits")
    args = parser.parse_args()
    banks = [ExitBank.load(folder) for folder in args.exits]
    joined = join(banks)
    report = joined_report(banks, joined.config.layers, args.exits)
    joined.save(args.out)
    save_json(args.out / "distill.json", {"provenance": provenance(None), **report})
    print(f"exits after layers {', '.join(map(str, joined.config.layers))} in {args.out}; next: training.confidence")


if __name__ == "__main__":
    run_command(main)
