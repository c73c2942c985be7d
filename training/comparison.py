"""Comparison: the published figures of the original CascadeExit, each beside the figure of ours that is nearest to it.

The published system has another model and another machine. So shares and ratios can be compared, tokens per second
cannot.
"""


def exits_beside(figures: dict) -> list[dict]:
    """Pair each published exit with our exits at nearly the same depth, on the text of the published figures.

    Args:
        figures: result of `training.results.read_all`. Files that are missing leave gaps.

    Returns a dict for each published exit:
    - `published`: its figures.
    - `depth`: share of the layers below it.
    - `routed`: share of the tokens that it wrote.
    - `ours`: for each file of measured exits, a dict of the exit of ours: `adapter`, `layer`, `depth`, `figures`,
      `own_top1` (top-1 after a token of the exit's own; None if this was not measured) and `routed` (None unless a
      benchmark measured such a cascade).
    """
    published = figures["published"]
    tokens = sum(exit["tokens"] for exit in published["exits"]) + published["full_tokens"]
    return [{"published": exit, "depth": (depth := exit["layer"] / published["num_layers"]),
             "routed": exit["tokens"] / tokens,
             "ours": [_nearest(result, layers, depth, figures) for result, layers in measured_exits(figures)
                      if published["text"] in result["texts"]]}
            for exit in published["exits"]]


def measured_exits(figures: dict) -> list[tuple[dict, int]]:
    """List the results of `training.evaluate exits`, those of the default exits first.

    Returns (result, number of the model's layers) for each.
    """
    layers = {artifact["config"]["base_model"]: artifact["config"]["num_layers"] for artifact in figures["artifacts"]
              if artifact["config"]}
    found = [(result, layers[result["model"]]) for name, result in figures.items()
             if name.split("_")[0] == "exits" and result.get("model") in layers]
    return sorted(found, key=lambda measured: measured[0]["exits"] not in figures["shipped"][:1])


def published_cascade(figures: dict) -> dict | None:
    """Return the benchmark's row of the cascade without the exit before the first layer. It is nearest to theirs."""
    for result in (result for name, result in figures.items() if name.startswith("benchmark")):
        for name, row in result["rows"].items():
            if name.startswith("cascade") and row["routing_share"][0] == 0:
                return row
    return None


def speeds_beside(figures: dict) -> list[dict]:
    """Pair each published method with the same method of ours, without a KV cache and with one.

    Args:
        figures: result of `training.results.read_all`.

    Returns a dict for each method: `method`, `published` (its figures), `uncached` and `cached` (rows of
    `training.baselines`, or {} where they are missing), and `acceptance` (ours, or None).
    """
    published, baselines = figures["published"], figures.get("baselines")
    rows = {(row["setting"], row["method"]): row for row in (baselines or {"rows": ()})["rows"]}
    accepted = {(row["layer"], row["max_draft"]): row["acceptance"]
                for row in (figures.get("decode") or {"self_speculation": ()})["self_speculation"]}

    def beside(method: str, theirs: dict, name: str, acceptance: float | None = None) -> dict:
        return {"method": method, "published": theirs, "uncached": rows.get(("uncached", name), {}),
                "cached": rows.get(("cached", name), {}), "acceptance": acceptance}

    pairs = [beside("full model", published["standard"] | {"over_standard": 1.0}, "standard"),
             beside("cascade", published["cascade"], "cascade")]
    for theirs in published["self_speculation"]:
        layer, drafts = _layer_near(figures, theirs["layer"] / published["num_layers"]), theirs["max_draft"]
        pairs.append(beside(f"self-speculation, exit {theirs['layer']}/{layer}, {drafts} drafts", theirs,
                            f"self-speculation, layer {layer}, K = {drafts}", accepted.get((layer, drafts))))
    return pairs


def _layer_near(figures: dict, depth: float) -> int | None:
    """Return the layer of the default exits whose depth is nearest; None if there are no exits."""
    config = next((artifact["config"] for artifact in figures["artifacts"] if artifact["config"]), None)
    return config and min(config["layers"], key=lambda layer: abs(layer / config["num_layers"] - depth))


def _nearest(result: dict, num_layers: int, depth: float, figures: dict) -> dict:
    kinds = result["texts"][figures["published"]["text"]]
    exits = kinds["after_full"]["exits"]
    s = min(range(len(exits)), key=lambda s: abs(exits[s]["layer"] / num_layers - depth))
    row = published_cascade(figures)
    routed = row["routing_share"][s] if row and result["exits"] in figures["shipped"][:1] else None
    return {"adapter": result["adapter"], "layer": exits[s]["layer"], "depth": exits[s]["layer"] / num_layers,
            "figures": exits[s], "routed": routed,
            "own_top1": kinds["after_exit"]["exits"][s]["top1"] if "after_exit" in kinds else None}
