"""Baselines: measure cascade and self-speculation without a KV cache, beside our engine.

    python -m training.baselines

The original CascadeExit published speed-ups (cascade 1.76x, self-speculation 0.43x to 0.84x) over a decoding loop
without a cache. For every new token, such a loop reads the whole text again and computes the logits of every position.
This file has three such loops, with our model and our exits: `standard` (the full model alone), `cascade` and
`self_speculation`. The tests use them as a reference.

Each method runs without a cache (these loops) and with a cache (our engine). The table has two ratios for each method:
- `over_uncached`: speed of the method / speed of the loop `standard`.
- `over_standard`: speed of the method / speed of the full model. Both run without a cache, or both with a cache. The
  full model is the loop `standard` without a cache, and our engine in mode `full` with a cache.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from cascadeexit.carry import carried_states
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.drafting import worth_running
from cascadeexit.engine import Engine
from cascadeexit.hub import load
from cascadeexit.lookup import NOTHING_COPIED, Lookup
from cascadeexit.prompts import bundled_prompts, token_ids
from training.command import run_command
from training.json_files import save_json
from training.options import add_model_and_exits, add_prompts, command_parser
from training.provenance import provenance, results_file

Job = tuple[str, str]           # setting and method
Decode = Callable[[list[int]], list[int]]


class Uncached:
    """Runs the model over a whole text, without keys and values of earlier passes."""

    def __init__(self, engine: Engine):
        self.model, self.layers, self.exits = engine.model, engine.model.layers, engine.exits

    def segments(self, text: list[int]) -> Iterator[Tensor]:
        """Run the model in segments (the layers between exits). After each, yield the text's hidden states (1, N, D).

        The next segment runs only when the caller asks for the next hidden states. So a caller can stop after any
        segment.
        """
        rows, cache = self.layers.embed(text), self.layers.new_cache(len(text) + self.layers.row_multiple)
        for s in range(self.model.num_segments):
            rows, = self.layers.run(range(s, s + 1), rows, cache)
            yield self.layers.tensor(rows)

    def top(self, text: list[int]) -> tuple[Tensor, Tensor]:
        """Run the full model over a text.

        Returns the id of the token that the full model chooses after every position, a tensor (N,), and the hidden
        states after the final norm, a tensor (N, D).
        """
        *_, h = self.segments(text)
        normed = self.layers.norm(h)
        return self.model.head.logits(normed)[0].argmax(-1), normed[0]

    def exit(self, s: int, h: Tensor, carried: Tensor, copied: tuple[int, int],
             before: Tensor | None = None) -> tuple[int, float, Tensor]:
        """Run exit s at the last position of the text.

        The logits are computed even if the exit is not taken.

        Args:
            s: number of the exit, from 0.
            h: hidden states of the whole text at the layer of the exit (1, N, D).
            carried: the carried state (1, D).
            copied: the token that the n-gram lookup proposes, and the length of its match, from `Lookup.copied`.
            before: the adapted hidden state of the previous exit (1, D). None if that exit did not run.

        Returns the token that the exit chooses, its confidence, and its adapted hidden state (1, D).
        """
        hidden = self.exits.hidden(s, h[0, -1:], carried)
        confidence, = self.exits.confidence(s, hidden, [copied], before)
        return self.exits.choice(s, hidden), confidence, hidden

    def carried(self, prompt: list[int]) -> Tensor:
        """Return the carried state (1, D) at the last token of the prompt, from which decoding starts."""
        return carried_states(self.top(prompt)[1])[-1:]


@torch.inference_mode()
def standard(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    """Decode greedily with the full model, without a cache. Returns at most `tokens` token ids."""
    run, text = Uncached(engine), list(prompt)
    while len(text) < len(prompt) + tokens and not _ended(engine, prompt, text):
        text.append(int(run.top(text)[0][-1]))
    return text[len(prompt):]


@torch.inference_mode()
def cascade(engine: Engine, prompt: list[int], tokens: int, thresholds: tuple[float, ...],
            ask_all: bool = False) -> list[int]:
    """Decode with the cascade, without a cache. Returns at most `tokens` token ids.

    Each token comes from the first exit whose confidence reaches its threshold. If no exit does, the full model chooses
    the token.

    Args:
        thresholds: one for each exit.
        ask_all: True runs the exits one after another until one is taken, as the original CascadeExit does. False skips
            exits that are not worth running (`cascadeexit.drafting.worth_running`).
    """
    run, text = Uncached(engine), list(prompt)
    carried, lookup = run.carried(prompt), Lookup(prompt)
    while len(text) < len(prompt) + tokens and not _ended(engine, prompt, text):
        lookup.extend(text[len(lookup):])
        hidden, confidence = None, None
        for s, h in enumerate(run.segments(text)):
            if s == engine.num_exits:
                normed = engine.model.layers.norm(h)        # as published, every position is projected
                token = int(engine.model.head.logits(normed)[0].argmax(-1)[-1])
                carried = engine.model.layers.tensor(normed)[0, -1:]
                break
            if not ask_all and not worth_running(s, thresholds, confidence):
                hidden = None
                continue
            token, confidence, hidden = run.exit(s, h, carried, lookup.copied(text), hidden)
            if confidence >= thresholds[s]:
                carried = hidden
                break
        text.append(token)
    return text[len(prompt):]


@torch.inference_mode()
def self_speculation(engine: Engine, prompt: list[int], tokens: int, exit: int, max_draft: int) -> list[int]:
    """Decode with self-speculation, without a cache. Returns at most `tokens` token ids.

    In each round, one exit drafts tokens, one after another. Then one pass of the full model verifies them.

    Args:
        exit: number of the exit that drafts, from 0.
        max_draft: number of drafted tokens in each round.
    """
    run, text = Uncached(engine), list(prompt)
    carried, end = run.carried(prompt), len(prompt) + tokens
    while len(text) < end and not _ended(engine, prompt, text):
        confirmed, draft_carried = len(text), carried
        for _ in range(max_draft):
            h = next(islice(run.segments(text), exit, None))
            token, _, draft_carried = run.exit(exit, h, draft_carried, NOTHING_COPIED)
            text.append(token)
        choices, top = run.top(text)
        accepted = 0
        while accepted < max_draft and text[confirmed + accepted] == choices[confirmed + accepted - 1]:
            accepted += 1
        text[confirmed + accepted:] = [int(choices[confirmed + accepted - 1])]
        carried = top[confirmed + accepted - 1:confirmed + accepted]
        eos = [i for i in range(confirmed, len(text)) if text[i] in engine.model.eos_ids]
        del text[min(end, eos[0] + 1 if eos else end):]
    return text[len(prompt):]


def _ended(engine: Engine, prompt: list[int], text: list[int]) -> bool:
    return len(text) > len(prompt) and text[-1] in engine.model.eos_ids


# -- measurement ------------------------------------------------------------------------------------------------------


def make_jobs(engine: Engine, args: argparse.Namespace) -> dict[Job, Decode]:
    """Make the decoding functions that are measured.

    Returns {(setting, method): function}. The setting is "uncached" (a loop of this file) or "cached" (our engine).
    Each function takes the token ids of a prompt and returns the new token ids.

    Args:
        args: `threshold`, `tokens` and `max_draft` are used, with the meaning of the command's options.
    """
    thresholds, n = (args.threshold,) * engine.num_exits, args.tokens

    def cached(mode: Mode, **settings) -> Decode:
        config = DecodeConfig(mode=mode, max_new_tokens=n, **settings)
        return lambda ids: engine.run(ids, config).token_ids

    jobs = {("uncached", "standard"): lambda ids: standard(engine, ids, n),
            ("uncached", "cascade"): lambda ids: cascade(engine, ids, n, thresholds, ask_all=True),
            ("cached", "standard"): cached(Mode.FULL),
            ("cached", "cascade"): cached(Mode.CASCADE, thresholds=thresholds)}
    for e, layer in enumerate(engine.model.exit_layers):
        for k in args.max_draft:
            only = tuple(0.0 if s == e else None for s in range(engine.num_exits))
            name = f"self-speculation, layer {layer}, K = {k}"
            jobs["uncached", name] = lambda ids, e=e, k=k: self_speculation(engine, ids, n, e, k)
            jobs["cached", name] = cached(Mode.VERIFIED, thresholds=only, max_draft=k)
    jobs["cached", "verified, all exits"] = cached(Mode.VERIFIED, thresholds=(0.7,) * engine.num_exits, max_draft=3)
    return jobs


def time_jobs(jobs: dict[Job, Decode], prompts: list[list[int]]) -> tuple[dict[Job, list[float]], dict[Job, list]]:
    """Decode every prompt with every decoding function of `make_jobs`, and measure the speed.

    Returns {job: speeds in tokens per second} and {job: outputs as token ids}. The speeds and the outputs of a job are
    lists with one entry for each prompt.
    """
    for job, decode in jobs.items():
        if job[0] == "cached":                              # warm-up; the uncached loops gain little by one
            decode(prompts[0])
    speeds, outputs = defaultdict(list), defaultdict(list)
    for ids in tqdm(prompts, unit="prompt"):
        for job, decode in jobs.items():
            start = time.perf_counter()
            text = decode(ids)
            speeds[job].append(len(text) / (time.perf_counter() - start))
            outputs[job].append(text)
    return speeds, outputs


def table_row(job: Job, speeds: dict[Job, list[float]], outputs: dict[Job, list]) -> dict:
    """Compute the table row of one job, from the results of `time_jobs`.

    Returns a dict. Speed and ratios are medians over the prompts:
    - `setting`, `method`: the two parts of the job.
    - `tokens_per_second`: speed.
    - `over_standard`: speed / speed of the method "standard" in the same setting.
    - `over_uncached`: speed / speed of the method "standard" without a cache.
    - `identical`: share of the prompts for which the output equals the output of the method "standard" with a cache.
    """
    setting, method = job

    def over(base: Job) -> float:
        return median(a / b for a, b in zip(speeds[job], speeds[base]))

    same = [ours == full for ours, full in zip(outputs[job], outputs["cached", "standard"])]
    return {"setting": setting, "method": method, "tokens_per_second": median(speeds[job]),
            "over_standard": over((setting, "standard")), "over_uncached": over(("uncached", "standard")),
            "identical": sum(same) / len(same)}


def main() -> None:
    parser = command_parser(__doc__)
    add_model_and_exits(parser)
    add_prompts(parser, prompts=3, tokens=48)
    parser.add_argument("--threshold", type=float, default=0.5, help="threshold of the cascade at every exit")
    parser.add_argument("--max-draft", type=int, nargs="+", default=[3, 5, 7], help="draft lengths")
    parser.add_argument("--out", type=Path, help="result file; default: assets/results/baselines.json")
    args = parser.parse_args()
    out = args.out or results_file(args.model, args.exits, "baselines.json")
    engine, tokenizer = load(args.model, args.exits)
    prompts = [token_ids(tokenizer, prompt.text) for prompt in bundled_prompts()[:args.prompts]]
    jobs = make_jobs(engine, args)
    speeds, outputs = time_jobs(jobs, prompts)
    rows = [table_row(job, speeds, outputs) for job in jobs]
    for r in rows:
        print(f"{r['setting']:<10}{r['method']:<34}{r['tokens_per_second']:>8.1f} tokens/s{r['over_standard']:>7.2f}x "
              f"standard{r['over_uncached']:>7.2f}x uncached{r['identical']:>6.0%} identical")
    result = {"provenance": provenance(0), "model": engine.model.name, "exits": engine.bank.fingerprint(),
              "prompts": len(prompts), "tokens": args.tokens, "threshold": args.threshold, "rows": rows}
    save_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
