"""Training text: conversations that the model writes itself, and local text.

    python -m training.data policy --tokens 500000 --prompts prompts.jsonl --texts book.txt --out data/policy
    python -m training.data text --files book.txt notes.jsonl --out data/text
    python -m training.data text --dataset Salesforce/wikitext --dataset-config wikitext-103-raw-v1 --max-length 512 \\
        --tokens 10240000 --out data/wikitext                       # as published: 20,000 samples of 512 tokens

`policy` lets the frozen model write, so that exits are trained on the distribution they will decode. Through its chat
template it answers user turns from --prompts, JSONL rows {"prompt": ...}, and invents other conversations whole, the
user's turn too; of --texts it reads the first words of a passage and goes on by itself. `text` only tokenizes: plain
files (documents divided by blank lines) or JSONL rows {"text": ...} or {"prompt": ...}.

A run that is started again keeps the shards it finds. With --features, `policy` keeps the hidden states that training
will ask for while they are at hand, which saves training to run the model over the same text again.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cascadeexit.hub import DEFAULT_MODEL, exit_layers, load_model, load_tokenizer
from cascadeexit.model import SegmentedModel
from training.command import run_command
from training.documents import Document, key_of, load_shard, save_shard
from training.features import Features, FeatureStore, wanted
from training.provenance import provenance, save_json

_SETTINGS = ("seed", "temperature", "batch", "steps", "own_share", "plain_share", "max_prompt_chars")   # of the text
MIN_TOKENS = 16
MAX_CONTINUATION = 160      # tokens after a passage of plain text, which rarely ends by itself
TOP_K = 50


# -- text the model writes --------------------------------------------------------------------------------------------


class ChatTemplate:
    """The chat template around one user turn, as token ids: opening, the turn, closing up to the reply.

    A model without a template goes on from the text as it stands: `closing` is empty.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        if tokenizer.chat_template is None:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            self.opening, self.closing = [start], []
            return
        sentinel = "\u241f"
        text = tokenizer.apply_chat_template([{"role": "user", "content": sentinel}], tokenize=False,
                                             add_generation_prompt=True)
        opening, closing = text.split(sentinel)
        self.opening, self.closing = self.encode(opening), self.encode(closing)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, turn: str) -> list[int]:
        return self.opening + self.encode(turn) + self.closing


class Sources:
    """What a lane may begin with: a user turn to answer, nothing (it invents the conversation), a passage to go on."""

    def __init__(self, template: ChatTemplate | None, prompts: list[str], texts: list[str], own_share: float,
                 plain_share: float, seed: str):
        self.template, self.rng = template, random.Random(seed)
        self._turns = self.rng.sample(prompts, len(prompts))
        self._texts = self.rng.sample(texts, len(texts))
        plain = plain_share if texts else 0.0
        self._shares = (plain, (1 - plain) * (own_share if prompts else 1.0))

    def begin(self) -> "Opening":
        draw = self.rng.random()
        if draw < self._shares[0] and self._texts:
            text = self._texts.pop()
            words = self.template.encode(text)[:self.rng.randint(8, 48)]
            return Opening(words, key_of(text), limit=len(words) + MAX_CONTINUATION)
        if draw < sum(self._shares) or not self._turns:
            return Opening(list(self.template.opening), 0, invents_user=bool(self.template.closing))
        turn = self._turns.pop()
        return Opening(self.template.prompt(turn), key_of(turn), greedy=self.rng.random() < 0.5)


@dataclass
class Opening:
    """The first tokens of a document, and how the model goes on from them."""

    forced: list[int]
    key: int                        # 0: the finished document gets its own
    invents_user: bool = False      # the model writes the user's turn, then the reply
    greedy: bool = False
    limit: int = 1 << 30            # tokens of the whole document


class Row:
    """One lane of the batch: what it must say next, and the document it is writing."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self.finished: list[tuple[int, Document]] = []          # each with the slot of its first token
        self.begin(0)

    def begin(self, slot: int) -> None:
        """Start a new document at this slot of the cache."""
        self.opening = self.sources.begin()
        self.start, self.document, self.forced = slot, Document(key=self.opening.key), self.opening.forced

    def next_token(self, sampled: int, best: int, eos: frozenset[int], slot: int) -> int:
        """The token for this slot, given what the model would say; the lane's bookkeeping moves on."""
        forced, document = bool(self.forced), self.document
        token = self.forced.pop(0) if forced else best if self.opening.greedy else sampled
        document.ids.append(token)
        document.chosen.append(0 if forced else 1)
        if not forced and token in eos and self.opening.invents_user:
            self.opening.invents_user, self.opening.greedy = False, self.sources.rng.random() < 0.5
            closing = self.sources.template.closing
            self.forced = closing[1:] if closing[:1] == [token] else list(closing)
        elif not forced and (token in eos or len(document.ids) >= self.opening.limit):
            self.close()
            self.begin(slot + 1)
        return token

    def close(self) -> None:
        if sum(self.document.chosen) >= MIN_TOKENS:
            self.document.key = self.document.key or key_of(str(self.document.ids))
            self.finished.append((self.start, self.document))


@torch.inference_mode()
def write_round(model: SegmentedModel, rows: list[Row], steps: int, temperature: float, bar: tqdm,
                keep: bool = False) -> tuple[list[Document], list[Features]]:
    """Run all lanes in lock-step for `steps` slots of one static cache; a finished lane starts anew.

    keep: return the features of each document, too, from these very passes; else none.

    The text need not be bitwise that of decoding: passes have other shapes.
    """
    cache, best = model.new_cache(steps, batch=len(rows)), [0] * len(rows)
    sampled, seen, choices = best, [], []
    for slot in range(steps):
        begins = [row.start for row in rows]        # a lane sees only its own conversation, up to this slot
        tokens = [row.next_token(s, b, model.eos_ids, slot) for row, s, b in zip(rows, sampled, best, strict=True)]
        h, at_exit = model.embed(tokens), []                                                    # (1, B, D)
        for s in range(model.num_segments):
            h = model.run_batch(s, h, begins, cache)
            at_exit.append(h[0])
        top, ids = model.logits(h)[0].float().topk(TOP_K)                                       # (B, K)
        pick = torch.multinomial((top / temperature).softmax(-1), 1)
        best, sampled = ids[:, 0].tolist(), ids.gather(1, pick)[:, 0].tolist()
        if keep:
            seen.append(torch.stack([*at_exit[:-1], model.norm(at_exit[-1]).to(at_exit[0].device)], 1))
            choices.append(ids[:, 0].int())
        bar.update(len(rows))
    for row in rows:
        row.close()
    documents, features = [d for row in rows for _, d in row.finished], []
    if keep:
        seen, choices = torch.stack(seen, 1), torch.stack(choices, 1)                           # (B, steps, E + 1, D)
        for lane, row in enumerate(rows):
            for start, d in row.finished:
                part = slice(start, start + len(d.ids))
                features.append(Features(torch.tensor(d.ids, dtype=torch.int32, device=seen.device),
                                         seen[lane, part, :-1], seen[lane, part, -1], choices[lane, part],
                                         wanted(d).to(seen.device)))
    return documents, features


def check_settings(folder: Path, settings: dict) -> None:
    """Raise ValueError where shards of other settings lie: they would pass for ones of these."""
    file = folder / "provenance.json"
    before = json.loads(file.read_text(encoding="utf-8")).get("settings", {}) if file.exists() else {}
    changed = {k: (before[k], settings.get(k)) for k in before if before[k] != settings.get(k)}
    if changed and any(folder.glob("shard-*.safetensors")):
        raise ValueError(f"{folder} holds text of other settings, before and now: {changed}. Give the same ones, or "
                         "another --out.")


def write_policy(args) -> None:
    base, tokenizer, name = load_model(args.model)
    exits = exit_layers(args.exits, base.config.num_hidden_layers) if args.features else ()
    model, template = SegmentedModel(base, exits, name=name), ChatTemplate(tokenizer)
    prompts = [json.loads(line)["prompt"] for file in args.prompts for line in open(file, encoding="utf-8")]
    prompts = sorted({p.strip() for p in prompts if len(p) <= args.max_prompt_chars})
    texts = sorted({t.strip() for file in args.texts for t in read_texts(file) if len(t) >= 80})
    per_round = args.batch * args.steps
    rounds = -(-args.tokens // per_round)
    settings = {"head": model.head_fingerprint} | {k: getattr(args, k) for k in _SETTINGS}
    settings["sources"] = key_of(json.dumps([prompts, texts]))
    check_settings(args.out, settings)
    save_json(args.out / "provenance.json", provenance(args.seed) | {
        "model": name, "prompts": len(prompts), "texts": len(texts), "settings": settings})
    known: set[tuple[int, ...]] = set()
    with tqdm(total=rounds * per_round, unit="token", unit_scale=True, smoothing=0.05) as bar:
        for index in range(rounds):
            path = args.out / f"shard-{index:05d}.safetensors"
            if path.exists():
                known.update(tuple(d.ids) for d in load_shard(path))
                bar.update(per_round)
                continue
            sources = Sources(template, prompts, texts, args.own_share, args.plain_share, f"{args.seed}-{index}")
            torch.manual_seed(sources.rng.randrange(2**31))
            rows = [Row(sources) for _ in range(args.batch)]
            documents, features = write_round(model, rows, args.steps, args.temperature, bar, bool(args.features))
            new = []
            for i, ids in enumerate(tuple(d.ids) for d in documents):
                if ids not in known:
                    known.add(ids)
                    new.append(i)
            documents, features = [documents[i] for i in new], [features[i] for i in new if features]
            if features:
                FeatureStore(model, documents, args.features, math.inf).put(features)
            save_shard(path, documents)


# -- local text -------------------------------------------------------------------------------------------------------


def read_texts(file: Path) -> Iterator[str]:
    if file.suffix == ".jsonl":
        for line in file.open(encoding="utf-8"):
            row = json.loads(line)
            yield row.get("text") or row["prompt"]
    else:
        yield from re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))


def read_dataset(args) -> Iterator[str]:
    """Documents of a Hub dataset with a `text` column; articles of WikiText, whose rows are lines, are put together."""
    from datasets import load_dataset  # here: only this command needs it, and its import takes a second

    rows = load_dataset(args.dataset, args.dataset_config, split=args.dataset_split)
    if "text" not in rows.column_names:
        raise SystemExit(f"{args.dataset} has no column 'text', it has {', '.join(rows.column_names)}")
    if "wikitext" not in Path(args.dataset).name.lower():
        yield from (row["text"] for row in rows)
        return
    article: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=].* = \n?", row["text"]) and article:
            yield "".join(article)
            article = []
        article.append(row["text"])
    yield "".join(article)


def write_text(args) -> None:
    if not args.files and not args.dataset:
        raise SystemExit("nothing to read: give --files or --dataset")
    tokenizer = load_tokenizer(args.model)
    texts = [t.strip() for file in args.files for t in read_texts(file) if t.strip()]
    if args.dataset:
        texts += [t.strip() for t in read_dataset(args) if t.strip()]
    random.Random(args.seed).shuffle(texts)
    documents, total = [], 0
    with tqdm(total=args.tokens, unit="token", unit_scale=True) as bar:
        for text in texts:
            whole = tokenizer(text, verbose=False)["input_ids"]
            for a in range(0, len(whole), args.max_length):
                ids = whole[a:a + args.max_length]
                if len(ids) >= MIN_TOKENS and total < args.tokens:
                    documents.append(Document(ids, [0] * len(ids), key_of(text)))
                    total += len(ids)
                    bar.update(len(ids))
            if total >= args.tokens:
                break
    if not documents:
        raise SystemExit(f"no document of at least {MIN_TOKENS} tokens was found")
    save_shard(args.out / "shard-00000.safetensors", documents)
    save_json(args.out / "provenance.json",
              provenance(args.seed) | {"files": [f.name for f in args.files], "dataset": args.dataset})
    print(f"{len(documents)} documents, {total} tokens in {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="{policy,text}")
    policy = kinds.add_parser("policy", help="let the model write conversations")
    policy.add_argument("--prompts", type=Path, nargs="*", default=[], help='JSONL files with rows {"prompt": ...}')
    policy.add_argument("--texts", type=Path, nargs="*", default=[], help="text files whose passages it goes on with")
    policy.add_argument("--own-share", type=float, default=0.4, help="part of the conversations invented whole")
    policy.add_argument("--plain-share", type=float, default=0.2, help="part of the documents that go on from --texts")
    policy.add_argument("--max-prompt-chars", type=int, default=400, help="leave out longer prompts")
    policy.add_argument("--batch", type=int, default=128, help="documents written at once")
    policy.add_argument("--steps", type=int, default=384, help="cache slots a round; no conversation is longer")
    policy.add_argument("--temperature", type=float, default=0.8, help="of sampled replies; half of them are greedy")
    policy.add_argument("--features", type=Path, help="keep the hidden states, too, that training will ask for: the "
                                                      "folder which training.distill is given as --features")
    policy.add_argument("--exits", help="with --features: the exits' layers, as for training.distill")
    policy.set_defaults(run=write_policy, tokens=500_000)
    text = kinds.add_parser("text", help="tokenize local text")
    text.add_argument("--files", type=Path, nargs="*", default=[], help="text or JSONL files")
    text.add_argument("--dataset", help="a Hub dataset with a text column, such as Salesforce/wikitext")
    text.add_argument("--dataset-config", help="such as wikitext-103-raw-v1")
    text.add_argument("--dataset-split", default="train")
    text.add_argument("--max-length", type=int, default=256, help="cut longer documents into pieces of this size")
    text.set_defaults(run=write_text)
    for kind in (policy, text):
        kind.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, Hub id or local folder")
        kind.add_argument("--out", type=Path, required=True, help="folder for the shards")
        kind.add_argument("--tokens", type=int, default=500_000, help="stop after about this many")
        kind.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
