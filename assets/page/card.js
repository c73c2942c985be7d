// The token card: what is known about one token. It opens when the pointer rests on a token, and a click, a tap or the
// arrow keys pin it.

const REST = 150;                            // milliseconds until a pointer rests
let card;                                    // {node, name (of the side), i, pinned, twin (the same place in the other text)}, or null
let resting;                                 // timer of the pointer

function listen(text, name) {
  text.addEventListener('pointerover', event => {
    if (event.pointerType === 'touch' || card && card.pinned) return;
    clearTimeout(resting);
    const token = event.target.matches('.t') ? event.target : null;
    resting = setTimeout(() => {
      if (card && card.pinned) return;
      if (token && token.isConnected) openCard(token, name, false); else closeCard();
    }, REST);
  });
  text.addEventListener('pointerleave', () => { clearTimeout(resting); if (card && !card.pinned) closeCard(); });
  text.addEventListener('click', event => {
    clearTimeout(resting);
    if (!getSelection().isCollapsed) return;                    // a text was selected
    if (!event.target.matches('.t') || card && card.pinned && card.node === event.target) closeCard();
    else openCard(event.target, name, true);
  });
  text.addEventListener('scroll', () => { clearTimeout(resting); cardFollows(); });
  text.addEventListener('focusout', event => {
    if (card && event.relatedTarget && !text.contains(event.relatedTarget) && !parts.card.contains(event.relatedTarget)) closeCard();
  });
  text.addEventListener('keydown', event => {
    if (event.key === 'Escape') {
      if (card) closeCard(); else if (timeline.chosen) choosePass(null);
      return;
    }
    if ((event.key === 'Enter' || event.key === ' ') && card && event.target === text) {
      event.preventDefault();
      return parts.card.querySelector('button').focus();
    }
    const nodes = sides[name].nodes, now = card && card.name === name ? card.i : -1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (to === undefined || !nodes.length || event.target !== text) return;
    event.preventDefault();
    lookAt(name, Math.max(0, Math.min(nodes.length - 1, to)), 'nearest');
  });
}

// Show a token in its text, and open its card.
function lookAt(name, i, block = 'center') {
  const side = sides[name], node = side && side.nodes[i];
  if (!node) return;
  unfold(name, i);
  if (block === 'center') reveal(name, i); else keepTokenInView(node, parts[name].text);
  openCard(node, name, true);
}

function keepTokenInView(node, box) {             // moves the text only, never the page
  const at = node.getBoundingClientRect(), frame = box.getBoundingClientRect();
  if (at.top < frame.top) box.scrollTop -= frame.top - at.top + 8;
  else if (at.bottom > frame.bottom) box.scrollTop += at.bottom - frame.bottom + 8;
}

function cardBox() {
  parts.card = make('div', 'ce-card');
  parts.card.id = 'ce-token-card';
  parts.card.tabIndex = -1;
  parts.card.setAttribute('role', 'dialog');
  parts.card.setAttribute('aria-label', 'One token');
  parts.card.hidden = true;
  parts.card.addEventListener('keydown', event => {
    if (event.key !== 'Escape') return;
    event.stopPropagation();
    leaveCard();
  });
  return parts.card;
}

document.addEventListener('pointerdown', event => {
  if (card && !event.target.closest('.ce-card, .ce-text .t')) closeCard();
});
addEventListener('scroll', cardFollows, { passive: true, capture: false });
addEventListener('resize', cardFollows);

function openCard(node, name, pinned) {
  if (card && card.node === node && card.pinned === pinned) return;
  const grew = card && card.node === node;                      // a card that is pinned keeps its content
  if (!grew) closeCard();
  card = { node, name, i: +node.dataset.i, pinned, answer: grew ? card.answer : null, twin: grew ? card.twin : null };
  node.classList.add('chosen');
  fillCard();
  parts.card.classList.toggle('pinned', pinned);
  parts.card.hidden = false;
  placeCard(true);
}

function closeCard() {
  clearTimeout(resting);
  if (!card) return;
  card.node.classList.remove('chosen');
  card = null;
  if (parts && parts.card) parts.card.hidden = true;
}

function leaveCard() {                       // the focus goes back to the text
  const name = card && card.name;
  closeCard();
  if (name && parts[name]) parts[name].text.focus({ preventScroll: true });
}

// -- its place: beside its token, and wholly on the screen ---------------------------------------------------------------

const MARGIN = 8;

function placeCard(opening = false) {
  const box = parts.card;
  if (narrow()) return placeSheet(opening);
  document.body.style.paddingBottom = '';
  box.style.maxHeight = 'none';
  const token = [...card.node.getClientRects()], twin = twinInSight(), size = box.getBoundingClientRect();
  if (!token.length) return closeCard();
  const top = Math.min(...[...token, ...twin].map(r => r.top)), bottom = Math.max(...[...token, ...twin].map(r => r.bottom));
  const left = Math.min(...token.map(r => r.left)), right = Math.max(...token.map(r => r.right));
  const above = top - 2 * MARGIN, below = innerHeight - bottom - 2 * MARGIN;
  const wide = document.documentElement.clientWidth;
  let x = Math.max(MARGIN, Math.min(left - 14, wide - size.width - MARGIN)), y;
  if (size.height <= below) y = bottom + MARGIN;
  else if (size.height <= above) y = top - size.height - MARGIN;
  else if (!twin.length && (right + MARGIN + size.width + MARGIN <= wide || left - 2 * MARGIN - size.width >= 0)) {     // beside it
    x = right + MARGIN + size.width + MARGIN <= wide ? right + MARGIN : left - MARGIN - size.width;
    y = Math.max(MARGIN, Math.min(top - 40, innerHeight - size.height - MARGIN));
    box.style.maxHeight = innerHeight - 2 * MARGIN + 'px';
  } else {
    const room = Math.max(above, below);
    box.style.maxHeight = room + 'px';
    y = below >= above ? bottom + MARGIN : MARGIN;
  }
  box.style.left = x + 'px';
  box.style.top = y + 'px';
}

// Also leave the same place in the other text free.
function keepFree(twin) {
  if (!card) return;
  card.twin = twin;
  placeCard(true);
}

function twinInSight() {
  const { twin } = card, text = twin && twin.closest('.ce-text');
  if (!text) return [];
  const frame = text.getBoundingClientRect();
  return [...twin.getClientRects()].filter(r => r.bottom > frame.top && r.top < frame.bottom);
}

// On a phone the card is a sheet at the bottom of the screen. The page moves up so that the token stays in sight.
function placeSheet(opening) {
  const box = parts.card;
  box.style.left = box.style.top = box.style.maxHeight = '';
  if (!opening) return;
  const hidden = () => card.node.getBoundingClientRect().bottom + 12 - box.getBoundingClientRect().top;
  if (hidden() <= 0) return;
  const room = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (room < hidden()) document.body.style.paddingBottom = hidden() - room + 'px';
  scrollBy({ top: hidden(), behavior: 'instant' });
}

let following = 0;
function cardFollows() {
  if (!card || following) return;
  if (!card.pinned) return closeCard();
  following = requestAnimationFrame(() => {
    following = 0;
    if (!card) return;
    const at = card.node.getBoundingClientRect(), frame = parts[card.name].text.getBoundingClientRect();
    const seen = at.bottom > frame.top && at.top < frame.bottom && at.bottom > 0 && at.top < innerHeight;
    if (!seen && !narrow()) return closeCard();
    placeCard();
  });
}

// -- its content -----------------------------------------------------------------------------------------------------------

function fillCard() {
  const { node, name, i, answer } = card, side = sides[name];
  const record = side.nodes[i] === node ? side.records[i] : null;
  const draft = record ? null : side.events.find(e => e.i === i && e.id === +node.dataset.id && e.status === 'draft');
  const text = node.textContent, close = button('ce-small ce-close', '×', leaveCard);
  close.setAttribute('aria-label', 'Close this card');
  const head = make('div', 'ce-card-head', null,
    make('p', 'ce-card-text', visible(text) || (record && record.part ? 'part of a character' : 'empty')),
    make('span', 'ce-card-place', 'token ' + (i + 1) + ' · ' + side.title), close);
  const said = make('p', 'ce-story', record ? story(side, record, i) : draftStory(side, node, draft));
  said.setAttribute('role', 'status');
  parts.card.replaceChildren(head, said, make('p', 'ce-card-facts', factsOf(side, record || draft, node)));
  if (!record) return;
  const chart = make('div', 'ce-card-lens'), actions = make('div', 'ce-card-actions');
  if (name === FULL && run) actions.append(continueOffer(i));
  if (name !== FULL && run) {
    const table = readings(side, record, i);
    parts.card.append(make('div', 'ce-card-body', null, table, chart));
    if (answer) readAnswer(answer, table, chart, actions);
    else if (mayAsk(side)) ask(table, chart, actions);
    else table.caption.textContent = replaying() ? 'This recorded run does not have the other choices of the exits. Press Run: then this card shows them, and you can continue the text with one of them.'
      : 'When the run is over, this table shows what each exit would have written.';
  }
  parts.card.append(actions);
  if (!card.pinned) parts.card.append(make('p', 'ce-card-hint', 'Click the token to keep this card open.'));
}

const mayAsk = side => !replaying() && Boolean(side.end || isOver());

// What happened, in sentences that hold in every mode.
function story(side, record, i) {
  const words = [], draft = rejectedDraft(side, i), fresh = i >= side.start, fullWrote = writtenIn(side, i).name === FULL;
  if (!fresh) words.push('This token is the same as in “' + (sides[side.of] || side).title + '”.');
  if (side.of && i === side.start) return side.of === FULL ? 'The full model’s text ends with this token. From here on, it goes on with ' + settingsName() + '.'
    : 'You chose this token. The text goes on from here with the same settings.';
  if (fullWrote || side.mode === FULL) words.push('The full model wrote it, with all ' + model.layers + ' layers.');
  else if (side.mode === 'verified') words.push(verifiedStory(side, record, draft));
  else if (isLast(record.exit)) words.push('No exit was confident enough, so the full model wrote it, with all ' + model.layers + ' layers.');
  else if (record.exit === COPIED) words.push('It was copied from earlier in the text.');
  else words.push(exitName(record.exit) + ' wrote it ' + exitPlace(record.exit) + ' of ' + model.layers + '.');
  if (!fullWrote) words.push(choiceStory(side, record, i));
  return words.filter(Boolean).join(' ');
}

// The text in which a token was written: in a fork, what stands before its first token comes from another text.
function writtenIn(side, i) {
  while (sides[side.of] && i < side.start) side = sides[side.of];
  return side;
}

function verifiedStory(side, record, draft) {
  const verdict = side.tolerance ? 'accepted it' : 'agreed';
  if (record.status === 'accepted') return (record.exit === COPIED ? 'It was copied from earlier in the text as a draft.' : draftedBy(side, record.exit) + ' drafted it.')
    + ' The full model checked it and ' + verdict + '.';
  if (draft) return (draft.exit === COPIED ? 'The draft here was ' + inQuotes(draft.text) + ', copied from earlier in the text.' : draftedBy(side, draft.exit) + ' had drafted ' + inQuotes(draft.text) + ' here.')
    + ' The full model rejected it and wrote this token instead.';
  return 'The full model wrote it. There was no draft for this place.';
}

function choiceStory(side, record, i) {
  if (run.greedy === false) return '';
  const choice = side.choices[i], moment = side.end && (side.end.moments || []).find(m => m.i === i);
  if (moment) return 'The full model would choose ' + inQuotes(moment.full) + ' (probability ' + likely(moment.p_full) + ') and gives this token ' + likely(moment.p_said) + '.';
  if (!missing(choice)) return choice !== record.id ? 'The full model would choose ' + (wordOf(choice) || 'another token') + ' here.'
    : side.mode === 'verified' || isLast(record.exit) ? '' : 'The full model would choose it too.';
  return side.nodes[i].classList.contains('differs') ? 'The full model would choose another token here.' : '';
}

function draftStory(side, node, draft) {
  const by = draft && draft.exit !== COPIED ? draftedBy(side, draft.exit) + ' drafted it.' : 'This draft was copied from earlier in the text.';
  return node.classList.contains('rejected') ? by + ' The full model rejected it.' : by + ' The full model has not checked it yet.';
}

const rejectedDraft = (side, i) => {         // the draft that the full model did not accept at a position
  if (side.mode !== 'verified' || side.records[i].status === 'accepted') return null;
  const events = side.events, gone = events.findLast(e => e.i === i && e.status === 'rejected');
  return gone ? events.findLast(e => e.i === i && e.status === 'draft' && e.id === gone.id) : null;
};

function wordOf(id) {                         // the text of a token, where it stands somewhere on the page
  for (const name of order) {
    const found = sides[name].events.find(e => e.id === id && e.text);
    if (found) return inQuotes(found.text);
  }
  return '';
}

function factsOf(side, record, node) {
  const words = [], bytes = bytesOf(record, node.textContent);
  if (record && record.ms !== undefined) words.push(number(record.ms) + ' ms after the token before');
  if (record && record.read !== undefined) words.push(record.read < 0.0005
    ? 'no extra weights read: the model computed it together with the token before'
    : 'read ' + percent(record.read) + ' of the weights that the full model reads for a token'
      + (side.mode === 'verified' ? ' (for all tokens of its pass)' : ''));
  words.push('id ' + node.dataset.id);
  if (bytes.length) words.push('bytes ' + bytes.slice(0, 12).join(' ') + (bytes.length > 12 ? ' …' : ''));
  return words.join(' · ');
}

function bytesOf(record, text) {              // a part of a character brings its bytes: it has no text of its own
  if (record && record.bytes) return record.bytes.match(/../g);
  return [...new TextEncoder().encode(text)].map(b => b.toString(16).padStart(2, '0'));
}

// A probability that is neither nought nor certain does not look like either.
const likely = p => p > 0 && p < 0.005 ? 'under 1%' : p < 1 && p >= 0.995 ? 'over 99%' : percent(p);

// A token inside a sentence: without the space that most tokens begin with.
const plain = text => visible(text.trim() || text) || 'part of a character';
const inQuotes = text => '“' + plain(text) + '”';

// -- what each exit would have written -------------------------------------------------------------------------------------

const NOT_COMPUTED = 'not computed';         // the token was written without this exit

function readings(side, record, i) {
  const thresholds = side.thresholds || run.thresholds, draft = rejectedDraft(side, i), used = (draft || record).conf || [];
  const table = make('table', 'ce-readings'), body = make('tbody');
  table.append(make('caption'), make('thead', null, null, make('tr', null, null, make('th', null, 'Who'),
    make('th', null, 'Chance that this exit is right'), make('th', null, 'Likeliest tokens in this row, and the probability of each'))), body);
  table.querySelectorAll('thead th').forEach(cell => cell.setAttribute('scope', 'col'));
  for (let s = 0; s <= model.exits.length; s++) {
    const wrote = draft || record, drafter = wrote.exit === s && !isLast(s) && draftedBy(side, s) !== exitName(s);
    const known = !drafter && !missing(used[s]), needed = thresholds && thresholds[s];
    const words = isLast(s) ? '' : known ? percent(used[s]) + (missing(needed) ? '' : ', needs ' + percent(needed)) : NOT_COMPUTED;
    const part = drafter ? '' : draft && draft.exit === s ? 'drafted ' + inQuotes(draft.text) : s !== record.exit ? ''
      : side.mode === 'verified' && !isLast(s) ? 'drafted it' : 'wrote it';
    const who = make('th', null, null, swatch(s));
    who.setAttribute('scope', 'row');
    if (part) who.append(make('span', 'ce-part', part));
    body.append(make('tr', part ? 'ce-now-row' : '', null, who, make('td', 'ce-chance', words), make('td', 'ce-top5', '')));
  }
  return table;
}

async function ask(table, chart, actions) {
  const opened = card;
  let answer = null;
  try { answer = await server.token_card([run.run, opened.name, opened.i]); } catch { /* the server is gone */ }
  if (!card || card.node !== opened.node) return;
  if (!answer) { table.caption.textContent = 'The server no longer keeps this run. Run it again to see more.'; return placeCard(); }
  card.answer = answer;
  if (table.isConnected) readAnswer(answer, table, chart, actions);
  else fillCard();
  placeCard(true);
}

function readAnswer(answer, table, chart, actions) {
  const { name, i } = card, side = sides[name], id = side.records[i].id, full = answer.readings[answer.readings.length - 1].top[0];
  const offer = forkOffer(side, i, full.id !== id ? full : answer.readings.flatMap(r => r.top).find(c => c.id !== id));
  let late = false;
  answer.readings.forEach((reading, s) => {
    const [, chance, top] = table.tBodies[0].rows[s].cells;
    if (!isLast(s) && chance.textContent === NOT_COMPUTED) {
      put(chance, percent(reading.confidence) + ', computed afterwards');
      late = true;
    }
    top.replaceChildren(...reading.top.slice(0, isLast(s) ? 5 : 3).map(c => candidate(c, c.id === id, offer)));
  });
  put(table.caption, late ? '“Computed afterwards”: the run did not need this exit here.' : '');
  chart.replaceChildren(lensChart(answer, id, full));
  actions.replaceChildren(...offer ? [offer.node] : []);
}

function candidate(choice, same, offer) {
  const word = offer && !same && offer.open ? button('ce-candidate', visible(choice.text), () => offer.choose(choice)) : make('span', 'ce-candidate' + (same ? ' same' : ''), visible(choice.text));
  if (word.type === 'button') word.title = 'Choose ' + inQuotes(choice.text) + ' to continue with';
  return make('span', 'ce-choice', null, word, ' ' + likely(choice.p));
}
