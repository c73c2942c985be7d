// Differences: each text is aligned with the full model's by its tokens, so that texts that have parted can be compared
// again. Differences can be marked, everything else can be folded away, and the texts scroll together.

const REALIGN = 600;                         // least milliseconds between two alignments of a growing text
const SHORTEST = 3;                          // fewer equal tokens between two differences are part of them
const CONTEXT = 3;                           // equal tokens that stay beside a difference when the rest is folded

const aligned = new Map();                   // name of a side -> {blocks, n, m, whole}
const compare = { on: false, folded: false, together: true, side: 'cascade', opened: new Set(), last: 0, driver: null, at: -1 };

// -- the alignment -----------------------------------------------------------------------------------------------------------

// Blocks {a0, a1, b0, b1, same} that cover both lists in order: the longest common subsequence, without stray matches.
function alignIds(a, b) {
  let from = 0, aEnd = a.length, bEnd = b.length;
  while (from < aEnd && from < bEnd && a[from] === b[from]) from++;
  while (aEnd > from && bEnd > from && a[aEnd - 1] === b[bEnd - 1]) { aEnd--; bEnd--; }
  const n = aEnd - from, m = bEnd - from, wide = m + 1, table = new Uint16Array((n + 1) * wide);
  for (let i = n - 1; i >= 0; i--) {
    const id = a[from + i], row = i * wide, next = row + wide;
    for (let j = m - 1; j >= 0; j--)
      table[row + j] = id === b[from + j] ? table[next + j + 1] + 1 : Math.max(table[next + j], table[row + j + 1]);
  }
  const pairs = [];
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[from + i] === b[from + j]) pairs.push([from + i++, from + j++]);
    else if (table[(i + 1) * wide + j] >= table[i * wide + j + 1]) i++;
    else j++;
  }
  const runs = from ? [{ a0: 0, a1: from, b0: 0, b1: from }] : [];
  for (const [i, j] of pairs) {
    const last = runs[runs.length - 1];
    if (last && last.a1 === i && last.b1 === j) { last.a1++; last.b1++; } else runs.push({ a0: i, a1: i + 1, b0: j, b1: j + 1 });
  }
  if (aEnd < a.length) runs.push({ a0: aEnd, a1: a.length, b0: bEnd, b1: b.length });
  return blocksOf(runs.filter((r, k) => r.a1 - r.a0 >= SHORTEST || k === 0 && r.a0 === 0 && r.b0 === 0 || k === runs.length - 1 && r.a1 === a.length && r.b1 === b.length), a.length, b.length);
}

function blocksOf(runs, n, m) {
  const blocks = [];
  let a = 0, b = 0;
  for (const r of [...runs, { a0: n, a1: n, b0: m, b1: m }]) {
    if (r.a0 > a || r.b0 > b) blocks.push({ a0: a, a1: r.a0, b0: b, b1: r.b0, same: false });
    const last = blocks[blocks.length - 1];
    if (r.a1 > r.a0 && last && last.same) { last.a1 = r.a1; last.b1 = r.b1; }
    else if (r.a1 > r.a0) blocks.push({ ...r, same: true });
    a = r.a1; b = r.b1;
  }
  return blocks;
}

const idsOf = name => Array.from(sides[name].records, record => record ? record.id : -1);
const settled = () => !playing() && !isRunning();
// True when both texts are complete, so that what only one of them has at its end is a difference.
const complete = name => [name, FULL].every(one => sides[one].stats && sides[one].stats.done);

function realign() {
  compare.last = performance.now();
  for (const name of exitSides()) {
    const now = aligned.get(name), n = sides[name].records.length, m = sides[FULL].records.length;
    if (now && now.n === n && now.m === m && now.whole === complete(name)) continue;
    let blocks = alignIds(idsOf(name), idsOf(FULL));
    const end = blocks[blocks.length - 1];
    if (!complete(name) && end && !end.same) blocks = blocks.slice(0, -1);       // one text is ahead: no difference yet
    aligned.set(name, { blocks, n, m, whole: complete(name) });
  }
}

// The place in the other text that belongs to position i of this one.
function across(blocks, i, back = false) {
  const [p0, p1, q0, q1] = back ? ['b0', 'b1', 'a0', 'a1'] : ['a0', 'a1', 'b0', 'b1'];
  for (const block of blocks) {
    if (i >= block[p1]) continue;
    if (block.same) return block[q0] + i - block[p0];
    const share = (i - block[p0]) / Math.max(1, block[p1] - block[p0]);
    return Math.min(Math.max(block[q0], block[q1] - 1), block[q0] + Math.floor(share * (block[q1] - block[q0])));
  }
  const last = blocks[blocks.length - 1];
  return last ? Math.max(0, last[q1] - 1) : i;
}

// -- the first difference ------------------------------------------------------------------------------------------------------

function firstDifference(name) {
  const ours = sides[name].records, theirs = sides[FULL].records, n = Math.min(ours.length, theirs.length);
  let i = sides[name].alike || 0;
  while (i < n && ours[i] && theirs[i] && ours[i].id === theirs[i].id) i++;
  sides[name].alike = i;
  return i < n || n > 0 && ours.length !== theirs.length && complete(name) ? i : -1;
}

function markSplit() {
  const places = new Map(exitSides().map(name => [name, firstDifference(name)]));
  const mark = (name, i) => {
    const side = sides[name], node = i < 0 ? null : side.nodes[i];
    if (side.split === node) return;
    if (side.split) side.split.classList.remove('split');
    if (node) node.classList.add('split');
    side.split = node;
  };
  places.forEach((i, name) => mark(name, i));
  mark(FULL, places.get(compared()) ?? -1);
  parts.firstDifference.hidden = (places.get(compared()) ?? -1) < 0;
}

// Show the place in both texts. The card of the token leaves both free; on a phone there is no room for it.
function showFirstDifference(withCard = true) {
  const name = compared(), i = firstDifference(name);
  if (i < 0) return;
  const [ours, theirs] = [name, FULL].map(one => {
    const at = Math.min(i, sides[one].nodes.length - 1);
    unfold(one, at);
    reveal(one, at);
    flash(sides[one].nodes[at]);
    return sides[one].nodes[at];
  });
  if (narrow()) { closeCard(); return showBoth(ours, theirs); }
  if (!withCard || !sides[name].nodes[i]) return;
  openCard(ours, name, true);
  keepFree(theirs);
}

// Move the page so that two tokens stand in the middle between the strip and the lower edge of the screen.
function showBoth(one, other) {
  const [a, b] = [one, other].map(node => node.getBoundingClientRect()), strip = parts.legend.getBoundingClientRect();
  const free = Math.max(0, Math.min(strip.height, innerHeight / 2));
  scrollBy({ top: (Math.min(a.top, b.top) + Math.max(a.bottom, b.bottom)) / 2 - (free + innerHeight) / 2, behavior: 'instant' });
}

function flash(node) {
  if (!node) return;
  node.classList.add('lit');
  setTimeout(() => node.classList.remove('lit'), 1600);
}

const compared = () => sides[compare.side] && compare.side !== FULL ? compare.side : exitSides()[0];

// -- marks ---------------------------------------------------------------------------------------------------------------------

const MARKS = ['swapped', 'alone'];

function markSide(name, blocks, back) {
  const [p0, p1, q0, q1] = back ? ['b0', 'b1', 'a0', 'a1'] : ['a0', 'a1', 'b0', 'b1'], nodes = sides[name].nodes;
  let at = 0;
  const put = (to, kind) => {
    for (; at < to && at < nodes.length; at++) if (nodes[at]) for (const mark of MARKS) nodes[at].classList.toggle(mark, mark === kind);
  };
  for (const block of blocks) put(block[p1], block.same ? '' : block[q1] > block[q0] ? 'swapped' : 'alone');
  put(nodes.length, '');
}

function drawDifferences() {
  root.classList.toggle('ce-comparing', compare.on);
  parts.differences.setAttribute('aria-pressed', String(compare.on));
  parts.compareBar.hidden = !compare.on;
  if (compare.on && aligned.size) {
    for (const name of exitSides()) if (aligned.has(name)) markSide(name, aligned.get(name).blocks, false);
    markSide(FULL, aligned.get(compared()).blocks, true);
  }
  drawFolds();
  drawCompareBar();
}

function drawCompareBar() {
  if (!compare.on) return;
  const found = aligned.get(compared()), texts = exitSides();
  parts.compareWith.hidden = texts.length < 2;
  if (parts.compareWith.dataset.sides !== texts.join()) {
    parts.compareWith.dataset.sides = texts.join();
    parts.compareWith.replaceChildren(...texts.map(name => new Option(sides[name].title + ' against the full model', name)));
  }
  parts.compareWith.value = compared();
  if (!found) return put(parts.compareWords, run ? 'Comparing…' : 'Run a prompt to compare the texts.');
  const same = found.blocks.reduce((n, b) => n + (b.same ? b.a1 - b.a0 : 0), 0), all = Math.max(found.n, found.m), count = found.blocks.filter(b => !b.same).length;
  const lined = same / Math.max(1, found.whole ? all : Math.min(found.n, found.m)), match = matchOf(sides[compared()]);
  put(parts.compareWords, count === 0 ? 'No differences' + (found.whole ? ': the texts are identical.' : ' so far.')
    : count + (count === 1 ? ' stretch differs' : ' stretches differ') + ' · ' + percent(lined) + ' of the tokens are equal when lined up'
      + (match && !missing(match.positional) ? ', ' + percent(match.positional) + ' at the same position' : ''));
  parts.compareSteps.hidden = count === 0;
}

function stepDifference(move) {
  const name = compared(), found = aligned.get(name), list = found ? found.blocks.filter(b => !b.same) : [];
  if (!list.length) return;
  compare.at = (compare.at + move + list.length) % list.length;
  const block = list[compare.at];
  for (const [one, p0, p1] of [[name, block.a0, block.a1], [FULL, block.b0, block.b1]]) {
    const nodes = sides[one].nodes, at = Math.min(p0, nodes.length - 1);
    if (at < 0) continue;
    reveal(one, at);
    for (let i = p0; i < Math.min(p1, p0 + 40); i++) flash(nodes[i]);
  }
}

// -- only differences: equal stretches are folded -------------------------------------------------------------------------------

function drawFolds() {
  for (const name of order) {
    const box = parts[name] && parts[name].text, blocks = compare.on && compare.folded && settled()
      ? (aligned.get(name === FULL ? compared() : name) || { blocks: [] }).blocks : [];
    if (!box) continue;
    const wanted = foldsOf(name, blocks), key = wanted.map(f => f.join('-')).join();
    if (box.dataset.folds === key || !box.dataset.folds && !key) continue;
    box.dataset.folds = key;
    box.querySelectorAll('.ce-fold').forEach(node => node.remove());
    box.querySelectorAll('.folded').forEach(node => node.classList.remove('folded'));
    for (const [from, to] of wanted) fold(name, from, to);
    for (const paragraph of box.querySelectorAll('.ce-par'))
      paragraph.classList.toggle('gone', wanted.length > 0 && paragraph.childElementCount > 0 && !paragraph.querySelector(':scope > :not(.folded, .rejected)'));
  }
}

function foldsOf(name, blocks) {             // [from, to) of each stretch that is folded
  const [p0, p1] = name === FULL ? ['b0', 'b1'] : ['a0', 'a1'];
  return blocks.map((block, k) => {
    const from = block[p0] + (k === 0 ? 0 : CONTEXT), to = block[p1] - (k === blocks.length - 1 ? 0 : CONTEXT);
    return block.same && to - from > CONTEXT && !compare.opened.has(name + ':' + block[p0]) ? [from, to, block[p0]] : null;
  }).filter(Boolean);
}

function fold(name, from, to) {
  const nodes = sides[name].nodes, first = nodes[from];
  if (!first) return;
  for (let i = from; i < to; i++) if (nodes[i]) nodes[i].classList.add('folded');
  const opener = button('ce-fold', '… ' + (to - from) + ' equal tokens …', () => {
    unfold(name, from);
    parts[name].text.focus({ preventScroll: true });
  });
  opener.title = 'Show them';
  first.before(opener);
}

function unfold(name, i) {
  if (!compare.on || !compare.folded || !sides[name].nodes[i] || !sides[name].nodes[i].classList.contains('folded')) return;
  const blocks = (aligned.get(name === FULL ? compared() : name) || { blocks: [] }).blocks;
  const block = blocks.find(b => name === FULL ? i >= b.b0 && i < b.b1 : i >= b.a0 && i < b.a1);
  if (!block) return;
  compare.opened.add(name + ':' + (name === FULL ? block.b0 : block.a0));
  if (name === compared()) compare.opened.add(FULL + ':' + block.b0);
  if (name === FULL) compare.opened.add(compared() + ':' + block.a0);
  drawFolds();
}

// -- scrolling together ------------------------------------------------------------------------------------------------------------

// The token at the top of a text, and how far it stands below the upper edge.
function tokenAtTop(name) {
  const nodes = sides[name].nodes, edge = parts[name].text.getBoundingClientRect().top;
  let low = 0, high = nodes.length - 1;
  const bottom = i => {                        // of the next token that is not folded
    for (let k = i; k <= high; k++) if (nodes[k] && nodes[k].getClientRects().length) return [k, nodes[k].getBoundingClientRect()];
    return null;
  };
  while (low < high) {
    const middle = (low + high) >> 1, found = bottom(middle);
    if (found && found[1].bottom <= edge + 4) low = found[0] + 1; else high = middle;
  }
  const found = bottom(low);
  return found ? { i: found[0], below: found[1].top - edge } : null;
}

function placeToken(name, i, below) {
  const nodes = sides[name].nodes, box = parts[name].text;
  while (i > 0 && !(nodes[i] && nodes[i].getClientRects().length)) i--;
  if (nodes[i]) box.scrollTop += nodes[i].getBoundingClientRect().top - box.getBoundingClientRect().top - below;
}

function scrollOthers(name) {
  if (!compare.on || !compare.together || !settled() || !sides[name] || !aligned.size) return;
  const box = parts[name].text, atTop = box.scrollTop < 2, atEnd = box.scrollHeight - box.clientHeight - box.scrollTop < 2;
  const top = tokenAtTop(name);
  if (!top) return;
  const inFull = name === FULL ? top.i : across(aligned.get(name).blocks, top.i);
  for (const other of order) {
    if (other === name || !parts[other]) continue;
    const text = parts[other].text;
    if (atTop) text.scrollTop = 0;
    else if (atEnd && name !== FULL && other !== FULL) text.scrollTop = text.scrollHeight;
    else placeToken(other, other === FULL ? inFull : across(aligned.get(other).blocks, inFull, true), top.below);
  }
}

let scrolling = 0;
function drive(name) { compare.driver = name; }

function followScroll(name) {                // only the text that a visitor moves takes the others along
  const text = parts[name].text;
  for (const kind of ['wheel', 'touchstart', 'pointerdown', 'keydown']) text.addEventListener(kind, () => drive(name), { passive: true });
  text.addEventListener('scroll', () => {
    if (compare.driver !== name || scrolling) return;
    scrolling = requestAnimationFrame(() => { scrolling = 0; scrollOthers(name); });
  }, { passive: true });
}

// -- its controls ---------------------------------------------------------------------------------------------------------------------

function toggleBox(text, on, changed) {
  const input = make('input');
  input.type = 'checkbox';
  input.checked = on;
  input.addEventListener('change', () => changed(input.checked));
  return make('label', 'ce-check', null, input, text);
}

function buildCompareBar() {
  parts.compareWords = make('span', 'ce-compare-words');
  parts.compareWith = make('select', 'ce-compare-with');
  parts.compareWith.setAttribute('aria-label', 'Text to compare with the full model’s text');
  parts.compareWith.addEventListener('change', () => { compare.side = parts.compareWith.value; compare.at = -1; compareNow(); });
  const back = button('ce-small', '‹', () => stepDifference(-1)), forth = button('ce-small', '›', () => stepDifference(1));
  back.setAttribute('aria-label', 'Previous difference');
  forth.setAttribute('aria-label', 'Next difference');
  parts.compareSteps = make('span', 'ce-compare-steps', null, back, forth);
  parts.compareBar = make('div', 'ce-compare', null, parts.compareWith, parts.compareWords, parts.compareSteps,
    make('span', 'ce-compare-key', null, make('span', 'ce-mark swapped', 'replaced'), make('span', 'ce-mark alone', 'only in this text')),
    toggleBox('Only differences', compare.folded, on => {
      compare.folded = on;
      compare.opened.clear();
      compareNow();
      for (const name of order) parts[name].text.scrollTop = 0;
    }),
    toggleBox('Scroll together', compare.together, on => { compare.together = on; }));
  parts.compareBar.setAttribute('role', 'group');
  parts.compareBar.setAttribute('aria-label', 'Differences');
  parts.compareBar.hidden = true;
  parts.panels.before(parts.compareBar);
}

function compareNow() {
  realign();
  markSplit();
  drawDifferences();
}

// The buttons in the header of the full model's text. They stay the same nodes when the panels are built anew.
function differenceButtons() {
  if (!parts.differences) {
    parts.differences = button('ce-toggle ce-differences', 'Differences', () => {
      compare.on = !compare.on;
      compare.at = -1;
      compareNow();
      if (compare.on && run && settled()) showFirstDifference(false);
    });
    parts.differences.title = 'Align the texts by their tokens and mark what differs';
    parts.differences.setAttribute('aria-pressed', String(compare.on));
    parts.firstDifference = button('ce-toggle', 'First difference', () => showFirstDifference());
    parts.firstDifference.setAttribute('aria-label', 'Show the first difference');
    parts.firstDifference.hidden = true;
  }
  return [parts.firstDifference, parts.differences];
}

let late = 0;
feature({
  build() { buildCompareBar(); compare.on = compare.folded = false; },
  begin() { aligned.clear(); compare.opened.clear(); compare.at = -1; compare.side = 'cascade'; if (parts.compareBar) drawDifferences(); },
  leave(name) { aligned.delete(name); compareNow(); },
  draw() {
    if (!run || !parts.compareBar) return;
    markSplit();
    clearTimeout(late);
    if (!compare.on) return;
    if (settled() || performance.now() - compare.last > REALIGN) compareNow();
    else late = setTimeout(() => run && compareNow(), REALIGN);
  },
  finish() { if (run && parts.compareBar) compareNow(); },
});
