// The layer map: what every exit would have written at each position.

const WINDOW = 48;                           // positions shown at once

function layerMap() {
  const table = make('table', 'ce-map-table'), scroll = make('div', 'ce-map-scroll', null, table);
  scroll.tabIndex = 0;
  scroll.setAttribute('role', 'region');
  scroll.setAttribute('aria-label', 'What every exit would have written');
  const back = button('ce-small', '‹ earlier'), forth = button('ce-small', 'later ›'), place = make('span', 'ce-place');
  let start = 0, total = 0;
  const load = async to => {
    const map = await server.layer_map([run.run, 'cascade', to, WINDOW]);
    if (!map) return put(place, 'The server no longer keeps this run. Run it again.');
    ({ start, total } = map);
    drawMap(table, map);
    put(place, 'tokens ' + (start + 1) + ' to ' + (start + map.columns.length) + ' of ' + total);
    back.disabled = start === 0;
    forth.disabled = start + map.columns.length >= total;
  };
  back.addEventListener('click', () => load(Math.max(0, start - WINDOW)));
  forth.addEventListener('click', () => load(start + WINDOW));
  const key = make('p', 'ce-sub', 'Columns: positions in the first text. Rows: exits; top row: the full model. Stronger colour: more confident. Bold: the full model would choose this token. Bar below a token: this row wrote it.');
  const box = make('div', 'ce-map', null, key, make('p', 'ce-map-bar', null, back, forth, place), scroll);
  let shown = null;
  return { box, open() {
    const reason = whyNoMap();
    for (const node of [key, back, forth, scroll]) node.hidden = Boolean(reason);
    if (reason) put(place, reason);
    if (reason || shown === run.run) return;
    shown = run.run;
    put(place, 'Loading…');
    load(0);
  }, forget() { if (run && shown === run.run) return; shown = null; table.replaceChildren(); } };
}

function whyNoMap() {                        // '' where there is a table
  return replaying() ? 'A recorded run has no table of layers. Press Run: when your own run is over, this table shows what every exit would have written.'
    : !run ? 'Press Run: when the run is over, this table shows what every exit would have written.'
    : isOver() ? '' : 'When the run is over, this table shows what every exit would have written.';
}

const isOver = () => records.some(record => record.type === 'end' && record.side === 'cascade');

function drawMap(table, map) {
  const rows = [], written = readPasses().get('cascade').at;            // also of tokens after the player's moment
  for (let s = model.exits.length; s >= 0; s--) {
    const row = make('tr', null, null, make('th', null, null, swatch(s)));
    map.columns.forEach((column, c) => {
      const choice = column[s], record = written[map.start + c] && written[map.start + c].wrote.find(r => r.i === map.start + c);
      const cell = make('td', colourClass(s) + (choice.id === column[column.length - 1].id ? ' same' : '') + (record && record.exit === s ? ' left' : ''), visible(choice.text));
      cell.style.setProperty('--p', Math.round(100 * choice.p) + '%');
      cell.title = visible(choice.text) + ' · ' + percent(choice.p) + (isLast(s) ? ' probability' : ' confidence') + (record && record.exit === s ? ' · wrote the token' : '');
      row.append(cell);
    });
    rows.push(row);
  }
  table.replaceChildren(...rows);
}


let layers;
feature({
  build() { layers = layerMap(); addTab('layers', 'Layers', layers.box, layers.open); },
  begin() { layers.forget(); },
});
