// The dock under the texts: one tab for each way of looking at the run, and the player.

const dock = { tabs: [], open: null };

function buildDock() {
  dock.tabs = [];
  dock.list = make('div', 'ce-tabs');
  dock.list.setAttribute('role', 'tablist');
  dock.list.setAttribute('aria-label', 'Views of this run');
  dock.body = make('div', 'ce-dock-body');
  dock.list.addEventListener('keydown', event => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key], all = dock.tabs.filter(tab => !tab.head.hidden);
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const to = all[(all.findIndex(tab => tab.id === dock.open) + move + all.length) % all.length];
    openTab(to.id);
    to.head.focus();
  });
  return make('section', 'ce-dock', null, make('div', 'ce-dock-head', null, dock.list, playerBar()), dock.body);
}

// Add a tab. `opened` is called each time it is opened, and while it is open at each draw.
function addTab(id, title, node, opened = () => {}) {
  const head = button('ce-tab', title, () => openTab(id));
  head.id = 'ce-tab-' + id;
  head.setAttribute('role', 'tab');
  head.setAttribute('aria-controls', 'ce-panel-' + id);
  const panel = make('div', 'ce-tabpanel ce-tabpanel-' + id, null, node);
  panel.id = 'ce-panel-' + id;
  panel.setAttribute('role', 'tabpanel');
  panel.setAttribute('aria-labelledby', head.id);
  panel.hidden = true;
  dock.list.append(head);
  dock.body.append(panel);
  dock.tabs.push({ id, head, panel, opened });
  if (dock.tabs.length === 1) openTab(id);
}

function openTab(id) {
  dock.open = id;
  for (const tab of dock.tabs) {
    const on = tab.id === id;
    tab.panel.hidden = !on;
    tab.head.setAttribute('aria-selected', String(on));
    tab.head.tabIndex = on ? 0 : -1;
    if (on) tab.opened();
  }
}

function drawDock() {
  const tab = dock.tabs.find(tab => tab.id === dock.open);
  if (tab && run) tab.opened();
}
