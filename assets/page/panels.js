// The texts, one panel for each side. A text is made of paragraphs, so that a new token moves only the last of them and
// paragraphs out of sight cost nothing.

// A text follows its newest token until the reader scrolls up, and again from when the reader is back at its end.
function follow(part) {
  let last = 0;
  part.follows = true;
  part.text.addEventListener('scroll', () => {
    const { scrollTop, scrollHeight, clientHeight } = part.text;
    if (scrollTop < last - 2) part.follows = false;
    if (scrollHeight - scrollTop - clientHeight < 24) part.follows = true;
    last = scrollTop;
  });
}

const tokenNodes = name => sides[name].nodes;

function buildPanels() {
  parts.panels.replaceChildren();
  parts.panels.dataset.count = order.length;
  for (const name of order) buildPanel(name);
}

function buildPanel(name, kept = []) {
  const side = sides[name], full = name === FULL;
  const text = make('div', 'ce-text');
  text.tabIndex = 0; text.dir = 'auto';
  text.setAttribute('role', 'region');
  text.setAttribute('aria-label', 'Text: ' + side.title);
  text.dataset.side = name;
  text.dataset.hint = full ? 'The same model without exits answers here, for comparison.'
    : 'Press Run. Each token appears in the colour of the exit that wrote it.';
  const facts = make('p', 'ce-facts');
  const rejected = button('ce-toggle', '', () => {
    root.classList.toggle('ce-show-rejected');
    order.forEach(drawRejected);
  });
  rejected.hidden = true;
  const copy = button('ce-toggle', 'Copy', () => copyText(textOf(side), copy));
  const title = make('h3', null, side.title);
  title.title = panelNote(side);
  const box = make('section', 'ce-panel' + (full ? ' full' : ''), null, make('header', null, null, title, facts, rejected, copy), text);
  parts[name] = { box, title, text, facts, rejected, copy };
  const after = full ? null : parts.panels.querySelector('.ce-panel.full');
  parts.panels.insertBefore(box, after);
  parts.panels.dataset.count = parts.panels.children.length;
  newParagraph(side, text);
  for (const node of kept) {
    const copyOf = node.cloneNode(true);
    copyOf.classList.add('kept');
    copyOf.classList.remove('chosen', 'lit');
    append(side, text, copyOf);
    side.nodes.push(copyOf);
    endParagraph(side, text, copyOf);
  }
  follow(parts[name]);
  listen(text, name);
}

const panelNote = side => side.name === FULL ? 'Every token uses all ' + model.layers + ' layers.'
  : side.mode !== 'verified' ? 'The first confident exit writes each token. Layers that were skipped catch up later, so the text before is always complete.'
  : side.tolerance ? 'Tokens are drafted ahead. The full model also accepts drafts that it finds nearly as likely as its own choice.'
  : 'Tokens are drafted ahead, and the full model checks every draft: the text is its own. The colour shows who drafted a token.';

const textOf = side => side.nodes.filter(Boolean).map(node => node.textContent).join('');

async function copyText(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                                                     // no permission, as in some frames
    const box = make('textarea', null, text);
    document.body.append(box); box.select(); document.execCommand('copy'); box.remove();
  }
  const before = node.textContent;
  put(node, 'Copied ✓');
  setTimeout(() => put(node, before), 1500);
}

// -- paragraphs ----------------------------------------------------------------------------------------------------------

function newParagraph(side, text) {
  const fence = side.paragraph && side.paragraph.textContent.trimStart().startsWith('```');
  if (fence) {
    side.paragraph.classList.add('code');
    side.code = !side.code;
  }
  side.paragraph = make('div', 'ce-par' + (side.code ? ' code' : ''));
  text.append(side.paragraph);
}

const append = (side, text, node) => side.paragraph.append(node);

function endParagraph(side, text, node) {                       // after a final token that ends a line
  if (!node.textContent.endsWith('\n')) return;
  const rest = [];
  for (let next = node.nextSibling; next; next = next.nextSibling) rest.push(next);
  newParagraph(side, text);
  side.paragraph.append(...rest);
}

// -- tokens --------------------------------------------------------------------------------------------------------------

function dress(node, record, state) {
  const blank = record.text && !record.text.trim() && record.text.includes('\n');
  node.className = 't ' + colourClass(record.exit) + state
    + (record.special ? ' special' : '') + (record.part ? ' part' : '') + (blank ? ' newline' : '');
  node.dataset.id = record.id;
  node.dataset.i = record.i;
  node.textContent = record.text;
}

function writeToken(side, record) {
  let node = side.pending.get(record.i);
  side.pending.delete(record.i);
  const text = parts[side.name].text;
  if (!node) append(side, text, node = make('span'));
  dress(node, record, '');
  if (side.corrected.has(record.i) && isLast(record.exit)) node.classList.add('correction');
  side.nodes[record.i] = node;
  endParagraph(side, text, node);
}

function writeDraft(side, record) {
  const node = make('span');
  dress(node, record, ' draft');
  side.pending.set(record.i, node);
  append(side, parts[side.name].text, node);
}

function writeRejected(side, record) {
  const node = side.pending.get(record.i);
  side.pending.delete(record.i);
  if (!node) return;
  node.className = node.className.replace(' draft', ' rejected');
  if (!node.classList.contains('ec')) side.corrected.add(record.i);     // drafted by an exit, not copied
  side.rejected++;
}

// -- numbers of a panel ----------------------------------------------------------------------------------------------------

function drawPanel(name) {
  const side = sides[name], stats = side.stats, part = parts[name];
  drawRejected(name);
  if (!stats) return;
  const words = [number(stats.tokens_per_second) + ' tokens/s', stats.tokens + ' tokens'];
  if (!missing(stats.token_seconds_p50))
    words.push('median ' + milliseconds(stats.token_seconds_p50) + ', p90 ' + milliseconds(stats.token_seconds_p90));
  if (stats.tokens_per_verification) words.push(stats.tokens_per_verification.toFixed(1) + ' tokens per check');
  put(part.facts, words.join(' · '));
  part.facts.title = 'First token after ' + milliseconds(stats.first_token_seconds) + '; all in ' + number(stats.seconds, 2) + ' s'
    + (missing(stats.acceptance) ? '' : '; ' + percent(stats.acceptance) + ' of the drafts were accepted');
}

function drawRejected(name) {
  const side = sides[name], node = parts[name].rejected, on = root.classList.contains('ce-show-rejected');
  node.hidden = side.rejected === 0;
  node.setAttribute('aria-pressed', String(on));
  put(node, (on ? 'Hide ' : 'Show ') + side.rejected + ' rejected draft' + (side.rejected === 1 ? '' : 's'));
}

// Scroll a token into the middle of its text, without moving the page.
function reveal(name, i) {
  const node = sides[name].nodes[i], box = parts[name].text;
  if (node) box.scrollTop += node.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
}
