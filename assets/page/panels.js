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
  const facts = make('p', 'ce-facts'), loop = make('span', 'ce-flag ce-panel-loop');
  loop.hidden = true;
  const mini = make('div', 'ce-mini'), aside = make('p', 'ce-aside');
  aside.hidden = true;
  const rejected = button('ce-toggle', '', () => {
    root.classList.toggle('ce-show-rejected');
    order.forEach(drawRejected);
  });
  rejected.hidden = true;
  const copy = button('ce-toggle', 'Copy', () => copyText(textOf(side), copy));
  const title = make('h3', null, side.title);
  title.title = panelNote(side);
  const box = make('section', 'ce-panel' + (full ? ' full' : ''), null, 
    make('header', null, null, title, loop, rejected, ...full ? differenceButtons() : [], copy), mini, aside, text, facts);
  parts[name] = { box, title, loop, text, facts, rejected, copy, mini, aside };
  const after = full ? null : parts.panels.querySelector('.ce-panel.full');
  parts.panels.insertBefore(box, after);
  parts.panels.dataset.count = parts.panels.children.length;
  side.paragraph = null; side.code = false;                      // a fork began as a copy of another side
  newParagraph(side, text);
  for (const node of kept) {
    const copyOf = node.cloneNode(true);
    copyOf.classList.add('kept');
    copyOf.classList.remove('chosen', 'lit', 'split', 'forked', 'folded', 'swapped', 'alone');
    side.paragraph.append(copyOf);
    side.nodes.push(copyOf);
    endParagraph(side, text, copyOf);
  }
  follow(parts[name]);
  listen(text, name);
  followScroll(name);
}

const panelNote = side => side.name === FULL ? 'Every token uses all ' + model.layers + ' layers.'
  : side.mode !== 'verified' ? 'The first confident exit writes each token. Layers that it skipped read the token later, before they are used again.'
  : side.tolerance ? 'Tokens are drafted ahead. The full model also accepts drafts that it finds nearly as likely as its own choice.'
  : 'Tokens are drafted ahead, and the full model checks every draft: the text is exactly the full model’s. The colour shows who drafted a token.';

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
  const lines = side.paragraph ? linesOf(side.paragraph) : [''];
  if (lines[lines.length - 1].trimStart().startsWith('```')) {   // a fence begins or ends a block of code
    if (side.code || lines.length === 1) side.paragraph.classList.add('code');
    side.code = !side.code;
  }
  side.paragraph = make('div', 'ce-par' + (side.code ? ' code' : ''));
  text.append(side.paragraph);
}

// The lines of a paragraph whose last newline has just been written. Drafts and rejected drafts are no part of the text.
function linesOf(paragraph) {
  const written = paragraph.querySelectorAll(':scope > .t:not(.draft, .rejected)');
  return Array.from(written, node => node.textContent).join('').replace(/\n+$/, '').split('\n');
}

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
  if (!node) side.paragraph.append(node = make('span'));
  dress(node, record, '');
  if (side.corrected.has(record.i) && isLast(record.exit)) node.classList.add('correction');
  side.nodes[record.i] = node;
  endParagraph(side, text, node);
}

function writeDraft(side, record) {
  const node = make('span');
  dress(node, record, ' draft');
  side.pending.set(record.i, node);
  side.paragraph.append(node);
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
  drawLoop(side, part.loop);
  if (!stats) return;
  drawRouting(side, part.mini);
  const words = [...order.length > 2 ? comparison(side) : [], number(stats.tokens_per_second) + ' tokens/s',
    ...stats.tokens_per_verification ? [stats.tokens_per_verification.toFixed(1) + ' tokens per check'] : [], stats.tokens + ' tokens'];
  if (stats.tokens_per_verification) words.push(...checkTime(stats));
  else if (!missing(stats.token_seconds_p50))
    words.push('median ' + milliseconds(stats.token_seconds_p50) + ', p90 ' + milliseconds(stats.token_seconds_p90));
  put(part.facts, words.join(' · '));
  part.facts.title = 'First token after ' + milliseconds(stats.first_token_seconds) + '; all tokens in ' + number(stats.seconds, 2) + ' s'
    + (missing(stats.acceptance) ? '' : '; ' + acceptedWords(stats));
}

// Tokens come in bursts: the time between two of them says nothing where one check brings several.
function checkTime({ tokens, tokens_per_second: speed, tokens_per_verification: burst }) {
  const checks = tokens / burst - 1;          // without the first, whose time is that of the first token
  return speed && checks > 0.5 ? [milliseconds((tokens - 1) / speed / checks) + ' per check'] : [];
}

const acceptedWords = ({ drafted, acceptance }) => Math.round(acceptance * drafted) + ' of ' + drafted + ' drafts accepted (' + percent(acceptance) + ')';

// With more than two texts, the strip has the numbers of the first, so each header has the most important ones of its own.
function comparison(side) {
  const { end } = side, speed = speedOf(side), so = agreementSoFar(side), agreement = end ? end.agreement : so && so.share;
  if (end && end.loops) return [];                               // the flag beside the title has it
  return [...!missing(speed) && !side.of ? [speed.toFixed(1) + '× the speed'] : [],
    ...side.name === FULL || missing(agreement) || run.greedy === false ? [] : [percent(agreement) + ' agreement']];
}

// With two texts, the strip says that the first one repeats itself.
function drawLoop(side, flag) {
  const loops = order.length > 2 && side.end && side.end.loops, { agreement } = side.end || {};
  flag.hidden = !loops;
  if (!loops) return;
  put(flag, 'repeats from token ' + (loops.start + 1) + ' on');
  flag.title = loopWords(loops) + (missing(agreement) ? '' : ' Here the agreement is ' + percent(agreement) + '.');
}

function drawRouting(side, bar) {             // which exit wrote how much of this text
  bar.hidden = order.length < 3 || side.name === FULL;
  if (bar.hidden) return;
  const shares = writers().map(exit => exit === COPIED ? side.stats.copied_share || 0 : side.stats.routing_share[exit] || 0);
  if (!bar.children.length) bar.append(...writers().map(exit => make('span', 'ce-share-part ' + colourClass(exit))));
  shares.forEach((share, n) => { bar.children[n].style.flexGrow = share; });
  const words = writers().map((exit, n) => shares[n] ? swatchText(exit) + ' ' + percent(shares[n]) : '').filter(Boolean).join(', ');
  bar.title = words;
  bar.setAttribute('role', 'img');
  bar.setAttribute('aria-label', 'Who wrote the tokens: ' + words);
}

function drawRejected(name) {
  const side = sides[name], node = parts[name].rejected, on = root.classList.contains('ce-show-rejected');
  node.hidden = side.rejected === 0;
  node.setAttribute('aria-pressed', String(on));
  node.title = side.rejected + ' rejected drafts: the likeliest one at each place. Each pass of the timeline shows all of its drafts.';
  put(node, (on ? 'Hide' : 'Show') + ' rejected');
}

// Scroll a token into the middle of its text, without moving the page.
function reveal(name, i) {
  const node = sides[name].nodes[i], box = parts[name].text;
  if (node) box.scrollTop += node.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
}
