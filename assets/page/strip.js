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
  parts.caption = make('span', 'ce-caption', null, 'Colour: which ', term('exit'), ' wrote each ', term('token'));
  parts.recorded = make('span', 'ce-flag ce-recorded', 'recorded run');
  parts.model = make('span', 'ce-model', model.model);
  const untrained = make('span', 'ce-flag', 'untrained exits');
  untrained.title = 'These exits were not trained for this model. They are rarely confident and often wrong. Exact mode stays exact.';
  untrained.hidden = model.trained;
  const head = make('div', 'ce-strip-head', null, parts.caption, bar, parts.recorded, untrained, parts.model);
  parts.legend = make('section', 'ce-strip ce-legend', null, head, keys, numbers());
  parts.legend.setAttribute('aria-label', 'Results');
  return parts.legend;
}

function numbers() {
  parts.status = make('p', 'ce-status');
  parts.status.setAttribute('role', 'status');
  parts.badge = make('span', 'ce-badge');
  parts.badge.hidden = true;
  parts.offer = button('ce-small ce-offer', 'Now the same, exact', runExact);
  parts.offer.title = 'Run this prompt in Exact mode: the full model’s own text, checked';
  parts.offer.hidden = true;
  const tiles = make('dl', 'ce-tiles', null, tile('speed', 'Speed', 'times the full model'),
    tile('agreement', 'Agreement', 'full model would choose the same'),
    tile('cost', 'Weights read', 'of the full model’s, per token'), tile('same', 'Match', 'same token, same place'));
  return make('div', 'ce-verdict', null, tiles, parts.badge, parts.offer, parts.status);
}

function tile(name, label, note) {
  const value = make('dd', 'ce-value', '–'), words = make('dd', 'ce-note', note);
  parts[name] = value; parts[name + 'Note'] = words; words.dataset.note = note;
  const key = { Speed: 'speed', Agreement: 'agreement', 'Weights read': 'weights read', Match: 'match' }[label];
  return make('div', 'ce-tile', null, make('dt', null, null, term(key, label)), value, words);
}

function note(name, text) { put(parts[name + 'Note'], text || parts[name + 'Note'].dataset.note); }

function status(text, kind = '') {
  if (!parts) return;
  put(parts.status, text);
  parts.status.className = 'ce-status ' + kind;
}

// While a run is on its way, Run becomes Stop.
function waiting(on) { document.body.classList.toggle('ce-running', on); }

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
  if (exact) exact.click();
  setTimeout(() => control('ce-run', '').click(), 150);          // once gradio has taken the mode
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
  put(parts.model, run && run.settings.model || model.model);
  if (run) put(parts.caption.childNodes[2], run.mode === 'verified' ? ' drafted each ' : ' wrote each ');
  drawNumbers(side, stats);
}

function drawNumbers(side, stats) {
  const { versus, end } = side, sampled = run && run.greedy === false, loops = end && end.loops;
  put(parts.speed, versus && !missing(versus.speedup) ? versus.speedup.toFixed(1) + '×' : '–');
  parts.speed.classList.toggle('aside', Boolean(loops));
  note('speed', loops ? 'the text repeats itself, which is easy to guess' : '');
  put(parts.cost, stats ? percent(stats.cost) : '–');
  const so = agreementSoFar(side), share = end && !missing(end.agreement) ? end.agreement : so && so.share;
  put(parts.agreement, sampled || missing(share) ? '–' : percent(share, share > 0.99 && share < 1 ? 1 : 0));
  note('agreement', sampled ? 'not defined for sampled text' : end ? '' : so ? 'of ' + so.judged + ' tokens checked so far' : '');
  const match = end || versus;
  put(parts.same, match ? percent(match.positional) : '–');
  note('same', !match ? '' : missing(match.first_divergence) ? end ? 'identical texts' : 'no difference so far'
    : 'identical up to token ' + match.first_divergence);
  const known = end && !missing(end.identical);
  parts.badge.hidden = !known;
  if (known) {
    parts.badge.classList.toggle('bad', !end.identical);
    put(parts.badge, end.identical ? '✓ Identical to the full model, all ' + sides.full.tokens + ' tokens compared'
      : '✗ Differs from the full model at token ' + (end.first_divergence + 1));
  }
  parts.offer.hidden = !(finished && !replaying() && run && run.mode !== 'verified');
}
