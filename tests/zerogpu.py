"""A simulated ZeroGPU Space: app.py in a process of its own, with the worker machinery of the package `spaces`.

From `spaces` itself come the decorator, the fork of a worker and its reuse, the queues, pickling, Stop, the errors of a
worker, the hook at launch, and the calls to the device API. Two things are stand-ins:

- The device API is a small HTTP server in the tests' process (`DeviceApi`). It grants a GPU at once.
- There is no CUDA. Its emulation in the Space's process is switched off by `spaces`' own `unpatch`, at once instead of
  in the worker, and there `init` (open the GPU) and `move` (weights from disk to the GPU) do nothing. So both processes
  see a CPU, and the worker runs our C++ kernels where there is a compiler.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

ROOT = Path(__file__).parents[1]
LONG = 300                      # runs of so many tokens or more are slow, so that a test can act in the middle
SLOW_SECONDS = 0.02             # a token then takes


class DeviceApi:
    """The part of the ZeroGPU device API that `spaces` calls, with any number of GPUs.

    Attributes:
        starts: start-up reports.
        asked: seconds that each call asked for.
        workers: process id of each worker.
        ended: for each call that gave its GPU back: True where it had failed.
    """

    def __init__(self):
        self.starts, self.asked, self.workers, self.ended = 0, [], [], []
        self._busy: dict[str, int] = {}         # GPU by token
        self._idle: set[int] = set()            # GPUs with a worker that waits
        self._lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                address = urlparse(self.path)
                with api._lock:
                    answer = api._answer(address.path, {k: v[0] for k, v in parse_qs(address.query).items()})
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, path: str, query: dict[str, str]) -> dict:
        if path == "/startup-report":
            self.starts += 1
        elif path == "/schedule":
            gpu, token = next(i for i in range(99) if i not in self._busy.values()), str(len(self.asked))
            self.asked.append(float(query["durationSeconds"]))
            self._busy[token] = gpu
            return dict(idle=gpu in self._idle, nvidiaIndex=gpu, nvidiaUUID=f"GPU-{gpu}", allowToken=token)
        elif path == "/allow":
            self.workers.append(int(query["pid"]))
        elif path == "/release":
            gpu, failed = self._busy.pop(query["allowToken"]), query["fail"] == "true"
            (self._idle.discard if failed else self._idle.add)(gpu)
            self.ended.append(failed)
        return {}


class Space:
    """A running Space: its address, the device API it talks to, and what its processes print."""

    def __init__(self, url: str, api: DeviceApi, process: subprocess.Popen, log: Path):
        self.url, self.api, self.process, self._log = url, api, process, log

    @property
    def printed(self) -> str:
        return self._log.read_text(encoding="utf-8")


@contextmanager
def simulated_space(folder: Path, model: Path) -> Iterator[Space]:
    """Run app.py on a simulated ZeroGPU.

    Args:
        folder: for the files of this Space.
        model: folder of the model to serve.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api, cgroup, log = DeviceApi(), folder / "cgroup", folder / "log"
    cgroup.write_text("0::/space\n")
    threading.Thread(target=api.server.serve_forever, daemon=True).start()
    environment = os.environ | dict(
        SPACES_ZERO_GPU="true", SPACES_ZERO_DEVICE_API_URL=api.url, ZEROGPU_PROC_SELF_CGROUP_PATH=str(cgroup),
        ZEROGPU_OFFLOAD_DIR=str(folder / "tensors"), OMP_NUM_THREADS="2", PYTHONUNBUFFERED="1",
        NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, "-m", "tests.zerogpu", "--model", str(model), "--port", str(port)],
                                   cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    space = Space(f"http://127.0.0.1:{port}/", api, process, log)
    try:
        ends = time.monotonic() + 120
        while "is ready" not in space.printed:
            assert process.poll() is None and time.monotonic() < ends, space.printed
            time.sleep(0.1)
        yield space
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for worker in api.workers:              # idle ones outlive their Space; on ZeroGPU the container ends them
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        api.server.shutdown()
        api.server.server_close()


def _import_spaces() -> None:
    """Import `spaces` as app.py does, on a torch build for CPUs too."""
    import torch
    # A torch build for CPUs lacks what `spaces` reads when it is imported.
    torch.version.cuda = torch.version.cuda or "13.0"
    torch._C._cuda_init = getattr(torch._C, "_cuda_init", None)
    torch.cuda._is_in_bad_fork = bool                           # False, and it can be pickled
    import spaces.zero.torch  # noqa: F401


def _without_cuda() -> None:
    """Put the stand-ins for CUDA in place."""
    import spaces.zero.torch
    spaces.zero.torch.unpatch()
    spaces.zero.torch.unpatch = lambda: None
    spaces.zero.torch.init = lambda uuid: None
    spaces.zero.torch.move = lambda callback=None: None


def _slow_long_runs() -> None:
    """Make long runs slow, and report on which backend and in which process they run."""
    from cascadeexit.engine import Engine
    fast = Engine.generate

    def generate(self, ids, config):
        print(f"generate {self.model.backend.name} in {os.getpid()} of {os.getppid()}")
        for event in fast(self, ids, config):
            if config.max_new_tokens >= LONG:
                time.sleep(SLOW_SECONDS)
            yield event
    Engine.generate = generate


def load_with_emulation(model: str) -> None:
    """Load a model as the Space's process does, with the CUDA emulation of `spaces` on, and move its weights to disk.

    Prints JSON: device, bytes moved, and the fingerprint of the exits, asked for in a visitor's thread afterwards.
    """
    _import_spaces()
    import spaces.zero.torch

    from cascadeexit.library import Library, Offer
    library = Library([Offer("tiny", model)])
    library.load_all()
    engine, found = library.get("tiny")[0], []
    moved = spaces.zero.torch.pack()
    visitor = threading.Thread(target=lambda: found.append(library.fingerprint("tiny")))
    visitor.start()
    visitor.join()
    print(json.dumps(dict(device=str(engine.model.device), moved=moved, fingerprint=found[0])))


def main() -> None:
    _import_spaces()
    _without_cuda()
    import app
    _slow_long_runs()
    app.main()


if __name__ == "__main__":
    main()
