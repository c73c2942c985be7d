// A picture of the token view, as SVG or PNG: white paper, wrapped text in the colours of the exits, a legend with model,
// setting, numbers, machine and date. Made as nodes and serialised, so that no token can break out of its text.

const PAPER = { width: 1200, margin: 32, gap: 32, line: 25, size: 15, ink: '#17202c', soft: '#566070', loud: '#d4380d', rule: '#d5dae1' };
const FACE = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif";        // a picture cannot bring the page's font

// XML has no way to write these characters at all, and half an emoji is no character.
const printable = text => Array.from(text, c => /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ufffe\uffff]/.test(c)
  || c.length === 1 && c >= '\ud800' && c <= '\udfff' ? '\ufffd' : c).join('');
const graphemes = text => typeof Intl.Segmenter === 'function' ? Array.from(new Intl.Segmenter().segment(text), part => part.segment) : [...text];

let pen;

function widthOf(text, font) {
  pen = pen || document.createElement('canvas').getContext('2d');
  pen.font = font;
  return pen.measureText(text).width;
}

// The tokens of a side as pieces on lines of this width: {x, row, width, text, token}. Lines break between words, which
// may be several tokens; a word that is longer than a line is cut between letters.
function laidOut(side, width) {
  const font = PAPER.size + 'px ' + FACE, wide = text => widthOf(text, font), pieces = [];
  let x = 0, row = 0, word = 0;                // word: the first piece of the word that is being written
  const newLine = () => { x = 0; row++; word = pieces.length; };
  const put = (text, token) => { pieces.push({ x, row, width: wide(text), text, token }); x += wide(text); };
  const add = (text, token) => {
    if (/^\s/.test(text)) word = pieces.length;
    if (x + wide(text) > width && x > 0) {
      const begun = pieces.slice(word), long = begun.reduce((sum, piece) => sum + piece.width, 0);
      if (begun.length && begun[0].x > 0 && long + wide(text) <= width) {          // take the whole word along
        row++; x = 0;
        begun[0].text = begun[0].text.trimStart();
        begun[0].width = wide(begun[0].text);
        for (const piece of begun) Object.assign(piece, { x, row }), x += piece.width;
      } else if (!begun.length || wide(text) > width) { newLine(); text = text.trimStart(); }
    }
    let fits = '';
    for (const letter of wide(text) + x > width ? graphemes(text) : [text]) {
      if (fits && x + wide(fits + letter) > width) { put(fits, token); newLine(); fits = ''; }
      else if (x > 0 && x + wide(letter) > width) newLine();
      fits += letter;
    }
    if (fits) put(fits, token);
    if (/\s$/.test(text)) word = pieces.length;
  };
  side.nodes.forEach((node, i) => {
    if (!node) return;
    const token = { exit: side.records[i].exit, differs: node.classList.contains('differs'), special: node.classList.contains('special') };
    printable(node.textContent).replace(/\t/g, '    ').replace(/\r\n?/g, '\n').split('\n').forEach((line, n) => {
      if (n) newLine();
      for (const part of line.match(/\s*\S+|\s+$/g) || []) add(part, token);
    });
  });
  return { pieces, rows: row + 1 };
}

// Text at a place. Its width is fixed, so that another font on another machine leaves it inside its box.
function pictureText(x, y, text, { size = 13, fill = PAPER.ink, bold = false, width } = {}) {
  const lead = text.length - text.trimStart().length, font = (bold ? 'bold ' : '') + size + 'px ' + FACE;
  const start = lead ? widthOf(text.slice(0, lead), font) : 0, body = text.trim();
  const node = drawn('text', { x: (x + start).toFixed(2), y: y.toFixed(2), 'font-size': size, fill });
  if (bold) node.setAttribute('font-weight', 'bold');
  if (width && body) node.setAttribute('textLength', widthOf(body, font).toFixed(2));
  node.textContent = body;
  return node;
}

function settingWords() {                          // the run's own settings, in words
  const side = sides[exitSides()[0]];
  const list = side.mode === 'verified' ? ['Exact mode' + (side.tolerance ? ' with tolerance ' + side.tolerance : '')] : ['Early exits'];
  if (side.mode !== 'verified' && side.thresholds) list.push('thresholds of the exits: ' + side.thresholds.map(t => missing(t) || t >= 1 ? 'off' : percent(t)).join(', '));
  list.push(run.greedy === false ? sampledWords(run.settings || {}) : 'greedy', 'up to ' + run.max_new_tokens + ' tokens');
  return list.join(' · ');
}

const sampledWords = ({ temperature, top_p: p, seed }) => missing(temperature) ? 'sampled'
  : 'sampled with temperature ' + temperature + ', top-p ' + p + ', seed ' + seed;

function pictureHeadline() {
  const side = sides[exitSides()[0]], { stats, versus, end } = side, list = [];
  if (end && end.loops) list.push('The text repeats itself, so speed and agreement mean little');
  if (versus && !missing(versus.speedup)) list.push(versus.speedup.toFixed(1) + '× the full model’s speed');
  const so = agreementSoFar(side);
  if (run.greedy !== false && (end ? !missing(end.agreement) : so)) list.push(percent(end ? end.agreement : so.share) + ' agreement');
  if (stats && !missing(stats.cost)) list.push(percent(stats.cost) + ' of the weights read');
  if (end && end.identical) list.push('identical to the full model’s text');
  return list.join(' · ');
}

function picture() {
  const { margin, gap, width, line, size } = PAPER, names = order, inner = width - 2 * margin;
  const column = (inner - gap * (names.length - 1)) / names.length, nodes = [], add = (...made) => nodes.push(...made);
  const prompt = run.settings && run.settings.prompt || '';
  let y = margin + 16;
  add(pictureText(margin, y, model.model, { size: 20, bold: true }));
  for (const [text, style] of [[prompt && 'Prompt: ' + printable(prompt).replace(/\s+/g, ' '), {}], [settingWords(), { fill: PAPER.soft }], [pictureHeadline(), { bold: true }]]) {
    if (!text) continue;
    add(pictureText(margin, y += 22, clippedTo(text, inner, style), { ...style }));
  }
  y += 28;
  let x = margin;
  const shares = sides[exitSides()[0]].stats, verb = run.mode === 'verified' ? 'Drafted by' : 'Written by';
  add(pictureText(x, y, verb, { fill: PAPER.soft }));
  x += widthOf(verb, '13px ' + FACE) + 10;
  for (const exit of writers()) {
    const share = !shares ? null : exit === COPIED ? shares.copied_share || 0 : shares.routing_share[exit];
    if (exit === COPIED && !share) continue;
    const label = exitName(exit) + ', ' + exitPlace(exit) + (missing(share) ? '' : ': ' + percent(share)), wide = widthOf(label, '13px ' + FACE) + 16;
    if (x + wide > width - margin) { x = margin; y += 26; }
    add(drawn('rect', { x, y: y - 15, width: wide, height: 21, rx: 3, fill: paperColour(exit) || '#ffffff', stroke: paperColour(exit) ? 'none' : PAPER.soft }), pictureText(x + 8, y, label));
    x += wide + 8;
  }
  y += 24;
  const top = y, layouts = names.map(name => laidOut(sides[name], column));
  names.forEach((name, n) => {
    const left = margin + n * (column + gap), { pieces } = layouts[n], first = top + 44;
    add(drawn('line', { x1: left, x2: left + column, y1: top, y2: top, stroke: PAPER.rule }), pictureText(left, top + 20, pictureTitle(sides[name], column), { bold: true, size: 14 }));
    for (const { x, row, width: wide, text, token } of pieces) {
      const at = first + row * line, fill = name === FULL ? null : paperColour(token.exit);
      if (fill) add(drawn('rect', { x: (left + x).toFixed(2), y: at - 16, width: wide.toFixed(2), height: 21, rx: 2, fill }));
      if (token.differs) add(drawn('rect', { x: (left + x).toFixed(2), y: at + 3, width: wide.toFixed(2), height: 2.5, fill: PAPER.loud }));
      if (text.trim()) add(pictureText(left + x, at, text, { size, width: true, fill: token.special ? PAPER.soft : PAPER.ink }));
    }
  });
  y = top + 44 + Math.max(...layouts.map(l => l.rows)) * line + 4;
  const marked = exitSides().some(name => sides[name].nodes.some(node => node && node.classList.contains('differs')));
  const foot = [run.machine, run.date || new Date().toISOString().slice(0, 10), marked && 'orange line: the full model would choose another token', 'CascadeExit'].filter(Boolean).join(' · ');
  add(pictureText(margin, y += 12, clippedTo(foot, inner, {}), { size: 12, fill: PAPER.soft }));
  const height = Math.ceil(y + margin - 8);
  const svg = drawn('svg', { width, height, viewBox: `0 0 ${width} ${height}`, 'font-family': FACE },
    drawn('title'), drawn('rect', { width, height, fill: '#ffffff' }), ...nodes);
  svg.setAttributeNS('http://www.w3.org/XML/1998/namespace', 'xml:space', 'preserve');
  svg.firstChild.textContent = printable('CascadeExit: ' + model.model + (prompt ? ', ' + prompt : ''));
  return { svg, width, height };
}

// A fork also has the token with which it begins.
function pictureTitle(side, width) {
  const title = !side.of ? side.title : side.title + ': ' + inQuotes(side.records[side.start].text) + ' instead of ' + inQuotes(side.instead);
  return clippedTo(printable(title), width, { bold: true });
}

const paperColour = exit => isLast(exit) ? null : exit === COPIED ? '#f2c4d8' : model.colours[Math.min(exit, 5)];

function clippedTo(text, width, { bold = false }) {
  const font = (bold ? 'bold ' : '') + '13px ' + FACE;
  if (widthOf(text, font) <= width) return text;
  const all = graphemes(text);
  while (all.length && widthOf(all.join('') + '…', font) > width) all.pop();
  return all.join('') + '…';
}

const pictureFile = () => '<?xml version="1.0" encoding="UTF-8"?>\n' + new XMLSerializer().serializeToString(picture().svg);

async function savePixels() {
  const { width, height } = picture(), scale = Math.min(2, 16000 / height), image = new Image();
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(pictureFile());
  await image.decode();
  const canvas = document.createElement('canvas');
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob(blob => blob ? save('tokens.png', 'image/png', blob) : status('This browser could not draw the picture. Save it as SVG.', 'error'));
}
