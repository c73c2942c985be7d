// The run as a file.

function files() {
  return make('div', 'ce-files', null,
    button('ce-small', 'Save run (JSON)', () => save('cascadeexit-run.json', 'application/json',
      JSON.stringify({ format: model.format, records: recorded() }))),
    button('ce-small', 'Save tokens (CSV)', () => save('cascadeexit-tokens.csv', 'text/csv', table())));
}

const recorded = () => records.filter(record => record.type !== 'status');

function table() {
  const rows = [['side', 'position', 'token', 'text', 'exit', 'layer', 'status', 'confidence', 'milliseconds', 'weights_read', 'full_choice']];
  for (const name of order) sides[name].records.forEach((r, i) => {
    const node = sides[name].nodes[i];
    rows.push([name, i, r.id, node.textContent, isLast(r.exit) ? 'full' : r.exit === COPIED ? 'copied' : r.exit + 1, isLast(r.exit) ? model.layers : r.exit === COPIED ? 0 : model.exits[r.exit].layer,
      r.status, r.conf[r.exit] ?? '', r.ms ?? '', r.read ?? '', sides[name].choices[i] ?? '']);
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


feature({ build() { addTab('files', 'Save', files()); } });
