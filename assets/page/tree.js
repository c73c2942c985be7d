// The chosen pass in words, and the tree of tokens that were drafted for it: probabilities, who drafted each, the path
// that the full model accepted, and its own token at the end of that path.

const passTitle = pass => isChoice(pass) ? 'Your choice: ' + quoted(textOfPass(pass))
  : isVerified(pass.lane) ? 'Pass ' + (pass.n + 1) : 'Token ' + ((pass.wrote[0] || { i: pass.n }).i + 1) + ' ' + quoted(textOfPass(pass));
const quoted = text => '“' + visible(text) + '”';
const inMs = seconds => number(1000 * seconds, 1000 * seconds < 10 ? 2 : 1) + ' ms';

function passWords(pass) {
  if (isChoice(pass)) return 'you chose this token; the text goes on from here';
  const time = inMs(pass.end - pass.start) + (readsPrompt(pass) ? ', including the time to read the text before this pass' : ''), words = [];
  if (isVerified(pass.lane)) {
    const drafts = draftCount(pass), accepted = acceptedOf(pass).length;
    words.push(drafts ? accepted + ' of ' + drafts + (drafts === 1 ? ' draft accepted' : ' drafts accepted') : 'nothing drafted');
    words.push('wrote ' + pass.wrote.length + (pass.wrote.length === 1 ? ' token' : ' tokens'));
  } else if (pass.wrote.length && pass.lane.name !== FULL) {
    const { exit } = pass.wrote[0];
    words.push(exitName(exit) + ', ' + exitPlace(exit));
    for (const [first, end, rows] of caughtUp(pass)) words.push(layerRange(first, end) + ' caught up on ' + rows + ' positions');
  } else if (pass.wrote.length) words.push(exitPlace(model.exits.length));
  return [...words, time].join(' · ');
}

function showPass(pass) {
  const { pane } = timeline.nodes || {};
  if (!pane) return;
  pane.hidden = !pass;
  if (!pass) return pane.replaceChildren();
  const go = button('ce-small', 'Go to this moment', () => goToPass(pass));
  const close = button('ce-small ce-pass-close', '×', leavePass);
  close.setAttribute('aria-label', 'Close the pass');
  const title = draftCount(pass) || !pass.wrote.length ? make('b', null, passTitle(pass))
    : opensCard(button('ce-pass-token', passTitle(pass)), pass, pass.wrote[0]);
  const head = make('header', null, null, title, go, close);
  const ran = pass.steps.flatMap(step => step.ran);
  pane.replaceChildren(head, make('p', 'ce-pass-words', passWords(pass)));
  if (draftCount(pass)) pane.append(draftTree(pass));
  else if (ran.length) pane.append(ranTable(ran));
  else if (!isVerified(pass.lane) && !isChoice(pass)) pane.append(make('p', 'ce-pass-words', 'This saved run does not say which layers ran.'));
}

// A node of the pane that opens the card of a token that the pass wrote.
function opensCard(node, pass, record) {
  node.addEventListener('click', () => lookAt(pass.lane.name, record.i));
  return node;
}

function ranTable(ran) {                     // neighbouring segments of as many positions on one line
  const lines = [];
  for (const [first, end, rows] of ran) {
    const last = lines[lines.length - 1];
    if (last && last.end === first && last.rows === rows) last.end = end; else lines.push({ first, end, rows });
  }
  const rows = lines.map(({ first, end, rows }) => make('tr', null, null, make('th', null, layerRange(first, end)),
    make('td', null, rows === 1 ? 'ran for 1 position' : 'ran for ' + rows + ' positions at once')));
  return make('table', 'ce-pass-ran', null, make('tbody', null, null, ...rows));
}

// -- the tree --------------------------------------------------------------------------------------------------------------

const LEVEL = 24, LETTER = 7.3, ROOM = 12;   // height of a row, width of a letter, most letters of a token

function draftTree(pass) {
  const drafts = draftsOf(pass), nodes = plannedTree(pass, drafts);
  const wide = Math.max(...nodes.map(node => node.x + node.w)) + 4, tall = (1 + Math.max(...nodes.map(node => node.row))) * LEVEL + 4;
  const accepted = drafts.filter(d => d.accepted).length;
  const picture = drawn('svg', { class: 'ce-tree', width: wide, height: tall, viewBox: `0 0 ${wide} ${tall}`, role: 'group',
    'aria-label': 'Draft tree: ' + drafts.map(d => quoted(d.text) + (missing(d.p) ? '' : ' ' + likely(d.p)) + (d.accepted ? ' accepted' : '')).join(', ')
      + (pass.own ? '. The full model’s own token: ' + quoted(pass.own.text) : '') });
  for (const node of nodes) if (node.from) picture.append(...edgeOf(node));
  const side = sides[pass.lane.name] || pass.lane;
  for (const node of nodes) picture.append(node.record ? pillButton(node, pass, side) : pillOf(node, side));
  const box = make('div', 'ce-tree-scroll', null, picture);
  box.tabIndex = 0;
  box.setAttribute('role', 'region');
  box.setAttribute('aria-label', 'Draft tree, ' + accepted + ' of ' + drafts.length + ' accepted');
  return box;
}

// Where each token stands: one column for each depth; the accepted path runs along the top, likelier branches before
// others. The root is the token before the pass.
function plannedTree(pass, drafts) {
  const first = pass.wrote.length ? pass.wrote[0].i : pass.drafts[0].i, before = sides[pass.lane.name] && sides[pass.lane.name].nodes[first - 1];
  const node = (text, kind, more) => ({ text: shortened(text), whole: text, kind, ...more });
  const root = node(before ? before.textContent : 'prompt', 'root', { depth: 0, children: [] });
  const all = drafts.map(d => node(d.text, d.accepted ? 'accepted' : d.accepted === false || pass.own ? 'rejected' : 'waiting', { p: d.p, exit: d.exit, children: [] }));
  all.forEach((n, k) => { n.from = all[drafts[k].parent] || root; n.from.children.push(n); n.depth = n.from.depth + 1; });
  const path = all.filter(n => n.kind === 'accepted'), last = path[path.length - 1] || root;
  acceptedOf(pass).forEach((record, k) => { if (path[k]) path[k].record = record; });
  if (pass.own) {
    const own = node(pass.own.text, 'own', { from: last, depth: last.depth + 1, children: [], exit: model.exits.length, record: pass.own });
    last.children.unshift(own);
    all.push(own);
  }
  const rank = n => n.kind === 'accepted' ? 3 : n.kind === 'own' ? 2 : n.p || 0;
  let row = 0;
  const place = n => {
    n.row = row;
    n.children.sort((a, b) => rank(b) - rank(a)).forEach((child, k) => { if (k) row++; place(child); });
  };
  place(root);
  const nodes = [root, ...all], columns = [];
  for (const n of nodes) { n.w = Math.max(22, n.text.length * LETTER + 12); columns[n.depth] = Math.max(columns[n.depth] || 0, n.w); }
  for (const n of nodes) n.x = 2 + columns.slice(0, n.depth).reduce((sum, w) => sum + w + 44, 0);
  for (const n of nodes) n.y = n.row * LEVEL + LEVEL / 2 + 1;
  return nodes;
}

function shortened(text) {
  const letters = [...visible(text)];
  return letters.length > ROOM ? letters.slice(0, ROOM - 1).join('') + '…' : letters.join('') || '∅';
}

function edgeOf(node) {
  const x = node.from.x + node.from.w, { y } = node.from, to = node.x, bend = (to - x) / 2, straight = node.y === y;
  const path = drawn('path', { class: 'ce-edge ' + node.kind, 'stroke-width': missing(node.p) ? 1.5 : (0.8 + 4 * node.p).toFixed(2),
    d: straight ? `M${x} ${y}H${to}` : `M${x} ${y}C${x + bend} ${y} ${x + bend * 0.6} ${node.y} ${to} ${node.y}` });
  const words = node.kind === 'own' ? 'full' : missing(node.p) ? '' : likely(node.p);
  if (!words) return [path];
  const label = drawn('text', { class: 'ce-edge-p', x: to - 5, y: node.y - 4 });
  label.textContent = words;
  return [path, label];
}

function pillOf(node, side) {
  const pill = drawn('g', { class: 'ce-pill ' + node.kind + (node.kind === 'root' || node.kind === 'own' ? '' : ' ' + colourClass(node.exit)) });
  const title = drawn('title'), text = drawn('text', { x: node.x + node.w / 2, y: node.y + 4 });
  title.textContent = quoted(node.whole) + (node.kind === 'root' ? ': the last token before this pass' : node.kind === 'own' ? ': the full model’s own token'
    : ': ' + (node.exit === COPIED ? 'copied from earlier in the text' : 'drafted by ' + draftedBy(side, node.exit).replace('The', 'the')) + ', ' + (node.kind === 'waiting' ? 'not checked yet' : node.kind)
    + (missing(node.p) ? '' : ', estimated probability ' + likely(node.p)));
  text.textContent = node.text;
  pill.append(drawn('rect', { x: node.x, y: node.y - 9.5, width: node.w, height: 19, rx: 5 }), text, title);
  return pill;
}

function pillButton(node, pass, side) {            // of a token that stands in the text
  const pill = opensCard(pillOf(node, side), pass, node.record);
  pill.setAttribute('role', 'button');
  pill.setAttribute('tabindex', '0');
  pill.addEventListener('keydown', event => {
    if (event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();
    event.stopPropagation();
    lookAt(pass.lane.name, node.record.i);
  });
  return pill;
}
