"""The page: layout and events only. cascadeexit.stream and views say what is shown, the engine computes it.

    python app.py                                the bundled model on this machine
    python app.py --model my-model               any Llama-like model: a Hub id or a local folder
    python app.py --model one two --mcp          a choice of models, and the same as tools for an agent
"""

import argparse
import html
import json
import logging
import math
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")     # read when gradio is imported

import gradio as gr  # noqa: E402
import torch  # noqa: E402

from cascadeexit import evaluation, hub, metrics, prompts, record, stream, views  # noqa: E402
from cascadeexit.calibration import Calibration  # noqa: E402
from cascadeexit.engine import CASCADE_THRESHOLD, DecodeConfig, Mode, graded_thresholds  # noqa: E402
from cascadeexit.inspection import Inspection, inspect  # noqa: E402
from cascadeexit.library import Library, Offer  # noqa: E402
from cascadeexit.race import race  # noqa: E402
from cascadeexit.shape import Shape, exit_name  # noqa: E402

log = logging.getLogger("cascadeexit.app")
ASSETS = Path(__file__).parent / "assets"
TRACE = ASSETS / "traces" / "sky.json"          # a recorded run: what a visitor sees while the model loads
EXAMPLES = {
    "Why is the sky blue?": "Explain why the sky is blue.",
    "Reverse a string": "Write a Python function that reverses a string.",
    "Australia's capital": "What is the capital of Australia, and what is it known for?",
    "Five fruits": "List five fruits and their colours.",
    "A lighthouse story": "Tell a short story about a lighthouse.",
    "Un chat (français)": "Raconte une courte histoire sur un chat.",
    "Pizza 🍕": "Tell me about pizza, with emoji 🍕🔥😀",
}
MODES = [("Cascade: fast, keeps what a sure exit says", Mode.CASCADE),
         ("Verified: exact, the full model checks every guess", Mode.VERIFIED)]
PRESETS = [("Fast", 0.4), ("Balanced", CASCADE_THRESHOLD), ("Careful", 0.8)]
MAX_UPLOAD = 10_000_000         # bytes that the server takes in at all; what reads a file has its own, smaller limit
MAX_PROMPT_CHARACTERS = 20_000
NEVER = 1.0             # a threshold slider at its end closes the exit
LEAST_WANTED = 50       # percent of agreement, at the lower end of the quality dial
MAX_DRAFT = DecodeConfig.max_draft
MAX_EXITS = 6           # sliders on the page
FIRST_SURE = -1         # no exit is forced or left out
KEPT_RUNS = 50          # whose candidates and charts can be asked for
NUM_FIGURES = 3
NO_CHARTS = (gr.Accordion(visible=False, open=False), "")       # the box of charts, and which run they are of


# -- what happens -------------------------------------------------------------------------------------------

def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The visitor's words as token ids. Raises ValueError with a message for the visitor."""
    prompt = (prompt or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # half characters
    if not prompt.strip():
        raise ValueError("Please write a prompt first.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"This prompt has {len(prompt):,} characters, the limit {MAX_PROMPT_CHARACTERS:,}.")
    return prompts.token_ids(tokenizer, prompt, chat=chat)


def decode_configs(num_exits: int, mode, max_new_tokens, max_draft, tolerance, temperature, top_p, seed, force,
                   thresholds) -> tuple[DecodeConfig, DecodeConfig]:
    """(with exits, full), as the controls ask. Raises ValueError with a message for the visitor."""
    try:
        shared = dict(max_new_tokens=int(max_new_tokens), temperature=temperature, top_p=top_p,
                      seed=int(seed or 0) % 2**63)
        wanted = [None if t >= NEVER else t for t in thresholds[:num_exits]]
        if force >= 0:                  # every token leaves at this exit, however unsure
            wanted = [0.0 if s == force else None for s in range(num_exits)]
        elif force != FIRST_SURE:
            wanted = [None if s == _left_out(force) else t for s, t in enumerate(wanted)]
        elif mode == Mode.VERIFIED:     # its text does not depend on them: it guesses where that saves time
            wanted = None
        tolerance = tolerance if mode == Mode.VERIFIED else 0
        return (DecodeConfig(mode=mode, max_draft=int(max_draft), thresholds=wanted, tolerance=tolerance, **shared),
                DecodeConfig(mode=Mode.FULL, **shared))
    except TypeError:
        raise ValueError("A setting is empty: give it a value.") from None


def sliders_at(threshold: float, shape: Shape) -> list[float]:
    """Each threshold slider at one price (`graded_thresholds`), that of the first exit as given; NEVER closes all."""
    depths = [layer / shape.num_layers for layer in shape.exit_layers]
    # Up, not to the nearest: a calibrated threshold keeps its promise.
    each = [t if t >= NEVER else min(math.ceil(round(100 * t, 6)) / 100, 0.99)
            for t in graded_thresholds(threshold, depths)]
    return [*each, *[threshold] * MAX_EXITS][:MAX_EXITS]


def _left_out(s: int) -> int:
    """Exit s, never taken, as a value of the menu of forced exits; and back."""
    return FIRST_SURE - 1 - s


class Page:
    """What the handlers of one page share: the models, and the latest finished runs for the token card."""

    def __init__(self, library: Library):
        self.library = library
        self._seen: OrderedDict[str, tuple[stream.TokenStream, Inspection, object]] = OrderedDict()

    def respond(self, label, prompt, mode, chat, max_new_tokens, max_draft, tolerance, temperature, top_p, seed, force,
                *thresholds) -> Iterator[tuple]:
        """Race the exits against the full model: yields (stream, box of charts, which run the charts are of)."""
        wait = (gr.skip(),) * 2
        settings = dict(prompt=prompt, mode=mode, chat=chat, tokens=max_new_tokens, drafts=max_draft,
                        tolerance=tolerance, temperature=temperature, top_p=top_p, seed=seed, force=force,
                        thresholds=thresholds)
        try:
            if not (prompt or "").strip():
                raise ValueError("Please write a prompt first.")
            if not self.library.ready(label):
                for line in self.library.load(label):
                    yield stream.model_line(self.library.shapes[label]) + stream.status_line(line), *wait
            engine, tokenizer = self.library.get(label)
            config, full = decode_configs(engine.num_exits, mode, max_new_tokens, max_draft, tolerance, temperature,
                                          top_p, seed, force, thresholds)
            ids = prompt_ids(tokenizer, prompt, chat)
            contest = race({stream.CASCADE: engine.generate(ids, config), stream.FULL: engine.generate(ids, full)})
        except (ValueError, hub.ModelUnavailable, FileNotFoundError) as error:
            gr.Warning(html.escape(str(error)), title="Not started")       # gradio renders it as HTML
            yield stream.error_line(str(error)), *wait
            return

        told = stream.TokenStream(engine, tokenizer, config, ids, settings)
        try:
            yield told.text, *NO_CHARTS
            for text in stream.frames(told, contest):
                yield text, *wait
            told.close_text()
            yield told.text, *wait
            seen = inspect(engine, ids, told.sides[stream.CASCADE].events)
            self._keep(told, seen, tokenizer)
            told.end(seen)
            yield told.text, gr.Accordion(visible=True), told.run
        except Exception:
            log.exception("a run failed")
            told.fail("Something went wrong while the model was running. The server's log tells what.")
            yield told.text, *wait
        finally:
            contest.close()                                         # also when the visitor stops or leaves

    def try_all(self, kinds, each, pasted, file, label, mode, chat, max_new_tokens, max_draft, tolerance, temperature,
                top_p, seed, force, *thresholds) -> Iterator[tuple]:
        """Many prompts: yields (what happens, table, figure, JSON file, CSV file); every result is kept at once."""
        wait = (gr.skip(),) * 4
        try:
            chosen = chosen_prompts(kinds, each, pasted, file)
            if not self.library.ready(label):
                for line in self.library.load(label):
                    yield _said(line), *wait
            engine, tokenizer = self.library.get(label)
            config, _ = decode_configs(engine.num_exits, mode, max_new_tokens, max_draft, tolerance, temperature, top_p,
                                       seed, force, thresholds)
            running = evaluation.evaluate(engine, partial(prompt_ids, tokenizer, chat=chat), chosen, config,
                                          partial(tokenizer.decode, skip_special_tokens=True), pauses=True)
        except (ValueError, OSError, hub.ModelUnavailable) as error:
            yield _said(str(error), "error"), *wait
            return
        folder, results, began = Path(tempfile.mkdtemp(prefix="cascadeexit-")), [], time.monotonic()
        curve, next_figure, next_yield = measured_curve(engine.bank.fingerprint()), began, began
        yield _said(f"0 of {len(chosen)} prompts"), [], *wait[1:]
        for result in running:
            if result is None:              # in the middle of a prompt: only where it yields can a run be stopped
                if time.monotonic() >= next_yield:
                    next_yield = time.monotonic() + YIELD_SECONDS
                    yield (gr.skip(),) * 5
                continue
            results.append(result)
            (folder / "evaluation.json").write_text(evaluation.results_json(results, config, label), encoding="utf-8")
            (folder / "evaluation.csv").write_text(evaluation.results_csv(results), encoding="utf-8")
            left = (time.monotonic() - began) / len(results) * (len(chosen) - len(results))
            done = len(results) == len(chosen)
            drawn = done or time.monotonic() >= next_figure
            if drawn:
                next_figure = time.monotonic() + FIGURE_SECONDS
            yield (_said(_in_words(results, len(chosen), left), "done" if done else "busy"), _rows(results),
                   gr.Plot(views.quality_speed_figure(results, curve), visible=True) if drawn else gr.skip(),
                   *(gr.DownloadButton(value=str(folder / f"evaluation.{kind}"), interactive=True)
                     for kind in ("json", "csv")))

    def charts(self, run) -> list[gr.Plot]:
        """Interactive figures of a finished run, when their box is opened: the first loads plotly, a second's work."""
        told, seen, _ = self._seen.get(run, (None,) * 3)
        if told is None:
            gr.Warning("The server no longer keeps this run. Run it again.", title="No charts")
            return [gr.skip()] * NUM_FIGURES
        return [gr.Plot(figure, visible=True) for figure in views.figures(told, seen.full_choices)]

    def _keep(self, told: stream.TokenStream, seen: Inspection, tokenizer) -> None:
        self._seen[told.run] = told, seen, tokenizer
        while len(self._seen) > KEPT_RUNS:
            self._seen.popitem(last=False)

    # Asked by the browser, so by anybody: what does not fit gets nothing.

    def token_card(self, run, i):
        """Candidates of one token, for the card; None when the run is not kept."""
        _, seen, tokenizer = self._seen.get(run, (None,) * 3) if isinstance(run, str) else (None,) * 3
        if seen is None or not isinstance(i, int) or not 0 <= i < len(seen.token_ids):
            return None
        return seen.card(tokenizer, i)

    def layer_map(self, run, start, count):
        """What every exit would have said, for the layer map; None when the run is not kept."""
        _, seen, tokenizer = self._seen.get(run, (None,) * 3) if isinstance(run, str) else (None,) * 3
        if seen is None or not (isinstance(start, int) and isinstance(count, int)):
            return None
        return seen.map(tokenizer, max(0, start), min(max(1, count), 64))


def replayed(path: str | Path) -> str:
    """A recorded run as the page draws it. Raises ValueError for a file that is none."""
    return stream.replay_line() + record.load(Path(path).read_bytes())


# -- many prompts ---------------------------------------------------------------------------------------------

COLUMNS = ("prompt", "kind", "agreement", "same text", "first difference", "speed", "layers used", "weights read",
           "problem")
FIGURE_SECONDS = 3.0            # at least, between two pictures of an evaluation under way
YIELD_SECONDS = 0.2             # at least, between two places where it can be cancelled


def chosen_prompts(kinds, each, pasted, file) -> list[prompts.Prompt]:
    """An uploaded file, else pasted lines, else the bundled kinds. Raises ValueError."""
    if file:
        return prompts.read_prompts(Path(file))
    if (pasted or "").strip():
        return prompts.read_prompts(pasted)
    if not kinds:
        raise ValueError("Choose a kind of prompts, paste some, or upload a file.")
    return prompts.bundled_prompts(kinds, int(each or 1))


def measured_curve(fingerprint: str) -> list[dict]:
    """Thresholds measured before for these very exits (`training.evaluate decode`); empty when there are none."""
    path = ASSETS / "results" / "decode.json"
    if not path.exists():
        return []
    measured = json.loads(path.read_text(encoding="utf-8"))
    return measured["cascade"] if measured.get("exits") == fingerprint else []


def threshold_for(percent: float, calibration: Calibration) -> float:
    """The loosest threshold that is sure to keep this agreement; NEVER where none that was measured does."""
    threshold = calibration.threshold(1 - percent / 100)
    return NEVER if threshold is None else threshold


def percent_at(threshold: float, calibration: Calibration) -> int:
    """The agreement that is sure at this threshold, as at the next looser one that was measured; 0: none was."""
    at_most = [point.at_most for point in calibration.points if point.threshold <= threshold]
    return math.floor(100 * (1 - at_most[0])) if at_most else 0


def _rows(results: list[evaluation.Result]) -> list[list]:
    def shown(value, form):
        return "" if value is None else format(value, form)
    return [[r.prompt[:80], r.kind, shown(r.agreement, ".1%"), shown(r.positional, ".0%"),
             "" if r.error else "none" if r.first_divergence is None else r.first_divergence + 1,
             shown(r.speedup, ".2f") + ("×" if r.speedup else ""), shown(r.average_depth, ".0%"), shown(r.cost, ".0%"),
             r.error or ""]
            for r in results]


def _in_words(results: list[evaluation.Result], total: int, left: float) -> str:
    s = evaluation.summarize_results(results)
    words = [f"{len(results)} of {total} prompts"]
    if s.failed:
        words.append(f"{s.failed} could not run")
    if s.agreement is not None:
        words.append(f"agreement {s.agreement:.1%}")
    if s.speedup is not None:
        words.append(f"{s.speedup:.2f}x the full model's speed")
    if s.sequence is not None:
        words.append(f"{s.sequence:.0%} identical texts")
    if left > 1:
        words.append(f"about {left:.0f} s left")
    return " · ".join(words)


def _said(text: str, kind: str = "busy") -> str:
    return f"<p class='ce-status {kind}' role='status'>{html.escape(text)}</p>"


# -- for programs: the same as named endpoints and as tools -----------------------------------------------------

def add_endpoints(page: Page) -> None:
    """/models, /generate, /compare and /evaluate; plain JSON in and out."""
    library = page.library

    def prepared(model: str, prompt: str | None, chat: bool, threshold: float, target: float, **options) -> tuple:
        try:
            label = model or library.labels[0]
            if label not in library.labels:
                raise ValueError(f"model '{label}' is not offered here; /models lists {', '.join(library.labels)}")
            engine, tokenizer = library.get(label)
            thresholds = graded_thresholds(threshold, engine.exit_depths)
            if target:
                thresholds = [NEVER if t is None else t for t in engine.thresholds(DecodeConfig(
                    mode=options["mode"], temperature=options["temperature"], target_disagreement=target))]
            config, full = decode_configs(engine.num_exits, **options, force=FIRST_SURE, thresholds=thresholds)
            ids = None if prompt is None else prompt_ids(tokenizer, prompt, chat)
            engine.check([0] if ids is None else ids, config)
            return engine, tokenizer, ids, config, full
        except (TypeError, ValueError, hub.ModelUnavailable) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    def models() -> list[dict]:
        """The models offered here: name, layers, exit layers, and whether their exits are trained."""
        return [dict(model=label, layers=shape.num_layers, exit_layers=list(shape.exit_layers), trained=shape.trained)
                for label, shape in library.shapes.items()]

    def generate(prompt: str, mode: str = "cascade", threshold: float = CASCADE_THRESHOLD, max_new_tokens: int = 128,
                 max_draft: int = MAX_DRAFT, tolerance: float = 0.0, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0, chat: bool = True, model: str = "", target_disagreement: float = 0.0) -> dict:
        """Write with early exits.

        Args:
            prompt: what to answer, or with chat=False what to continue.
            mode: 'cascade' (fast, keeps what a sure exit says), 'verified' (exactly the full model's text) or 'full'.
            threshold: cascade mode: how sure the first exit must be, 0 to 1; deeper ones, which save less, must be
                surer in proportion. 1 closes all exits.
            max_new_tokens: the most tokens to write.
            max_draft: verified mode: the most guesses before the full model looks.
            tolerance: verified mode, temperature 0: a guess also stands when the full model gives it at least
                1 - tolerance times the chance of its own choice; 0 is lossless.
            temperature: 0 takes the likeliest token always.
            top_p: below 1, choose among the likeliest tokens only.
            seed: the same seed writes the same text.
            chat: put the prompt through the model's chat template.
            model: a name from models; empty: the first.
            target_disagreement: cascade mode, temperature 0, above 0 instead of a threshold: the part of the tokens
                that may be others than the full model would choose; kept to by exits that were calibrated.

        Returns text, token_ids, exits (0 = the first exit, the highest number = the full model, -1 = copied from
        earlier in the text) and stats.
        """
        engine, tokenizer, ids, config, _ = prepared(
            model, prompt, chat, threshold, target_disagreement, mode=mode, max_new_tokens=max_new_tokens,
            max_draft=max_draft, tolerance=tolerance, temperature=temperature, top_p=top_p, seed=seed)
        run = engine.run(ids, config)
        return dict(text=tokenizer.decode(run.token_ids, skip_special_tokens=True), token_ids=run.token_ids,
                    exits=[e.exit for e in run.events if e.final], stats=asdict(run.stats))

    def compare(prompt: str, mode: str = "cascade", threshold: float = CASCADE_THRESHOLD, max_new_tokens: int = 128,
                max_draft: int = MAX_DRAFT, tolerance: float = 0.0, chat: bool = True, model: str = "",
                target_disagreement: float = 0.0) -> dict:
        """Write with early exits and with the full model, side by side; arguments as for generate.

        Returns exits and full (text, token_ids, stats each), speedup, agreement (part of the tokens that the full
        model would have chosen too), positional_match, first_divergence and identical.
        """
        engine, tokenizer, ids, config, full = prepared(
            model, prompt, chat, threshold, target_disagreement, mode=mode, max_new_tokens=max_new_tokens,
            max_draft=max_draft, tolerance=tolerance, temperature=0.0, top_p=1.0, seed=0)
        told = stream.TokenStream(engine, tokenizer, config, ids)
        for _ in stream.frames(told, race({stream.CASCADE: engine.generate(ids, config),
                                           stream.FULL: engine.generate(ids, full)})):
            pass
        ours, theirs = (told.sides[name] for name in (stream.CASCADE, stream.FULL))
        match = metrics.match(ours.ids, theirs.ids)
        exits, whole = (dict(text=tokenizer.decode(side.ids, skip_special_tokens=True), token_ids=side.ids,
                             stats=asdict(metrics.summarize(side.events, engine.costs))) for side in (ours, theirs))
        speeds = exits["stats"]["tokens_per_second"], whole["stats"]["tokens_per_second"]
        return dict(exits=exits, full=whole, speedup=speeds[0] / speeds[1] if all(speeds) else None,
                    agreement=metrics.agreement(ours.ids, engine.full_choices(ids, ours.ids)),
                    positional_match=match.positional, first_divergence=match.first_divergence,
                    identical=match.sequence)

    def evaluate(texts: list[str], mode: str = "cascade", threshold: float = CASCADE_THRESHOLD,
                 max_new_tokens: int = 64, max_draft: int = MAX_DRAFT, tolerance: float = 0.0, chat: bool = True,
                 model: str = "", target_disagreement: float = 0.0) -> dict:
        """Compare over many prompts; arguments as for generate.

        Args:
            texts: the prompts.

        Returns summary and results, one a prompt: agreement, speedup, routing_share, texts, or the error.
        """
        if not texts or len(texts) > prompts.MAX_PROMPTS:
            raise gr.Error(f"give 1 to {prompts.MAX_PROMPTS} prompts, got {len(texts)}", print_exception=False)
        engine, tokenizer, _, config, _ = prepared(
            model, None, chat, threshold, target_disagreement, mode=mode, max_new_tokens=max_new_tokens,
            max_draft=max_draft, tolerance=tolerance, temperature=0.0, top_p=1.0, seed=0)
        results = list(evaluation.evaluate(
            engine, partial(prompt_ids, tokenizer, chat=chat), [prompts.Prompt("own", str(text)) for text in texts],
            config, partial(tokenizer.decode, skip_special_tokens=True)))
        return dict(summary=asdict(evaluation.summarize_results(results)), results=[asdict(r) for r in results])

    gr.api(models, api_name="models", queue=False)
    for endpoint in (generate, compare, evaluate):
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_id="model", concurrency_limit=1)


# -- a link that restores the settings ------------------------------------------------------------------------

LINK = ("p", "mode", "chat", "n", "drafts", "tol", "temp", "top_p", "seed", "exit")     # then t: thresholds, by commas

COPY_LINK = """(label, ...values) => {
    const names = NAMES, query = new URLSearchParams();
    names.forEach((name, i) => { if (values[i] !== null && values[i] !== '') query.set(name, values[i]); });
    query.set('t', values.slice(names.length).join(','));
    query.set('model', label);
    const theme = new URLSearchParams(location.search).get('__theme');
    if (theme) query.set('__theme', theme);
    const link = location.origin + location.pathname + '?' + query;
    history.replaceState(null, '', link);
    if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => 0);
}""".replace("NAMES", json.dumps(LINK))


def settings_of(query: dict[str, str], components: list, exits: list[tuple[str, int]]) -> list:
    """Values for the model menu, `LINK` and the thresholds, from a link's query; what does not fit is left alone.

    exits: choices of the menu of exits, which depends on the model.
    """
    texts = [query.get("model"), *(query.get(name) for name in LINK)]
    thresholds = query.get("t", "").split(",") if query.get("t") else []
    texts += [thresholds[s] if s < len(thresholds) else None for s in range(len(components) - len(texts))]
    return [_fitting(component, text, exits if name == "exit" else getattr(component, "choices", None))
            for name, component, text in zip(("model", *LINK, *("t",) * MAX_EXITS), components, texts)]


def _fitting(component, text: str | None, choices: list[tuple] | None):
    try:
        if text is None:
            return gr.skip()
        if isinstance(component, gr.Textbox):
            return text[:MAX_PROMPT_CHARACTERS]
        if isinstance(component, gr.Checkbox):
            return text == "true"
        if isinstance(component, (gr.Radio, gr.Dropdown)):
            values = {str(value): value for _, value in choices}
            return values.get(text, gr.skip())
        number = float(text)
        if isinstance(component, gr.Slider):
            number = min(max(number, component.minimum), component.maximum)
            return int(number) if component.step == 1 else number
        return int(number)
    except (ValueError, OverflowError):
        return gr.skip()


# -- what it looks like -------------------------------------------------------------------------------------

def token_view(page: Page, value: str) -> gr.HTML:
    """Both texts, live numbers and charts, drawn in the browser from one growing string of JSON lines.

    The template is constant on purpose: gradio runs template values as code, and model text is not trusted.
    """
    def token_card(asked):              # gradio marks functions, and methods cannot be marked; it hands one value over
        return page.token_card(*_of_size(asked, 2))

    def layer_map(asked):
        return page.layer_map(*_of_size(asked, 3))

    return gr.HTML(value, html_template="<div class='ce'></div>", apply_default_css=False, elem_id="ce-view",
                   js_on_load=(ASSETS / "app.js").read_text(encoding="utf-8"),
                   server_functions=[token_card, layer_map])


def _of_size(asked, n: int) -> list:
    """A browser's request as n values: anybody can send anything."""
    return (asked if isinstance(asked, list) else [])[:n] + [None] * (n - len(asked if isinstance(asked, list) else []))


def build_demo(library: Library) -> gr.Blocks:
    """The page around these models."""
    page, shape = Page(library), library.shapes[library.labels[0]]
    calibrations = {label: library.calibration(label) for label in library.labels}
    measured = bool(measured_curve(library.fingerprint(library.labels[0])))
    # Shown until the model that wrote it is ready.
    recorded = TRACE.exists() and shape.name == hub.DEFAULT_MODEL and not library.ready(library.labels[0])
    with gr.Blocks(title="CascadeExit", analytics_enabled=False) as demo:
        gr.HTML("<h1>CascadeExit</h1><p>Easy words leave a language model early, hard words take every layer."
                " Watch it race its full self.</p>", elem_id="ce-title", apply_default_css=False)
        with gr.Tab("One prompt", elem_id="ce-one"):
            with gr.Row(elem_id="ce-controls"):
                with gr.Column(min_width=300):
                    prompt = gr.Textbox(next(iter(EXAMPLES.values())), label="Prompt", lines=3, max_lines=8,
                                        placeholder="Ask something, or give a text to continue", elem_id="ce-prompt")
                    gr.Examples([[text] for text in EXAMPLES.values()], prompt, label="Examples",
                                elem_id="ce-examples", example_labels=list(EXAMPLES))
                with gr.Column(min_width=300):
                    mode = gr.Radio(MODES, value=Mode.CASCADE, label="Mode", elem_id="ce-mode",
                                    info="To keep 95% of the full model's words, Verified measured faster, on a CPU."
                                    if measured else None)
                    preset, quality = _dials(calibrations[library.labels[0]])
                    model = gr.Dropdown(library.labels, value=library.labels[0], label="Model", elem_id="ce-model-menu",
                                        visible=len(library.labels) > 1)
            with gr.Row(elem_id="ce-actions"):
                run = gr.Button("Run", variant="primary", size="md", scale=0, elem_id="ce-run")
                stop = gr.Button("Stop", size="md", scale=0, elem_id="ce-stop")
                retry = gr.Button("Retry", size="md", scale=0, elem_id="ce-retry")
                clear = gr.Button("Clear", size="md", scale=0, elem_id="ce-clear")
                # Where gradio says whose turn it is.
                queue = gr.HTML("<span></span>", elem_id="ce-queue", apply_default_css=False)
            with gr.Accordion("More settings: each exit, length, chance", open=False, elem_id="ce-settings"):
                thresholds, force = _exit_controls(shape)
                settings = [mode, *_more_settings(), force, *thresholds]
            view = token_view(page, replayed(TRACE) if recorded else stream.model_line(shape))
            charted = gr.State("")
            with gr.Accordion("Interactive charts of this run", open=False, visible=False,
                              elem_id="ce-figures") as charts, gr.Row():
                figures = [gr.Plot(visible=False, show_label=False, container=False, min_width=300)
                           for _ in range(NUM_FIGURES)]
            with gr.Row(elem_id="ce-links"):
                link = gr.Button("Copy a link to these settings", size="sm", scale=0, elem_id="ce-link")
                upload = gr.UploadButton("Replay a saved run", size="sm", scale=0, file_types=[".json"],
                                         elem_id="ce-replay")
        with gr.Tab("Many prompts", elem_id="ce-many"):
            many = _many_prompts()

        # One model, one queue: everything that computes shares this id, so runs never share the device.
        quiet = dict(show_progress="hidden", api_visibility="private")
        turns = dict(show_progress="minimal", show_progress_on=[queue], api_visibility="private",
                     concurrency_id="model", concurrency_limit=1)
        inputs, outputs = [model, prompt, *settings], [view, charts, charted]
        seed = settings[7]
        running = gr.on([run.click, prompt.submit], page.respond, inputs, outputs, **turns)
        again = retry.click(lambda value: int(value or 0) + 1, seed, seed, queue=False, **quiet).then(
            page.respond, inputs, outputs, **turns)
        stop.click(None, cancels=[running, again]).then(stream.stopped, view, view, queue=False, **quiet)
        clear.click(lambda label: ("", stream.model_line(library.shapes[label]), *NO_CHARTS),
                    model, [prompt, *outputs], cancels=[running, again], queue=False, **quiet)
        charts.expand(page.charts, charted, figures, queue=False, **quiet)
        # Who turns a dial quickly means its last position, which gradio else drops while an earlier one is answered.
        last = dict(quiet, queue=False, trigger_mode="always_last")
        model.input(lambda label: (stream.model_line(library.shapes[label]), *NO_CHARTS, *_fit(library.shapes[label]),
                                   *_dials_at(CASCADE_THRESHOLD, calibrations[label])),
                    model, [*outputs, force, *thresholds, preset, quality], cancels=[running, again], **last)
        preset.input(lambda value, label: (*sliders_at(value, library.shapes[label]),
                                           _dials_at(value, calibrations[label])[1]),
                     [preset, model], [*thresholds, quality], **last)
        quality.input(lambda percent, label: (*sliders_at(threshold_for(percent, calibrations[label]),
                                                          library.shapes[label]), None),
                      [quality, model], [*thresholds, preset], **last)
        gr.on([slider.input for slider in thresholds], None, None, preset, js="() => null", **quiet)
        link.click(None, inputs, js=COPY_LINK).then(
            lambda: gr.Info("The page's address now holds these settings, and was copied."), queue=False, **quiet)
        upload.upload(_replay_upload, upload, outputs, cancels=[running, again], queue=False, **quiet)
        kinds, each, pasted, file, start, cancel, said, table, chart, as_json, as_csv = many
        tried = start.click(page.try_all, [kinds, each, pasted, file, model, *settings],
                            [said, table, chart, as_json, as_csv], **turns | dict(show_progress_on=[said]))
        cancel.click(lambda: None, cancels=[tried], queue=False, **quiet).then(
            lambda text: text.replace("ce-status busy", "ce-status stopped").replace("</p>", " · stopped</p>")
            if "ce-status busy" in (text or "") else text, said, said, queue=False, **quiet)

        def restore(request: gr.Request):
            query, first = dict(request.query_params), library.labels[0]
            label = query["model"] if query.get("model") in library.labels else first
            shape = library.shapes[label]
            values = settings_of(query, inputs, _ways_out(shape)["choices"])
            fitted = _fit(shape) if label != first else [gr.skip() for _ in (force, *thresholds)]
            wanted = values[-MAX_EXITS:][:len(shape.exit_layers)]
            dials = [gr.skip()] * 2
            if all(isinstance(t, float) for t in wanted):
                dials = _dials_at(wanted[0] if wanted == sliders_at(wanted[0], shape)[:len(wanted)] else None,
                                  calibrations[label])
            for update, value in zip(fitted, values[-len(fitted):]):        # the menu and its choice in one
                update.update(value if isinstance(value, dict) else dict(value=value))
            return (*values[:-len(fitted)], *fitted, *dials,
                    gr.skip() if label == first and not (recorded and library.ready(first))
                    else stream.model_line(shape))

        demo.load(restore, None, [*inputs, preset, quality, view], queue=False, **quiet)
        add_endpoints(page)
    # Closed to direct calls: a POST to /run/generate would skip the queue, and with it the limit of one run at a time.
    return demo.queue(max_size=20, api_open=False)


def _replay_upload(path):
    """A visitor's file: (its run, no charts), or a message and everything as it was."""
    try:
        return replayed(path), *NO_CHARTS
    except ValueError as error:
        gr.Warning(html.escape(str(error)), title="Not a saved run")
        return stream.error_line(f"This file cannot be replayed: {error}"), *[gr.skip()] * 2


def _many_prompts() -> tuple[gr.components.Component, ...]:
    """What `Page.try_all` takes and gives, in its order, with start and cancel between."""
    gr.Markdown("Run many prompts with the settings of the first tab, and see how well and how fast the exits do. "
                "Results so far are kept when you cancel.", elem_id="ce-many-words")
    available = list(dict.fromkeys(p.kind for p in prompts.bundled_prompts()))
    with gr.Row():
        with gr.Column():
            kinds = gr.CheckboxGroup(available, value=available, label="Bundled prompts", elem_id="ce-kinds")
            each = gr.Slider(1, 12, 2, step=1, label="Of each kind", buttons=[])
        pasted = gr.Textbox(label="Or your own, one a line", lines=5, max_lines=10, elem_id="ce-pasted",
                            placeholder="What is a noun?\nWrite a haiku about rain.")
        file = gr.File(label="Or a file: .txt, .jsonl, .csv", type="filepath", height=170,
                       file_types=[".txt", ".jsonl", ".csv"], elem_id="ce-prompt-file")
    with gr.Row(elem_id="ce-many-actions"):
        start = gr.Button("Evaluate", variant="primary", scale=0, elem_id="ce-evaluate")
        cancel = gr.Button("Cancel", scale=0, elem_id="ce-cancel")
        as_json = gr.DownloadButton("Save all (JSON)", scale=0, interactive=False)
        as_csv = gr.DownloadButton("Save table (CSV)", scale=0, interactive=False)
    said = gr.HTML("<span></span>", elem_id="ce-said", apply_default_css=False)
    chart = gr.Plot(visible=False, show_label=False, container=False, elem_id="ce-chart")
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, wrap=True, elem_id="ce-results", buttons=[],
                         label="Results",
                         column_widths=[f"{width}px" for width in (240, 100, 120, 100, 130, 100, 110, 110, 210)])
    return kinds, each, pasted, file, start, cancel, said, table, chart, as_json, as_csv


def _dials(calibration: Calibration | None) -> tuple[gr.Radio, gr.Slider]:
    """Both set all thresholds, at one price: a word, or a wanted quality where exits were calibrated."""
    with gr.Row(elem_id="ce-dials"):
        return (gr.Radio(PRESETS, value=CASCADE_THRESHOLD, label="How sure must an exit be?", elem_id="ce-preset",
                         scale=3, min_width=280),
                gr.Slider(LEAST_WANTED, 99, max(LEAST_WANTED, percent_at(CASCADE_THRESHOLD, calibration))
                          if calibration else LEAST_WANTED, step=1, label="Agreement wanted, %", info=(
                              f"Kept with {1 - calibration.delta:.0%} certainty on prompts like the "
                              f"{calibration.prompts} it was tested on") if calibration else None,
                          buttons=[], elem_id="ce-quality", scale=2, min_width=200, visible=bool(calibration)))


def _dials_at(threshold: float | None, calibration: Calibration | None) -> list[dict]:
    """Updates of both dials for thresholds at one price, that of the first exit given; None: at none."""
    named = threshold if threshold in dict(PRESETS).values() else None
    percent = {}
    if calibration and threshold is not None:
        percent = dict(value=max(LEAST_WANTED, percent_at(threshold, calibration)))
    return [gr.update(value=named), gr.update(visible=bool(calibration), **percent)]


def _exit_controls(shape: Shape) -> tuple[list[gr.Slider], gr.Dropdown]:
    """A slider for each exit, and a way to force one or to leave one out."""
    with gr.Row():
        force = gr.Dropdown(label="Where tokens leave", elem_id="ce-force", min_width=220, **_ways_out(shape))
        gr.HTML("<p>How sure must each exit be? Lower is faster, higher is closer to the full model, 1 closes the exit."
                " Verified mode guesses wherever that saves time.</p>", elem_id="ce-hint", apply_default_css=False,
                min_width=220)
    with gr.Row():
        sliders = [gr.Slider(0, NEVER, t, step=0.01, buttons=[], min_width=200, **_slider(s, shape))
                   for s, t in enumerate(sliders_at(CASCADE_THRESHOLD, shape))]
    return sliders, force


def _ways_out(shape: Shape) -> dict:
    exits = range(len(shape.exit_layers))
    return dict(value=FIRST_SURE, choices=[
        ("At the first sure exit", FIRST_SURE), *((f"Always at exit {s + 1}", s) for s in exits),
        *((f"Never at exit {s + 1}", _left_out(s)) for s in exits)])


def _slider(s: int, shape: Shape) -> dict:
    exits = len(shape.exit_layers)
    return dict(visible=s < exits, label=exit_name(min(s, exits), shape))


def _fit(shape: Shape) -> list[dict]:
    """Updates that make the exit controls those of another model, as it is first shown."""
    return [gr.update(**_ways_out(shape)),
            *(gr.update(value=t, **_slider(s, shape)) for s, t in enumerate(sliders_at(CASCADE_THRESHOLD, shape)))]


def _more_settings() -> list[gr.components.Component]:
    """The controls that `respond` takes between mode and force, in its order."""
    with gr.Row():
        chat = gr.Checkbox(True, label="Chat", info="Off: the model continues your text instead of answering it")
        tokens = gr.Slider(1, 1024, 200, step=1, label="Most new tokens", buttons=[])
        draft = gr.Slider(1, 15, MAX_DRAFT, step=1, label="Guesses per check",
                          info="Verified mode: the most guesses before the full model looks", buttons=[])
        tolerance = gr.Slider(0, 0.9, 0, step=0.05, label="Tolerance", buttons=[],
                              info="Verified mode: above 0 a guess also stands where the full model finds it nearly as "
                                   "likely as its own word")
    with gr.Row():
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", buttons=[],
                                info="0: always the likeliest token")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", buttons=[],
                          info="Below 1: choose among the likeliest tokens only")
        seed = gr.Number(0, label="Seed", precision=0, info="Same seed, same text; Retry counts it up")
    return [chat, tokens, draft, tolerance, temperature, top_p, seed]


def launch_options() -> dict:
    """How this page is served: no outside request, our own looks; tests and scripts start it the same way."""
    # Bold, not gradio's usual semi-bold: the semi-bold file that gradio serves lacks most letters.
    font = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="lg", font=font).set(
        body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")    # its own is too pale to read
    return dict(theme=theme, css_paths=ASSETS / "app.css", ssr_mode=False, run_history=False, footer_links=[],
                max_file_size=MAX_UPLOAD)


# -- start --------------------------------------------------------------------------------------------------

def offers(models: list[str], exits: str | None) -> list[Offer]:
    """The menu: the models asked for; else the bundled one with each kind of exits that ships for it."""
    if models or exits or os.environ.get("CASCADEEXIT_MODEL"):
        return [Offer(hub.short_name(model or hub.DEFAULT_MODEL), model, exits)
                for model in models or [os.environ.get("CASCADEEXIT_MODEL")]]
    return [Offer(hub.DEFAULT_MODEL, None), *(
        Offer(folder.name, None, folder) for folder in sorted((ASSETS / "exits").glob(f"{hub.DEFAULT_MODEL}-*")))]


def main() -> None:
    parser = argparse.ArgumentParser(description="CascadeExit: a model leaving early, beside itself in full.")
    parser.add_argument("--model", nargs="+", default=[], help="Hub ids, local folders, or the bundled model's name; "
                        f"several make a menu (default: $CASCADEEXIT_MODEL, else {hub.DEFAULT_MODEL})")
    parser.add_argument("--exits", help="folder of trained exits (default: those shipped for the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="default: bfloat16, or float16 on a GPU that only emulates that")
    parser.add_argument("--host", help="address to serve on, 0.0.0.0 for every network (default: 127.0.0.1)")
    parser.add_argument("--mcp", action="store_true", help="offer the endpoints as MCP tools too (needs gradio[mcp])")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    say = partial(print, flush=True)
    try:
        library = Library(offers(args.model, args.exits), device=args.device,
                          dtype=getattr(torch, args.dtype) if args.dtype else None)
        demo = build_demo(library)
        demo.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True,
                    mcp_server=args.mcp, **launch_options())
        say(f"Open {demo.local_url} (a recorded run plays there until the model is ready)")
        library.get(library.labels[0], say)
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"app.py: {error}") from error
    say(f"{library.labels[0]} is ready: {demo.local_url}")
    demo.block_thread()


if __name__ == "__main__":
    main()
