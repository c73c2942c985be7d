// The run as a file: to replay it, to calculate with it, to see it in a trace viewer, to show it.

const FORMATS = [
  ['Save run (JSON)', 'Everything. “Replay a saved run” in Settings plays it again.', () => save('run.json', 'application/json', runFile())],
  ['Save tokens (CSV)', 'One row for each token: exit, confidence, time, the full model’s choice.', () => save('tokens.csv', 'text/csv', table())],
  ['Save trace (JSON)', 'Every pass on a time axis. Open it at ui.perfetto.dev.', () => save('trace.json', 'application/json', traceFile())],
  ['Save picture (SVG)', 'Both texts with colours and numbers, for a paper.', () => save('tokens.svg', 'image/svg+xml', pictureFile())],
  ['Save picture (PNG)', 'The same picture as pixels, for a post.', savePixels],
];

function files() {
  parts.saves = FORMATS.map(([title, , action]) => button('ce-small', title, action));
  return make('div', 'ce-files', null, ...FORMATS.map(([, words], n) =>
    make('div', 'ce-file', null, parts.saves[n], make('p', null, words))));
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
  const same = side.name === FULL ? undefined : agrees(side, i);
  const id = side.choices[i] ?? (same ? side.records[i].id : '');
  return [id, same === undefined ? '' : same ? 'yes' : 'no'];
}

function table() {
  const rows = [['side', 'position', 'token', 'text', 'exit', 'layer', 'status', 'confidence', 'milliseconds', 'weights_read', 'full_choice', 'agrees', 'seconds', 'same_position']];
  const theirs = sides[FULL].records;
  for (const name of order) sides[name].records.forEach((r, i) => {
    const node = sides[name].nodes[i], twin = name !== FULL && theirs[i];
    rows.push([name, i, r.id, node.textContent, isLast(r.exit) ? 'full' : r.exit === COPIED ? 'copied' : r.exit + 1, isLast(r.exit) ? model.layers : r.exit === COPIED ? 0 : model.exits[r.exit].layer,
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

// The passes of a side: what it did between two moments at which tokens became final. A pass has its begin and end in
// seconds, its final tokens and, in Exact, its drafts and when the last of them was made.
function passesOf(side) {
  const passes = [];
  let open = null, before = 0;
  for (const r of side.events) {
    if (missing(r.t) && !open) continue;
    const closes = open && open.tokens.length && (r.status === 'draft' || r.t > open.end);
    if (!open || closes) {
      if (open) before = open.end;
      passes.push(open = { begin: before, end: before, tokens: [], drafts: [], rejected: 0, ran: [], drafted: null });
    }
    if (!missing(r.t)) open.end = Math.max(open.end, r.t);
    if (r.ran) open.ran.push(...r.ran);
    if (r.status === 'draft') { open.drafts.push(r); open.drafted = r.t; }
    else if (r.status === 'rejected') open.rejected++;
    else open.tokens.push(r);
  }
  return passes;
}

function traceEvents() {
  const micro = seconds => Math.round(1e6 * seconds * 1000) / 1000, process = { pid: 1 };
  const events = [{ ph: 'M', ...process, tid: 0, name: 'process_name', args: { name: 'CascadeExit: ' + model.model } }];
  order.forEach((name, n) => {
    const side = sides[name], thread = { ...process, tid: n + 1 }, passes = passesOf(side);
    events.push({ ph: 'M', ...thread, name: 'thread_name', args: { name: side.title } },
      { ph: 'M', ...thread, name: 'thread_sort_index', args: { sort_index: n } });
    passes.forEach((pass, k) => {
      const writers = pass.tokens.map(r => exitName(r.exit)), accepted = pass.tokens.filter(r => r.status === 'accepted').length;
      const args = { tokens: pass.tokens.map(r => side.nodes[r.i] ? side.nodes[r.i].textContent : r.text), positions: pass.tokens.map(r => r.i), exits: writers,
        rows: pass.ran.length ? Math.max(...pass.ran.map(span => span[2])) : pass.drafts.length ? pass.drafts.length + 1 : 1, accepted };
      if (pass.drafts.length) Object.assign(args, { drafted: pass.drafts.length, rejected: pass.rejected });
      if (pass.ran.length) args.ran = pass.ran.map(([first, end, rows]) => ({ segments: [first, end - 1], rows }));
      const reads = pass.tokens.reduce((sum, r) => sum + (r.read || 0), 0);
      if (reads) args.weights_read = +reads.toFixed(4);
      const title = k === 0 ? 'Read the prompt, first token' : pass.drafts.length ? 'Check ' + pass.drafts.length + ' drafts' : writers[writers.length - 1] || 'Pass';
      const slice = (name, from, to, more) => events.push({ ph: 'X', ...thread, cat: side.mode || name, name, ts: micro(from), dur: Math.max(0, micro(to) - micro(from)), ...more });
      slice(title, pass.begin, pass.end, { args });
      if (pass.drafted !== null && pass.drafted > pass.begin) slice('Draft', pass.begin, pass.drafted, { args: { drafts: pass.drafts.map(r => r.text) } });
    });
  });
  return events;
}

const traceFile = () => JSON.stringify({ traceEvents: traceEvents(), displayTimeUnit: 'ms',
  otherData: { model: model.model, mode: run.mode, machine: run.machine || '', date: run.date || '' } });

feature({
  build() { addTab('files', 'Save', files()); },
  draw() { for (const node of parts.saves) node.disabled = !run || !order.some(name => sides[name].tokens); },
});
