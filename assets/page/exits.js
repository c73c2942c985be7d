// Who wrote a token: an exit by its number, the full model (the number after the last exit), or nobody, for a token that
// was copied from earlier in the text.

const COPIED = -1;

const isLast = exit => exit >= model.exits.length;
const colourClass = exit => isLast(exit) ? 'ef' : exit === COPIED ? 'ec' : 'e' + Math.min(exit, 5);
const exitName = exit => isLast(exit) ? 'Full model' : exit === COPIED ? 'Copied' : 'Exit ' + (exit + 1);
const exitPlace = exit => isLast(exit) ? 'all ' + model.layers + ' layers'
  : exit === COPIED ? 'from earlier in the text'
  : model.exits[exit].layer === 0 ? 'before layer 1'
  : 'after layer ' + model.exits[exit].layer;
const swatchText = exit => isLast(exit) ? 'full model' : exit === COPIED ? 'copied' : 'exit ' + (exit + 1);
const swatch = exit => make('span', 'ce-swatch t ' + colourClass(exit), swatchText(exit));
const writers = () => [...model.exits.keys(), model.exits.length, COPIED];
// Exact mode drafts with the drafter, unless thresholds let the exits draft.
const draftedBy = (side, exit) => exit !== COPIED && side.mode === 'verified' && (side.thresholds || [0]).every(missing) ? 'The drafter' : exitName(exit);
const isExact = side => side.mode === 'verified' && !side.tolerance;

// Words that a visitor may not know. `term` makes a node that explains one on hover, focus and tap.
const TERMS = {
  exit: 'A small trained network before the first layer, or after some of the layers. It can write a token early, without the layers above it.',
  token: 'A word, or a part of one.',
  agreement: 'Share of the tokens that the full model would choose too, given the same text before them.',
  'weights read': 'Weights read from memory for each token, as a share of what the full model reads. Reading weights takes most of the time.',
  'same position': 'Share of the positions at which both texts have the same token. One extra word moves all later tokens to other positions, so this share falls after the first difference. “Differences” lines the texts up before it counts.',
  speed: 'Tokens per second after the first token, compared with the full model on the same machine, in the same run.',
};

function term(name, text = name) {
  const node = button('ce-term', text);
  node.append(make('span', 'ce-tip', TERMS[name]));
  node.addEventListener('click', event => event.stopPropagation());
  return node;
}
