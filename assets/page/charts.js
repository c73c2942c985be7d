// Live plots: who wrote the tokens, agreement and time for each token, as the text grows. All three share one x axis, the
// position of a token, and one cursor: pointing at a plot lights the token in the texts, pointing at a token moves the cursor.

const RECENT = 32;                           // tokens in a moving share
const REDRAW = 50;                           // milliseconds between two drawings, at least
const SMOOTH = 8;                            // tokens in the moving mean of the time
const EDGE = { left: 40, right: 10, top: 7, bottom: 30 };      // pixels around the area of a plot

let plots = [], chartCursor = null, litNodes = [], chartFrame = 0, chartsDrawn = 0, chartSizes, routed, judging;

// -- one plot: axes, marks, cursor -------------------------------------------------------------------------------------

// name     class and key; label: of the y axis; right: room at the right edge, for labels
// top()    -> [least, largest] value of the y axis;  form(value) -> its text
// paint(p) draws with p.x(i), p.y(value), p.samples and p.path(key, class, d)
// tell(i)  -> what is known about token i: a list of [class of a swatch or '', text]
// lights() -> names of the sides whose tokens are lit
function makePlot({ name, title, hint, label, right = EDGE.right, top, form, paint, tell, lights }) {
  const heading = make('span', 'ce-plot-title', title), now = make('span', 'ce-now');
  const caption = make('figcaption', null, null, heading, now);
  const axes = drawn('g', { class: 'ce-axes' }), marks = drawn('g'), line = drawn('line', { class: 'ce-cursor' });
  const svg = drawn('svg', { 'aria-hidden': 'true' }, axes, marks, line);
  const tip = make('div', 'ce-plot-tip'), area = make('div', 'ce-plot-area', null, svg, tip);
  tip.hidden = true;
  heading.title = hint;
  area.tabIndex = 0;
  area.setAttribute('role', 'slider');
  area.setAttribute('aria-valuenow', 1);
  area.setAttribute('aria-label', title + ': token');
  const paths = {}, p = { name, title, heading, now, caption, area, tip, tell, lights, length: 1,
    node: make('figure', 'ce-plot ce-plot-' + name, null, caption, area) };

  p.path = (key, className, d) => {
    const path = paths[key] || marks.appendChild(paths[key] = drawn('path'));
    if (path.getAttribute('class') !== className) path.setAttribute('class', className);
    if (path.getAttribute('d') !== d) path.setAttribute('d', d);
    p.used.add(key);
  };
  p.text = (key, className, x, y, text) => {
    const node = paths[key] || marks.appendChild(paths[key] = drawn('text'));
    node.setAttribute('class', className); node.setAttribute('x', x); node.setAttribute('y', y);
    put(node, text);
    p.used.add(key);
  };

  p.draw = (length, width, height) => {
    if (width < 80 || height < 60) return;
    const inner = { width: width - EDGE.left - right, height: height - EDGE.top - EDGE.bottom }, [least, most] = top();
    p.length = Math.max(2, length);
    p.x = i => EDGE.left + i / (p.length - 1) * inner.width;
    p.y = value => EDGE.top + inner.height * (1 - Math.max(0, Math.min(1, (value - least) / (most - least))));
    p.index = x => Math.max(0, Math.min(p.length - 1, Math.round((x - EDGE.left) / inner.width * (p.length - 1))));
    p.right = EDGE.left + inner.width;
    p.bottom = EDGE.top + inner.height;
    p.step = Math.max(1, Math.ceil(p.length / inner.width));         // positions for each pixel
    const frame = [p.length, width, height, least, most].join();
    if (frame !== p.frame) {
      p.frame = frame;
      svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
      axes.replaceChildren(...ticksOf(p, least, most, form, label, inner));
    }
    p.used = new Set();
    paint(p);
    for (const key of Object.keys(paths)) if (!p.used.has(key)) { paths[key].remove(); delete paths[key]; }
    area.setAttribute('aria-valuemin', 1);
    area.setAttribute('aria-valuemax', p.length);
    p.point();
  };

  p.point = () => {                          // the cursor, where it is now
    line.style.display = chartCursor && p.x && chartCursor.i < p.length ? '' : 'none';
    area.setAttribute('aria-valuenow', chartCursor ? chartCursor.i + 1 : 1);
    const own = chartCursor && chartCursor.plot === p && p.x, facts = own ? [['', 'Token ' + (chartCursor.i + 1)], ...tell(chartCursor.i)] : [];
    tip.hidden = !own;
    area.setAttribute('aria-valuetext', own ? facts.map(fact => fact[1]).join(', ') : 'Use the arrow keys to read values');
    if (!chartCursor || !p.x) return;
    const x = p.x(chartCursor.i);
    for (const [attribute, value] of Object.entries({ x1: x, x2: x, y1: EDGE.top, y2: p.bottom })) line.setAttribute(attribute, value);
    if (!own) return;
    tip.replaceChildren(...facts.map(([kind, text], n) => make('div', n ? null : 'ce-tip-head', null,
      ...(kind ? [make('i', 'ce-dot ' + kind)] : []), text)));
    const beyond = x > (EDGE.left + p.right) / 2;
    tip.style.left = beyond ? '' : x + 10 + 'px';
    tip.style.right = beyond ? area.clientWidth - x + 10 + 'px' : '';
  };

  area.addEventListener('pointermove', event => p.x && pointAt(p.index(event.clientX - area.getBoundingClientRect().left), p));
  area.addEventListener('pointerleave', () => pointAt(null));
  area.addEventListener('click', () => chartCursor && lights().forEach(side => reveal(side, chartCursor.i)));
  area.addEventListener('blur', () => pointAt(null));
  area.addEventListener('keydown', event => {
    const i = chartCursor ? chartCursor.i : -1, last = p.length - 1;
    const to = { ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1, PageUp: i + 10, PageDown: i - 10, Home: 0, End: last }[event.key];
    if (event.key === 'Escape') return pointAt(null);
    if (to === undefined) return;
    event.preventDefault();
    pointAt(Math.max(0, Math.min(last, to)), p);
    lights().forEach(side => reveal(side, chartCursor.i));
  });
  return p;
}

// Lines and labels of both axes, with the unit of x at its end.
function ticksOf(p, least, most, form, label, inner) {
  const nodes = [], word = (x, y, anchor, text, className = '') => {
    const node = drawn('text', { x, y, 'text-anchor': anchor, class: className });
    node.textContent = text;
    nodes.push(node);
  };
  for (const value of roundValues(least, most, 4)) {
    const y = p.y(value);
    nodes.push(drawn('line', { x1: EDGE.left, x2: p.right, y1: y, y2: y, class: value === least ? 'ce-base' : 'ce-grid' }));
    word(EDGE.left - 6, y + 4, 'end', form(value));
  }
  for (const value of roundValues(1, p.length, Math.max(2, Math.floor(inner.width / 60)))) {
    const i = Math.max(1, value) - 1, x = p.x(i);
    nodes.push(drawn('line', { x1: x, x2: x, y1: p.bottom, y2: p.bottom + 3, class: 'ce-base' }));
    word(x, p.bottom + 15, i ? 'middle' : 'start', String(i + 1));
  }
  word((EDGE.left + p.right) / 2, p.bottom + 27, 'middle', 'token', 'ce-axis');
  if (label) word(2, EDGE.top + 4, 'start', label, 'ce-axis');
  return nodes;
}

// About n round numbers in [least, most].
function roundValues(least, most, n) {
  const rough = (most - least) / n || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].filter(k => k !== 2.5 || power < 1).map(k => k * power).find(size => size >= rough * 0.85), values = [];
  for (let k = Math.ceil(least / step - 1e-9); k * step <= most + step * 1e-9; k++) values.push(+(k * step).toPrecision(12));
  return values;
}

const roundUp = value => {                   // the next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map(k => k * power).find(size => size >= value * 0.999);
};

const tenths = n => n.toFixed(1);
const lineThrough = points => points.map(([x, y], n) => (n ? 'L' : 'M') + tenths(x) + ' ' + tenths(y)).join('');
const dotsAt = points => points.map(([x, y]) => 'M' + tenths(x) + ' ' + tenths(y) + 'h0').join('');

// -- the cursor that all plots share -----------------------------------------------------------------------------------

function pointAt(i, from = null) {
  if (i === null ? !chartCursor : chartCursor && chartCursor.i === i && chartCursor.plot === from) return;
  chartCursor = i === null ? null : { i, plot: from };
  litNodes.forEach(node => node.classList.remove('lit'));
  litNodes = [];
  if (chartCursor && from) litNodes = from.lights().map(name => sides[name].nodes[i]).filter(Boolean);
  litNodes.forEach(node => node.classList.add('lit'));
  plots.forEach(p => p.point());
}

root.addEventListener('pointerover', event => {                 // a token of a text: show where it is in the plots
  if (dock.open === 'charts' && event.target.matches('.ce-text .t[data-i]')) pointAt(+event.target.dataset.i);
});
root.addEventListener('pointerout', event => { if (chartCursor && !chartCursor.plot && event.target.matches('.ce-text .t')) pointAt(null); });

// -- who wrote the tokens ------------------------------------------------------------------------------------------------

const shownSide = () => sides[routed] || sides[exitSides()[0]];

function paintRouting(p) {
  const side = shownSide(), ids = writers(), counts = ids.map(() => 0), place = exit => exit === COPIED ? ids.length - 1 : Math.min(exit, ids.length - 2);
  const order = [ids.length - 1, ...ids.keys()].slice(0, ids.length);          // copied tokens lowest, the full model's on top
  const edges = order.map(() => []), all = side.records;
  for (let i = side.start; i < all.length; i++) {
    if (!all[i]) continue;
    counts[place(all[i].exit)]++;
    const gone = i - RECENT;
    if (gone >= side.start && all[gone]) counts[place(all[gone].exit)]--;
    if ((i - side.start) % p.step && i < all.length - 1) continue;
    const total = Math.min(RECENT, i - side.start + 1);
    let sum = 0;
    order.forEach((n, k) => edges[k].push([p.x(i), p.y(sum / total), p.y((sum += counts[n]) / total)]));
  }
  if (all.length < 2 || !edges[0].length) return;
  order.forEach((n, k) => {
    const low = edges[k].map(([x, y]) => [x, y]), high = edges[k].map(([x, , y]) => [x, y]).reverse();
    p.path('band' + n, 'ce-band ' + colourClass(ids[n]), lineThrough([...low, ...high]) + 'Z');
  });
}

function tellRouting(i) {
  const side = shownSide(), all = side.records, first = Math.max(side.start, i - RECENT + 1), total = i - first + 1;
  if (!all[i]) return [];
  const facts = [[colourClass(all[i].exit), visible(all[i].text || '').slice(0, 24) + ' · ' + exitName(all[i].exit)]];
  for (const exit of writers()) {
    let n = 0;
    for (let k = first; k <= i; k++) n += all[k] && all[k].exit === exit;
    if (n) facts.push([colourClass(exit), swatchText(exit) + ' ' + percent(n / total)]);
  }
  return facts;
}

// -- agreement -----------------------------------------------------------------------------------------------------------------

// A fork begins with the token that the visitor chose, which nobody judges.
const decodedFrom = side => side.start + (side.of ? 1 : 0);

// Would the full model choose this token too? true, false, or undefined while that is not known. In a greedy run its own
// tokens need no check, and neither do the drafts that it accepted as its own choice.
function agrees(side, i) {
  const record = side.records[i];
  if (!record || run.greedy === false || i < decodedFrom(side)) return undefined;
  if (side.end) return !(side.wrong || (side.wrong = new Set(side.end.differs))).has(i);
  if (i in side.choices) return side.choices[i] === record.id;
  return isLast(record.exit) || isExact(side) ? true : undefined;
}

// The verdicts that are known, from the first position up to the first token that nobody has checked yet. Later tokens of
// the full model do not count before that: they always agree, so a share with them would be too high.
function verdicts(side) {
  const list = [];
  let told = Boolean(side.end) || isExact(side);
  for (let i = decodedFrom(side); i < side.records.length; i++) {
    const verdict = agrees(side, i);
    if (verdict === undefined) break;
    told = told || !isLast(side.records[i].exit);
    list.push(verdict);
  }
  return told ? list : [];
}

function agreementSoFar(side) {               // null before anything is known
  const list = verdicts(side), same = list.filter(Boolean).length;
  return list.length ? { share: same / list.length, judged: list.length } : null;
}

const shortTitle = name => sides[name].title.split(':')[0];
const sideColour = name => name === FULL ? 'ce-of-full' : 'ce-of-' + exitSides().indexOf(name) % 3;

function measureAgreement() {                 // once for each drawing: moving share, judged positions and mismatches of each side
  judging = {};
  for (const name of exitSides()) {
    const list = verdicts(sides[name]), start = decodedFrom(sides[name]), points = [], wrong = [];
    let same = 0, recent = 0, least = 1;
    list.forEach((verdict, n) => {
      same += verdict;
      recent += verdict - (n >= RECENT ? list[n - RECENT] : 0);
      const share = recent / Math.min(RECENT, n + 1);
      if (n >= 7) least = Math.min(least, share);
      if (!verdict) wrong.push(start + n);
      points.push([start + n, share]);
    });
    judging[name] = { points, wrong, share: list.length ? same / list.length : null, all: list.length, least };
  }
}

function agreementRange() {
  const least = Math.min(...Object.values(judging).map(j => j.least));
  return [least >= 0.8 ? 0.8 : least >= 0.5 ? 0.5 : 0, 1];
}

function paintAgreement(p) {
  for (const [name, { points, wrong }] of Object.entries(judging)) {
    const shown = points.filter(([i], n) => n % p.step === 0 || n === points.length - 1);
    if (shown.length > 1) p.path('line' + name, 'ce-line ' + sideColour(name), lineThrough(shown.map(([i, share]) => [p.x(i), p.y(share)])));
    const last = points[points.length - 1];
    if (last) p.text('now' + name, 'ce-level-label ' + sideColour(name), p.x(last[0]) + 4, p.y(last[1]) + 4, percent(last[1]));
    p.path('wrong' + name, 'ce-wrong', wrong.map(i => 'M' + tenths(p.x(i)) + ' ' + tenths(p.bottom) + 'v-7').join(''));
  }
}

function tellAgreement(i) {
  return Object.entries(judging).map(([name, { points }]) => {
    const verdict = agrees(sides[name], i), point = points[i - decodedFrom(sides[name])];
    const words = verdict === undefined ? 'not checked yet' : verdict ? 'the full model agrees' : 'the full model would choose another token';
    return [verdict === false ? 'ce-of-wrong' : sideColour(name), (exitSides().length > 1 ? shortTitle(name) + ': ' : '') + words
      + (point ? ', last ' + RECENT + ': ' + percent(point[1]) : '')];
  });
}

// -- confidence against correctness ------------------------------------------------------------------------------------------

const exitTokens = side => side.records.filter(r => r && r.exit >= 0 && !isLast(r.exit) && !missing(r.conf[r.exit]) && r.i >= side.start);

function paintConfidence(p) {
  const side = shownSide(), groups = new Map(), wrong = [];
  for (const r of exitTokens(side)) {
    const key = colourClass(r.exit), point = [p.x(r.i), p.y(r.conf[r.exit])];
    groups.has(key) ? groups.get(key).push(point) : groups.set(key, [point]);
    if (agrees(side, r.i) === false) wrong.push(point);
  }
  for (const [key, points] of groups) {
    p.path('rim' + key, 'ce-rim', dotsAt(points));
    p.path('dot' + key, 'ce-dots ' + key, dotsAt(points));
  }
  p.path('wrong', 'ce-crosses', wrong.map(([x, y]) => `M${tenths(x - 3)} ${tenths(y - 3)}l6 6m0 -6l-6 6`).join(''));
}

function tellConfidence(i) {
  const side = shownSide(), record = side.records[i];
  if (!record) return [];
  const sure = isLast(record.exit) || record.exit === COPIED ? '' : ', confidence ' + percent(record.conf[record.exit]);
  return [[colourClass(record.exit), exitName(record.exit) + sure], ...(agrees(side, i) === false ? [['ce-of-wrong', 'the full model would choose another token']] : [])];
}

// -- time for each token ------------------------------------------------------------------------------------------------------

function quantile(sorted, share) {            // interpolated, as metrics.percentile
  const place = share * (sorted.length - 1), low = Math.floor(place);
  return sorted.length ? sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]) : null;
}

let chartTimes;

function measureTimes() {
  chartTimes = {};
  for (const name of order) {
    const side = sides[name], points = [], smooth = [];
    let sum = 0;
    side.records.forEach((r, i) => {
      if (missing(r.ms) || i < side.start) return;
      points.push([i, r.ms]);
      sum += r.ms - (points.length > SMOOTH ? points[points.length - 1 - SMOOTH][1] : 0);
      if (points.length >= Math.min(SMOOTH, 3)) smooth.push([i, sum / Math.min(SMOOTH, points.length)]);
    });
    const sorted = points.map(point => point[1]).sort((a, b) => a - b);
    chartTimes[name] = { points, smooth, p50: quantile(sorted, 0.5), p90: quantile(sorted, 0.9) };
  }
}

function timeRange() {
  let most = 1;
  for (const { smooth, p90 } of Object.values(chartTimes)) {
    if (!missing(p90)) most = Math.max(most, 1.25 * p90);
    for (const [, ms] of smooth) most = Math.max(most, Math.min(ms, 3 * p90));
  }
  return [0, roundUp(most)];
}

const timeText = ms => ms === 0 || ms >= 10 ? ms.toFixed(0) : ms.toFixed(1);

function paintTimes(p) {
  const labels = [];
  for (const name of [...order].reverse()) {
    const { points, smooth, p50, p90 } = chartTimes[name], colour = sideColour(name);
    p.path('dots' + name, 'ce-ms ' + colour, dotsAt(points.map(([i, ms]) => [p.x(i), p.y(ms)])));
    for (const [key, value] of [['p50', p50], ['p90', p90]]) {
      if (missing(value) || points.length < 4) continue;
      p.path(key + name, 'ce-level ' + key + ' ' + colour, `M${EDGE.left} ${tenths(p.y(value))}H${tenths(p.right)}`);
      labels.push({ key: key + name + 'label', colour, y: p.y(value), text: key + ' ' + timeText(value) });
    }
    const shown = smooth.filter((point, n) => n % p.step === 0 || n === smooth.length - 1);
    if (shown.length > 1) p.path('line' + name, 'ce-line ' + colour, lineThrough(shown.map(([i, ms]) => [p.x(i), p.y(ms)])));
  }
  labels.sort((a, b) => a.y - b.y);
  for (let n = labels.length - 1, below = p.bottom + 8; n >= 0; n--) below = (labels[n].y = Math.min(labels[n].y, below)) - 12;
  for (let n = 0, above = EDGE.top + 2; n < labels.length; n++) above = (labels[n].y = Math.max(labels[n].y, above)) + 12;
  labels.forEach(({ key, colour, y, text }) => p.text(key, 'ce-level-label ' + colour, p.right + 4, y + 4, text));
}

function tellTimes(i) {
  return order.filter(name => sides[name].records[i] && !missing(sides[name].records[i].ms)).map(name =>
    [sideColour(name), sides[name].title + ': ' + number(sides[name].records[i].ms) + ' ms']);
}

// -- the tab -------------------------------------------------------------------------------------------------------------------

function buildCharts() {
  const whole = value => Math.round(100 * value) + '%';
  const routing = makePlot({ name: 'routing', title: 'Who wrote the tokens', hint: 'At each token: which share of the last ' + RECENT + ' tokens each exit wrote',
    top: () => [0, 1], form: whole, paint: paintRouting, tell: tellRouting, lights: () => [shownSide().name] });
  const agreement = makePlot({ name: 'agreement', title: 'Agreement', right: 38, form: whole, paint: paintAgreement, tell: tellAgreement, lights: exitSides,
    hint: 'Share of the last ' + RECENT + ' checked tokens that the full model would choose too, given the same text. Marks below: tokens that it would not choose.',
    top: agreementRange });
  const confidence = makePlot({ name: 'confidence', title: 'Confidence', form: whole, top: () => [0, 1], paint: paintConfidence, tell: tellConfidence,
    hint: 'Confidence of the exit that wrote each token. Crosses: the full model would choose another token.', lights: () => [shownSide().name] });
  const times = makePlot({ name: 'times', title: 'Time per token, ms', form: timeText, right: 56, top: timeRange, paint: paintTimes, tell: tellTimes,
    hint: 'Dots: milliseconds from one token to the next. Line: mean of ' + SMOOTH + ' tokens. p50: median. p90: nine of ten tokens take less.', lights: () => order });
  plots = [routing, agreement, confidence, times];
  parts.sidePicker = make('select', 'ce-picker');
  parts.sidePicker.setAttribute('aria-label', 'Text of this plot');
  parts.sidePicker.addEventListener('change', () => { routed = parts.sidePicker.value; drawCharts(); });
  routing.heading.after(parts.sidePicker);
  const pages = [agreement, confidence];      // two plots that share one place
  const turn = shown => {
    for (const p of pages) p.node.hidden = p !== shown;
    drawCharts();
  };
  pages.forEach((p, n) => p.heading.after(button('ce-toggle ce-turn', pages[1 - n].title, () => { turn(pages[1 - n]); pages[1 - n].area.focus(); })));
  confidence.node.hidden = true;
  const key = make('span', 'ce-plot-key');
  times.heading.after(key);
  times.key = key;
  const box = make('div', 'ce-plots', null, ...plots.map(p => p.node));
  if (chartSizes) chartSizes.disconnect();
  chartSizes = new ResizeObserver(scheduleCharts);
  chartSizes.observe(box);
  return box;
}

function scheduleCharts() {                   // not in every frame, which nobody could see
  if (!chartFrame) chartFrame = requestAnimationFrame(function soon(now) {
    if (now - chartsDrawn < REDRAW) { chartFrame = requestAnimationFrame(soon); return; }
    chartFrame = 0;
    chartsDrawn = now;
    drawCharts();
  });
}

// Tokens on the x axis: those of the whole run where it is known, else a length that grows in steps.
function chartLength() {
  let last = 0;
  if (replaying() || finished || !player.atEnd) {
    for (const r of records) if (r.type === 'token' && r.i > last && (r.status === 'emitted' || r.status === 'accepted')) last = r.i;
    return last + 1;
  }
  const n = Math.max(...order.map(name => sides[name].records.length), 1);
  const steps = [32, 48, 64, 96, 128, 192, 256, 384, 512, 768];
  return Math.min(steps.find(step => step >= n) || 1024 * Math.ceil(n / 1024), Math.max(n, run.max_new_tokens || n));
}

function drawCharts() {
  if (!run || dock.open !== 'charts' || !plots.length) return;
  measureAgreement();
  measureTimes();
  const length = chartLength(), sampled = run.greedy === false;
  const sizes = plots.map(p => p.node.hidden ? null : [p.area.clientWidth, p.area.clientHeight]);       // measure before writing
  plots.forEach((p, n) => sizes[n] && p.draw(length, ...sizes[n]));
  const [routing, agreement, confidence, times] = plots, names = exitSides();
  put(routing.heading, shownSide().mode === 'verified' ? 'Who drafted the tokens' : 'Who wrote the tokens');
  put(routing.now, 'last ' + RECENT + ' tokens');
  drawPicker(names);
  put(agreement.now, sampled ? 'not measured above temperature 0' : agreementWords(names));
  put(confidence.now, 'crosses: full model differs');
  if (times.keyOf !== order.join()) {
    times.keyOf = order.join();
    times.key.replaceChildren(...order.map(name => make('span', 'ce-key-side ' + sideColour(name), shortTitle(name))));
  }
}

function agreementWords(names) {              // the shares of all sides, and how many tokens they are of
  const known = names.map(name => judging[name]).filter(({ all }) => all);
  if (!known.length) return 'known at the end';
  const most = Math.max(...known.map(({ all }) => all)), over = names.every(name => sides[name].end);
  return known.map(({ share }) => percent(share, share > 0.99 && share < 1 ? 1 : 0)).join(', ') + ' of ' + most + (over ? ' tokens' : ' checked so far');
}

function drawPicker(names) {
  const picker = parts.sidePicker;
  picker.hidden = names.length < 2;
  if (picker.dataset.names === names.join()) return;
  picker.dataset.names = names.join();
  picker.replaceChildren(...names.map(name => new Option(sides[name].title, name, name === shownSide().name, name === shownSide().name)));
}

feature({
  build() { addTab('charts', 'Charts', buildCharts(), scheduleCharts); },
  begin() { pointAt(null); if (!sides[routed]) routed = undefined; },
});
