// Marks of the timeline: the cursor, the pass under the pointer and the chosen one, their links with the texts, and what
// the pointer and the keys do.

// -- marks and the cursor --------------------------------------------------------------------------------------------------

const boxOf = pass => pass && timeline.boxes.find(box => box.lane === pass.lane);

function placeOver(node, pass) {
  const box = boxOf(pass);
  node.hidden = !box || pass.end < timeline.from || pass.start > timeline.to;
  if (node.hidden) return;
  const left = Math.max(gutter(), xOf(pass.start)), right = Math.min(plotWidth(), xOf(pass.end));
  node.style.left = left - 1 + 'px';
  node.style.width = Math.max(3, right - left + 1) + 'px';
  node.style.top = box.top - 1 + 'px';
  node.style.height = box.height + 2 + 'px';
}

function placeMarks() {
  placeOver(timeline.nodes.light, timeline.hover);
  placeOver(timeline.nodes.mark, timeline.chosen);
}

// The lanes that the player plays: a fork has a clock of its own, which begins where the player's stood when it was made.
function playedBoxes() {
  const forks = timeline.boxes.filter(box => box.lane.fork && player.clock > box.lane.from);
  return player.atEnd || !forks.length ? timeline.boxes.filter(box => !box.lane.fork) : forks.slice(-1);
}

const playhead = () => player.atEnd || !timeline.boxes.length ? null : player.clock - playedBoxes()[0].lane.from;

function placeCursor() {
  const { cursor } = timeline.nodes, clock = player.atEnd ? Infinity : player.clock, current = playedBoxes();
  for (const box of timeline.boxes) {
    const x = Math.max(gutter(), Math.min(plotWidth(), xOf(clock - box.lane.from)));
    box.later.hidden = player.atEnd;
    if (!player.atEnd) { box.later.style.left = x + 'px'; box.later.style.width = plotWidth() - x + 'px'; }
  }
  const moment = player.atEnd ? timeLength() : playhead();
  cursor.hidden = !playable() || moment < timeline.from - 1e-9 || moment > timeline.to + 1e-9;
  if (cursor.hidden) return;
  cursor.style.transform = 'translateX(' + Math.min(plotWidth() - 1, xOf(moment)) + 'px)';
  cursor.style.height = current[current.length - 1].bottom + 'px';
}

// -- links with the text ---------------------------------------------------------------------------------------------------

function lightTokens() {
  for (const node of timeline.lit) node.classList.remove('lit');
  timeline.lit = [timeline.hover, timeline.chosen].flatMap(pass => pass && sides[pass.lane.name]
    ? pass.wrote.map(record => sides[pass.lane.name].nodes[record.i]).filter(Boolean) : []);
  for (const node of timeline.lit) node.classList.add('lit');
}

function hoverPass(pass) {
  if (timeline.hover === pass) return;
  timeline.hover = pass;
  lightTokens();
  if (dock.open === 'time') placeMarks();
}

function choosePass(pass) {
  timeline.chosen = pass;
  lightTokens();
  showPass(pass);
  if (!pass) return placeMarks();
  keepInView(pass.start, pass.end);
  drawTimelineSoon();
  const last = pass.wrote[pass.wrote.length - 1], name = pass.lane.name;
  if (last && sides[name] && sides[name].nodes[last.i]) reveal(name, last.i);
}

function leavePass() {
  choosePass(null);
  timeline.nodes.plot.focus({ preventScroll: true });
}

function goToPass(pass) { if (playable()) { pause(); seek(pass.lane.from + pass.end); } }

function passOfToken(node) {
  const text = node.closest('.ce-text'), lane = text && readPasses().get(text.dataset.side);
  return lane && lane.at[sides[text.dataset.side].nodes.indexOf(node)] || null;
}

root.addEventListener('pointerover', event => {
  if (!timeline.nodes || dock.open !== 'time' || event.pointerType === 'touch') return;
  if (event.target.matches('.ce-text .t')) hoverPass(passOfToken(event.target));
  else if (!event.target.closest('.ce-time-plot')) hoverPass(null);
});
root.addEventListener('pointerleave', () => { if (timeline.nodes) hoverPass(null); });
root.addEventListener('click', event => {
  if (timeline.nodes && dock.open === 'time' && event.target.matches('.ce-text .t')) followToken(event.target);
});
root.addEventListener('keydown', event => {                     // after the text has moved its card
  if (timeline.nodes && dock.open === 'time' && card && event.target.closest('.ce-text')) followToken(card.node);
});

function followToken(node) {
  const pass = passOfToken(node);
  if (!pass || pass === timeline.chosen) return;
  timeline.chosen = pass;
  lightTokens();
  showPass(pass);
  keepInView(pass.start, pass.end);
  drawTimelineSoon();
}

// -- pointer and keys ------------------------------------------------------------------------------------------------------

function listenToTimeline(plot) {
  const at = event => { const box = plot.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const passUnder = ([x, y]) => {
    const box = timeline.boxes.find(b => y >= b.top - TITLE && y < b.bottom), seconds = secondsAt(x);
    return box && x >= gutter() && seconds <= box.lane.clock ? passAt(box.lane, seconds) || null : null;
  };
  const pointers = new Map();
  let drag = null;                           // {x, from, to, scrub, moved}
  const scrub = x => { const seconds = Math.max(0, secondsAt(Math.max(gutter(), x))); seekSoon(seconds); };

  plot.addEventListener('pointerdown', event => {
    if (event.button) return;
    const [x, y] = at(event);
    pointers.set(event.pointerId, x);
    plot.setPointerCapture(event.pointerId);
    const handle = Boolean(event.target.closest('.ce-time-axis, .ce-time-cursor')) && playable();
    drag = { x, from: timeline.from, to: timeline.to, scrub: handle, moved: false, at: [x, y] };
    if (handle) { plot.focus({ preventScroll: true }); scrub(x); event.preventDefault(); }
  });
  plot.addEventListener('pointermove', event => {
    const [x, y] = at(event);
    if (!drag || !pointers.has(event.pointerId)) return event.pointerType !== 'touch' && showTip(passUnder([x, y]), x, y);
    const before = pointers.get(event.pointerId);
    pointers.set(event.pointerId, x);
    if (pointers.size === 2) {               // two fingers
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      drag.moved = true;
      zoomTimeline(Math.min(3, Math.max(0.3, Math.abs(before - other) / Math.max(8, Math.abs(x - other)))), secondsAt((x + other) / 2));
      return Object.assign(drag, { x, from: timeline.from, to: timeline.to });
    }
    if (drag.scrub) return scrub(x);
    if (!drag.moved && Math.abs(x - drag.x) < 4) return;
    drag.moved = true;
    hideTip();
    const move = (drag.x - x) / Math.max(1, plotWidth() - gutter()) * (drag.to - drag.from);
    viewTime(drag.from + move, drag.to + move);
  });
  const released = event => {
    pointers.delete(event.pointerId);
    if (pointers.size || !drag) return;
    const { moved, scrub: scrubbed, at: place } = drag;
    drag = null;
    if (moved || scrubbed || event.type === 'pointercancel') return;
    const pass = passUnder(place);
    if (pass && !player.atEnd) goToPass(pass);
    choosePass(pass);
  };
  plot.addEventListener('pointerup', released);
  plot.addEventListener('pointercancel', released);
  plot.addEventListener('pointerleave', () => { hideTip(); hoverPass(null); });
  plot.addEventListener('dblclick', event => {
    const pass = event.target.closest('.ce-time-axis') ? null : passUnder(at(event));
    if (pass) goToPass(pass);
  });
  plot.addEventListener('wheel', event => {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
    if (!sideways && timeline.whole && event.deltaY > 0) return;           // nothing to zoom out of: scroll the page
    event.preventDefault();
    if (sideways) panTimeline((event.deltaX || event.deltaY) / plotWidth());
    else zoomTimeline(Math.exp(Math.max(-1, Math.min(1, event.deltaY * (event.ctrlKey ? 0.01 : 0.0025)))), secondsAt(at(event)[0]));
    hideTip();
  }, { passive: false });
  plot.addEventListener('keydown', timelineKey);
}

function timelineKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const actions = { ArrowRight: () => stepPass(1), ArrowLeft: () => stepPass(-1), ArrowUp: () => stepLane(-1), ArrowDown: () => stepLane(1),
    Home: () => stepPass(-Infinity), End: () => stepPass(Infinity),
    '+': () => zoomTimeline(0.5), '=': () => zoomTimeline(0.5), '-': () => zoomTimeline(2), w: () => zoomTimeline(0.5), s: () => zoomTimeline(2),
    a: () => panTimeline(-0.25), d: () => panTimeline(0.25), f: () => zoomTimeline(FIT), 0: () => zoomTimeline(FIT),
    Enter: () => timeline.chosen && goToPass(timeline.chosen), Escape: () => card ? closeCard() : choosePass(null) };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  event.stopPropagation();
  hideTip();
  action();
}

function stepPass(by) {
  const lane = timeline.chosen ? timeline.chosen.lane : timeline.boxes.length ? timeline.boxes[0].lane : null;
  if (!lane) return;
  const now = timeline.chosen ? timeline.chosen.n : by > 0 ? -1 : lane.passes.length;
  const pass = lane.passes[Math.max(0, Math.min(lane.passes.length - 1, now + by))];
  if (pass) choosePass(pass);
}

function stepLane(by) {
  const now = timeline.boxes.findIndex(box => timeline.chosen && box.lane === timeline.chosen.lane);
  const box = timeline.boxes[Math.max(0, Math.min(timeline.boxes.length - 1, now + by))];
  const pass = box && passAt(box.lane, timeline.chosen ? timeline.chosen.start + 1e-9 : 0);
  if (pass) choosePass(pass);
}

// -- the tip ---------------------------------------------------------------------------------------------------------------

function showTip(pass, x, y) {
  hoverPass(pass);
  const { tip, plot } = timeline.nodes;
  if (!pass) return hideTip();
  tip.replaceChildren(make('b', null, passTitle(pass)), make('span', null, passWords(pass)));
  tip.hidden = false;
  const box = boxOf(pass);
  tip.style.left = Math.max(0, Math.min(x + 12, plot.clientWidth - tip.offsetWidth)) + 'px';
  tip.style.top = (box.bottom + tip.offsetHeight + 4 > plot.clientHeight && box.top > tip.offsetHeight ? box.top - tip.offsetHeight - 4 : box.bottom + 2) + 'px';
}

function hideTip() { timeline.nodes.tip.hidden = true; }
