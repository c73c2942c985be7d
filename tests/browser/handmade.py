"""A run made by hand: every kind of record that the timeline draws, without a model and the same each time."""

import json
import random

from cascadeexit.stream import colours

WORDS = (" the", " sky", " is", " blue", " because", " light", " from", " sun", " scatters", " in", " air", ",", " and",
         ".", " Rayleigh", " shorter", " waves", "\n", " more", " than", " red")
LAYERS = (0, 9, 17, 24)
TOP = len(LAYERS)           # the last segment, and the full model's place among the exits
TITLES = dict(cascade="Fast", verified="Exact: same text, checked", full="Full model")
TWO, EXACT = dict(cascade="cascade", full="full"), dict(cascade="verified", full="full")
THREE = dict(cascade="cascade", second="verified", full="full")


def handmade_run(sides: dict[str, str], tokens: int = 60, spans: bool = True, fork: int = 0, seed: int = 1) -> str:
    """A recorded run as lines of JSON, as the page gets it.

    Args:
        sides: mode of each, by name.
        spans: False leaves out what older files do not have: sides, `ran` and `tree`.
        fork: position at which the first side is continued with another token; 0 for none.
    """
    chance, lines = random.Random(seed), []
    for name, mode in sides.items():
        write = {"cascade": _cascade, "verified": _verified, "full": _full}[mode]
        lines += [(t, record | dict(side=name)) for t, record in write(tokens, chance)]
    lines.sort(key=lambda line: line[0])                        # stable: those of one moment keep their order
    exits = [dict(layer=layer, depth=layer / 30) for layer in LAYERS]
    run = dict(type="run", run="0123456789ab", mode=sides["cascade"], greedy=True, thresholds=[0.6, 0.7, 0.8, 0.9],
               prompt_tokens=37, max_new_tokens=tokens, tolerance=0, settings={})
    if spans:
        run |= dict(machine="CPU, 2 threads", date="2026-11-29", sides=[
            dict(name=name, mode=mode, title=TITLES[mode], thresholds=[0.6, 0.7, 0.8, 0.9], tolerance=0)
            for name, mode in sides.items()])
    records = [dict(type="model", format=1, model="handmade", layers=30, exits=exits, trained=True,
                    colours=colours(len(LAYERS))), run, *(record for _, record in lines)]
    if not spans:
        records = [{k: v for k, v in r.items() if k != "ran"} for r in records if r["type"] != "tree"]
    records += [dict(type="end", side=name, agreement=0.97, positional=0.9, first_divergence=None, sequence=False,
                     identical=None, differs=[7], moments=[], loops=None) for name in sides if name != "full"]
    if fork:
        records.append(dict(type="fork", side="fork1", of="cascade", at=fork, id=3, text=" blue",
                            title="Fast, your token"))
        records.append(_token(fork, 1, 0.0, text=" blue") | dict(side="fork1"))
        records += [record | dict(side="fork1", i=fork + 1 + record["i"])
                    for _, record in _cascade(tokens - fork - 1, chance)]
        records.append(dict(type="end", side="fork1", agreement=0.9, positional=0.5, differs=[]))
    return "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in [dict(type="replay"), *records])


def _token(i: int, exit: int, t: float, status: str = "emitted", text: str | None = None, ran=(), **more) -> dict:
    text = WORDS[i * 8 % len(WORDS)] if text is None else text
    return dict(type="token", i=i, id=WORDS.index(text), status=status, text=text, exit=exit, t=round(t, 6),
                conf=[None] * 4, read=0.5, ran=[*map(list, ran)], **more)


def _full(tokens, chance):
    t = 0.14
    for i in range(tokens):
        yield t, _token(i, TOP, t, ran=[] if i == 0 else [(0, TOP + 1, 1)])
        t += 0.02 + 0.002 * chance.random()


def _cascade(tokens, chance):
    t, behind = 0.14, [0] * (TOP + 1)                           # positions that wait at each segment
    for i in range(tokens):
        exit = TOP if i % 12 == 11 else chance.choices(range(TOP), (2, 4, 3, 1))[0]
        ran, layers = [], 0
        for s in range(exit + 1):
            rows, behind[s] = behind[s] + 1, 0
            ran.append((s, s + 1, rows))
            layers += (*LAYERS, 30)[s] - (0, *LAYERS)[s] + 0.1 * rows
        for s in range(exit + 1, TOP + 1):
            behind[s] += 1
        if i:
            t += 0.0006 * layers + 0.001
        yield t, _token(i, exit, t, ran=[] if i == 0 else ran)


def _verified(tokens, chance):
    t, i = 0.14, 0
    while i < tokens:
        drafts = []
        for k in range(chance.choice((0, 3, 7, 7)) if i else 2):
            parent = k - 1 if k < 4 else chance.randrange(-1, k)
            drafts.append([k, WORDS[(i + k) * 5 % len(WORDS)], parent, round(chance.uniform(0.1, 0.95), 4),
                           chance.choice((-1, 0, 0)), False])
        accepted = min(chance.randint(0, 4), len(drafts), tokens - i - 1)
        for k, (_, text, parent, _, exit, _) in enumerate(drafts):
            t += 0.001
            if parent == k - 1 and k < 4:
                yield t, _token(i + k, exit, t, "draft", text)
        t += 0.024
        shown = min(len(drafts), 4)
        for k in range(accepted):
            drafts[k][5] = True
            ran = [(0, TOP + 1, len(drafts) + 1)] if k == 0 else ()
            yield t, _token(i + k, drafts[k][4], t, "accepted", drafts[k][1], ran=ran)
        for k in range(accepted, shown):
            yield t, dict(type="token", i=i + k, id=WORDS.index(drafts[k][1]), status="rejected")
        if drafts:
            yield t, dict(type="tree", i=i, drafts=drafts)
        yield t, _token(i + accepted, TOP, t, ran=[(0, TOP + 1, len(drafts) + 1)] if not accepted else ())
        i += accepted + 1
