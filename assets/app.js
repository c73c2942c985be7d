// TokenView: draws a growing string of JSON lines, one record a line (cascadeexit/views.py writes them).
//
// Gradio runs this once per mount, with `element`, `props` and `watch` in scope. The value is cumulative: a frame may
// be skipped, repeated or replaced, so we read on from `offset`, or start again when the text is another one. All text
// goes to the page through textContent. Numbers arrive computed; here they are only shown.

const root = element.querySelector('.ce');
const SVG = 'http://www.w3.org/2000/svg';
const SIDES = ['cascade', 'full'];
const MAX_POINTS = 240;                      // of a live chart; longer lines keep the peak of each step

const over = new Set();                      // runs that were stopped or cleared: frames still under way are too late

let offset, consumed, model, run, sides, versus, verdict, match, parts, dirty;

// -- small helpers ---------------------------------------------------------------------------------------------------

function make(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

function put(node, text) {                   // touch the page only where something changed
  if (node.textContent !== text) node.textContent = text;
}

const percent = (x, digits = 0) => x === null || x === undefined ? '–' : (100 * x).toFixed(digits) + '%';
const number = (x, digits = 1) => x === null || x === undefined ? '–' : x.toFixed(digits);
const milliseconds = x => x === null || x === undefined ? '–' : x >= 10 ? x.toFixed(2) + ' s' : Math.round(1000 * x) + ' ms';
const isLast = exit => exit >= model.exits.length;
const colourClass = exit => isLast(exit) ? 'ef' : 'e' + Math.min(exit, 5);
const exitName = exit => isLast(exit) ? 'Full model' : 'Exit ' + (exit + 1);
const exitPlace = exit => isLast(exit) ? 'all ' + model.layers + ' layers'
  : 'after layer ' + model.exits[exit].layer + ' of ' + model.layers;

// -- reading the stream ----------------------------------------------------------------------------------------------

function reset() {
  offset = 0; consumed = ''; model = run = versus = verdict = null; match = []; dirty = true;
  sides = {};
  for (const name of SIDES) {
    sides[name] = { nodes: [], pending: new Map(), waits: [], stats: null, tokens: 0, rejected: 0 };
  }
}

function update() {
  const value = props.value || '';
  if (value.startsWith('{"type":"error"')) {                    // a run that could not begin: keep what is shown
    if (!model) return;
    return status(JSON.parse(value.slice(0, value.indexOf('\n'))).message, 'error');
  }
  const id = (value.match(/"run":"(\w+)"/) || [])[1];
  if (over.has(id)) return;
  if (!value.startsWith(consumed)) {
    if (run && !id) over.add(run.run);
    reset();
  }
  const end = value.lastIndexOf('\n') + 1;
  const pinned = parts ? SIDES.filter(name => atBottom(parts[name].text)) : [];
  for (const line of value.slice(offset, end).split('\n')) if (line) read(JSON.parse(line));
  offset = end;
  consumed = value.slice(0, end);
  if (!model) return;
  if (dirty) draw();
  for (const name of pinned) parts[name].text.scrollTop = parts[name].text.scrollHeight;
}

const readers = {
  model(record) { model = record; build(); status(''); },
  run(record) { run = record; begin(); status('Reading the prompt…', 'busy'); },
  token: readToken,
  text(record) { sides[record.side].nodes[record.i].textContent += record.text; },
  stats(record) { sides[record.side].stats = record; dirty = true; },
  versus(record) { versus = record; match.push([record.n, record.rolling]); dirty = true; },
  end(record) { verdict = record; dirty = true; status('Done.', 'done'); },
  stopped() { over.add(run.run); dirty = true; status('Stopped. The text so far is kept.', 'stopped'); },
  error(record) { dirty = true; status(record.message, 'error'); },
};

function read(record) {
  const reader = readers[record.type];
  if (reader) reader(record);                                   // unknown kinds come from newer versions: skip
}

function readToken(record) {
  const side = sides[record.side];
  if (record.status === 'rejected') return reject(side, record);
  if (record.status === 'draft') return draft(side, record);
  let node = side.pending.get(record.i);
  side.pending.delete(record.i);
  if (!node) parts[record.side].text.append(node = make('span'));
  dress(node, record, '');
  side.nodes[record.i] = node;
  if (record.ms !== undefined) side.waits.push(record.ms);
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
  node.title += ' · the full model said something else';
  side.rejected++;
  dirty = true;
}

function dress(node, record, state) {
  const blank = record.text && !record.text.trim() && record.text.includes('\n');
  node.className = 't ' + colourClass(record.exit) + state
    + (record.special ? ' special' : '') + (record.part ? ' part' : '') + (blank ? ' newline' : '');
  node.dataset.id = record.id;
  node.textContent = record.text;
  node.title = tooltip(record);
}

function tooltip(record) {
  const sure = record.conf[record.exit];
  const words = [exitName(record.exit) + ', ' + exitPlace(record.exit)];
  if (sure !== null && sure !== undefined) words.push(percent(sure) + ' sure');
  if (record.ms !== undefined) words.push(number(record.ms) + ' ms');
  if (record.part) words.push('part of a character');
  words.push('token ' + record.id);
  return words.join(' · ');
}

// -- the page: built once per run, then only text and widths change --------------------------------------------------

function build() {
  model.colours.forEach((colour, s) => root.style.setProperty('--ce-' + colourClass(s), colour));
  parts = { share: [], keys: [] };
  root.replaceChildren(legend(), verdictStrip(), make('div', 'ce-panels', null, panel('cascade'), panel('full')), charts());
  root.classList.remove('ce-show-rejected');
}

function legend() {
  const bar = make('div', 'ce-share');
  bar.setAttribute('aria-hidden', 'true');
  const keys = make('ul', 'ce-keys');
  for (let s = 0; s <= model.exits.length; s++) {
    const segment = make('div', 'ce-share-part ' + colourClass(s));
    const count = make('span', 'ce-count', '');
    const key = make('li', 'ce-key', null,
      make('span', 'ce-swatch t ' + colourClass(s), isLast(s) ? 'full' : 'exit ' + (s + 1)),
      make('span', 'ce-place', exitPlace(s)), count);
    bar.append(segment); keys.append(key);
    parts.share.push(segment); parts.keys.push(count);
  }
  const head = make('div', 'ce-legend-head', null, make('span', 'ce-caption', 'Colour shows how deep each token had to go'),
    make('span', 'ce-model', model.model));
  if (!model.trained) {
    const flag = make('span', 'ce-flag', 'untrained exits');
    flag.title = 'These exits were not trained for this model: they stop rarely or guess badly. Verified mode stays exact.';
    head.append(flag);
  }
  return make('section', 'ce-legend', null, head, bar, keys);
}

function verdictStrip() {
  parts.status = make('p', 'ce-status');
  parts.status.setAttribute('role', 'status');
  parts.badge = make('p', 'ce-badge');
  parts.badge.hidden = true;
  const tiles = make('dl', 'ce-tiles', null, tile('speed', 'Speed', 'the full model’s speed'),
    tile('agreement', 'Agreement', 'known at the end'), tile('same', 'Same text', 'so far'),
    tile('cost', 'Weights read', 'of what the full model reads'));
  return make('section', 'ce-verdict', null, tiles, parts.badge, parts.status);
}

function tile(name, label, note) {
  const value = make('dd', 'ce-value', '–'), small = make('dd', 'ce-note', note);
  parts[name] = value; parts[name + 'Note'] = small;
  return make('div', 'ce-tile', null, make('dt', null, label), value, small);
}

function panel(name) {
  const title = make('h3', null, name === 'full' ? 'Full model' : 'With early exits');
  const sub = make('p', 'ce-sub', name === 'full' ? 'every token goes through all ' + model.layers + ' layers'
    : 'each token leaves as soon as an exit is sure');
  const text = make('div', 'ce-text');
  text.tabIndex = 0; text.dir = 'auto';
  text.setAttribute('role', 'region');
  text.setAttribute('aria-label', name === 'full' ? 'Text of the full model' : 'Text with early exits');
  text.dataset.side = name;
  text.dataset.hint = name === 'full' ? 'The same model without exits answers here, for comparison.'
    : 'Press Run. Each token appears in the colour of the exit that wrote it.';
  const speed = make('b', null, '–'), first = make('b', null, '–'), total = make('b', null, '–');
  const facts = make('p', 'ce-facts', null, speed, ' tokens/s', make('i'), 'first token ', first, make('i'), total);
  const toggle = make('button', 'ce-toggle');
  toggle.type = 'button'; toggle.hidden = true;
  toggle.setAttribute('aria-pressed', 'false');
  toggle.addEventListener('click', () => {
    const on = root.classList.toggle('ce-show-rejected');
    toggle.setAttribute('aria-pressed', String(on));
    drawToggle(parts[name], sides[name]);
  });
  parts[name] = { title, sub, text, speed, first, total, toggle };
  return make('section', 'ce-panel', null, make('header', null, null, title, sub, facts, toggle), text);
}

function charts() {
  parts.matchChart = chart('Same tokens as the full model', 'the last 32 places', ['cascade']);
  parts.waitChart = chart('Time for each token', 'milliseconds', ['full', 'cascade']);
  parts.charts = make('section', 'ce-charts', null, parts.matchChart.box, parts.waitChart.box);
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
  put(parts.cascade.title, verified ? 'Early exits, verified' : 'With early exits');
  put(parts.cascade.sub, verified ? 'exits guess ahead, the full model checks every guess'
    : 'each token leaves as soon as an exit is sure');
  parts.charts.hidden = false;
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
  if (!run) return;
  drawMatch();
  drawWaits();
}

function drawSide(part, side) {
  drawToggle(part, side);
  const stats = side.stats;
  if (!stats) return;
  put(part.speed, number(stats.tokens_per_second));
  put(part.first, milliseconds(stats.first_token_seconds));
  put(part.total, stats.tokens + ' tokens in ' + number(stats.seconds, 2) + ' s' + (stats.done ? ' ✓' : ''));
}

function drawToggle(part, side) {
  part.toggle.hidden = side.rejected === 0;
  const verb = root.classList.contains('ce-show-rejected') ? 'Hide ' : 'Show ';
  put(part.toggle, verb + side.rejected + ' rejected guess' + (side.rejected === 1 ? '' : 'es'));
}

function drawShare(stats) {
  parts.share.forEach((segment, s) => {
    const share = stats ? stats.routing_share[s] : 0;
    segment.style.flexGrow = share;
    put(parts.keys[s], stats ? Math.round(share * stats.tokens) + ' · ' + percent(share) : '');
  });
}

function drawTiles() {
  const stats = sides.cascade.stats;
  put(parts.speed, versus && versus.speedup !== null ? versus.speedup.toFixed(2) + '×' : '–');
  put(parts.cost, stats ? percent(stats.cost) : '–');
  put(parts.same, versus ? percent(verdict ? verdict.positional : versus.positional) : '–');
  const result = verdict || versus;
  put(parts.sameNote, !result ? 'so far' : result.first_divergence === null ? 'no difference ' + (verdict ? 'at all' : 'so far')
    : 'first difference at token ' + (result.first_divergence + 1));
  put(parts.agreement, verdict ? percent(verdict.agreement, verdict.agreement > 0.99 && verdict.agreement < 1 ? 1 : 0) : '–');
  put(parts.agreementNote, verdict ? 'of its tokens the full model would pick too' : 'known at the end');
  drawBadge();
}

function drawBadge() {
  const known = verdict && verdict.identical !== null;
  parts.badge.hidden = !known;
  if (!known) return;
  parts.badge.classList.toggle('bad', !verdict.identical);
  put(parts.badge, verdict.identical ? '✓ Identical to the full model, all ' + sides.full.tokens + ' tokens compared'
    : '✗ Differs from the full model at token ' + (verdict.first_divergence + 1));
}

function drawMatch() {
  const last = match.length ? match[match.length - 1] : null;
  put(parts.matchChart.now, last ? percent(last[1]) : '');
  line(parts.matchChart.paths.cascade, match, last ? last[0] : 1, 1);
}

function drawWaits() {
  const stats = SIDES.map(name => sides[name].stats).filter(Boolean);
  const top = 1.15 * Math.max(1e-3, ...stats.map(s => 1000 * (s.token_seconds_p99 || 0)));
  const longest = Math.max(1, ...SIDES.map(name => sides[name].waits.length));
  for (const name of SIDES) line(parts.waitChart.paths[name], peaks(sides[name].waits), longest, top);
  put(parts.waitChart.top, Math.round(top) + ' ms');
  const middle = sides.cascade.stats;
  put(parts.waitChart.now, middle && middle.token_seconds_p50 !== null
    ? 'with exits: half under ' + Math.round(1000 * middle.token_seconds_p50) + ' ms, 90% under ' + Math.round(1000 * middle.token_seconds_p90) + ' ms'
    : '');
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

reset();
update();
watch('value', update);
