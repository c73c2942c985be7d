"""The published setting rebuilt: nothing cached, every token reads the whole text again. And beside it, ours.

    python -m training.baselines

The published figures (cascade 1.76x, self-speculation 0.43x to 0.84x) compare with an uncached loop that also projects
every position onto the vocabulary. These three small loops do the same with the same model and exits, and serve the
tests as oracles. The table sets each against the uncached loop, and the cached engine's modes against its own `full`.
"""

import argparse
import json
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.hub import DEFAULT_MODEL, load
from cascadeexit.lookup import NOTHING_COPIED, Lookup
from cascadeexit.prompts import bundled_prompts, token_ids
from training.command import run_command
from training.provenance import provenance, results_file, save_json


class Uncached:
    """Passes over a whole text, from the first layer on, as far as is asked."""

    def __init__(self, engine: Engine):
        self.engine, self.model, self.bank = engine, engine.model, engine.bank

    def segments(self, text: list[int]):
        """Hidden rows of the whole text (1, N, D) after each segment in turn; the caller stops when it has enough."""
        h, cache = self.model.embed(text), self.model.new_cache(self.model.pad(len(text)))
        for s in range(self.model.num_segments):
            h = self.model.run_segment(s, h, cache)
            yield h

    def top(self, text: list[int]) -> tuple[Tensor, Tensor]:
        """The full model's choice after every position (N,), and its normed hidden states (N, D)."""
        *_, h = self.segments(text)
        return self.model.logits(h)[0].argmax(-1), self.model.norm(h[0])

    def exit(self, s: int, h: Tensor, said: Tensor, copied: tuple[int, int],
             before: Tensor | None = None) -> tuple[int, float, Tensor]:
        """Exit s at the newest row: its choice, confidence and adapted hidden (1, D). Projects whether taken or not.

        Args:
            copied: what the text said before, from `Lookup.copied`.
            before: the adapted hidden of the exit before it, where that was asked.
        """
        hidden = self.bank.hidden(s, h[0, -1:], said)
        confidence, = self.bank.confidence(s, hidden, [copied], before)
        return self.bank.choice(s, hidden), confidence, hidden

    def said(self, prompt: list[int]) -> Tensor:
        """What named the prompt's last token, as `Engine.generate` has it: (1, D)."""
        if len(prompt) == 1:
            return torch.zeros(1, self.model.hidden_size, dtype=self.model.dtype, device=self.model.device)
        return self.top(prompt[:-1])[1][-1:]


@torch.inference_mode()
def standard(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    """The full model, greedily."""
    run, text = Uncached(engine), list(prompt)
    while len(text) < len(prompt) + tokens and not _ended(engine, prompt, text):
        text.append(int(run.top(text)[0][-1]))
    return text[len(prompt):]


@torch.inference_mode()
def cascade(engine: Engine, prompt: list[int], tokens: int, thresholds: tuple[float, ...],
            ask_all: bool = False) -> list[int]:
    """Each token leaves at the first exit that is confident enough; ask_all, as published: none is ruled out before."""
    run, text = Uncached(engine), list(prompt)
    said, before = run.said(prompt), Lookup(prompt)
    while len(text) < len(prompt) + tokens and not _ended(engine, prompt, text):
        before.extend(text[len(before):])
        hidden, confidence = None, None
        for s, h in enumerate(run.segments(text)):
            if s == engine.num_exits:
                token, said = int(engine.model.logits(h)[0].argmax(-1)[-1]), engine.model.norm(h[0, -1:])
                break
            if not ask_all and not engine.worth_asking(s, thresholds, confidence):
                hidden = None
                continue
            token, confidence, hidden = run.exit(s, h, said, before.copied(text), hidden)
            if confidence >= thresholds[s]:
                said = hidden
                break
        text.append(token)
    return text[len(prompt):]


@torch.inference_mode()
def self_speculation(engine: Engine, prompt: list[int], tokens: int, exit: int, max_draft: int) -> list[int]:
    """One exit drafts max_draft tokens, one pass over the whole text judges them."""
    run, text = Uncached(engine), list(prompt)
    said, end = run.said(prompt), len(prompt) + tokens
    while len(text) < end and not _ended(engine, prompt, text):
        confirmed, drafted_said = len(text), said
        for _ in range(max_draft):
            h = next(islice(run.segments(text), exit, None))
            token, _, drafted_said = run.exit(exit, h, drafted_said, NOTHING_COPIED)
            text.append(token)
        choices, top = run.top(text)
        right = 0
        while right < max_draft and text[confirmed + right] == choices[confirmed + right - 1]:
            right += 1
        text[confirmed + right:] = [int(choices[confirmed + right - 1])]
        said = top[confirmed + right - 1:confirmed + right]
        eos = [i for i in range(confirmed, len(text)) if text[i] in engine.model.eos_ids]
        del text[min(end, eos[0] + 1 if eos else end):]
    return text[len(prompt):]


def _ended(engine: Engine, prompt: list[int], text: list[int]) -> bool:
    return len(text) > len(prompt) and text[-1] in engine.model.eos_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
    parser.add_argument("--exits", type=Path, help="exits folder; default the shipped ones")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a prompt")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the cascade, at every exit")
    parser.add_argument("--max-draft", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--out", type=Path, help="default assets/results/baselines.json")
    args = parser.parse_args()
    out = args.out or results_file(args.model, args.exits, "baselines.json")
    engine, tokenizer = load(args.model, args.exits)
    prompts = [token_ids(tokenizer, prompt.text) for prompt in bundled_prompts()[:args.prompts]]
    thresholds, n = (args.threshold,) * engine.num_exits, args.tokens

    def ours(mode: Mode, **settings):
        config = DecodeConfig(mode=mode, max_new_tokens=n, **settings)
        return lambda ids: engine.run(ids, config).token_ids

    jobs = {("uncached", "standard"): lambda ids: standard(engine, ids, n),
            ("uncached", "cascade"): lambda ids: cascade(engine, ids, n, thresholds, ask_all=True),
            ("cached", "standard"): ours(Mode.FULL),
            ("cached", "cascade"): ours(Mode.CASCADE, thresholds=thresholds)}
    for e, layer in enumerate(engine.model.exit_layers):
        for k in args.max_draft:
            only = tuple(0.0 if s == e else None for s in range(engine.num_exits))
            name = f"self-speculation, layer {layer}, K = {k}"
            jobs["uncached", name] = lambda ids, e=e, k=k: self_speculation(engine, ids, n, e, k)
            jobs["cached", name] = ours(Mode.VERIFIED, thresholds=only, max_draft=k)
    jobs["cached", "verified, all exits"] = ours(Mode.VERIFIED, thresholds=(0.7,) * engine.num_exits, max_draft=3)

    speeds, outputs = defaultdict(list), {}
    for i, ids in enumerate(tqdm([prompts[0], *prompts], unit="prompt")):
        for job, run in jobs.items():
            if i == 0 and job[0] == "uncached":
                continue                                    # the first prompt warms up; one cached pass is enough
            start = time.perf_counter()
            text = run(ids)
            if i:
                speeds[job].append(len(text) / (time.perf_counter() - start))
                outputs[job, i] = text
    rows = []
    for setting, name in jobs:
        base = speeds[setting, "standard"]
        rows.append({
            "setting": setting, "method": name, "tokens_per_second": median(speeds[setting, name]),
            "over_standard": median(a / b for a, b in zip(speeds[setting, name], base)),
            "over_uncached": median(a / b for a, b in zip(speeds[setting, name], speeds["uncached", "standard"])),
            "identical": sum(outputs[(setting, name), i + 1] == outputs[("cached", "standard"), i + 1]
                             for i in range(len(prompts))) / len(prompts)})
        r = rows[-1]
        print(f"{setting:<10}{name:<34}{r['tokens_per_second']:>8.1f} tokens/s{r['over_standard']:>7.2f}x standard"
              f"{r['over_uncached']:>7.2f}x uncached{r['identical']:>6.0%} identical")
    result = {"provenance": provenance(0), "model": engine.model.name, "exits": engine.bank.fingerprint(),
              "prompts": len(prompts), "tokens": n, "threshold": args.threshold, "rows": rows}
    save_json(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
