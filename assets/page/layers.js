// Layers and time: the detailed form of the timeline. Rows are the layers between two exits, the first layers at the
// bottom; a block says that these layers ran, and for how many positions at once.

const EMPTY_ROW = 6;                         // height of a row without layers: an exit that reads no layer

function rowsOf(box) {                       // [top, height] of each segment
  const count = model.exits.length + 1, all = [...Array(count).keys()], empty = all.filter(s => !segmentLayers(s)).length;
  const tall = (box.height - EMPTY_ROW * empty) / (count - empty);
  let floor = box.top + box.height;
  return all.map(s => {
    const height = segmentLayers(s) ? tall : EMPTY_ROW;
    floor -= height;
    return [floor, height];
  });
}

function segmentNames(box) {
  return rowsOf(box).map(([top, height], s) => {
    const name = make('span', 'ce-time-row', segmentLayers(s) ? layerRange(s, s + 1) : '');
    name.style.top = top + 'px';
    name.style.height = name.style.lineHeight = height + 'px';
    return name;
  });
}

function drawSegments(context, box, colours, passes) {
  const rows = rowsOf(box), right = plotWidth();
  context.fillStyle = colours.line;
  rows.forEach(([top, height]) => context.fillRect(gutter(), Math.round(top + height) - 0.5, right, 0.5));
  for (const pass of passes) {
    for (const step of pass.steps) {
      const spans = step.ran.length ? spansOf(step) : guessedSpan(pass, step);
      for (const span of spans) drawSpan(context, box, colours, rows, pass, step, span, right);
    }
    if (readsPrompt(pass) && pass.steps[0]) {
      const x = xOf(0), w = xOf(pass.steps[0].end) - x;
      drawPrompt(context, box, colours, x, w);
    }
  }
}

// Old files do not say what ran. An exit's token needs at least the layers below the exit.
function guessedSpan(pass, step) {
  if (step.draft || isVerified(pass.lane) || step.exit === COPIED) return [];
  return [{ first: 0, end: Math.min(step.exit, model.exits.length) + 1, rows: 1, from: step.start, to: step.end }];
}

function drawSpan(context, box, colours, rows, pass, step, { first, end, rows: positions, from, to }, right) {
  const left = xOf(from), wide = xOf(to) - left;
  if (left > right || left + wide < gutter()) return;
  const many = positions > 1, x = left, w = Math.max(0.8, wide - (wide > 4 ? 1 : 0));
  const [top] = rows[end - 1], [low, height] = rows[first], tall = low + height - top - 1;
  const checking = many && isVerified(pass.lane);
  context.fillStyle = checking ? colours.soft : many ? colours.accent : colours.of(step.exit);
  context.fillRect(x, top + 0.5, w, tall);
  if (many && w > 2 * positions && positions <= 32) {           // one cell for each position
    context.fillStyle = colours.card;
    context.globalAlpha = 0.6;
    for (let k = 1; k < positions; k++) context.fillRect(x + w * k / positions, top + 0.5, 0.6, tall);
    context.globalAlpha = 1;
  }
  if (!many || w < 22 || tall < 9) return;
  const words = '×' + positions;
  context.font = '600 10px ' + colours.font;
  const size = context.measureText(words).width + 6, y = top + tall / 2;
  if (size > w) return;
  context.fillStyle = colours.card;
  context.fillRect(x + (w - size) / 2, y - 5, size, 11);
  context.fillStyle = colours.ink;
  context.fillText(words, x + (w - size) / 2 + 3, y + 4);
}
