// The page: its parts in their order, and the first look at the value.

let parts;

function build() {
  model.colours.forEach((colour, exit) => root.style.setProperty('--ce-' + colourClass(exit), colour));
  parts = { panels: make('div', 'ce-panels') };
  const strip = buildStrip(), under = buildDock();
  root.classList.remove('ce-show-rejected');
  delete root.dataset.only;
  root.replaceChildren(strip, parts.panels, under, cardBox());
  buildPanels();
  each('build');
}

function draw() {
  dirty = false;
  measureMoment();
  order.forEach(drawPanel);
  drawStrip();
  each('draw');
  drawDock();
}

// The click counts at once, before the server answers.
document.addEventListener('click', event => { if (event.target.closest('#ce-run')) began(); });
document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey && event.target.closest('#ce-prompt')) began();
});

// A prompt that was changed after its run: the texts below are still those of the old one.
function comparePrompt() {
  if (!run || !finished || !player.atEnd || !run.settings || document.body.classList.contains('ce-running')) return;
  const field = document.querySelector('#ce-prompt textarea');
  if (field.value.trim() !== (run.settings.prompt || '').trim()) status('These texts answer the earlier prompt. Press Run.');
  else if (parts.status.className.trim() === 'ce-status') status(overWords(), 'done');
}
document.addEventListener('input', event => { if (event.target.closest('#ce-prompt')) comparePrompt(); });
document.addEventListener('click', event => { if (event.target.closest('#ce-examples')) setTimeout(comparePrompt, 600); });

// The drawer of settings. Its buttons are ours alone: they work before gradio has connected its own events.
document.addEventListener('click', event => {
  if (!event.target.closest('#ce-open, #ce-close')) return;
  const open = document.body.classList.toggle('ce-settings-open');
  setTimeout(() => control(open ? 'ce-close' : 'ce-open').focus(), 220);    // when it has slid in
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape' && document.body.classList.contains('ce-settings-open')) control('ce-close').click();
});

forget();
update();
watch('value', update);
