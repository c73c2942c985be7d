// The strip that stays at the top: which exit wrote how many tokens, the numbers of the run, and what happens now.

function buildStrip() {
  const bar = make('div', 'ce-share'), keys = make('ul', 'ce-keys');
  bar.setAttribute('aria-hidden', 'true');
  parts.share = []; parts.counts = []; parts.buttons = [];
  writers().forEach((exit, n) => {
    const count = make('span', 'ce-count', ''), place = make('span', 'ce-place', exitPlace(exit));
    const key = button('ce-key', null, () => only(exit));
    key.append(swatch(exit), place, count);
    key.title = 'Highlight only these tokens (key ' + (n + 1) + ')';
    key.setAttribute('aria-keyshortcuts', String(n + 1));
    key.setAttribute('aria-pressed', 'false');
    const item = make('li', null, null, key);
    item.hidden = exit === COPIED;                              // until a token is copied
    keys.append(item);
    const segment = make('div', 'ce-share-part ' + colourClass(exit));
    bar.append(segment);
    parts.share.push(segment); parts.counts.push(count); parts.buttons.push(key);
  });
  parts.keys = keys;
  parts.caption = make('span', 'ce-caption', null, 'Colour: which ', term('exit'), ' wrote each ', term('token'));
  parts.recorded = make('span', 'ce-flag ce-recorded', 'recorded run');
  parts.model = make('span', 'ce-model', model.model);
  const untrained = make('span', 'ce-flag', 'untrained exits');
  untrained.title = 'These exits were not trained for this model. They are rarely confident and often wrong. Exact mode stays exact.';
  untrained.hidden = model.trained;
  const head = make('div', 'ce-strip-head', null, parts.caption, bar, parts.recorded, untrained, parts.model);
  parts.catchUp = make('li', 'ce-catch-up');
  keys.append(parts.catchUp);
  parts.legend = make('section', 'ce-strip ce-legend', null, head, keys, numbers());
  parts.legend.setAttribute('aria-label', 'Results');
  return parts.legend;
}

function numbers() {
  parts.status = make('p', 'ce-status');
  parts.status.setAttribute('role', 'status');
  parts.badge = make('span', 'ce-badge');
  parts.badge.hidden = true;
  parts.loop = make('span', 'ce-flag ce-loop');
  parts.loop.hidden = true;
  parts.offer = button('ce-small ce-offer', 'Now in Exact mode', runExact);
  parts.offer.title = 'Run this prompt in Exact mode: the full model’s own text, checked';
  parts.offer.hidden = true;
  const tiles = make('dl', 'ce-tiles', null, tile('speed', 'Speed', 'times the full model', measureButton()),
    tile('agreement', 'Agreement', 'full model would choose the same'),
    tile('cost', 'Weights read', 'of the full model’s, per token'), tile('same', 'Same position', 'same token in both texts'));
  return make('div', 'ce-verdict', null, tiles, parts.loop, parts.badge, parts.offer, parts.status);
}

function tile(name, label, note, more) {
  const value = make('dd', 'ce-value', '–'), words = make('span', null, note), line = make('dd', 'ce-note', null, words, ...(more ? [' ', more] : []));
  parts[name] = value; parts[name + 'Note'] = words; words.dataset.note = note;
  return make('div', 'ce-tile', null, make('dt', null, null, term(label.toLowerCase(), label)), value, line);
}

function note(name, text, title = '') {
  put(parts[name + 'Note'], text || parts[name + 'Note'].dataset.note);
  parts[name + 'Note'].title = title;
}

// Speed varies from run to run: a visitor may ask for short repeats of the same prompt.
function measureButton() {
  parts.measure = button('ce-toggle ce-measure', 'Measure again', () => {
    waiting(true);
    status('Measuring the speed again…', 'busy');
    control('ce-measure').click();
  });
  parts.measure.title = 'Runs this prompt three more times, 64 tokens each, and shows the median speed-up';
  parts.measure.hidden = true;
  return parts.measure;
}

function status(text, kind = '') {
  if (!parts) return;
  put(parts.status, text);
  parts.status.className = 'ce-status ' + kind;
}

// A click on Stop before the run began, or while the speed is measured: no record of the run will tell.
document.addEventListener('click', event => {
  if (!event.target.closest('#ce-stop') || !(starting || finished && !replaying())) return;
  const words = starting ? 'Stopped before the run began.' : 'Stopped.';
  waiting(false);
  status(words, 'stopped');
});

let starting = false;                        // a click on Run counted, and nothing of its run came yet

// While a run is on its way, Run becomes Stop.
function waiting(on) {
  document.body.classList.toggle('ce-running', on);
  begun();
}

function begun() {
  starting = false;
  root.classList.remove('ce-earlier');
}

// The texts of an earlier run stand back until the new one begins.
function began() {
  waiting(true);
  starting = true;
  root.classList.add('ce-earlier');
  status('Starting…', 'busy');
  const queue = control('ce-queue');
  if (!queue || began.watched) return;
  began.watched = new MutationObserver(() => {                   // gradio shows the place in the queue there: "queue: 1/2"
    const place = starting && queue.textContent.match(/queue: (\d+)\//);
    if (place) status('Waiting: ' + (place[1] === '1' ? 'another run is' : place[1] + ' other runs are') + ' in progress…', 'busy');
  });
  began.watched.observe(queue, { subtree: true, childList: true, characterData: true });
}

function only(exit) {
  const kind = colourClass(exit), on = root.dataset.only !== kind;
  if (on) root.dataset.only = kind; else delete root.dataset.only;
  parts.buttons.forEach((key, n) => key.setAttribute('aria-pressed', String(on && colourClass(writers()[n]) === kind)));
}

// Digit keys work only while the focus is inside the token view, so that digits typed into a prompt stay there.
root.addEventListener('keydown', event => {
  const n = event.key - 1;
  if (event.ctrlKey || event.altKey || event.metaKey || !parts || !parts.buttons || !(n in parts.buttons)
      || parts.buttons[n].parentNode.hidden || event.target.matches('input, select')) return;
  event.preventDefault();
  only(writers()[n]);
});

// Choose Exact and run the same prompt again.
function runExact() {
  const exact = [...document.querySelectorAll('#ce-mode input')].find(input => input.value === 'verified');
  if (exact && !exact.checked) exact.click();
  const tolerance = document.querySelector('#ce-settings input[type=number][aria-label="number input for Tolerance"]');
  if (tolerance && +tolerance.value) {                            // above 0 it would not be exact
    tolerance.value = 0;
    for (const kind of ['input', 'change', 'blur']) tolerance.dispatchEvent(new Event(kind, { bubbles: true }));
  }
  // Gradio reads its values at the click: a moment after its radio has shown the choice.
  const go = tries => setTimeout(() => exact && !exact.closest('label').classList.contains('selected') && tries
    ? go(tries - 1) : setTimeout(() => control('ce-run').click(), 60), 30);
  go(40);
}

// -- drawing -----------------------------------------------------------------------------------------------------------------

function drawStrip() {
  const side = sides.cascade, stats = side.stats;
  parts.recorded.hidden = !replaying();
  if (replaying() && run) put(parts.recorded, ['recorded run', run.machine, run.date].filter(Boolean).join(', '));
  writers().forEach((exit, n) => {
    const share = !stats ? 0 : exit !== COPIED ? stats.routing_share[exit] : stats.copied_share || 0;
    parts.share[n].style.flexGrow = share;
    put(parts.counts[n], stats ? percent(share) : '');
    parts.counts[n].title = stats ? Math.round(share * stats.tokens) + ' tokens' : '';
    if (exit === COPIED) parts.buttons[n].parentNode.hidden = share < 1e-9;
  });
  put(parts.model, run && run.settings && run.settings.model || model.model);
  if (run) put(parts.caption.childNodes[2], run.mode === 'verified' ? ' drafted each ' : ' wrote each ');
  put(parts.catchUp, !run ? '' : run.mode !== 'verified' ? 'Skipped layers catch up later.'
    : side.tolerance ? 'The full model checks every draft, with tolerance ' + side.tolerance + '.' : 'The full model checks every draft.');
  drawNumbers(side, stats);
}

function drawNumbers(side, stats) {
  const { versus, end } = side, sampled = run && run.greedy === false, loops = end && end.loops;
  const speed = speedOf(side);
  put(parts.speed, missing(speed) ? '–' : speed.toFixed(1) + '×');
  const reason = loops ? ['high because the text repeats', ''] : side.spread ? spreadWords(side) : slowReason(side, stats);
  note('speed', ...reason);
  put(parts.cost, stats ? percent(stats.cost) : '–');
  const so = agreementSoFar(side), share = end && !missing(end.agreement) ? end.agreement : so && so.share;
  put(parts.agreement, sampled || missing(share) ? '–' : percent(share, share > 0.99 && share < 1 ? 1 : 0));
  note('agreement', ...stats && !missing(stats.acceptance) ? [acceptedWords(stats), 'All drafts count, including those on branches of the draft tree that the text did not take']
    : sampled ? ['not measured above temperature 0'] : end ? exitsAlone(side) : so ? ['of ' + so.judged + ' tokens checked so far'] : ['']);
  for (const name of ['speed', 'agreement']) parts[name].classList.toggle('aside', Boolean(loops));
  parts.loop.hidden = !loops;
  if (loops) {
    put(parts.loop, 'The text repeats itself from token ' + (loops.start + 1) + ' on');
    parts.loop.title = loopWords(loops);
  }
  const match = matchOf(side);
  put(parts.same, match ? percent(match.positional) : '–');
  note('same', !match ? '' : missing(match.first_divergence) ? end ? 'identical texts' : 'no difference so far'
    : match.first_divergence === 0 ? 'differs from the first token on' : 'identical for ' + match.first_divergence + ' token' + (match.first_divergence === 1 ? '' : 's'));
  const known = end && !missing(end.identical);
  parts.badge.hidden = !known;
  if (known) {
    parts.badge.classList.toggle('bad', !end.identical);
    put(parts.badge, end.identical ? '✓ Identical to the full model, all ' + sides.full.tokens + ' tokens compared'
      : '✗ Differs from the full model at token ' + (end.first_divergence + 1));
  }
  const live = finished && !replaying() && Boolean(end);
  parts.offer.hidden = !(live && run.mode !== 'verified');
  parts.measure.hidden = !(live && versus && !side.spread && !loops && control('ce-measure'));
}

const matchOf = side => side.end || side.versus;                // the comparison with the full model's text, position by position

const loopWords = ({ period }) => 'The same ' + period + ' tokens are written again and again. Such text is easy to predict: its speed and agreement say little about other texts.';

// The speed of the run, or what its repeats say: their median.
function speedOf({ versus, spread }) {
  const all = spread ? [...spread.speedups].sort((a, b) => a - b) : [], half = all.length >> 1;
  if (all.length) return all.length % 2 ? all[half] : (all[half - 1] + all[half]) / 2;
  return versus ? versus.speedup : null;
}

function spreadWords({ versus, spread: { speedups, tokens } }) {
  if (!speedups.length) return ['measuring again failed; try once more', ''];
  const [least, most] = [Math.min(...speedups), Math.max(...speedups)].map(x => x.toFixed(1)), n = speedups.length;
  return [(least === most ? least : least + ' to ' + most) + '× in ' + n + (n === 1 ? ' repeat' : ' repeats') + ' of the first ' + tokens + ' tokens',
    'Repeats: ' + speedups.map(x => x.toFixed(2) + '×').join(', ') + '. The number above is their median. The run itself: ' + number(versus.speedup, 2) + '×.'];
}

// The full model agrees with its own tokens by construction, so a text of many of them says little about the exits.
function exitsAlone(side) {
  const theirs = side.records.filter((r, i) => i >= decodedFrom(side) && !isLast(r.exit));
  if (side.mode !== 'cascade' || !theirs.length || theirs.length === side.records.length) return [''];
  const share = theirs.filter(r => agrees(side, r.i)).length / theirs.length;
  return ['exits alone: ' + percent(share), 'The full model would also choose ' + percent(share) + ' of the ' + theirs.length
    + ' tokens that exits wrote. The full model wrote the other tokens itself, so they always agree.'];
}

// Why a run with exits is slower than the full model: words, and more words on hover.
function slowReason(side, stats) {
  if (!stats || !side.versus || missing(side.versus.speedup) || side.versus.n < 16 || side.versus.speedup >= 0.95) return [''];
  const early = 1 - stats.routing_share[model.exits.length];
  return !model.trained ? ['slower: exits are untrained', 'These exits were not trained for this model, so they are rarely confident and often wrong. Computing them costs more than they save.']
    : side.mode === 'verified' ? ['slower: few drafts are right', 'Drafting costs time, and here the full model accepts too few drafts to make up for it.']
    : early < 0.3 ? ['slower: few tokens stop early', 'Only ' + percent(early) + ' of the tokens stopped early. That saves less time than computing the exits costs.']
    : ['slower: exits save too little', 'On this machine and for this model, computing the exits costs more time than the skipped layers save.'];
}
