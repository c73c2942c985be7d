"""Training text: conversations that the model writes itself, and local text.

    python -m training.data policy --tokens 500000 --prompts prompts.jsonl --texts book.txt --out data/policy
    python -m training.data text --files book.txt notes.jsonl --out data/text
    python -m training.data text --dataset Salesforce/wikitext --dataset-config wikitext-103-raw-v1 --max-length 512 \\
        --tokens 10240000 --out data/wikitext                       # as published: 20,000 samples of 512 tokens

`policy` lets the frozen model write, so that exits are trained on the distribution they will decode. Through its chat
template it answers user turns from --prompts, JSONL rows {"prompt": ...}, and invents other conversations whole, the
user's turn too; of --texts it reads the first words of a passage and goes on by itself. `text` only tokenizes: plain
files (documents divided by blank lines) or JSONL rows {"text": ...} or {"prompt": ...}.

A shard holds documents as flat token ids with offsets, a flag per token (1 = the model chose it) and a key per
document by which training, calibration and test documents are divided. A run that is started again keeps the shards
it finds.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoTokenizer

from cascadeexit.hub import DEFAULT_MODEL, load_model, resolve
from cascadeexit.model import SegmentedModel
from training.provenance import provenance, save_json

MIN_TOKENS = 16
MAX_CONTINUATION = 160      # tokens after a passage of plain text, which rarely ends by itself
TOP_K = 50


class Split(IntEnum):
    TRAIN = 0
    CALIBRATION = 1
    TEST = 2


@dataclass
class Document:
    ids: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)     # 1 where the model picked the token
    key: int = 0

    @property
    def split(self) -> "Split":
        """Of 25 documents one tests, two calibrate, the rest train. By key, so a prompt never changes sides."""
        return {0: Split.TEST, 1: Split.CALIBRATION, 2: Split.CALIBRATION}.get(self.key % 25, Split.TRAIN)


def key_of(content: str) -> int:
    """A stable 48-bit key: equal content lands in the same split."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big")


# -- shards -----------------------------------------------------------------------------------------------------------


def save_shard(path: Path, documents: list[Document]) -> None:
    offsets = torch.tensor([0] + [len(d.ids) for d in documents]).cumsum(0)
    tensors = {
        "ids": torch.tensor([i for d in documents for i in d.ids], dtype=torch.int32),
        "chosen": torch.tensor([c for d in documents for c in d.chosen], dtype=torch.uint8),
        "offsets": offsets,
        "keys": torch.tensor([d.key for d in documents]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.rename(path)


def load_documents(folders: list[Path]) -> list[Document]:
    """Every document of these folders, duplicates (equal token ids) dropped, in a fixed order.

    Raises FileNotFoundError when a folder holds no shard.
    """
    documents, seen = [], set()
    for folder in folders:
        shards = sorted(Path(folder).glob("shard-*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"no shard-*.safetensors in {folder}: write them with python -m training.data")
        for shard in shards:
            t = load_file(shard)
            ids, chosen, offsets = t["ids"].tolist(), t["chosen"].tolist(), t["offsets"].tolist()
            for a, b, key in zip(offsets, offsets[1:], t["keys"].tolist()):
                fingerprint = hash(tuple(ids[a:b]))
                if fingerprint not in seen:
                    seen.add(fingerprint)
                    documents.append(Document(ids[a:b], chosen[a:b], key))
    return documents


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
        self.finished: list[Document] = []
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
            self.finished.append(self.document)


@torch.inference_mode()
def write_round(model: SegmentedModel, rows: list[Row], steps: int, temperature: float, bar: tqdm) -> list[Document]:
    """Run all lanes in lock-step for `steps` slots of one static cache; a finished lane starts anew.

    Each pass looks at the cache only as far as it is filled, rounded up: the text need not be bitwise that of decoding.
    """
    cache, layers = model.new_cache(steps, batch=len(rows)), range(model.num_layers)
    slots = torch.arange(steps, device=model.device)
    best = sampled = [0] * len(rows)
    for slot in range(steps):
        tokens = torch.tensor([row.next_token(s, b, model.eos_ids, slot)
                               for row, s, b in zip(rows, sampled, best, strict=True)], device=model.device)
        # A lane sees only its own conversation: from where it began up to this slot.
        start = torch.tensor([min(row.start, slot) for row in rows], device=model.device)
        near = slots[:-(-(slot + 1) // 64) * 64]
        mask = ((near >= start[:, None]) & (near <= slot))[:, None, None]                       # (B, 1, 1, C)
        h = model.embed(tokens).transpose(0, 1)                                                 # (B, 1, D)
        h = model.run_layers(layers, h, slots[None, slot:slot + 1], mask, cache)
        cache.advance(layers, 1)
        top, ids = model.logits(h.transpose(0, 1))[0].float().topk(TOP_K)                       # (B, K)
        pick = torch.multinomial((top / temperature).softmax(-1), 1)
        best, sampled = ids[:, 0].tolist(), ids.gather(1, pick)[:, 0].tolist()
        bar.update(len(rows))
    for row in rows:
        row.close()
    return [d for row in rows for d in row.finished]


def write_policy(args) -> None:
    base, tokenizer, name = load_model(args.model)
    model, template = SegmentedModel(base, (), name=name, native=False), ChatTemplate(tokenizer)
    prompts = [json.loads(line)["prompt"] for file in args.prompts for line in open(file, encoding="utf-8")]
    prompts = sorted({p.strip() for p in prompts if len(p) <= args.max_prompt_chars})
    texts = sorted({t.strip() for file in args.texts for t in read_texts(file) if len(t) >= 80})
    per_round = args.batch * args.steps
    rounds = -(-args.tokens // per_round)
    save_json(args.out / "provenance.json",
              provenance(args.seed) | {"model": name, "prompts": len(prompts), "texts": len(texts)})
    with tqdm(total=rounds * per_round, unit="token", unit_scale=True, smoothing=0.05) as bar:
        for index in range(rounds):
            path = args.out / f"shard-{index:05d}.safetensors"
            if path.exists():
                bar.update(per_round)
                continue
            sources = Sources(template, prompts, texts, args.own_share, args.plain_share, f"{args.seed}-{index}")
            torch.manual_seed(sources.rng.randrange(2**31))
            rows = [Row(sources) for _ in range(args.batch)]
            save_shard(path, write_round(model, rows, args.steps, args.temperature, bar))


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
    tokenizer = AutoTokenizer.from_pretrained(resolve(args.model))
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
    main()
