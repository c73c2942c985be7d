// Small helpers: nodes, buttons and the form of numbers. All text enters the page through textContent.

const root = element.querySelector('.ce');
const SVG = 'http://www.w3.org/2000/svg';
const reducedMotion = matchMedia('(prefers-reduced-motion: reduce)').matches;
const narrow = () => innerWidth < 768;

function make(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

function button(className, text, action) {
  const node = make('button', className, text);
  node.type = 'button';
  if (action) node.addEventListener('click', action);
  return node;
}

function drawn(tag, attributes = {}, ...children) {           // an SVG node
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function put(node, text) {                                    // change the page only where the text changed
  if (node.textContent !== text) node.textContent = text;
}

const missing = x => x === null || x === undefined;
const percent = (x, digits = 0) => missing(x) ? '–' : (100 * x).toFixed(digits) + '%';
const number = (x, digits = 1) => missing(x) ? '–' : x.toFixed(digits);
const milliseconds = x => missing(x) ? '–' : x >= 10 ? x.toFixed(1) + ' s' : Math.round(1000 * x) + ' ms';
const visible = text => text.replace(/ /g, '␣').replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/\r/g, '␍');

// One of gradio's own controls, by its id.
const control = id => document.getElementById(id);

// -- features: each file of the page registers what it does at the moments of a run ------------------------------------
//
// build    a model is known: make the nodes
// begin    a run begins (also when the player starts it again): forget the last one
// record   {type: function}: after the base has read a record of this type
// draw     at most once a frame, when something changed
// finish   nothing more is written: the run ended, stopped or failed
// seek     the player shows another moment of the run: its seconds

const features = [];
const feature = parts => features.push(parts);
const each = (moment, ...values) => features.forEach(f => f[moment] && f[moment](...values));
