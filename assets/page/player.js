// The player: shows the records of a run again, at the pace at which they happened or at any moment of it. It plays
// recorded runs, and any live run once it has finished.

const RATES = [0.25, 0.5, 1, 2, 4];
const LONGEST_FRAME = 150;                   // milliseconds
const player = { value: null, shown: 0, clock: 0, rate: 1, frame: 0, last: 0, times: [], atEnd: true, hidden: null };

const replaying = () => player.value !== null;                  // a recorded run, not one that this page computed
const playing = () => player.frame !== 0;

function startReplay(value) {
  if (player.value === value) return;
  if (run && !replaying()) cleared.add(run.run);                // late frames of the live run must not win
  stopReplay();
  forget();
  player.value = value;
  player.shown = 0;
  records = value.slice(value.indexOf('\n') + 1).split('\n').filter(Boolean).map(line => expand(JSON.parse(line)));
  waiting(false);
  if (reducedMotion) seekToEnd(); else play(0);
}

function stopReplay() {
  pause();
  if (replaying()) { player.value = null; forget(); }
}

// The moment of each record, in seconds from the begin of the run. A fork begins where all before it ended.
function timeRecords() {
  const { times } = player;
  if (times.of !== records) player.times = Object.assign([], { of: records, now: 0, from: 0 });
  for (let n = player.times.length; n < records.length; n++) {  // only what came since the last call
    const { type, t } = records[n];
    if (type === 'fork') player.times.from = player.times.now;
    if (!missing(t)) player.times.now = Math.max(player.times.now, player.times.from + t);
    player.times.push(player.times.now);
  }
  return player.times.now;
}

// A run can be played when nothing is being written: a recorded run always, a live one once it has ended.
const playable = () => records.some(record => record.type === 'token')
  && (replaying() || !document.body.classList.contains('ce-running'));

function play(from) {
  pause();
  const length = timeRecords();
  player.last = 0;
  const step = now => {
    if (!playable()) return pause();                            // a new run is on its way
    player.frame = requestAnimationFrame(step);
    // A page that is loading or out of sight draws no frames: what nobody could see is not played.
    player.clock += player.last ? player.rate * Math.min(now - player.last, LONGEST_FRAME) / 1000 : 0;
    player.last = now;
    if (player.clock < length) return showUntil(player.clock);
    seekToEnd();
    pause();
  };
  player.frame = requestAnimationFrame(step);
  player.clock = from < length ? from : 0;
  showUntil(player.clock);
}

function pause() {
  cancelAnimationFrame(player.frame);
  player.frame = 0;
  tellPlayer();
  drawPlayer();
}

function toggle() { if (playing()) pause(); else play(player.atEnd ? 0 : player.clock); }

function seek(seconds) {
  if (!records.length) return;
  const length = timeRecords();
  player.clock = Math.max(0, Math.min(seconds, length));
  if (player.clock >= length) seekToEnd(); else showUntil(player.clock);
}

// For a pointer that moves: at most one jump in a frame. Going back means to write everything again, which takes longer
// than a frame for long texts. Until the pointer rests, the tokens of later passes are only hidden.
const RESTS = 120;                           // milliseconds

function seekSoon(seconds) {
  if (playing()) pause();
  player.wanted = seconds;
  player.soon = player.soon || requestAnimationFrame(() => {
    player.soon = 0;
    clearTimeout(player.rests);
    if (player.wanted >= shownTime() && !player.hidden) return seek(player.wanted);
    hideAfter(player.wanted);
    player.clock = Math.max(0, Math.min(player.wanted, timeRecords()));
    each('seek', player.clock);
    drawPlayer();
    player.rests = setTimeout(() => { if (!playing()) seek(player.clock); }, RESTS);
  });
}

const shownTime = () => player.atEnd ? timeRecords() : player.shown ? player.times[player.shown - 1] : 0;

function hideAfter(clock) {                  // of the tokens that are shown
  player.hidden = player.hidden || {};
  player.atEnd = false;
  for (const [name, lane] of readPasses()) {
    const side = sides[name], pass = side && clock >= lane.from ? passAt(lane, clock - lane.from) : null;
    if (!side) continue;
    const wrote = pass && pass.end <= clock - lane.from ? pass : pass && lane.passes[pass.n - 1];
    const keep = wrote && wrote.wrote.length ? wrote.wrote[wrote.wrote.length - 1].i + 1 : side.start;
    const hidden = player.hidden[name] === undefined ? side.nodes.length : player.hidden[name];
    for (let i = Math.min(keep, hidden); i < Math.max(keep, hidden); i++)
      if (side.nodes[i]) side.nodes[i].classList.toggle('ahead', i >= keep);
    player.hidden[name] = keep;
  }
  for (const name of order) {                                   // after all changes, so that the layout is computed once
    const { nodes } = sides[name], last = nodes[Math.min(player.hidden[name] || 0, nodes.length) - 1], { text } = parts[name];
    if (!last) continue;
    const box = text.getBoundingClientRect(), { top, bottom } = last.getBoundingClientRect();
    if (top < box.top || bottom > box.bottom) text.scrollTop += bottom - box.bottom + 16;
  }
}

function showHidden() {                      // before the exact state is written
  if (!player.hidden) return;
  for (const name of Object.keys(player.hidden))
    if (sides[name]) for (const node of sides[name].nodes.slice(player.hidden[name])) if (node) node.classList.remove('ahead');
  player.hidden = null;
}

// Show again from the beginning. The nodes of the model and of the dock stay, since a pointer may be dragging one.
function rewind() {
  const first = records.findIndex(record => record.type === 'run');
  if (first > 0 && records.includes(model)) closeCard(); else resetShown();
  return model ? first : 0;
}

function showUntil(clock) {
  showHidden();
  let from = player.shown;
  const back = from === 0 || from > records.length || player.times[from - 1] > clock;
  const focused = back && document.activeElement && document.activeElement.closest('.ce-text');
  if (back) from = rewind();
  let to = from;
  while (to < records.length && (player.times[to] <= clock || records[to].type === 'model' || records[to].type === 'run')) to++;
  player.atEnd = false;
  show(records.slice(from, to));
  player.shown = to;
  if (focused && parts[focused.dataset.side]) parts[focused.dataset.side].text.focus({ preventScroll: true });
  tellPlayer();
  each('seek', clock);
  drawPlayer();
}

function seekToEnd() {
  showHidden();
  if (player.shown > records.length || player.shown === 0) player.shown = rewind();
  show(records.slice(player.shown));
  player.shown = records.length;
  player.clock = timeRecords();
  player.atEnd = true;
  tellPlayer();
  each('seek', player.clock);
  drawPlayer();
}

// The status line while a run is looked through. The end of a run has words of its own.
function tellPlayer() {
  if (!model || !run || !playable() || document.body.classList.contains('ce-running')) return;
  if (!player.atEnd) return playing() ? status(replaying() ? 'Playing a recorded run' : 'Playing this run again', 'busy')
    : status('Paused', 'paused');
  if (finished && /busy|paused/.test(parts.status.className)) status(overWords(), 'done');
}

function stepBy(direction) {                                    // to the end of the next or the previous pass
  pause();
  const now = player.atEnd ? timeRecords() : player.clock, ends = passEnds();
  const to = direction > 0 ? ends.find(t => t > now + 1e-7) : ends.reverse().find(t => t < now - 1e-7) || 0;
  if (to !== undefined) seekSoon(to);
}

// -- its controls ----------------------------------------------------------------------------------------------------------

function playerBar() {
  const bar = make('div', 'ce-player');
  bar.setAttribute('role', 'group');
  bar.setAttribute('aria-label', 'Play this run again');
  const back = button('ce-small', '‹', () => stepBy(-1)), forth = button('ce-small', '›', () => stepBy(1));
  for (const [step, words] of [[back, 'One pass back'], [forth, 'One pass forward']]) {
    step.title = words;
    step.setAttribute('aria-label', words);
  }
  const go = button('ce-small ce-play', 'Play', toggle);
  go.setAttribute('aria-keyshortcuts', 'Space');
  const range = make('input');
  range.type = 'range'; range.min = 0; range.max = 1; range.step = 'any'; range.value = 1;
  range.setAttribute('aria-label', 'Moment of the run');
  range.addEventListener('input', () => seekSoon(range.value * timeRecords()));
  const rate = make('select');
  rate.setAttribute('aria-label', 'Speed of the player');
  for (const r of RATES) rate.append(new Option(r < 1 ? '1/' + 1 / r + '×' : r + '×', r, r === 1, r === player.rate));
  rate.addEventListener('change', () => { player.rate = +rate.value; });
  const clock = make('span', 'ce-clock');
  bar.append(back, go, forth, range, clock, rate);
  parts.player = { bar, go, range, clock, back, forth };
  bar.hidden = true;
  return bar;
}

function drawPlayer() {
  if (!parts || !parts.player) return;
  const { bar, go, range, clock, back, forth } = parts.player, length = player.times.length ? player.times[player.times.length - 1] : 0;
  bar.hidden = !playable();
  if (bar.hidden) return;
  put(go, playing() ? 'Pause' : 'Play');
  go.title = (playing() ? 'Pause' : player.atEnd ? 'Play this run again' : 'Continue') + ' (space)';
  back.disabled = player.clock <= 0;
  forth.disabled = player.atEnd;
  const share = length ? player.clock / length : 1;
  if (!player.soon) range.value = share;
  range.style.setProperty('--done', percent(share, 2));
  const words = number(player.clock, 2) + ' of ' + number(length, 2) + ' s';
  put(clock, words);
  range.setAttribute('aria-valuetext', words);
}

// Space plays and pauses, unless it writes into a field or presses a button.
root.addEventListener('keydown', event => {
  if (event.key !== ' ' || event.ctrlKey || event.altKey || event.metaKey || !parts || !playable()
      || event.target.closest('input, textarea, select, button, a, summary, [role=tab], [contenteditable]')) return;
  event.preventDefault();
  toggle();
});

feature({
  finish() { if (!playing() && player.atEnd) player.clock = timeRecords(); drawPlayer(); },
  draw: drawPlayer,
});
