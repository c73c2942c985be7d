"""Make training text: let the model write conversations, or tokenize existing text.

    python -m training.data policy --tokens 500000 --prompts prompts.jsonl --texts book.txt --out data/policy
    python -m training.data text --files book.txt notes.jsonl --out data/text
    python -m training.data text --dataset Salesforce/wikitext --dataset-config wikitext-103-raw-v1 --max-length 512 \\
        --tokens 10240000 --out data/wikitext                       # 20,000 samples of 512 tokens

`policy` lets the frozen model write. So exits are trained on the kind of text that they will decode. The model writes
three kinds of documents. It answers user turns from --prompts (JSONL rows {"prompt": ...}) in its chat template. It
invents whole conversations, the user's turn included. It continues passages from --texts after their first words.

`text` only tokenizes existing text: plain files (documents separated by blank lines), JSONL rows {"text": ...} or
{"prompt": ...}, or a dataset of the Hugging Face Hub.

The same command continues an interrupted run: finished files are kept. With --features, `policy` also saves the hidden
states that training needs, so that training does not have to run the model over the same text again.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from cascadeexit.hub import exit_layers, load_model, load_tokenizer
from cascadeexit.model import SegmentedModel
from training.command import run_command
from training.documents import Document, Split, held_out_key, key_of, load_shard, save_shard, split_of
from training.features import FeatureStore
from training.json_files import read_json, save_json
from training.options import add_model, add_seed, command_parser
from training.policy import MIN_TOKENS, ChatTemplate, Lane, Sources, write_round
from training.provenance import provenance

# Options on which the text of `policy` depends.
_SETTINGS = ("seed", "temperature", "batch", "steps", "own_share", "plain_share", "max_prompt_chars")


# -- text that the model writes ---------------------------------------------------------------------------------------


def check_settings(folder: Path, settings: dict) -> None:
    """Check that the shards in a folder were made with these settings, because a run keeps existing shards.

    Args:
        folder: folder with the shards and their `provenance.json`.
        settings: {name: value}.

    Raises ValueError if the folder has shards and a setting is different.
    """
    old = (read_json(folder / "provenance.json") or {}).get("settings", {})
    changed = {k: (old[k], settings.get(k)) for k in old if old[k] != settings.get(k)}
    if changed and any(folder.glob("shard-*.safetensors")):
        raise ValueError(f"{folder} holds text of other settings, (old, new): {changed}. Give the old settings, "
                         "or another --out.")


class PolicyText:
    """Lets the model write training text, for the command `policy`.

    The constructor loads the model, and reads the files of --prompts and --texts. Then each call of `write_shard`
    writes one shard, a file with many documents.

    Args:
        args: options of the command `policy`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        base, tokenizer, self.name = load_model(args.model)
        exits = exit_layers(args.exits, base.config.num_hidden_layers) if args.features else ()
        self.model, self.template = SegmentedModel(base, exits, name=self.name), ChatTemplate(tokenizer)
        prompts = [json.loads(line)["prompt"] for file in args.prompts for line in open(file, encoding="utf-8")]
        self.prompts = sorted({p.strip() for p in prompts if len(p) <= args.max_prompt_chars})
        if args.held_out:
            self.prompts = [p for p in self.prompts if split_of(key_of(p)) == Split.TEST]
        self.texts = sorted({t.strip() for file in args.texts for t in read_texts(file) if len(t) >= 80})
        self._known: set[tuple[int, ...]] = set()       # documents of the rounds before

    def settings(self) -> dict:
        """Return all settings on which the text depends: a dict {name: value} that can be saved as JSON."""
        return {"head": self.model.head_fingerprint} | {k: getattr(self.args, k) for k in _SETTINGS} | {
            "sources": key_of(json.dumps([self.prompts, self.texts]))}

    def write_shard(self, index: int, bar: tqdm) -> None:
        """Let the model write shard number `index`. If the file of this shard exists, it is kept unchanged.

        Args:
            bar: progress bar, which counts tokens.
        """
        args, path = self.args, self.args.out / f"shard-{index:05d}.safetensors"
        if path.exists():
            self._known.update(tuple(d.ids) for d in load_shard(path))
            bar.update(args.batch * args.steps)
            return
        sources = Sources(self.template, self.prompts, self.texts, args.own_share, args.plain_share,
                          f"{args.seed}-{index}")
        torch.manual_seed(sources.rng.randrange(2**31))
        lanes = [Lane(sources) for _ in range(args.batch)]
        documents, features = write_round(self.model, lanes, args.steps, args.temperature, bar, bool(args.features))
        if args.held_out:
            for document in documents:
                document.key = held_out_key(document.key)
        new = [i for i, d in enumerate(documents) if self._is_new(d)]
        documents = [documents[i] for i in new]
        if new and features:
            FeatureStore(self.model, documents, args.features, math.inf).put([features[i] for i in new])
        save_shard(path, documents)

    def _is_new(self, document: Document) -> bool:
        """Return True if no earlier document had the same tokens. The document is remembered for later calls."""
        ids = tuple(document.ids)
        if ids in self._known:
            return False
        self._known.add(ids)
        return True


def write_policy(args: argparse.Namespace) -> None:
    """Run the command `policy`: let the model write shards of training text to the folder --out.

    Raises ValueError if the folder has shards that were made with other settings.
    """
    text = PolicyText(args)
    settings, per_round = text.settings(), args.batch * args.steps
    check_settings(args.out, settings)
    save_json(args.out / "provenance.json", provenance(args.seed) | {
        "model": text.name, "prompts": len(text.prompts), "texts": len(text.texts), "settings": settings})
    rounds, began, longest = -(-args.tokens // per_round), time.monotonic(), 0.0
    with tqdm(total=rounds * per_round, unit="token", unit_scale=True, smoothing=0.05) as bar:
        for index in range(rounds):
            started = time.monotonic()
            if index and started - began + longest > 60 * args.minutes:
                bar.write(f"stopped by --minutes after {index} of {rounds} rounds")
                break
            text.write_shard(index, bar)
            longest = max(longest, time.monotonic() - started)


# -- local text -------------------------------------------------------------------------------------------------------


def read_texts(file: Path) -> Iterator[str]:
    """Yield the documents of a file.

    A .jsonl file has one document per line, in the field "text" or "prompt". In other files, blank lines separate the
    documents.
    """
    if file.suffix == ".jsonl":
        for line in file.open(encoding="utf-8"):
            row = json.loads(line)
            yield row.get("text") or row["prompt"]
    else:
        yield from re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))


def read_dataset(args: argparse.Namespace) -> Iterator[str]:
    """Yield the documents of a Hub dataset, from its column `text`.

    Args:
        args: `dataset`, `dataset_config` and `dataset_split` are used, with the meaning of the command's options.

    A row is one document. In WikiText, a row is a single line, so the lines of each article are joined.

    Raises SystemExit if the dataset has no column `text`.
    """
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


def cut(tokenizer, texts: list[str], max_length: int, tokens: int) -> list[Document]:
    """Tokenize texts and cut them into documents of at most `max_length` tokens.

    Documents of fewer than MIN_TOKENS tokens are left out. The function stops when the documents have at least `tokens`
    tokens together.
    """
    documents, total = [], 0
    with tqdm(total=tokens, unit="token", unit_scale=True) as bar:
        for text in texts:
            whole = tokenizer(text, verbose=False)["input_ids"]
            for a in range(0, len(whole), max_length):
                ids = whole[a:a + max_length]
                if len(ids) >= MIN_TOKENS and total < tokens:
                    documents.append(Document(ids, [0] * len(ids), key_of(text)))
                    total += len(ids)
                    bar.update(len(ids))
            if total >= tokens:
                break
    return documents


def write_text(args: argparse.Namespace) -> None:
    """Run the command `text`: tokenize existing text, and save it as one shard in the folder --out.

    Raises SystemExit if no text was given, or if no document is long enough.
    """
    if not args.files and not args.dataset:
        raise SystemExit("nothing to read: give --files or --dataset")
    tokenizer = load_tokenizer(args.model)
    texts = [t.strip() for file in args.files for t in read_texts(file) if t.strip()]
    if args.dataset:
        texts += [t.strip() for t in read_dataset(args) if t.strip()]
    random.Random(args.seed).shuffle(texts)
    documents = cut(tokenizer, texts, args.max_length, args.tokens)
    if not documents:
        raise SystemExit(f"no document of at least {MIN_TOKENS} tokens was found")
    save_shard(args.out / "shard-00000.safetensors", documents)
    save_json(args.out / "provenance.json",
              provenance(args.seed) | {"files": [f.name for f in args.files], "dataset": args.dataset})
    print(f"{len(documents)} documents, {sum(len(d.ids) for d in documents)} tokens in {args.out}")


# -- command ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = command_parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="{policy,text}")
    policy = commands.add_parser("policy", help="let the model write conversations")
    policy.add_argument("--prompts", type=Path, nargs="*", default=[], help='JSONL files with rows {"prompt": ...}')
    policy.add_argument("--texts", type=Path, nargs="*", default=[], help="text files; the model continues passages of "
                        "them")
    policy.add_argument("--own-share", type=float, default=0.4, help="share of the conversations in which the model "
                        "also invents the user's turn")
    policy.add_argument("--plain-share", type=float, default=0.2, help="share of the documents that continue --texts")
    policy.add_argument("--max-prompt-chars", type=int, default=400, help="leave out longer prompts of "
                        "--prompts")
    policy.add_argument("--batch", type=int, default=128, help="documents written at once")
    policy.add_argument("--steps", type=int, default=384, help="tokens that each row of the batch writes in one round; "
                        "a document cannot be longer")
    policy.add_argument("--temperature", type=float, default=0.8, help="temperature of sampled replies; half of the "
                        "replies are greedy")
    policy.add_argument("--held-out", action="store_true", help="write only test documents: answers to user turns of "
                        "--prompts that no training document answers, and invented conversations. Give their folder to "
                        "training.calibrate --data")
    policy.add_argument("--minutes", type=float, default=math.inf, help="time limit: begin no round that would end "
                        "later; at least one round is written")
    policy.add_argument("--features", type=Path, help="also save the hidden states that training needs in this "
                        "folder; give the same folder to training.distill --features")
    policy.add_argument("--exits", help="with --features: the exit layers, as for training.distill")
    policy.set_defaults(run=write_policy)
    text = commands.add_parser("text", help="tokenize local text")
    text.add_argument("--files", type=Path, nargs="*", default=[], help="text or JSONL files")
    text.add_argument("--dataset", help="a Hub dataset with a text column, such as Salesforce/wikitext")
    text.add_argument("--dataset-config", help="such as wikitext-103-raw-v1")
    text.add_argument("--dataset-split", default="train", help="which part of the dataset")
    text.add_argument("--max-length", type=int, default=256, help="cut longer documents into pieces of this "
                      "many tokens")
    text.set_defaults(run=write_text)
    for command in (policy, text):
        add_model(command)
        command.add_argument("--out", type=Path, required=True, help="folder for the shards")
        command.add_argument("--tokens", type=int, default=500_000, help="stop after about this many tokens")
        add_seed(command)
    return p


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
