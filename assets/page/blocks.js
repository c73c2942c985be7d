// Blocks: how the timeline draws the passes of a lane.

function visiblePasses(lane) {
  const first = passAt(lane, timeline.from);
  if (!first) return [];
  let end = first.n;
  while (end < lane.passes.length && lane.passes[end].start < timeline.to) end++;
  return lane.passes.slice(first.n, end);
}

// The form of passes. In a cascade the height of a block is the share of the layers that ran, in the colour of the exit
// that wrote the token; stripes are skipped layers that catch up. In Exact mode a block is a pile of tokens: accepted
// drafts, the full model's own token, and above them the rejected drafts as outlines. A thin foot is the time of drafting.
function drawBlocks(context, box, colours, passes) {
  const most = isVerified(box.lane) ? Math.max(4, box.lane.most = longestPile(box.lane)) : 0;
  for (const pass of passes) {
    const left = xOf(pass.start), right = xOf(pass.end), wide = right - left;
    const x = Math.max(left, -4), w = Math.max(0.8, Math.min(right, plotWidth() + 4) - x - (wide > 5 ? 1 : wide > 2.5 ? 0.5 : 0));
    if (isVerified(box.lane)) drawPile(context, box, colours, pass, x, w, most);
    else drawDepth(context, box, colours, pass, x, w);
  }
}

function longestPile(lane) {                 // grows with the lane; counted once for each pass
  let most = lane.most || 0;
  for (let n = Math.max(0, (lane.counted || 0) - 1); n < lane.passes.length; n++) most = Math.max(most, draftCount(lane.passes[n]) + 1);
  lane.counted = lane.passes.length;
  return most;
}

function drawDepth(context, box, colours, pass, x, w) {
  if (readsPrompt(pass)) return drawPrompt(context, box, colours, x, w);
  const record = pass.wrote[pass.wrote.length - 1];
  if (!record) return;
  const top = isLast(record.exit) ? 1 : record.exit === COPIED ? 0.1 : model.exits[record.exit].layer / model.layers;
  const tall = Math.max(5, top * box.height), floor = box.top + box.height;
  context.fillStyle = colours.of(record.exit);
  context.fillRect(x, floor - tall, w, tall);
  if (w > 2) for (const [first, end] of caughtUp(pass)) {
    const low = (first ? segmentTop(first - 1) : 0) / model.layers, high = segmentTop(end - 1) / model.layers;
    context.fillStyle = stripes(context, colours.ink);
    context.fillRect(x, floor - high * box.height, w, (high - low) * box.height);
  }
}

function drawPile(context, box, colours, pass, left, wide, most) {
  const prompt = readsPrompt(pass) && pass.steps[0] ? xOf(pass.steps[0].end) : 0;
  const x = Math.max(left, prompt), w = Math.max(0.8, left + wide - x);
  const accepted = acceptedOf(pass), drafts = draftCount(pass), cell = box.height / most, gap = cell > 4 && w > 3 ? 1 : 0;
  let floor = box.top + box.height - 4;
  const scale = (box.height - 4) / box.height, h = cell * scale;
  const place = () => { floor -= h; return [x, floor + gap, w, Math.max(0.8, h - gap)]; };
  for (const record of accepted) {
    context.fillStyle = colours.of(record.exit);
    context.fillRect(...place());
  }
  if (pass.own) {
    context.fillStyle = colours.quiet;
    context.fillRect(...place());
  }
  const open = drafts - accepted.length;                        // rejected, or not judged yet
  if (open > 0) {
    floor -= open * h;
    context.globalAlpha = 0.22;
    context.fillStyle = context.strokeStyle = colours.soft;
    context.fillRect(x, floor + gap, w, open * h - gap);
    context.globalAlpha = 0.6;
    if (w > 5) for (let k = 0; k < (h > 4 ? open : 1); k++)
      context.strokeRect(x + 0.5, floor + gap + 0.5 + k * h, w - 1, (h > 4 ? h : open * h) - gap - 1);
    context.globalAlpha = 1;
  }
  if (prompt) drawPrompt(context, box, colours, xOf(0), prompt - xOf(0) - 1);
  if (!pass.drafts.length) return;
  context.fillStyle = colours.of(pass.drafts[0].exit);
  const until = Math.min(xOf(pass.drafted), x + w);
  context.fillRect(x, box.top + box.height - 3, Math.max(0.8, until - x), 3);
}

function drawPrompt(context, box, colours, x, w) {
  context.fillStyle = colours.card;
  context.globalAlpha = 0.72;
  context.fillRect(x, box.top, w, box.height);
  context.globalAlpha = 1;
  context.strokeStyle = colours.soft;
  context.setLineDash([3, 3]);
  if (w > 3) context.strokeRect(x + 0.5, box.top + 0.5, w - 1, box.height - 1);
  context.setLineDash([]);
  if (w < 64) return;
  context.fillStyle = colours.ink;
  context.font = '12px ' + colours.font;
  context.fillText('prompt', Math.max(x, 0) + 8, box.top + box.height / 2 + 4);
}

const stripePatterns = new Map();
function stripes(context, colour) {
  if (!stripePatterns.has(colour)) {
    const tile = make('canvas');
    tile.width = tile.height = 6;
    const pen = tile.getContext('2d');
    pen.strokeStyle = colour;
    pen.globalAlpha = 0.55;
    pen.lineWidth = 1.3;
    for (const x of [-6, 0, 6]) { pen.beginPath(); pen.moveTo(x, 6); pen.lineTo(x + 6, 0); pen.stroke(); }
    stripePatterns.set(colour, context.createPattern(tile, 'repeat'));
  }
  return stripePatterns.get(colour);
}
