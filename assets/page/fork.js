// Forks: the text goes on from one token with another choice, in a panel of its own.

const MAX_SHOWN = 3;                         // forks beside each other
let asked = null;                            // {run, forks} while the server has not answered

const forks = () => order.filter(name => sides[name].of);
const isRunning = () => document.body.classList.contains('ce-running');

function whyNoFork() {                       // '' where a fork can begin
  if (replaying()) return 'A recorded run cannot be continued. Press Run: when your own run is over, you can continue it with other tokens.';
  if (!finished || isRunning()) return 'The text can be continued when the run is over.';
  if (forks().length >= MAX_SHOWN) return 'Close one of the ' + MAX_SHOWN + ' continued texts first.';
  return '';
}

// The button of the card. `choose` puts another candidate on it.
function forkOffer(side, i, choice) {
  if (!choice || i < side.start) return null;
  const reason = whyNoFork(), words = make('b'), go = button('ce-small ce-fork', null, () => askFork(side.name, i, go.choice));
  go.append('Continue with ', words, ' instead');
  go.disabled = Boolean(reason);
  const choose = to => { go.choice = to; put(words, inQuotes(to.text)); };
  choose(choice);
  return { node: forkRow(go, reason || 'Or choose another token above.'), choose(to) { choose(to); go.focus(); }, open: !reason };
}

// The full model's text goes on after one of its tokens with the settings of the first text.
function continueOffer(i) {
  const { id, text } = sides[FULL].records[i], reason = whyNoFork();
  const go = button('ce-small ce-fork', 'Continue from here with ' + settingsName(), () => askFork(FULL, i, { id, text }));
  go.disabled = Boolean(reason);
  return forkRow(go, reason || 'Up to this token, the new text is the full model’s.');
}

const forkRow = (go, words) => make('div', 'ce-fork-row', null, go, make('span', 'ce-card-hint', words));
const settingsName = () => 'the settings of “' + sides.cascade.title + '”';

// The fork that continues a text from this position with this token, if there is one.
const forkOf = (name, i, id) => forks().find(fork => sides[fork].of === name && sides[fork].at === i && sides[fork].id === id);

function showFork(name) {
  const { box } = parts[name], at = sides[name].start;
  if (narrow()) box.scrollIntoView({ block: 'nearest' });
  else parts.panels.scrollTo({ left: box.offsetLeft - parts.panels.offsetLeft - 40 });
  unfold(name, at);
  reveal(name, at);
  flash(sides[name].nodes[at]);
}

function askFork(name, i, choice) {
  const there = forkOf(name, i, choice.id);
  if (there) { closeCard(); return showFork(there); }
  if (whyNoFork()) return;
  closeCard();
  asked = { run: run.run, forks: forks().length };
  waiting(true);
  status('Continuing with ' + inQuotes(choice.text) + '…', 'busy');
  trigger('fork', { run: run.run, side: name, at: i, id: choice.id });
}

// The server has done with it; when it refused, no fork came.
document.addEventListener('ce-fork-over', () => {
  if (asked && run && run.run === asked.run && forks().length === asked.forks) {
    waiting(false);
    status('Not continued.', 'stopped');
  }
  asked = null;
});

function markFork(record) {
  const side = sides[record.side], part = parts[record.side], before = sides[record.of];
  const instead = before.records[record.at], number = record.side.replace(/\D/g, '');
  side.title = 'Fork ' + number;
  side.instead = instead ? instead.text : '';
  put(part.title, side.title);
  part.text.setAttribute('aria-label', 'Text: ' + side.title);
  part.box.classList.add('ce-forked');
  part.close = button('ce-toggle ce-close-fork', 'Close', () => closeFork(record.side));
  part.close.setAttribute('aria-label', 'Close ' + side.title);
  part.box.querySelector('header').append(part.close);
  put(part.aside, forkWords(side) + '.');
  part.aside.hidden = false;
  showFork(record.side);
}

// What is other in a fork than in the text that it left.
const forkWords = side => side.of === FULL ? 'The full model’s text up to token ' + (side.at + 1) + ', then ' + settingsName()
  : inQuotes(side.text) + ' instead of ' + inQuotes(side.instead) + ' at token ' + (side.at + 1) + ' of ' + sides[side.of].title;

function closeFork(name) {
  if (isRunning() || !sides[name]) return;
  closeCard();
  if (!player.atEnd) seekToEnd();
  for (const child of forks().filter(f => sides[f].of === name)) closeFork(child);
  records = records.filter(record => record.side !== name);
  player.shown = records.length;
  parts[name].box.remove();
  order = order.filter(other => other !== name);
  delete sides[name];
  parts.panels.dataset.count = order.length;
  dirty = true;
  each('leave', name);
  draw();
}

// Whether the choice mattered: how much of what follows is the same as in the text that it left.
function judgeFork(name) {
  const side = sides[name], before = sides[side.of], part = parts[name];
  if (!side.end || !before) return;
  const ours = side.records.slice(side.start + 1).map(r => r.id), theirs = before.records.slice(side.start + 1).map(r => r.id);
  const blocks = alignIds(ours, theirs), same = blocks.filter(b => b.same).reduce((n, b) => n + b.a1 - b.a0, 0);
  const share = same / Math.max(1, ours.length, theirs.length), first = blocks.find(b => b.same);
  const effect = share >= 0.9 ? 'hardly mattered' : share >= 0.5 ? 'changed part of the text' : 'changed the text';
  side.verdict = effect + ', ' + percent(share) + ' of the rest is equal';
  put(part.aside, forkWords(side) + ': it ' + effect + '. '
    + percent(share) + ' of what follows is the same as in ' + before.title + '.');
  const at = side.start + 2 + first?.a0, long = first && first.a1 - first.a0;
  part.aside.title = !first || !same ? '' : long === 1 ? 'Token ' + at + ' is the same in both texts.'
    : 'From token ' + at + ', the next ' + long + ' tokens are the same in both texts.';
}

feature({
  record: {
    fork: markFork,
    token(record) {
      const side = sides[record.side];
      if (side.of && record.i === side.start && record.status !== 'draft' && record.status !== 'rejected') side.nodes[record.i].classList.add('forked');
    },
    end(record) { if (sides[record.side || 'cascade'].of) judgeFork(record.side); },
  },
  begin() { asked = null; },
});
