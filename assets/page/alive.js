// Is the server still there? A page cannot see that a stream has broken off: nothing comes any more. So when nothing has
// come for a while, it asks for a small address of the same server, and says so when there is no answer.

const SILENCE = 4000;                        // milliseconds without news before it asks
const PATIENCE = 8000;                       // milliseconds that an answer may take: the server may be busy computing
const alive = { heard: 0, value: undefined, failed: 0, asking: false };

async function askServer() {
  alive.asking = true;
  try {
    const answer = await fetch(location.pathname.replace(/\/?$/, '/') + 'gradio_api/app_id', { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE) });
    alive.failed = answer.ok ? 0 : alive.failed + 1;
  } catch { alive.failed++; }
  alive.asking = false;
  alive.heard = performance.now() - (alive.failed ? SILENCE - 1000 : 0);          // again in a second, or when it is silent again
  if (alive.failed < 2 || !document.body.classList.contains('ce-running')) return;
  alive.failed = 0;
  waiting(false);
  status('The server does not answer. The text so far is kept. Wait a minute, then press Run.', 'error');
}

setInterval(() => {
  const now = performance.now(), busy = document.body.classList.contains('ce-running');
  if (!busy || props.value !== alive.value) { alive.heard = now; alive.value = props.value; alive.failed = 0; }
  else if (!alive.asking && now - alive.heard > SILENCE) askServer();
}, 500);
