// Statistics at the moment that the player shows. Those of the stream come twice a second, so at most moments they are of
// fewer tokens than the text. The definitions are those of cascadeexit/metrics.py.

function measureShown(side) {
  const tokens = side.records.slice(decodedFrom(side)), n = tokens.length;
  if (!n) return;
  const share = exit => tokens.filter(r => r.exit === exit).length / n, sorted = [...side.times].sort((a, b) => a - b);
  const reads = side.events.map(r => r.read).filter(read => !missing(read)), seconds = p => missing(p) ? null : p / 1000;
  side.stats = { done: false, ...side.stats, tokens: n, routing_share: [...model.exits, null].map((_, exit) => share(exit)),
    copied_share: share(COPIED), seconds: tokens[n - 1].t, first_token_seconds: tokens[0].t, tokens_per_second: rateOf(side),
    token_seconds_p50: seconds(quantile(sorted, 0.5)), token_seconds_p90: seconds(quantile(sorted, 0.9)),
    cost: reads.length ? reads.reduce((sum, read) => sum + read, 0) / n : null, ...draftsShown(side, n) };
}

function rateOf(side) {                      // null before the second token
  const tokens = side.records.slice(decodedFrom(side)), time = tokens.length > 1 ? tokens[tokens.length - 1].t - tokens[0].t : 0;
  return time > 0 ? (tokens.length - 1) / time : null;
}

function draftsShown(side, tokens) {
  const lane = readPasses().get(side.name), last = side.records.length - 1;
  if (!isVerified(lane)) return {};
  const passes = lane.passes.filter(pass => !isChoice(pass) && pass.wrote.length && pass.wrote[0].i <= last);
  const drafted = passes.reduce((sum, pass) => sum + draftCount(pass), 0), accepted = passes.reduce((sum, pass) => sum + acceptedOf(pass).length, 0);
  return { drafted, acceptance: drafted ? accepted / drafted : null, tokens_per_verification: drafted ? tokens / passes.length : null };
}

function compareShown(side) {
  const ours = side.records, theirs = sides[FULL].records, n = Math.min(ours.length, theirs.length);
  if (!n || side.name === FULL) return;
  const same = ours.slice(0, n).map((r, i) => r.id === theirs[i].id), count = list => list.filter(Boolean).length / list.length;
  const first = same.indexOf(false), speeds = [rateOf(side), rateOf(sides[FULL])];
  side.versus = { ...side.versus, n, speedup: speeds[0] && speeds[1] ? speeds[0] / speeds[1] : null, positional: count(same),
    rolling: count(same.slice(-32)), first_divergence: first < 0 ? null : first };
}

function measureMoment() {
  if (player.atEnd || !run) return;           // the stream's own statistics are of the whole run
  order.forEach(name => measureShown(sides[name]));
  order.forEach(name => compareShown(sides[name]));
}
