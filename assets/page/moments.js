// Worst moments: the tokens at which the exits cost most, by how much likelier the full model's own choice was.

let moments;                                 // {list, words, which, side, shown: [{side, i, ...}], at}

function buildMoments() {
  const words = make('p', 'ce-sub ce-moments-words'), list = make('ol', 'ce-moments');
  const which = make('select', 'ce-compare-with');
  which.setAttribute('aria-label', 'Text whose worst moments are listed');
  which.addEventListener('change', () => { moments.side = which.value; drawMoments(); });
  moments = { words, list, which, side: '', shown: [], at: -1, key: '', of: '' };
  addTab('moments', 'Worst moments', make('div', null, null, make('div', 'ce-moments-head', null, words, which), list), drawMoments);
}

function worst(name) {                       // the list of a side; old recorded runs have positions only
  const side = sides[name], end = side.end;
  if (!end) return [];
  const found = end.moments && end.moments.length ? end.moments : (end.differs || []).map(i => ({ i }));
  return found.filter(m => side.records[m.i] && m.i >= side.start).map(m => ({ ...m, side: name }));
}

function drawMoments() {
  const texts = exitSides().filter(name => sides[name].end), side = texts.includes(moments.side) ? moments.side : texts[0], names = texts.filter(name => name === side);
  const verdicts = forks().map(name => name + (sides[name].verdict || '')), key = run ? run.run + side + texts + isRunning() + player.atEnd + verdicts + replaying() : '';
  if (moments.key === key) return;
  moments.key = key;
  const of = run ? run.run + side : '', at = moments.of === of ? moments.at : -1;       // a fork changes no place in the list
  Object.assign(moments, { of, at: -1 });
  drawChoice(texts, side);
  moments.shown = names.flatMap(worst).sort((a, b) => (b.p_full - b.p_said || 0) - (a.p_full - a.p_said || 0));
  moments.list.replaceChildren(...moments.shown.map(momentRow));
  markMoment(at);
  const sampled = run && run.greedy === false, n = moments.shown.length, reason = n ? whyNoFork() : '';
  put(moments.words, !run || !names.length ? 'The tokens that the full model would not have chosen are listed here when the run is over.'
    : n ? (n === 1 ? 'The only token that the full model would not have chosen.'
      : 'The ' + n + ' tokens where the full model most clearly preferred another one, the clearest first. Press n for the next one, p for the previous one.')
      + (reason ? ' ' + reason : '')
    : sampled ? 'Nothing to list: above temperature 0, tokens are chosen at random, so there is no single right token.'
    : names.every(name => isExact(sides[name])) ? 'Nothing to list: the full model checked every token, so this is exactly the text that it writes alone.'
    : 'Nothing to list: the full model would have chosen every token that the exits wrote.');
}

function drawChoice(texts, side) {            // which text is listed: a choice where there are more than one
  moments.which.hidden = texts.length < 2;
  moments.which.replaceChildren(...texts.map(name => new Option(sides[name].title, name, name === side, name === side)));
}

function momentRow(moment, k) {
  const side = sides[moment.side], record = side.records[moment.i];
  const said = moment.said ?? record.text, go = button('ce-moment', null, () => goToMoment(k));
  go.append(make('span', 'ce-moment-rank', String(k + 1)), swatch(record.exit), make('span', 'ce-moment-said', null, 'wrote ', momentWord(said), momentShare(moment.p_said)));
  go.append(make('span', 'ce-moment-full', null, ...moment.full === undefined ? ['the full model would choose another token'] : ['full model: ', momentWord(moment.full), momentShare(moment.p_full)]));
  const tried = forkOf(moment.side, moment.i, moment.id), verdict = tried && sides[tried].verdict;
  const context = make('span', 'ce-moment-context', null, ...verdict ? [make('span', 'ce-moment-verdict', verdict), ' '] : [], '… ' + momentContext(side, moment.i - 7, moment.i), make('b', null, side.nodes[moment.i].textContent), momentContext(side, moment.i + 1, moment.i + 5) + ' …');
  go.append(context, make('span', 'ce-moment-place', 'token ' + (moment.i + 1)));
  const row = make('li', null, null, go);
  if (moment.full !== undefined && !missing(moment.id)) {
    row.append(tried ? button('ce-small', 'Show ' + sides[tried].title, () => showFork(tried)) : tryButton(moment));
  }
  return row;
}

function tryButton(moment) {
  const reason = whyNoFork(), test = button('ce-small', 'Try ' + inQuotes(moment.full), () => askFork(moment.side, moment.i, { id: moment.id, text: moment.full }));
  test.title = reason || 'Continue from here with the full model’s choice, to see how much the text changes';
  test.disabled = Boolean(reason);
  return test;
}

const momentWord = text => make('b', 'ce-word', plain(text));
const momentShare = p => missing(p) ? '' : ' ' + likely(p);
const momentContext = (side, from, to) => side.nodes.slice(Math.max(0, from), to).map(node => node.textContent).join('').replace(/\s+/g, ' ');

function markMoment(k) {
  moments.at = k;
  moments.list.querySelectorAll('.ce-moment').forEach((row, at) => {
    if (at === k) row.setAttribute('aria-current', 'true'); else row.removeAttribute('aria-current');
  });
}

function goToMoment(k) {
  if (!moments.shown[k]) return;
  const { side, i } = moments.shown[k];
  markMoment(k);
  const row = moments.list.children[k], frame = dock.body.getBoundingClientRect(), at = row.getBoundingClientRect();
  if (dock.open === 'moments' && (at.top < frame.top || at.bottom > frame.bottom)) dock.body.scrollTop += at.top - frame.top - 40;
  parts[side].text.focus({ preventScroll: true });
  if (narrow() || parts[side].text.getBoundingClientRect().bottom < 80) parts[side].text.scrollIntoView({ block: 'nearest' });
  lookAt(side, i);
  alongside(side, i);
}

// The other texts show the same place.
function alongside(name, i) {
  if (!run || !settled()) return;
  realign();
  if (name !== FULL && aligned.has(name)) {
    const to = Math.min(across(aligned.get(name).blocks, i), sides[FULL].nodes.length - 1);
    unfold(FULL, to);
    reveal(FULL, to);
    keepFree(sides[FULL].nodes[to]);
  }
}

root.addEventListener('keydown', event => {
  const move = { n: 1, p: -1 }[event.key];
  if (!move || event.ctrlKey || event.altKey || event.metaKey || event.target.matches('input, select, textarea') || !moments) return;
  drawMoments();
  const n = moments.shown.length;
  if (!n) return;
  event.preventDefault();
  goToMoment(moments.at < 0 ? (move > 0 ? 0 : n - 1) : (moments.at + move + n) % n);
});

feature({ build: buildMoments, begin() { moments.key = ''; }, finish() { moments.key = ''; drawMoments(); } });
