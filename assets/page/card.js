// The token card: what is known about one token, on hover, tap, or with the arrow keys.

let card;                                    // {node, name (of the side), pinned}, or undefined

function listen(text, name) {
  text.addEventListener('pointerover', event => {
    if (event.pointerType !== 'touch' && event.target.matches('.t') && !(card && card.pinned)) openCard(event.target, name, false);
  });
  text.addEventListener('pointerleave', () => { if (card && !card.pinned) closeCard(); });
  text.addEventListener('click', event => { if (event.target.matches('.t')) openCard(event.target, name, true); else closeCard(); });
  text.addEventListener('scroll', () => { if (card && !card.pinned) closeCard(); });
  text.addEventListener('blur', closeCard);
  text.addEventListener('keydown', event => {
    const nodes = sides[name].nodes, now = card ? nodes.indexOf(card.node) : -1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (event.key === 'Escape') return closeCard();
    if (to === undefined || !nodes.length) return;
    event.preventDefault();
    const node = nodes[Math.max(0, Math.min(nodes.length - 1, to))];
    node.scrollIntoView({ block: 'nearest' });
    openCard(node, name, true);
  });
}

function cardBox() {
  parts.card = make('div', 'ce-card');
  parts.card.id = 'ce-token-card';
  parts.card.setAttribute('role', 'status');
  parts.card.hidden = true;
  return parts.card;
}

function openCard(node, name, pinned) {
  if (card && card.node === node && card.pinned === pinned) return;
  closeCard();
  card = { node, name, pinned };
  node.classList.add('chosen');
  fillCard();
  parts.card.hidden = false;
  placeCard();
}

function placeCard() {                        // above the token where there is room; called again when the card grows
  if (narrow()) {                     // the card is at the bottom of the screen and must not cover its token
    const hidden = card.node.getBoundingClientRect().bottom + 12 - parts.card.getBoundingClientRect().top;
    if (hidden > 0) scrollBy(0, hidden);
    return;
  }
  const node = card.node, box = root.getBoundingClientRect(), at = node.getClientRects()[0] || box, own = parts.card.getBoundingClientRect();
  const left = Math.max(0, Math.min(at.left - box.left, box.width - own.width));
  const above = at.top - own.height - 8 > 0 || at.bottom + own.height + 8 > innerHeight && at.top > innerHeight / 2;
  parts.card.style.left = left + 'px';
  parts.card.style.top = (above ? at.top - box.top - own.height - 6 : at.bottom - box.top + 6) + 'px';
}

function closeCard() {
  if (!card) return;
  card.node.classList.remove('chosen');
  card = null;
  if (parts) parts.card.hidden = true;
}

function fillCard() {
  const { node, name } = card, i = sides[name].nodes.indexOf(node), record = sides[name].records[i];
  const facts = make('dl', 'ce-card-facts');
  const fact = (label, value) => facts.append(make('dt', null, label), make('dd', null, value));
  const text = node.textContent, bytes = bytesOf(record, text);
  parts.card.replaceChildren(make('p', 'ce-card-text', visible(text) || (record && record.part ? 'part of a character' : 'empty')), facts);
  fact('token', node.dataset.id + (bytes.length ? ' · bytes ' + bytes.slice(0, 12).join(' ') + (bytes.length > 12 ? ' …' : '') : ''));
  if (node.dataset.note) fact('draft', node.dataset.note);
  if (!record) return;
  fact('written by', exitName(record.exit) + ', ' + exitPlace(record.exit));
  if (node.classList.contains('correction')) fact('verified', 'correction: an exit drafted another token');
  if (record.status === 'accepted') fact('verified', 'draft, accepted by the full model');
  if (record.ms !== undefined) fact('time', number(record.ms) + ' ms after the token before');
  if (record.read !== undefined) fact('weights read', percent(record.read) + ' of what the full model reads for a token');
  if (node.classList.contains('differs')) fact('mismatch', 'the full model would choose another token here');
  if (name !== FULL && run) parts.card.append(readings(name, record, i));
}

function bytesOf(record, text) {              // a part of a character brings its bytes: it has no text of its own
  if (record && record.bytes) return record.bytes.match(/../g);
  return [...new TextEncoder().encode(text)].map(b => b.toString(16).padStart(2, '0'));
}

function readings(name, record, i) {
  const thresholds = sides[name].thresholds || run.thresholds;
  const table = make('table', 'ce-readings'), body = make('tbody');
  table.append(make('caption', null, 'Confidence of each exit (its chance of being right), and its most likely tokens'), body);
  for (let s = 0; s <= model.exits.length; s++) {
    const confidence = record.conf[s], needed = thresholds[s];
    const words = confidence === null || confidence === undefined ? (s < record.exit ? 'not computed' : '')
      : percent(confidence) + (needed === null || needed === undefined ? '' : ' (needs ' + percent(needed) + ')');
    body.append(make('tr', null, null, make('th', null, null, swatch(s)),
      make('td', null, words), make('td', 'ce-top5', '')));
  }
  if (sides[name].end && !replaying()) ask(name, i, body);
  else table.caption.textContent = 'Confidence of each exit. After a live run: also its most likely tokens.';
  return table;
}

async function ask(name, i, body) {
  const opened = card;
  const answer = await server.token_card([run.run, name, i]);
  if (card !== opened || !answer) return;
  answer.readings.forEach((reading, s) => {
    const [, confidence, top] = body.rows[s].cells;
    if (!confidence.textContent && !isLast(s)) confidence.textContent = percent(reading.confidence) + ', not used';
    top.replaceChildren(...reading.top.map(c => make('span', 'ce-choice', null,
      make('span', 'ce-candidate' + (c.id === +opened.node.dataset.id ? ' same' : ''), visible(c.text)), ' ' + percent(c.p))));
  });
  placeCard();
}
