// The timeline: each pass as a block on a time axis, a lane for each side with its own clock. It shows the whole run; what
// comes after the moment of the player is pale. Blocks are drawn on a canvas, only where they are visible; words, marks
// and the cursor are nodes above it.

const AXIS = 20, TITLE = 16, GUTTER = 78, FIT = -1;
const timeline = { from: 0, to: 1, whole: true, detailed: false, hover: null, chosen: null, of: null, boxes: [], lit: [] };

// -- nodes -----------------------------------------------------------------------------------------------------------------

function buildTimeline() {
  const view = timeline.nodes = {};
  Object.assign(timeline, { whole: true, hover: null, chosen: null, of: null, boxes: [], lit: [] });
  view.kinds = [['By pass', false], ['By layer', true]].map(([words, detailed]) => {
    const choice = button('ce-small', words, () => { timeline.detailed = detailed; drawTimeline(); });
    choice.title = detailed ? 'Which layers ran when, and for how many positions' : 'What each pass wrote';
    return choice;
  });
  const kind = make('div', 'ce-time-kind', null, ...view.kinds);
  kind.setAttribute('role', 'group');
  kind.setAttribute('aria-label', 'Form of the timeline');
  const tool = (sign, words, action) => {
    const node = button('ce-small', sign, action);
    node.title = words;
    node.setAttribute('aria-label', words.split(' (')[0]);
    return node;
  };
  view.fit = tool('Fit', 'Show the whole run (F)', () => zoomTimeline(FIT));
  view.key = make('p', 'ce-time-key');
  const bar = make('div', 'ce-time-bar', null, kind, tool('−', 'Zoom out (−)', () => zoomTimeline(2)),
    tool('+', 'Zoom in (+)', () => zoomTimeline(0.5)), view.fit, view.key);
  view.canvas = make('canvas');
  view.canvas.setAttribute('aria-hidden', 'true');
  view.axis = make('div', 'ce-time-axis');
  view.axis.title = 'Drag to go to a moment of the run';
  view.above = make('div', 'ce-time-above');
  view.mark = make('div', 'ce-time-mark');
  view.light = make('div', 'ce-time-light');
  view.cursor = make('div', 'ce-time-cursor', null, make('div', 'ce-time-handle'));
  view.tip = make('div', 'ce-time-tip');
  for (const node of [view.mark, view.light, view.cursor, view.tip]) { node.hidden = true; node.setAttribute('aria-hidden', 'true'); }
  view.plot = make('div', 'ce-time-plot', null, view.canvas, view.axis, view.above, view.mark, view.light, view.cursor, view.tip);
  view.plot.tabIndex = 0;
  view.plot.setAttribute('role', 'group');
  view.plot.setAttribute('aria-label', 'Timeline of the passes. The left and right keys choose a pass. The up and down keys choose a text. '
    + 'Plus zooms in, minus zooms out. F shows the whole run. Enter goes to the moment of the chosen pass. Space plays the run.');
  view.pane = make('section', 'ce-pass');
  view.pane.setAttribute('aria-label', 'The chosen pass');
  view.pane.hidden = true;
  view.pane.addEventListener('keydown', event => {
    if (event.key !== 'Escape') return;
    event.stopPropagation();
    if (card) closeCard(); else leavePass();
  });
  view.empty = make('p', 'ce-time-empty', 'Press Run: each pass of the model appears here as a block in time.');
  new ResizeObserver(() => drawTimeline()).observe(view.plot);
  listenToTimeline(view.plot);
  return make('div', 'ce-time', null, bar, make('div', 'ce-time-main', null, make('div', 'ce-time-left', null, view.plot, view.empty), view.pane));
}

// -- the view: which part of the time is shown -----------------------------------------------------------------------------

const timeLength = () => Math.max(1e-3, ...[...readPasses().values()].map(lane => lane.clock));
const plotWidth = () => timeline.nodes.plot.clientWidth;
const gutter = () => timeline.detailed ? GUTTER : 0;
const xOf = seconds => gutter() + (seconds - timeline.from) / (timeline.to - timeline.from) * (plotWidth() - gutter());
const secondsAt = x => timeline.from + (x - gutter()) / Math.max(1, plotWidth() - gutter()) * (timeline.to - timeline.from);

function viewTime(from, to) {
  const length = timeLength(), span = Math.min(length, Math.max(length / 2000, to - from));
  timeline.from = Math.max(0, Math.min(from, length - span));
  timeline.to = timeline.from + span;
  timeline.whole = span > length * 0.999;
  drawTimelineSoon();
}

function zoomTimeline(factor, at = null) {   // around a moment: the pointer's, else the chosen pass's, else the player's, else the middle
  if (factor === FIT) return viewTime(0, timeLength());
  const { from, to, chosen } = timeline;
  const seen = [at, chosen && (chosen.start + chosen.end) / 2, playhead()].find(moment => !missing(moment) && moment >= from && moment <= to);
  const middle = missing(seen) ? (from + to) / 2 : seen;
  viewTime(middle - (middle - from) * factor, middle + (to - middle) * factor);
}

const panTimeline = share => viewTime(timeline.from + share * (timeline.to - timeline.from), timeline.to + share * (timeline.to - timeline.from));

function keepInView(start, end) {            // move the view where a pass or the cursor is outside
  if (timeline.whole || start >= timeline.from && end <= timeline.to) return;
  const span = timeline.to - timeline.from;
  viewTime(start - 0.15 * span, start + 0.85 * span);
}

function drawTimelineSoon() {
  timeline.soon = timeline.soon || requestAnimationFrame(() => { timeline.soon = 0; drawTimeline(); });
}

// -- drawing ---------------------------------------------------------------------------------------------------------------

function timelineColours() {                 // of the theme that is on
  const style = getComputedStyle(root), get = name => style.getPropertyValue('--ce-' + name).trim();
  const exits = [...model.exits.keys()].map(exit => get(colourClass(exit)));
  const soft = get('soft'), ground = style.getPropertyValue('--body-background-fill').trim();
  const quiet = `color-mix(in srgb, ${soft} 48%, ${ground})`;      // of the full model
  return { ink: get('ink'), soft, quiet, line: get('line'), loud: get('loud'), accent: get('accent'), card: get('card'), exits, font: style.fontFamily,
    of: exit => isLast(exit) ? quiet : exit === COPIED ? '#f2c4d8' : exits[Math.min(exit, exits.length - 1)] };
}

function drawTimeline() {
  const view = timeline.nodes;
  if (!view || !model || dock.open !== 'time') return;
  const lanes = [...readPasses().values()], some = lanes.some(lane => lane.passes.length), width = plotWidth();
  view.plot.hidden = !some;
  view.empty.hidden = some;
  view.kinds.forEach((choice, k) => choice.setAttribute('aria-pressed', String(timeline.detailed === Boolean(k))));
  if (!some || !width) return;
  if (timeline.whole) { timeline.from = 0; timeline.to = timeLength(); }
  view.fit.disabled = timeline.whole;
  placeLanes(lanes);
  const height = timeline.boxes[timeline.boxes.length - 1].bottom, scale = devicePixelRatio || 1;
  const context = view.canvas.getContext('2d');
  if (view.canvas.width !== Math.round(width * scale) || view.canvas.height !== Math.round(height * scale)) {
    view.canvas.width = Math.round(width * scale);
    view.canvas.height = Math.round(height * scale);
    view.plot.style.height = height + 'px';
  }
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const colours = timelineColours();
  drawAxis(context, colours, width, height);
  for (const box of timeline.boxes) {
    context.save();
    context.beginPath();
    context.rect(timeline.detailed ? gutter() : 0, 0, width, height);
    context.clip();
    (timeline.detailed ? drawSegments : drawBlocks)(context, box, colours, visiblePasses(box.lane));
    context.restore();
  }
  drawKey(lanes);
  placeMarks();
  placeCursor();
}

function placeLanes(lanes) {                 // as much height for each lane as the dock has
  const rows = model.exits.length + 1, room = narrow() ? 200 : 186 - 34 - AXIS;
  const least = timeline.detailed ? 11 * [...Array(rows).keys()].filter(segmentLayers).length + 6 * [...Array(rows).keys()].filter(s => !segmentLayers(s)).length : 26;
  const tall = Math.max(least, Math.min(timeline.detailed ? 120 : 56, Math.floor(room / lanes.length) - TITLE - 2));
  timeline.boxes = lanes.map((lane, k) => {
    const top = AXIS + k * (tall + TITLE + 2) + TITLE;
    return { lane, top, bottom: top + tall + 2, height: tall };
  });
  const names = lanes.map(lane => lane.name).join() + timeline.detailed + tall;
  if (timeline.nodes.above.dataset.names !== names) {
    timeline.nodes.above.dataset.names = names;
    timeline.nodes.above.replaceChildren(...timeline.boxes.map(laneNodes));
  }
  for (const box of timeline.boxes) {
    const { passes, clock } = box.lane, nodes = timeline.nodes.above.children[timeline.boxes.indexOf(box)];
    put(nodes.firstChild.firstChild, box.lane.title);
    put(nodes.firstChild.lastChild, passes.length + (passes.length === 1 ? ' pass, ' : ' passes, ') + number(clock, 2) + ' s');
    box.later = nodes.lastChild;
  }
}

function laneNodes(box) {                    // title, names of rows, and the veil over what comes later
  const title = make('p', 'ce-time-lane', null, make('span', 'ce-time-title'), make('span', 'ce-time-count'));
  title.style.top = box.top - TITLE + 'px';
  const later = make('div', 'ce-time-later');
  later.style.top = box.top + 'px';
  later.style.height = box.height + 'px';
  return make('div', null, null, title, ...timeline.detailed ? segmentNames(box) : [], later);
}

function drawAxis(context, colours, width, height) {
  const span = timeline.to - timeline.from, rough = span * 84 / Math.max(84, width - gutter());
  const size = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find(n => n * size >= rough) * size;
  const ticks = [], digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  context.fillStyle = colours.line;
  for (let k = Math.ceil(timeline.from / step - 1e-9); k * step <= timeline.to; k++) {
    const x = Math.round(xOf(k * step));
    context.fillRect(x, AXIS - 4, 1, height);
    ticks.push([x, k === 0 ? '0' : step >= 0.1 ? (k * step).toFixed(digits) + ' s' : (1000 * k * step).toFixed(Math.max(0, digits - 3)) + ' ms']);
  }
  context.fillRect(gutter(), AXIS - 1, width, 1);
  const axis = timeline.nodes.axis;
  while (axis.children.length > ticks.length) axis.lastChild.remove();
  ticks.forEach(([x, words], k) => {
    const tick = axis.children[k] || axis.appendChild(make('span', 'ce-time-tick'));
    put(tick, words);
    tick.style.left = x + 'px';
    tick.hidden = x > width - 24;
  });
}

function drawKey(lanes) {
  const verified = lanes.some(isVerified), cascade = lanes.some(lane => lane.mode === 'cascade');
  const names = [timeline.detailed, verified, cascade].join();
  if (timeline.nodes.key.dataset.names === names) return;
  timeline.nodes.key.dataset.names = names;
  const item = (kind, words) => make('span', null, null, make('i', 'ce-time-swatch ' + kind), words);
  const of = timelineColours().of, shades = [...model.exits.keys(), ...verified && !cascade ? [COPIED] : []].map(of), n = shades.length;
  timeline.nodes.key.style.setProperty('--bands', `linear-gradient(90deg, ${shades.map((shade, k) => `${shade} ${100 * k / n}% ${100 * (k + 1) / n}%`)})`);
  timeline.nodes.key.replaceChildren(...(timeline.detailed
    ? [item('colours', 'one position'), ...cascade ? [item('many', '×n: skipped layers catch up on n positions')] : [],
      ...verified ? [item('checking', '×n: n drafts and tokens checked at once')] : []]
    : [...cascade ? [item('colours', 'height: layers that ran'), item('striped', 'skipped layers catch up')] : [],
      ...verified ? [item('colours', 'accepted drafts'), item('hollow', 'rejected'), item('own', 'full model’s token')] : []]));
}

feature({
  build() { addTab('time', 'Timeline', buildTimeline(), drawTimeline); },
  begin() {
    timeline.lit = [];
    if (timeline.of === records) return;                        // the player begins the same run again
    Object.assign(timeline, { of: records, hover: null, chosen: null, whole: true });
    showPass(null);
  },
  draw: lightTokens,
  finish: () => drawTimelineSoon(),
  seek(clock) {
    if (!model || !timeline.nodes || dock.open !== 'time') return;
    lightTokens();
    const fork = [...readPasses().values()].filter(lane => lane.fork && lane.from < clock).pop();
    if (playing()) keepInView(clock - (fork ? fork.from : 0), clock - (fork ? fork.from : 0));
    if (timeline.boxes.length) placeCursor(); else drawTimelineSoon();
  },
});
