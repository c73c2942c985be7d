// Passes: the work of each side in order of its own clock, read from all records of the run, also from those that the
// player does not show at the moment. The timeline, the draft tree and the steps of the player read them.
//
// A pass of a cascade or of the full model writes one token. In Exact mode a pass drafts tokens, checks them, and ends
// with a token of the full model. `steps` are its parts: `ran` are the segments that ran between two events, each
// [first, end, positions]. Old files have no `ran`, and no `tree`.

const work = { of: null, next: 0, lanes: new Map(), now: 0 };

function readPasses() {                      // the lanes by name, up to the newest record
  if (work.of !== records) Object.assign(work, { of: records, next: 0, lanes: new Map(), now: 0 });
  for (; work.next < records.length; work.next++) {
    const record = records[work.next], reader = passReaders[record.type];
    if (reader) reader(record);
  }
  return work.lanes;
}

const passReaders = {
  run(record) {
    work.lanes = new Map();
    work.now = 0;
    for (const side of record.sides || TWO_SIDES(record.mode)) addLane(side);
  },
  fork(record) {
    const of = work.lanes.get(settingsOf(record)), full = work.lanes.get(FULL);
    addLane({ name: record.side, mode: of.mode, title: record.title, from: work.now, fork: true });
    if (full && work.lanes.delete(FULL)) work.lanes.set(FULL, full);            // the full model stands last
  },
  token(record) {
    const lane = work.lanes.get(record.side);
    if (lane) addToPass(lane, record);
  },
  tree(record) {
    const lane = work.lanes.get(record.side), pass = lane && lane.passes[lane.passes.length - 1];
    if (pass) pass.tree = record.drafts;
  },
};

function addLane(side) {
  work.lanes.set(side.name, { name: side.name, mode: side.mode, title: side.title, fork: side.fork, from: side.from || 0,
    passes: [], at: [], clock: 0, open: false });
}

function addToPass(lane, record) {
  if (!lane.open) lane.passes.push({ lane, n: lane.passes.length, start: lane.clock, end: lane.clock, drafted: lane.clock,
    steps: [], drafts: [], wrote: [], own: null, tree: null });
  const pass = lane.passes[lane.passes.length - 1];
  lane.open = record.status !== 'emitted';
  if (!missing(record.t)) {
    const to = Math.max(lane.clock, record.t);
    if (to > lane.clock || record.ran && record.ran.length)
      pass.steps.push({ start: lane.clock, end: to, exit: record.exit, ran: record.ran || [], draft: record.status === 'draft' });
    lane.clock = pass.end = to;
    work.now = Math.max(work.now, lane.from + to);
  }
  if (record.status === 'draft') {
    pass.drafts.push({ id: record.id, text: record.text, i: record.i, exit: record.exit, accepted: null });
    pass.drafted = lane.clock;
    return;
  }
  const draft = pass.drafts.find(d => d.i === record.i && d.accepted === null);
  if (draft) draft.accepted = record.status === 'accepted';
  if (record.status === 'rejected') return;
  pass.wrote.push(record);
  lane.at[record.i] = pass;
  if (record.status === 'emitted') pass.own = record;
}

const isVerified = lane => lane.mode === 'verified';
const isChoice = pass => Boolean(pass.lane.fork) && pass.n === 0;               // a fork begins with the visitor's token
const readsPrompt = pass => pass.n === (pass.lane.fork ? 1 : 0);                // its time also has the reading of the text before
const draftsOf = pass => pass.tree ? pass.tree.map(d => ({ text: d[1], parent: d[2], p: d[3], exit: d[4], accepted: d[5] }))
  : pass.drafts.map((d, k) => ({ text: d.text, parent: k - 1, p: null, exit: d.exit, accepted: d.accepted }));
const acceptedOf = pass => pass.wrote.filter(record => record.status === 'accepted');
const draftCount = pass => pass.tree ? pass.tree.length : pass.drafts.length;
const textOfPass = pass => pass.wrote.map(record => record.text).join('');

// Moments at which a pass of any side ended, in seconds of the player's clock, in order.
function passEnds() {
  const ends = new Set();
  for (const lane of readPasses().values()) for (const pass of lane.passes) ends.add(lane.from + pass.end);
  return [...ends].sort((a, b) => a - b);
}

// The newest pass that began before a moment of the lane's clock; the first one before all.
function passAt(lane, seconds) {
  let low = 0, high = lane.passes.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (lane.passes[middle].start <= seconds) low = middle; else high = middle - 1;
  }
  return lane.passes[low];
}

// -- segments: what lies between two exits ---------------------------------------------------------------------------------

const segmentTop = s => s < model.exits.length ? model.exits[s].layer : model.layers;
const segmentLayers = s => segmentTop(s) - (s ? segmentTop(s - 1) : 0);

function layerRange(first, end) {            // the layers of segments first..end-1, in words
  const from = (first ? segmentTop(first - 1) : 0) + 1, to = segmentTop(end - 1);
  return to < from ? 'no layers' : from === to ? 'layer ' + to : 'layers ' + from + '–' + to;
}

// The moments within a step are not recorded. Each span gets a share of the time by its layers: reading their weights
// takes most of it, whatever the number of positions.
function spansOf(step) {
  const cost = ([first, end, rows]) => {
    let layers = 0.3;                                           // an exit without layers still has a head to read
    for (let s = first; s < end; s++) layers += segmentLayers(s);
    return layers * (0.9 + 0.1 * rows);
  };
  const all = step.ran.reduce((sum, span) => sum + cost(span), 0);
  let now = step.start;
  return step.ran.map(span => {
    const start = now;
    now += (step.end - step.start) * cost(span) / all;
    return { first: span[0], end: span[1], rows: span[2], from: start, to: now };
  });
}

// Spans of more than one position: in a cascade, the layers that exits skipped catch up.
const caughtUp = pass => isVerified(pass.lane) ? [] : pass.steps.flatMap(step => step.ran.filter(span => span[2] > 1));
