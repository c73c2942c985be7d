// The run as a file: to replay it, to calculate with it, to see it in a trace viewer, to show it.

const FORMATS = [
  ['Save run (JSON)', 'The whole run. “Replay a saved run” in Settings plays it again.', () => save('run.json', 'application/json', runFile())],
  ['Save tokens (CSV)', 'One row for each token: exit, confidence, time, the full model’s choice. Numbers count from 1, positions from 0.', () => save('tokens.csv', 'text/csv', table())],
  ['Save trace (JSON)', 'Every pass of the model on a time axis. Open the file at ui.perfetto.dev.', () => save('trace.json', 'application/json', traceFile())],
  ['Save picture (SVG)', 'Both texts with colours and numbers, for a paper.', () => save('tokens.svg', 'image/svg+xml', pictureFile())],
  ['Save picture (PNG)', 'The same picture as an image of fixed size, for a post.', savePixels],
];

function files() {
  parts.saves = FORMATS.map(([title, , action]) => button('ce-small', title, () => fromTheEnd(action)));
  return make('div', 'ce-files', null, ...FORMATS.map(([, words], n) =>
    make('div', 'ce-file', null, parts.saves[n], make('p', null, words))));
}

// Files hold the whole run, also while the player shows an earlier moment, to which it returns.
function fromTheEnd(action) {
  if (player.atEnd) return action();
  const back = player.clock, on = playing();
  pause();
  seekToEnd();
  action();
  if (on) play(back); else seek(back);
}

function save(name, type, content) {
  const link = make('a');
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = 'cascadeexit-' + name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const recorded = () => records.filter(record => record.type !== 'status');
const runFile = () => JSON.stringify({ format: model.format, records: recorded() });

// -- table ---------------------------------------------------------------------------------------------------------------

// The full model's choice at a position, and whether the token equals it: '' where that is not known.
function choiceAt(side, i) {
  if (i < side.start) return choiceAt(sides[side.of], i);
  const said = side.records[i].id, chosen = side.of && i === side.start;            // by a visitor, after the same text
  if (chosen) {
    const [id] = choiceAt(sides[side.of], i);
    return [id, id === '' ? '' : id === said ? 'yes' : 'no'];
  }
  const same = side.name === FULL ? undefined : agrees(side, i);
  const moment = side.end && (side.end.moments || []).find(m => m.i === i) || {};
  return [side.choices[i] ?? moment.id ?? (same ? said : ''), same === undefined ? '' : same ? 'yes' : 'no'];
}

function table() {
  const rows = [['side', 'number', 'position', 'token', 'text', 'exit', 'layer', 'status', 'confidence', 'milliseconds', 'weights_read', 'full_choice', 'agrees', 'seconds', 'same_position']];
  const theirs = sides[FULL].records;
  for (const name of order) sides[name].records.forEach((r, i) => {
    const node = sides[name].nodes[i], twin = name !== FULL && theirs[i];
    rows.push([name, i + 1, i, r.id, node.textContent, isLast(r.exit) ? 'full' : r.exit === COPIED ? 'copied' : r.exit + 1, isLast(r.exit) ? model.layers : r.exit === COPIED ? 0 : model.exits[r.exit].layer,
      r.status, r.conf[r.exit] ?? '', r.ms ?? '', r.read ?? '', ...choiceAt(sides[name], i), r.t ?? '', twin ? twin.id === r.id ? 'yes' : 'no' : '']);
  });
  return rows.map(row => row.map(cell).join(',')).join('\r\n') + '\r\n';
}

// Quoted where needed; text that a spreadsheet would run as a formula gets an apostrophe.
function cell(value) {
  let text = String(value);
  if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
}

// -- trace: Chrome's JSON trace events, which Perfetto reads ------------------------------------------------------------

// One process; a thread for each side, with a slice for each pass, and in it one for each of its measured steps.
function traceEvents() {
  const process = { pid: 1 }, micro = seconds => +(1e6 * seconds).toFixed(3), lanes = [...readPasses().values()];
  const events = [{ ph: 'M', ...process, tid: 0, name: 'process_name', args: { name: 'CascadeExit: ' + model.model } }];
  lanes.forEach((lane, n) => {
    const thread = { ...process, tid: n + 1 };
    events.push({ ph: 'M', ...thread, name: 'thread_name', args: { name: lane.title } },
      { ph: 'M', ...thread, name: 'thread_sort_index', args: { sort_index: n } });
    const slice = (name, start, end, args) => events.push({ ph: 'X', ...thread, cat: lane.mode, name,
      ts: micro(lane.from + start), dur: Math.max(0, micro(lane.from + end) - micro(lane.from + start)), args });
    for (const pass of lane.passes) {
      slice(sliceTitle(pass), pass.start, pass.end, sliceFacts(pass));
      const steps = pass.steps.filter(step => step.draft || step.ran.length);           // else: verdicts of one check
      if (steps.length > 1) for (const step of steps)
        slice(stepTitle(pass, step), step.start, step.end, step.ran.length ? { ran: sliceSpans(step.ran) } : {});
    }
  });
  return events;
}

const sliceTitle = pass => readsPrompt(pass) ? 'Read the prompt, first token' : draftCount(pass) ? 'Check ' + draftCount(pass) + (draftCount(pass) === 1 ? ' draft' : ' drafts')
  : pass.wrote.length ? exitName(pass.wrote[pass.wrote.length - 1].exit) : 'Stopped';
// The first step of a text also has the reading of the text before.
const stepTitle = (pass, step) => step === pass.steps[0] && readsPrompt(pass) ? 'Read the prompt' + (step.draft ? ', draft' : '') : step.draft ? 'Draft' : 'Check';
const sliceSpans = ran => ran.map(([first, end, rows]) => ({ segments: [first, end - 1], layers: layerRange(first, end), rows }));

function sliceFacts(pass) {
  const ran = pass.steps.flatMap(step => step.ran), drafted = draftCount(pass), read = pass.wrote.reduce((sum, r) => sum + (r.read || 0), 0);
  const facts = { tokens: pass.wrote.map(r => r.text), positions: pass.wrote.map(r => r.i), exits: pass.wrote.map(r => exitName(r.exit)),
    rows: ran.length ? Math.max(...ran.map(span => span[2])) : drafted + 1, accepted: acceptedOf(pass).length };
  if (drafted) Object.assign(facts, { drafted, drafts: draftsOf(pass).map(d => d.text) });
  if (ran.length) facts.ran = sliceSpans(ran);
  if (read) facts.weights_read = +read.toFixed(4);
  return facts;
}

const traceFile = () => JSON.stringify({ traceEvents: traceEvents(), displayTimeUnit: 'ms',
  otherData: { model: model.model, mode: run.mode, machine: run.machine || '', date: run.date || '' } });

feature({
  build() { addTab('files', 'Save', files()); },
  draw() { for (const node of parts.saves) node.disabled = !run || !records.some(record => record.type === 'token'); },
});
