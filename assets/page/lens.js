// The lens chart: how likely a token was after each exit, and which rank it had there. The dashed line is the full
// model's own choice, where it is another token.

const LENS = { width: 272, height: 134, left: 36, right: 262, top: 20, bottom: 112 };

function lensChart(answer, id, full) {
  const n = answer.readings.length, other = full.id !== id;
  const find = (s, wanted) => answer.readings[s].top.findIndex(c => c.id === wanted);
  const at = (s, wanted) => { const k = find(s, wanted); return k < 0 ? null : { p: answer.readings[s].top[k].p, rank: k + 1 }; };
  const ours = answer.readings.map((_, s) => answer.lens ? answer.lens[s] : at(s, id));
  const theirs = other ? answer.readings.map((_, s) => at(s, full.id)) : [];
  const x = s => LENS.left + 14 + (LENS.right - LENS.left - 28) * (n > 1 ? s / (n - 1) : 0.5);
  const y = p => LENS.bottom - (LENS.bottom - LENS.top) * p;
  const label = (text, px, py, anchor = 'middle', kind = 'ce-lens-label') => {
    const node = drawn('text', { x: px, y: py, 'text-anchor': anchor, class: kind });
    node.textContent = text;
    return node;
  };
  const svg = drawn('svg', { viewBox: `0 0 ${LENS.width} ${LENS.height}`, width: LENS.width, height: LENS.height, role: 'img', class: 'ce-lens' });
  for (const p of [0, 0.5, 1]) svg.append(
    drawn('line', { x1: LENS.left, x2: LENS.right, y1: y(p), y2: y(p), class: 'ce-lens-grid' }), label(percent(p), LENS.left - 5, y(p) + 4, 'end'));
  for (let s = 0; s < n; s++) svg.append(label(isLast(s) ? 'full' : s + 1, x(s), LENS.bottom + 15));
  svg.append(label('exit', LENS.left - 5, LENS.bottom + 15, 'end'));
  svg.append(...lensLine(theirs, x, y, 'theirs'), ...lensLine(ours, x, y, 'ours'));
  ours.forEach((point, s) => {
    if (!point) return;
    const crossed = theirs[s] && theirs[s].p > point.p && y(point.p) - y(theirs[s].p) < 26;
    svg.append(label(point.rank ? '#' + point.rank : 'none', x(s), crossed ? Math.min(LENS.bottom - 1, y(point.p) + 15) : y(point.p) - 7, 'middle', 'ce-lens-rank'));
  });
  const said = inQuotes(card.node.textContent);
  svg.setAttribute('aria-label', 'Probability of ' + said + ' after each exit: '
    + ours.map((point, s) => swatchText(s) + ' ' + (point ? percent(point.p) + (point.rank ? ', rank ' + point.rank : '') : 'not among its likeliest tokens')).join('; '));
  const key = make('figcaption', null, null, make('span', 'ce-lens-ours', said));
  if (other) key.append(make('span', 'ce-lens-theirs', inQuotes(full.text) + ', the full model’s choice'));
  return make('figure', 'ce-lens-box', null, make('p', 'ce-lens-title', 'Probability and rank (#) after each exit'), svg, key);
}

function lensLine(points, x, y, kind) {      // gaps where a probability is not known
  const nodes = [];
  let stretch = [];
  const end = () => {
    if (stretch.length > 1) nodes.push(drawn('polyline', { points: stretch.join(' '), class: 'ce-lens-line ' + kind }));
    stretch = [];
  };
  points.forEach((point, s) => point ? stretch.push(x(s) + ',' + y(point.p)) : end());
  end();
  points.forEach((point, s) => { if (point) nodes.push(drawn('circle', { cx: x(s), cy: y(point.p), r: 3.5, class: 'ce-lens-dot ' + kind })); });
  return nodes;
}
