// Token view: draws a growing string of JSON lines, one record per line (written by cascadeexit/stream.py).
//
// Gradio runs this script once per mount, with `element`, `props` and `watch` in scope. The value is cumulative, because
// frames may be skipped, repeated or replaced: we continue at `offset`, or start again when the text is another one. All
// text enters the page through textContent. Numbers arrive computed and are only shown here.

const root = element.querySelector('.ce');
const SVG = 'http://www.w3.org/2000/svg';
const SIDES = ['cascade', 'full'];
const MAX_POINTS = 240;                      // of a live chart; longer series keep the maximum of each step

const WINDOW = 48;                           // tokens of the layer map shown at once
const FAST_WORDS = 'the first confident exit writes each token';

const ended = new Set();                     // runs that were stopped or cleared: later frames are ignored
const reducedMotion = matchMedia('(prefers-reduced-motion: reduce)').matches;

let offset, consumed, model, run, sides, versus, verdict, match, parts, dirty, playing, compared, card;

// -- small helpers ---------------------------------------------------------------------------------------------------

function make(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

function put(node, text) {                   // change the page only where the text changed
  if (node.textContent !== text) node.textContent = text;
}

const percent = (x, digits = 0) => x === null || x === undefined ? '–' : (100 * x).toFixed(digits) + '%';
const number = (x, digits = 1) => x === null || x === undefined ? '–' : x.toFixed(digits);
const milliseconds = x => x === null || x === undefined ? '–' : x >= 10 ? x.toFixed(2) + ' s' : Math.round(1000 * x) + ' ms';
const isLast = exit => exit >= model.exits.length;
const COPIED = -1;                           // exit of a token that was copied from earlier in the text
const colourClass = exit => isLast(exit) ? 'ef' : exit === COPIED ? 'ec' : 'e' + Math.min(exit, 5);
const exitName = exit => isLast(exit) ? 'Full model' : exit === COPIED ? 'No exit' : 'Exit ' + (exit + 1);
const exitPlace = exit => isLast(exit) ? 'all ' + model.layers + ' layers'
  : exit === COPIED ? 'copied from earlier in the text'
  : model.exits[exit].layer === 0 ? 'before the ' + model.layers + ' layers'
  : 'after layer ' + model.exits[exit].layer + ' of ' + model.layers;
const swatchText = exit => isLast(exit) ? 'full' : exit === COPIED ? 'copied' : 'exit ' + (exit + 1);

// -- reading the stream ----------------------------------------------------------------------------------------------

function reset() {
  offset = compared = 0; consumed = ''; model = run = versus = verdict = null; match = []; dirty = true;
  closeCard();
  sides = {};
  for (const name of SIDES) {
    sides[name] = { nodes: [], records: [], pending: new Map(), drafted: new Set(), times: [], stats: null, tokens: 0, rejected: 0 };
  }
}

function update() {
  const value = props.value || '';
  if (value.startsWith('{"type":"error"')) {                    // a run that could not begin: keep the last one
    if (!model) return;
    return status(JSON.parse(value.slice(0, value.indexOf('\n'))).message, 'error');
  }
  if (value.startsWith('{"type":"replay"')) return replay(value);
  stopReplay();
  const id = (value.match(/"run":"(\w+)"/) || [])[1];
  if (ended.has(id)) return;
  if (!value.startsWith(consumed)) {
    if (run && !id) ended.add(run.run);
    reset();
  }
  const end = value.lastIndexOf('\n') + 1;
  const lines = value.slice(offset, end).split('\n').filter(Boolean);
  offset = end;
  consumed = value.slice(0, end);
  show(lines.map(line => JSON.parse(line)));
}

function show(records) {
  const pinned = parts ? SIDES.filter(name => atBottom(parts[name].text)) : [];
  records.forEach(read);
  if (!model) return;
  if (dirty) draw();
  for (const name of pinned) parts[name].text.scrollTop = parts[name].text.scrollHeight;
}

// -- a recorded run, at the pace at which it happened ----------------------------------------------------------------

function replay(value) {
  if (playing && playing.value === value) return;
  stopReplay();
  reset();
  const records = value.slice(value.indexOf('\n') + 1).split('\n').filter(Boolean).map(line => JSON.parse(line));
  let next = 0;
  const began = performance.now();
  const step = () => {
    const now = (performance.now() - began) / 1000, from = next;
    while (next < records.length && (reducedMotion || !(records[next].t > now))) next++;
    if (next > from) show(records.slice(from, next));
    if (next === records.length) {
      clearInterval(playing.timer);
      if (!verdict) status('This recorded run ends here.', 'done');
    }
  };
  playing = { value, timer: setInterval(step, 70) };
  step();
  if (parts) parts.recorded.hidden = false;
}

function stopReplay() {
  if (playing) { clearInterval(playing.timer); playing = null; reset(); }
}

const readers = {
  model(record) { model = record; build(); status(''); },
  run(record) { run = record; begin(); status('Reading the prompt…', 'busy'); },
  token: readToken,
  text(record) { sides[record.side].nodes[record.i].textContent += record.text; },
  stats(record) { sides[record.side].stats = record; dirty = true; },
  versus(record) { versus = record; match.push([record.n, record.rolling]); dirty = true; },
  end(record) { verdict = record; dirty = true; judge(record); status(playing ? 'Recorded run. Press Run for a live one.' : 'Done.', 'done'); },
  status(record) { status(record.message, 'busy'); },
  stopped() { ended.add(run.run); dirty = true; status('Stopped. The text so far is kept.', 'stopped'); },
  error(record) { dirty = true; status(record.message, 'error'); },
};

function read(record) {
  const reader = readers[record.type];
  if (reader) reader(record);                                   // newer versions may write unknown types: skip them
}

function readToken(record) {
  const side = sides[record.side];
  if (record.status === 'rejected') return reject(side, record);
  if (record.status === 'draft') return draft(side, record);
  let node = side.pending.get(record.i);
  side.pending.delete(record.i);
  if (!node) parts[record.side].text.append(node = make('span'));
  dress(node, record, '');
  if (side.drafted.has(record.i) && isLast(record.exit)) {
    node.classList.add('correction');
    parts.correction.hidden = false;
  }
  side.nodes[record.i] = node;
  side.records[record.i] = record;
  if (record.ms !== undefined) side.times.push(record.ms);
  if (side.tokens++ === 0 && !verdict) status('Writing…', 'busy');
}

function draft(side, record) {
  const node = make('span');
  dress(node, record, ' draft');
  side.pending.set(record.i, node);
  parts[record.side].text.append(node);
}

function reject(side, record) {
  const node = side.pending.get(record.i);
  side.pending.delete(record.i);
  if (!node) return;
  node.className = node.className.replace(' draft', ' rejected');
  node.dataset.note = 'rejected: the full model chose another token';
  if (!node.classList.contains('ec')) side.drafted.add(record.i);       // drafted by an exit, not copied
  side.rejected++;
  drawToggle(parts[record.side], side);
}

function dress(node, record, state) {
  const blank = record.text && !record.text.trim() && record.text.includes('\n');
  node.className = 't ' + colourClass(record.exit) + state
    + (record.special ? ' special' : '') + (record.part ? ' part' : '') + (blank ? ' newline' : '');
  node.dataset.id = record.id;
  node.textContent = record.text;
}

// There are two kinds of mismatch. `differs`: given the same text before it, the full model would choose another token.
// `apart`: the other panel has another token at this position, as nearly everywhere after the texts have diverged.
function judge(record) {
  const nodes = sides.cascade.nodes;
  for (const i of record.differs || []) if (nodes[i]) nodes[i].classList.add('differs');
  parts.differs.hidden = !(record.differs || []).length;
  put(parts.differsCount, String((record.differs || []).length));
}

function comparePositions() {
  const [ours, theirs] = SIDES.map(name => sides[name].nodes);
  const n = Math.min(ours.length, theirs.length);
  for (; compared < n; compared++) {
    const same = ours[compared].dataset.id === theirs[compared].dataset.id;
    for (const node of [ours[compared], theirs[compared]]) node.classList.toggle('apart', !same);
  }
  const first = (verdict || versus || {}).first_divergence;
  if (first === null || first === undefined || parts.split) return;
  parts.split = SIDES.map(name => sides[name].nodes[first]);
  for (const node of parts.split) if (node) node.classList.add('split');
  parts.apart.hidden = parts.jump.hidden = false;
}

function jump() {
  parts.split.forEach((node, k) => {
    const box = parts[SIDES[k]].text;
    if (node) box.scrollTop += node.getBoundingClientRect().top - box.getBoundingClientRect().top - 40;
  });
  const k = parts.split[0] ? 0 : 1;
  parts[SIDES[k]].text.focus();                                 // so that the arrow keys continue from here
  openCard(parts.split[k], SIDES[k], true);
}

// -- the page: built once per run, then only text and widths change --------------------------------------------------

function build() {
  model.colours.forEach((colour, s) => root.style.setProperty('--ce-' + colourClass(s), colour));
  parts = { share: [], keys: [], buttons: [], writers: [...model.colours.keys(), COPIED] };
  root.replaceChildren(legend(), verdictStrip(), make('div', 'ce-panels', null, panel('cascade'), panel('full')),
    marks(), charts(), layerMap(), files(), cardBox());
  root.classList.remove('ce-show-rejected');
  delete root.dataset.only;
  parts.recorded.hidden = !playing;
}

function legend() {
  const bar = make('div', 'ce-share');
  bar.setAttribute('aria-hidden', 'true');
  const keys = make('ul', 'ce-keys');
  parts.writers.forEach((s, i) => {
    const segment = make('div', 'ce-share-part ' + colourClass(s));
    const count = make('span', 'ce-count', '');
    const button = make('button', 'ce-key', null,
      make('span', 'ce-swatch t ' + colourClass(s), swatchText(s)),
      make('span', 'ce-place', exitPlace(s)), count);
    button.type = 'button';
    button.title = 'Highlight only these tokens (key ' + (i + 1) + ')';
    button.setAttribute('aria-keyshortcuts', String(i + 1));
    button.setAttribute('aria-pressed', 'false');
    button.addEventListener('click', () => only(colourClass(s)));
    const key = make('li', '', null, button);
    key.hidden = s === COPIED;               // until a token is copied
    bar.append(segment); keys.append(key);
    parts.share.push(segment); parts.keys.push(count); parts.buttons.push(button);
  });
  const head = make('div', 'ce-legend-head', null, make('span', 'ce-caption', 'Colour shows which exit wrote each token'),
    make('span', 'ce-place', 'token: a word or a part of one; exit: a trained network that can write tokens after some of the layers'), make('span', 'ce-model', model.model));
  parts.recorded = make('span', 'ce-flag ce-recorded', 'recorded run');
  head.append(parts.recorded);
  if (!model.trained) {
    const flag = make('span', 'ce-flag', 'untrained exits');
    flag.title = 'These exits were not trained for this model.'
      + ' They are rarely confident and often wrong. Exact mode stays exact.';
    head.append(flag);
  }
  return parts.legend = make('section', 'ce-legend', null, head, bar, keys);
}

function only(kind) {
  const on = root.dataset.only !== kind;
  if (on) root.dataset.only = kind; else delete root.dataset.only;
  parts.buttons.forEach((button, s) => button.setAttribute('aria-pressed', String(on && colourClass(parts.writers[s]) === kind)));
}

// Digit keys work only while the focus is inside the token view, so that digits typed into a prompt stay there.
root.addEventListener('keydown', event => {
  const s = event.key - 1;
  if (event.ctrlKey || event.altKey || event.metaKey || !parts || !(s in parts.buttons)
      || parts.buttons[s].parentNode.hidden) return;
  event.preventDefault();
  only(colourClass(parts.writers[s]));
});

function marks() {
  parts.differsCount = make('b', null, '0');
  parts.differs = make('li', null, null, make('span', 't ef differs', 'like this'), ' different choice: given the same text before it, the full model would choose another token (', parts.differsCount, ')');
  parts.apart = make('li', null, null, make('span', 't ef apart split', 'like this'),
    ' diverged: the bar marks the first difference; at a dotted token the other text has another token');
  parts.correction = make('li', null, null, make('span', 't ef correction', 'like this'), ' correction: an exit drafted another token, and the full model wrote this one instead');
  parts.differs.hidden = parts.apart.hidden = parts.correction.hidden = true;
  return make('ul', 'ce-marks', null, parts.correction, parts.differs, parts.apart);
}

function verdictStrip() {
  parts.status = make('p', 'ce-status');
  parts.status.setAttribute('role', 'status');
  parts.badge = make('p', 'ce-badge');
  parts.jump = make('button', 'ce-toggle', 'Show');
  parts.jump.type = 'button';
  parts.jump.setAttribute('aria-label', 'Show the first difference');
  parts.jump.addEventListener('click', jump);
  parts.badge.hidden = parts.jump.hidden = true;
  const tiles = make('dl', 'ce-tiles', null, tile('speed', 'Speed', 'times the full model’s speed'),
    tile('agreement', 'Agreement', 'tokens that the full model would choose too'), tile('same', 'Match', 'same token at the same position'),
    tile('cost', 'Weights read', 'weights read per token, as a share of what the full model reads'));
  parts.sameNote.after(' ', parts.jump);
  return make('section', 'ce-verdict', null, tiles, parts.badge, parts.status);
}

function tile(name, label, note) {
  const value = make('dd', 'ce-value', '–'), words = make('span', null, note), small = make('dd', 'ce-note', null, words);
  parts[name] = value; parts[name + 'Note'] = words;
  return make('div', 'ce-tile', null, make('dt', null, label), value, small);
}

function panel(name) {
  const title = make('h3', null, name === 'full' ? 'Full model' : 'With early exits');
  const sub = make('p', 'ce-sub', name === 'full' ? 'every token uses all ' + model.layers + ' layers' : FAST_WORDS);
  const text = make('div', 'ce-text');
  text.tabIndex = 0; text.dir = 'auto';
  text.setAttribute('role', 'region');
  text.setAttribute('aria-label', name === 'full' ? 'Text of the full model' : 'Text with early exits');
  text.dataset.side = name;
  listen(text, name);
  text.dataset.hint = name === 'full' ? 'The same model without exits answers here, for comparison.'
    : 'Press Run. Each token appears in the colour of the exit that wrote it.';
  const [speed, first, median, slow, perPass, accepted, total] = [1, 2, 3, 4, 5, 6, 7].map(() => make('b', null, '–'));
  const facts = make('p', 'ce-facts', null, make('span', null, null, speed, ' tokens/s'), make('span', null, null, 'first token ', first),
    make('span', null, null, 'per token: median ', median, ', 90% within ', slow),
    make('span', null, null, perPass, ' tokens per pass of the full model, ', accepted, ' of the drafts accepted'),
    make('span', null, null, total));
  accepted.parentNode.hidden = true;
  const toggle = make('button', 'ce-toggle');
  toggle.type = 'button'; toggle.hidden = true;
  toggle.setAttribute('aria-pressed', 'false');
  toggle.addEventListener('click', () => {
    const on = root.classList.toggle('ce-show-rejected');
    toggle.setAttribute('aria-pressed', String(on));
    drawToggle(parts[name], sides[name]);
  });
  parts[name] = { title, sub, text, speed, first, median, slow, perPass, accepted, total, toggle };
  return make('section', 'ce-panel', null, make('header', null, null, title, sub, facts, toggle), text);
}

function charts() {
  parts.matchChart = chart('Match with the full model’s text', 'last 32 tokens', ['cascade']);
  parts.timeChart = chart('Time per token', 'solid: with exits, dotted: full model', ['full', 'cascade']);
  parts.charts = make('section', 'ce-charts', null, parts.matchChart.box, parts.timeChart.box);
  parts.charts.hidden = true;
  return parts.charts;
}

function chart(title, note, lines) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 300 80');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  const paths = {};
  for (const name of lines) {
    paths[name] = document.createElementNS(SVG, 'polyline');
    paths[name].setAttribute('class', 'ce-line-' + name);
    svg.append(paths[name]);
  }
  const now = make('span', 'ce-now'), top = make('span', 'ce-top');
  const head = make('figcaption', null, null, make('span', null, title), make('small', null, note), now);
  return { box: make('figure', 'ce-chart', null, head, make('div', 'ce-plot', null, svg, top)), paths, now, top };
}

function begin() {
  const verified = run.mode === 'verified';
  put(parts.cascade.title, verified ? run.tolerance ? 'With drafts, verified with tolerance' : 'With drafts, verified' : 'With early exits');
  put(parts.cascade.sub, verified ? run.tolerance ? 'the full model also accepts drafts that it finds nearly as likely as its own choice'
    : 'tokens are drafted ahead; the full model verifies every draft' : FAST_WORDS);
  parts.charts.hidden = false;
  if (!playing && innerWidth < 768) parts.legend.scrollIntoView({ behavior: reducedMotion ? 'auto' : 'smooth' });
}

function status(text, kind = '') {
  put(parts.status, text);
  parts.status.className = 'ce-status ' + kind;
}

const atBottom = box => box.scrollHeight - box.scrollTop - box.clientHeight < 24;

// -- numbers and charts: at most once per frame, and only when new ones came -----------------------------------------

function draw() {
  dirty = false;
  for (const name of SIDES) drawSide(parts[name], sides[name]);
  drawShare(sides.cascade.stats);
  drawTiles();
  parts.files.hidden = !sides.cascade.nodes.length;
  if (!run) return;
  comparePositions();
  drawMatch();
  drawTimes();
  if (verdict && !playing) parts.map.hidden = false;
}

function drawSide(part, side) {
  drawToggle(part, side);
  const stats = side.stats;
  if (!stats) return;
  put(part.speed, number(stats.tokens_per_second));
  put(part.first, milliseconds(stats.first_token_seconds));
  put(part.median, milliseconds(stats.token_seconds_p50));
  put(part.slow, milliseconds(stats.token_seconds_p90));
  part.accepted.parentNode.hidden = stats.acceptance === null || stats.acceptance === undefined;
  put(part.accepted, percent(stats.acceptance));
  put(part.perPass, stats.tokens_per_verification ? stats.tokens_per_verification.toFixed(1) : '–');
  put(part.total, stats.tokens + ' tokens in ' + number(stats.seconds, 2) + ' s' + (stats.done ? ' ✓' : ''));
}

function drawToggle(part, side) {
  part.toggle.hidden = side.rejected === 0;
  const verb = root.classList.contains('ce-show-rejected') ? 'Hide ' : 'Show ';
  put(part.toggle, verb + side.rejected + ' rejected draft' + (side.rejected === 1 ? '' : 's'));
}

function drawShare(stats) {
  parts.writers.forEach((s, i) => {
    const share = !stats ? 0 : s !== COPIED ? stats.routing_share[s] : stats.copied_share || 0;
    parts.share[i].style.flexGrow = share;
    put(parts.keys[i], stats ? Math.round(share * stats.tokens) + ' · ' + percent(share) : '');
    if (s === COPIED) parts.buttons[i].parentNode.hidden = share < 1e-9;
  });
}

function drawTiles() {
  const stats = sides.cascade.stats;
  put(parts.speed, versus && versus.speedup !== null ? versus.speedup.toFixed(2) + '×' : '–');
  put(parts.cost, stats ? percent(stats.cost) : '–');
  put(parts.same, versus ? percent(verdict ? verdict.positional : versus.positional) : '–');
  const result = verdict || versus;
  put(parts.sameNote, !result ? 'same token at the same position' : result.first_divergence === null ? 'no difference ' + (verdict ? 'at all' : 'so far')
    : 'first difference at token ' + (result.first_divergence + 1));
  put(parts.agreement, verdict ? percent(verdict.agreement, verdict.agreement > 0.99 && verdict.agreement < 1 ? 1 : 0) : '–');
  drawBadge();
}

function drawBadge() {
  const known = verdict && verdict.identical !== null;
  parts.badge.hidden = !known;
  if (!known) return;
  parts.badge.classList.toggle('bad', !verdict.identical);
  put(parts.badge, verdict.identical ? '✓ Identical to the full model, all ' + sides.full.tokens + ' tokens compared'
    : '✗ Differs from the full model, first at token ' + (verdict.first_divergence + 1));
}

function drawMatch() {
  const last = match.length ? match[match.length - 1] : null;
  put(parts.matchChart.now, last ? percent(last[1]) + ' now' : '');
  line(parts.matchChart.paths.cascade, match, last ? last[0] : 1, 1);
}

function drawTimes() {
  const stats = SIDES.map(name => sides[name].stats).filter(Boolean);
  const top = 1.15 * Math.max(1e-3, ...stats.map(s => 1000 * (s.token_seconds_p99 || 0)));
  const longest = Math.max(1, ...SIDES.map(name => sides[name].times.length));
  for (const name of SIDES) line(parts.timeChart.paths[name], peaks(sides[name].times), longest, top);
  put(parts.timeChart.top, Math.round(top) + ' ms');
}

function peaks(values) {
  const step = Math.ceil(values.length / MAX_POINTS) || 1, points = [];
  for (let i = 0; i < values.length; i += step) points.push([i + 1, Math.max(...values.slice(i, i + step))]);
  return points;
}

function line(path, points, width, height) {
  path.setAttribute('points', points.map(([x, y]) =>
    (300 * x / width).toFixed(1) + ',' + (78 - 74 * Math.min(1, y / height)).toFixed(1)).join(' '));
}

// -- the token card: on hover, tap, or arrow keys --------------------------------------------------------------------

function listen(text, name) {
  text.addEventListener('pointerover', event => {
    if (event.pointerType !== 'touch' && event.target.matches('.t') && !(card && card.pinned)) openCard(event.target, name, false);
  });
  text.addEventListener('pointerleave', () => { if (card && !card.pinned) closeCard(); });
  text.addEventListener('click', event => { if (event.target.matches('.t')) openCard(event.target, name, true); else closeCard(); });
  text.addEventListener('scroll', () => { if (card && !card.pinned) closeCard(); });
  text.addEventListener('blur', closeCard);
  text.addEventListener('keydown', event => {
    const nodes = sides[name].nodes, now = card ? nodes.indexOf(card.node) : -1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (event.key === 'Escape') return closeCard();
    if (to === undefined || !nodes.length) return;
    event.preventDefault();
    const node = nodes[Math.max(0, Math.min(nodes.length - 1, to))];
    node.scrollIntoView({ block: 'nearest' });
    openCard(node, name, true);
  });
}

function cardBox() {
  parts.card = make('div', 'ce-card');
  parts.card.id = 'ce-token-card';
  parts.card.setAttribute('role', 'status');
  parts.card.hidden = true;
  return parts.card;
}

function openCard(node, name, pinned) {
  if (card && card.node === node && card.pinned === pinned) return;
  closeCard();
  card = { node, name, pinned };
  node.classList.add('chosen');
  fillCard();
  parts.card.hidden = false;
  placeCard();
}

function placeCard() {                        // above the token where there is room; called again when the card grows
  if (innerWidth < 768) {                     // the card is at the bottom of the screen and must not cover its token
    const hidden = card.node.getBoundingClientRect().bottom + 12 - parts.card.getBoundingClientRect().top;
    if (hidden > 0) scrollBy(0, hidden);
    return;
  }
  const node = card.node, box = root.getBoundingClientRect(), at = node.getClientRects()[0] || box, own = parts.card.getBoundingClientRect();
  const left = Math.max(0, Math.min(at.left - box.left, box.width - own.width));
  const above = at.top - own.height - 8 > 0 || at.bottom + own.height + 8 > innerHeight && at.top > innerHeight / 2;
  parts.card.style.left = left + 'px';
  parts.card.style.top = (above ? at.top - box.top - own.height - 6 : at.bottom - box.top + 6) + 'px';
}

function closeCard() {
  if (!card) return;
  card.node.classList.remove('chosen');
  card = null;
  if (parts) parts.card.hidden = true;
}

function fillCard() {
  const { node, name } = card, i = sides[name].nodes.indexOf(node), record = sides[name].records[i];
  const facts = make('dl', 'ce-card-facts');
  const fact = (label, value) => facts.append(make('dt', null, label), make('dd', null, value));
  const text = node.textContent, bytes = bytesOf(record, text);
  parts.card.replaceChildren(make('p', 'ce-card-text', visible(text) || (record && record.part ? 'part of a character' : 'empty')), facts);
  fact('token', node.dataset.id + (bytes.length ? ' · bytes ' + bytes.slice(0, 12).join(' ') + (bytes.length > 12 ? ' …' : '') : ''));
  if (node.dataset.note) fact('draft', node.dataset.note);
  if (!record) return;
  fact('written by', exitName(record.exit) + ', ' + exitPlace(record.exit));
  if (node.classList.contains('correction')) fact('verified', 'correction: an exit drafted another token');
  if (record.status === 'accepted') fact('verified', 'draft, accepted by the full model');
  if (record.ms !== undefined) fact('time', number(record.ms) + ' ms after the token before');
  if (record.read !== undefined) fact('weights read', percent(record.read) + ' of what the full model reads for a token');
  if (node.classList.contains('differs')) fact('mismatch', 'the full model would choose another token here');
  else if (node.classList.contains('apart')) fact('mismatch', 'the other text has another token at this position');
  if (name === 'cascade' && run) parts.card.append(readings(record, i));
}

function bytesOf(record, text) {              // a part of a character brings its bytes: it has no text of its own
  if (record && record.bytes) return record.bytes.match(/../g);
  return [...new TextEncoder().encode(text)].map(b => b.toString(16).padStart(2, '0'));
}

function readings(record, i) {
  const table = make('table', 'ce-readings'), body = make('tbody');
  table.append(make('caption', null, 'Confidence of each exit (its chance of being right), and its most likely tokens'), body);
  for (let s = 0; s <= model.exits.length; s++) {
    const confidence = record.conf[s], needed = run.thresholds[s];
    const words = confidence === null || confidence === undefined ? (s < record.exit ? 'not computed' : '')
      : percent(confidence) + (needed === null || needed === undefined ? '' : ' (needs ' + percent(needed) + ')');
    body.append(make('tr', null, null, make('th', null, null, make('span', 'ce-swatch t ' + colourClass(s), swatchText(s))),
      make('td', null, words), make('td', 'ce-top5', '')));
  }
  if (verdict && !playing) ask(i, body);
  else table.caption.textContent = 'Confidence of each exit. After a live run: also its most likely tokens.';
  return table;
}

async function ask(i, body) {
  const opened = card;
  const answer = await server.token_card([run.run, i]);
  if (card !== opened || !answer) return;
  answer.readings.forEach((reading, s) => {
    const [, confidence, top] = body.rows[s].cells;
    if (!confidence.textContent && !isLast(s)) confidence.textContent = percent(reading.confidence) + ', not used';
    top.replaceChildren(...reading.top.map(c => make('span', 'ce-choice', null,
      make('span', 'ce-candidate' + (c.id === +opened.node.dataset.id ? ' same' : ''), visible(c.text)), ' ' + percent(c.p))));
  });
  placeCard();
}

const visible = text => text.replace(/ /g, '␣').replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/\r/g, '␍');

// -- the layer map: what every exit would have written ---------------------------------------------------------------

function layerMap() {
  const table = make('table', 'ce-map-table'), scroll = make('div', 'ce-map-scroll', null, table);
  scroll.tabIndex = 0;
  scroll.setAttribute('role', 'region');
  scroll.setAttribute('aria-label', 'What every exit would have written');
  const back = make('button', 'ce-small', '‹ earlier'), forth = make('button', 'ce-small', 'later ›'), place = make('span', 'ce-place');
  back.type = forth.type = 'button';
  let start = 0, total = 0;
  const load = async to => {
    const map = await server.layer_map([run.run, to, WINDOW]);
    if (!map) return put(place, 'The server no longer keeps this run. Run it again.');
    ({ start, total } = map);
    drawMap(table, map);
    put(place, 'tokens ' + (start + 1) + ' to ' + (start + map.columns.length) + ' of ' + total);
    back.disabled = start === 0;
    forth.disabled = start + map.columns.length >= total;
  };
  back.addEventListener('click', () => load(Math.max(0, start - WINDOW)));
  forth.addEventListener('click', () => load(start + WINDOW));
  const details = make('details', 'ce-map', null, make('summary', null, 'Look inside: what every exit would have written at each position'),
    make('p', 'ce-sub', 'Each column is a token of the left text, each row an exit. Stronger colour: higher confidence. Bold: the same token as the full model’s. Underlined: this exit wrote the token.'),
    make('p', 'ce-map-bar', null, back, forth, place), scroll);
  details.addEventListener('toggle', () => { if (details.open && !table.rows.length) load(0); });
  details.hidden = true;
  parts.map = details;
  return details;
}

function drawMap(table, map) {
  const rows = [];
  for (let s = model.exits.length; s >= 0; s--) {
    const row = make('tr', null, null, make('th', null, null, make('span', 'ce-swatch t ' + colourClass(s), swatchText(s))));
    map.columns.forEach((column, c) => {
      const choice = column[s], record = sides.cascade.records[map.start + c];
      const cell = make('td', colourClass(s) + (choice.id === column[column.length - 1].id ? ' same' : '') + (record && record.exit === s ? ' left' : ''), visible(choice.text));
      cell.style.setProperty('--p', Math.round(100 * choice.p) + '%');
      cell.title = visible(choice.text) + ' · ' + percent(choice.p) + (isLast(s) ? ' probability' : ' confidence') + (record && record.exit === s ? ' · wrote the token' : '');
      row.append(cell);
    });
    rows.push(row);
  }
  table.replaceChildren(...rows);
}

// -- the run as a file -----------------------------------------------------------------------------------------------

function files() {
  const json = make('button', 'ce-small', 'Save run (JSON)'), csv = make('button', 'ce-small', 'Save tokens (CSV)');
  json.type = csv.type = 'button';
  json.addEventListener('click', () => save('cascadeexit-run.json', 'application/json',
    JSON.stringify({ format: model.format, records: recorded() })));
  csv.addEventListener('click', () => save('cascadeexit-tokens.csv', 'text/csv', table()));
  parts.files = make('p', 'ce-files', null, json, csv);
  parts.files.hidden = true;
  return parts.files;
}

const recorded = () => (playing ? playing.value.slice(playing.value.indexOf('\n') + 1) : consumed)
  .split('\n').filter(Boolean).map(line => JSON.parse(line)).filter(record => record.type !== 'status');

function table() {
  const rows = [['side', 'position', 'token', 'text', 'exit', 'layer', 'status', 'confidence', 'milliseconds', 'weights_read', 'other_choice', 'other_place']];
  for (const name of SIDES) sides[name].records.forEach((r, i) => {
    const node = sides[name].nodes[i];
    rows.push([name, i, r.id, node.textContent, isLast(r.exit) ? 'full' : r.exit === COPIED ? 'copied' : r.exit + 1, isLast(r.exit) ? model.layers : r.exit === COPIED ? 0 : model.exits[r.exit].layer,
      r.status, r.conf[r.exit] ?? '', r.ms ?? '', r.read ?? '', +node.classList.contains('differs'), +node.classList.contains('apart')]);
  });
  return rows.map(row => row.map(cell).join(',')).join('\r\n') + '\r\n';
}

// Quoted where needed; text that a spreadsheet would run as a formula gets an apostrophe.
function cell(value) {
  let text = String(value);
  if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
}

function save(name, type, content) {
  const link = make('a');
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

reset();
update();
watch('value', update);
