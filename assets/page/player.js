// The player: shows the records of a run again, at the pace at which they happened or at any moment of it. It plays
// recorded runs, and any live run once it has finished.

const RATES = [0.25, 0.5, 1, 2, 4];
const player = { value: null, shown: 0, clock: 0, rate: 1, frame: 0, last: 0, times: [], atEnd: true };

const replaying = () => player.value !== null;                  // a recorded run, not one that this page computed
const playing = () => player.frame !== 0;

function startReplay(value) {
  if (player.value === value) return;
  if (run && !replaying()) cleared.add(run.run);                // late frames of the live run must not win
  stopReplay();
  forget();
  player.value = value;
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
  let now = 0, from = 0;
  player.times = records.map(record => {
    if (record.type === 'fork') from = now;
    if (!missing(record.t)) now = Math.max(now, from + record.t);
    return now;
  });
  return now;
}

function play(from) {
  pause();
  const length = timeRecords();
  if (from >= length) from = 0;
  seek(from);
  player.last = performance.now();
  const step = now => {
    player.clock += player.rate * (now - player.last) / 1000;
    player.last = now;
    if (player.clock >= length) { seekToEnd(); pause(); return drawPlayer(); }
    showUntil(player.clock);
    player.frame = requestAnimationFrame(step);
  };
  player.frame = requestAnimationFrame(step);
  drawPlayer();
}

function pause() {
  cancelAnimationFrame(player.frame);
  player.frame = 0;
  drawPlayer();
}

function seek(seconds) {
  if (!records.length) return;
  const length = timeRecords();
  player.clock = Math.max(0, Math.min(seconds, length));
  if (player.clock >= length) return seekToEnd();
  showUntil(player.clock);
  drawPlayer();
}

function showUntil(clock) {
  let n = player.shown;
  if (n && player.times[n - 1] > clock || n > records.length) { n = 0; player.shown = 0; }
  let to = n;
  while (to < records.length && (player.times[to] <= clock && records[to].type !== 'end' || records[to].type === 'model' || records[to].type === 'run')) to++;
  if (n === 0) resetShown();
  player.atEnd = false;
  show(records.slice(n, to));
  player.shown = to;
  each('seek', clock);
  drawPlayer();
}

function seekToEnd() {
  if (player.shown > records.length) player.shown = 0;
  const n = player.shown;
  if (n === 0) resetShown();
  show(records.slice(n));
  player.shown = records.length;
  player.clock = timeRecords();
  player.atEnd = true;
  each('seek', player.clock);
  drawPlayer();
}

function stepBy(direction) {                                    // to the next or the previous pass
  pause();
  timeRecords();
  const now = player.clock + 1e-9 * direction;
  const times = direction > 0 ? player.times : [...player.times].reverse();
  const to = times.find(t => direction > 0 ? t > now : t < now - 2e-9);
  if (to !== undefined) seek(to);
}

// -- its controls ----------------------------------------------------------------------------------------------------------

function playerBar() {
  const bar = make('div', 'ce-player');
  bar.setAttribute('role', 'group');
  bar.setAttribute('aria-label', 'Play this run again');
  const back = button('ce-small', '‹', () => stepBy(-1)), forth = button('ce-small', '›', () => stepBy(1));
  back.title = 'One step back'; forth.title = 'One step on';
  const toggle = button('ce-small ce-play', 'Play', () => playing() ? pause() : play(player.atEnd ? 0 : player.clock));
  const range = make('input');
  range.type = 'range'; range.min = 0; range.max = 1000; range.value = 1000;
  range.setAttribute('aria-label', 'Moment of the run');
  range.addEventListener('input', () => { pause(); seek(range.value / 1000 * timeRecords()); });
  const rate = make('select');
  rate.setAttribute('aria-label', 'Speed of the player');
  for (const r of RATES) rate.append(new Option(r < 1 ? '1/' + 1 / r + '×' : r + '×', r, r === 1, r === 1));
  rate.addEventListener('change', () => { player.rate = +rate.value; });
  const clock = make('span', 'ce-clock');
  bar.append(back, toggle, forth, range, clock, rate);
  parts.player = { bar, toggle, range, clock };
  bar.hidden = true;
  return bar;
}

function drawPlayer() {
  if (!parts || !parts.player) return;
  const { bar, toggle, range, clock } = parts.player, length = player.times.length ? player.times[player.times.length - 1] : 0;
  bar.hidden = !(replaying() || finished || !player.atEnd) || !records.length;
  put(toggle, playing() ? 'Pause' : 'Play');
  toggle.setAttribute('aria-label', playing() ? 'Pause' : 'Play this run again');
  if (document.activeElement !== range || playing()) range.value = length ? 1000 * player.clock / length : 1000;
  put(clock, number(player.clock, 2) + ' s');
}

feature({ finish() { if (!playing() && player.atEnd) player.clock = timeRecords(); drawPlayer(); } });
