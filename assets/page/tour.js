// The first visit: three steps, each beside the part that it explains. Not modal: the page works as it is. Once dismissed,
// the steps never come back in this browser.

const TOUR_KEY = 'cascadeexit.tour';
const STEPS = [
  { at: () => parts && parts.panels, title: 'One prompt, answered twice',
    text: () => 'The same model writes both texts. ' + (narrow() ? 'In the upper one' : 'On the left') + ' it may stop early, at an exit after some of its layers. '
      + (narrow() ? 'In the lower one' : 'On the right') + ' it always uses all ' + model.layers + ' layers.' },
  { at: () => parts && parts.keys, under: () => parts.legend, title: 'Colour: how early a token was ready',
    text: () => 'Light colours are early exits, darker ones are later. No colour: all layers were needed. A token with an orange underline: the full model would choose another one.' },
  { at: () => control('ce-mode'), title: 'Do you need the exact text?',
    text: () => '“Exact” gives the full model’s own text: the exits only draft, and the full model checks every token.', action: ['Try Exact', runExact] },
];

const tour = { step: -1, box: null, words: null, over: false };

function tourSeen() {                         // storage may be blocked, as in some frames and private windows
  try { return localStorage.getItem(TOUR_KEY) === 'done'; } catch { return tour.over; }
}

function endTour() {
  tour.over = true;
  try { localStorage.setItem(TOUR_KEY, 'done'); } catch { /* then it is only forgotten with the page */ }
  ring(null);
  if (tour.box) tour.box.remove();
  tour.box = null;
}

function startTour() {
  if (tour.box || tour.over || tourSeen()) return;
  tour.box = make('div', 'ce-tour');
  tour.box.setAttribute('role', 'dialog');
  tour.box.addEventListener('keydown', event => { if (event.key === 'Escape') { event.stopPropagation(); endTour(); } });
  document.body.prepend(tour.box);             // the first stop of the Tab key
  showStep(0);
}

function showStep(n) {
  if (n >= STEPS.length) return endTour();
  const step = STEPS[n], last = n === STEPS.length - 1, focused = tour.box.contains(document.activeElement);
  tour.step = n;
  const title = make('h2', 'ce-tour-title', step.title), skip = button('ce-tour-skip', 'Skip', endTour);
  title.id = 'ce-tour-title';
  tour.box.setAttribute('aria-labelledby', title.id);
  const next = button('ce-tour-next', last ? 'Got it' : 'Next', () => showStep(n + 1));
  const more = step.action ? [button('ce-tour-action', step.action[0], () => { endTour(); step.action[1](); })] : [];
  skip.hidden = last;
  tour.words = make('p', null, step.text());
  tour.box.replaceChildren(title, tour.words,
    make('div', 'ce-tour-foot', null, make('span', 'ce-tour-count', (n + 1) + ' of ' + STEPS.length), skip, ...more, next));
  if (focused) next.focus();
  placeTour();
}

let ringed = null;

function ring(node) {
  if (ringed) ringed.classList.remove('ce-ring');
  ringed = node;
  if (node) node.classList.add('ce-ring');
}

// Below its part where there is room, else over its lower end; on a phone at the bottom of the screen. Never over Run.
function placeTour() {
  if (!tour.box) return;
  const anchor = STEPS[tour.step].at();
  ring(anchor);
  if (!anchor) return;
  put(tour.words, STEPS[tour.step].text());    // the texts stand beside or above each other
  const step = STEPS[tour.step], at = (step.under ? step.under() : anchor).getBoundingClientRect(), own = tour.box.getBoundingClientRect(), run = control('ce-run') || control('ce-stop');
  const style = tour.box.style;
  tour.box.classList.toggle('low', narrow());
  if (narrow()) { style.left = style.top = ''; return; }
  let top = at.bottom + 10;
  if (top + own.height > innerHeight) top = Math.max(at.top + 10, Math.min(at.bottom, innerHeight) - own.height - 14);
  const left = Math.max(12, Math.min(at.left + (step.action ? 0 : at.width / 2 - own.width / 2), innerWidth - own.width - 12));
  const taken = run && run.getBoundingClientRect();
  if (taken && taken.width && left < taken.right && left + own.width > taken.left && top < taken.bottom && top + own.height > taken.top) top = taken.bottom + 10;
  style.left = left + scrollX + 'px';
  style.top = top + scrollY + 'px';
}

addEventListener('resize', placeTour);
setInterval(placeTour, 300);                  // parts above may grow while the page is loading
feature({ build() { if (tour.box) placeTour(); else requestAnimationFrame(() => setTimeout(startTour, 400)); }, finish: placeTour });
