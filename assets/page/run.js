// The run on the page: its records, and what follows from them for each side. cascadeexit/stream.py describes the records.
//
// The value of the component is one growing string of lines. Frames may be skipped, repeated or replaced, so reading goes
// on at `offset`, or starts again when the text is another one.

const FULL = 'full';
const TWO_SIDES = (mode, tolerance = 0) => [{ name: 'cascade', mode, tolerance, title: mode !== 'verified' ? 'With early exits' : tolerance ? 'Checked, tolerance ' + tolerance : 'Exact' },
  { name: FULL, mode: FULL, title: 'Full model' }];

const cleared = new Set();                   // runs that were replaced: later frames of them are ignored
const halted = new Set();                    // runs that were stopped: only frames that know of it count

let offset, consumed;                        // of the value
let records;                                 // all that came, in order
let model, run, sides, order, dirty;         // what is shown
let finished;                                // true when every side with exits has its end

const exitSides = () => order.filter(name => name !== FULL);

function forget() {
  offset = 0; consumed = ''; records = []; finished = false;
  resetShown();
}

function resetShown() {                      // the player shows the same records again from the first
  model = run = null; sides = {}; order = []; dirty = true;
  closeCard();
}

function newSide(description) {
  return { tolerance: 0, ...description, nodes: [], records: [], events: [], times: [], choices: [], pending: new Map(),
    corrected: new Set(), stats: null, versus: null, end: null, wrong: null, spread: null, tokens: 0, rejected: 0, start: description.at || 0 };
}

// -- reading the value -------------------------------------------------------------------------------------------------

function update() {
  const value = props.value || '';
  if (value.startsWith('{"type":"error"')) {                    // a run that could not begin: keep the last one
    waiting(false);
    return model && status(JSON.parse(value.slice(0, value.indexOf('\n'))).message, 'error');
  }
  if (value.startsWith('{"type":"replay"')) return startReplay(value);
  const id = (value.match(/"run":"(\w+)"/) || [])[1];
  if (cleared.has(id) || halted.has(id) && !value.includes('{"type":"stopped"')) return;
  stopReplay();
  if (!value.startsWith(consumed)) {
    if (run && run.run !== id) cleared.add(run.run);
    forget();
  }
  if (!player.atEnd) seekToEnd();                               // a fork continues a run that is being looked through
  const end = value.lastIndexOf('\n') + 1;
  const fresh = value.slice(offset, end).split('\n').filter(Boolean).map(line => expand(JSON.parse(line)));
  offset = end;
  consumed = value.slice(0, end);
  records.push(...fresh);
  show(fresh);
  player.shown = records.length;
}

function show(some) {
  for (const record of some) {
    const reader = readers[record.type];
    if (!reader) continue;                                      // newer versions may write unknown types: skip them
    reader(record);
    for (const f of features) if (f.record && f.record[record.type]) f.record[record.type](record);
  }
  if (!model) return;
  if (dirty) draw();
  for (const name of order) if (parts[name].follows) parts[name].text.scrollTop = parts[name].text.scrollHeight;
}

const readers = {
  model(record) { model = record; sides = {}; order = []; TWO_SIDES('cascade').forEach(addSide); build(); status(''); },
  run: readRun,
  reading(record) { status('Reading the prompt: ' + record.read + ' of ' + record.total + ' tokens…', 'busy'); },
  token: readToken,
  text(record) { sides[record.side].nodes[record.i].textContent += record.text; },
  stats(record) { sides[record.side].stats = record; dirty = true; },
  versus(record) { sides[record.side || 'cascade'].versus = record; dirty = true; },
  checked(record) { record.ids.forEach((id, k) => judge(sides[record.side], record.i + k, id)); dirty = true; },
  fork: readFork,
  end: readEnd,
  spread(record) { sides[record.side].spread = record; waiting(false); status('Done.', 'done'); dirty = true; },
  status(record) { begun(); status(record.message, isOver() ? 'done' : 'busy'); },
  stopped() { if (!replaying()) halted.add(run.run); over('Stopped. The text so far is kept.', 'stopped'); },
  error(record) { over(record.message, 'error'); },
};

function addSide(description) {
  sides[description.name] = newSide(description);
  order = description.name === FULL || !order.includes(FULL) ? [...order, description.name]
    : [...order.slice(0, -1), description.name, FULL];          // the full model stands last
}

function readRun(record) {
  run = record; sides = {}; order = [];
  begun();
  (record.sides || TWO_SIDES(record.mode, record.tolerance)).forEach(addSide);
  buildPanels();
  each('begin');
  dirty = true;
  if (player.atEnd && !replaying()) waiting(true);                // the player shows a run that is over
  status('Reading the prompt…', 'busy');
}

// The side whose settings a fork has: the full model's text goes on with those of the first one.
const settingsOf = fork => fork.of === FULL ? 'cascade' : fork.of;

function readFork(record) {
  const { mode, thresholds, tolerance } = sides[settingsOf(record)];
  addSide({ mode, thresholds, tolerance, ...record, name: record.side });
  const side = sides[record.side], before = sides[record.of];
  for (let i = 0; i < record.at; i++) {
    side.records[i] = before.records[i];
    side.choices[i] = before.choices[i];
  }
  buildPanel(record.side, before.nodes.slice(0, record.at));
  finished = false;
  dirty = true;
  if (player.atEnd && !replaying()) waiting(true);
}

function readToken(record) {
  const side = sides[record.side];
  side.events.push(record);
  if (record.status === 'draft') return writeDraft(side, record);
  if (record.status === 'rejected') return writeRejected(side, record);
  side.records[record.i] = record;
  if (!missing(record.ms)) side.times.push(record.ms);
  writeToken(side, record);
  if (record.i in side.choices) judge(side, record.i, side.choices[record.i]);
  if (side.tokens++ === 0 && !side.end) status('Writing…', 'busy');
  dirty = true;
}

// The full model's choice at a position is known: after the same text it would have written this token.
function judge(side, i, choice) {
  side.choices[i] = choice;
  const node = side.nodes[i];
  if (node && run.greedy !== false) node.classList.toggle('differs', choice !== side.records[i].id);
}

function readEnd(record) {
  const side = sides[record.side || 'cascade'];
  side.end = record;
  const wrong = new Set(record.differs || []);
  side.nodes.forEach((node, i) => node && i >= side.start && node.classList.toggle('differs', wrong.has(i)));
  dirty = true;
  if (exitSides().every(name => sides[name].end)) over(overWords(), 'done');
}

const overWords = () => replaying() ? 'This recorded run is over.'
  : halted.has(run.run) && !exitSides().every(complete) ? 'Stopped. The text so far is kept and was checked.' : 'Done.';

function over(message, kind) {
  finished = exitSides().every(name => sides[name].end);
  dirty = true;
  waiting(false);
  status(message, kind);
  each('finish');
}
