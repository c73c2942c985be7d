"""The web page: layout, events, link and command line. `cascadeexit.page` and `cascadeexit.endpoints` do the work.

    python app.py                                the bundled model on this machine
    python app.py --model my-model               any Llama-like model: a Hub id, a local folder or a GGUF file
    python app.py --model one two --mcp          a menu of two models, and the endpoints as MCP tools for an agent

The server also offers OpenAI's API at /v1 (`cascadeexit.openai`).
"""

import argparse
import html
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")     # read when gradio is imported

try:
    import spaces  # before gradio and torch: on ZeroGPU it stands in for CUDA in this process
except ImportError:     # not on a Space
    spaces = None
import gradio as gr  # noqa: E402
import torch  # noqa: E402
from gradio.components import Component  # noqa: E402
from gradio.context import LocalContext  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import HTMLResponse  # noqa: E402
from starlette.routing import Mount, Route  # noqa: E402

from cascadeexit import accelerator, hub, openai, prompts, settings, stream  # noqa: E402
from cascadeexit.blocks import MODEL, Demo, one_sentence  # noqa: E402
from cascadeexit.calibration import Calibration  # noqa: E402
from cascadeexit.config import Mode  # noqa: E402
from cascadeexit.endpoints import BadRequest, Endpoints  # noqa: E402
from cascadeexit.examples import EXAMPLES  # noqa: E402
from cascadeexit.library import Library, Offer  # noqa: E402
from cascadeexit.page import (  # noqa: E402
    ASSETS,
    Frame,
    Notice,
    Page,
    Progress,
    PromptSource,
    percent_at,
    quality_stops,
    replay_upload,
    replayed,
    retried,
    threshold_for,
)
from cascadeexit.payoff import QUICK_GPU_MINUTES, QUICK_MINUTES  # noqa: E402
from cascadeexit.report import COLUMNS  # noqa: E402
from cascadeexit.runner import Compute, RunFailed, Runner  # noqa: E402
from cascadeexit.settings import DEFAULT_THRESHOLD, PRESETS, THRESHOLDS, Settings, thresholds_at  # noqa: E402
from cascadeexit.shape import Shape, exit_name  # noqa: E402
from cascadeexit.uploads import UploadLimits  # noqa: E402

try:
    from training import report  # noqa: E402
except ImportError:     # an installation without the package `training`, or without jinja2
    report = None

TRACE = ASSETS / "traces" / "sky.json"          # a recorded run: it plays until a visitor's first own run
MODES = [("Early exits: may change the text", Mode.CASCADE), ("Exact: same text, checked", Mode.VERIFIED)]
# Files of the token view, in assets/page. `main` comes last: it draws the first value.
SCRIPTS = ("dom", "exits", "wire", "run", "panels", "passes", "player", "moment", "strip", "dock", "card", "lens",
           "fork", "charts", "timeline", "blocks", "layers", "marks", "tree", "moments", "align", "map", "picture",
           "files", "tour", "alive", "examples", "main")
FORK_OVER = "() => { document.dispatchEvent(new Event('ce-fork-over')); }"      # assets/page/fork.js listens
CLOSE_SETTINGS = "() => { document.body.classList.remove('ce-settings-open'); }"
MAX_UPLOAD = 10_000_000         # bytes of any upload; readers of single kinds of files have smaller limits
MAX_REQUEST = 11_000_000        # bytes of any request
MAX_UPLOADS = 500_000_000       # bytes of all uploads that are kept
KEEP_SECONDS, CLEAN_SECONDS = 3600, 300         # age at which files of visitors are deleted, and how often
SESSIONS = 500                  # open pages whose values Gradio keeps, about 0.2 MB each
RESULT_WIDTHS = (240, 100, 120, 100, 130, 100, 110, 110, 210)       # pixels of `COLUMNS`
ZERO_GPU = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")     # as `spaces` reads it
WORKER_DIED = "ZeroGPU worker error"                    # title that `spaces` gives to this error
AT_ONCE = dict(concurrency_id=MODEL, concurrency_limit=8 if ZERO_GPU else 1)      # a ZeroGPU run has its own GPU
REPORT_LINK = " <a href='report' target='_blank' style='text-decoration: underline'>Report</a>"
QUIET = dict(show_progress="hidden", api_visibility="private")      # options of an event that shows no progress


# -- layout -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPanel:
    """Two buttons and a status line in the settings. With them, the owner of the machine trains exits."""

    start: gr.Button
    cancel: gr.Button
    status: gr.HTML


@dataclass(frozen=True)
class OnePrompt:
    """Components of the first tab, where a visitor runs one prompt. The `_connect_...` functions give them events."""

    controls: dict[str, Component]      # what `Settings.from_controls` reads, by name
    preset: gr.Radio
    quality: gr.Slider
    run: gr.Button
    stop: gr.Button
    retry: gr.Button
    clear: gr.Button
    queue: gr.HTML                      # where gradio shows the place in the queue
    view: gr.HTML
    measure: gr.Button
    current: gr.State                   # id of the run that began last
    link: gr.Button
    upload: gr.UploadButton
    training: TrainingPanel | None      # only where the owner allows training

    @property
    def exit_controls(self) -> list[Component]:
        return [self.controls[name] for name in ("exit_choice", "beside", *THRESHOLDS)]


@dataclass(frozen=True)
class ManyPrompts:
    """Components of the second tab, where a visitor evaluates many prompts. `_connect_many` gives them events."""

    source: dict[str, Component]        # fields of `PromptSource`
    start: gr.Button
    cancel: gr.Button
    status: gr.HTML
    table: gr.Dataframe
    chart: gr.Plot
    files: dict[str, gr.DownloadButton]         # by kind of file
    report: gr.State                    # id of the evaluation that runs


def make_runner(library: Library) -> Runner:
    """Make the `Runner` that runs these models, both for the page and for the endpoints for programs."""
    return Runner(library, on_zero_gpu if ZERO_GPU else None, AT_ONCE["concurrency_limit"])


def build_demo(runner: Runner, allow_training: bool = False) -> gr.Blocks:
    """Build the page for the models of a runner. Returns the app; start it by `launch` with `launch_options`.

    allow_training: True adds a button “Train exits” to the settings. The button trains exits for the chosen model.
    """
    library, page = runner.library, Page(runner)
    calibrations = {label: library.calibration(label) for label in library.labels}
    with Demo(title="CascadeExit", analytics_enabled=False, delete_cache=(CLEAN_SECONDS, KEEP_SECONDS)) as demo:
        gr.HTML("<h1>CascadeExit</h1><p>The same language model, two ways: stop early when an exit is confident,"
                f" or always use every layer.{REPORT_LINK if report else ''}</p>",
                elem_id="ce-title", apply_default_css=False)
        with gr.Tabs(elem_id="ce-pages"):
            with gr.Tab("One prompt", elem_id="ce-one"):
                one = _one_prompt(page, calibrations[library.labels[0]], allow_training)
            with gr.Tab("Many prompts", elem_id="ce-many"):
                many = _many_prompts()
        _connect_runs(page, one)
        _connect_settings(library, calibrations, one)
        if one.training:
            _connect_training(library, calibrations, one)
        _connect_many(page, one, many)
        _connect_address(demo, library, calibrations, one)
        _add_endpoints(Endpoints(runner))
    # Closed to direct calls: a POST to /run/generate would skip the queue, and with it the limit of one run at a time.
    return demo.queue(api_open=False)


def _one_prompt(page: Page, calibration: Calibration | None, allow_training: bool) -> OnePrompt:
    library, label = page.library, page.library.labels[0]
    shape = library.shapes[label]
    with gr.Row(elem_id="ce-bar"):
        prompt = gr.Textbox(next(iter(EXAMPLES.values())), label="Prompt", lines=1, max_lines=6, container=False,
                            placeholder="Ask something. Enter runs, Shift+Enter makes a new line.",
                            elem_id="ce-prompt", scale=10, min_width=260)
        mode = gr.Radio(MODES, value=library.first_mode(label), label="Mode", container=False, elem_id="ce-mode",
                        scale=0, min_width=330)
        run = gr.Button("Run", variant="primary", size="md", scale=0, min_width=96, elem_id="ce-run")
        stop = gr.Button("Stop", size="md", scale=0, min_width=96, elem_id="ce-stop")
    with gr.Row(elem_id="ce-choices"):
        gr.Examples([[text] for text in EXAMPLES.values()], prompt, label="Examples",
                    elem_id="ce-examples", example_labels=list(EXAMPLES))
        gr.Button("More ›", size="sm", scale=0, min_width=64, elem_id="ce-more")
        queue = gr.HTML("<span></span>", elem_id="ce-queue", apply_default_css=False)
        preset = gr.Radio(list(PRESETS.items()), value=DEFAULT_THRESHOLD, label="How confident must an exit be?",
                          container=False, elem_id="ce-preset", scale=0, min_width=250)
        gr.Button("Settings", size="sm", scale=0, min_width=90, elem_id="ce-open")
    with gr.Column(elem_id="ce-settings"):
        with gr.Row(elem_id="ce-settings-head"):
            gr.HTML("<h2>Settings</h2>", apply_default_css=False)
            gr.Button("Close", size="sm", scale=0, min_width=80, elem_id="ce-close")
        model = gr.Dropdown(library.labels, value=label, label="Model", elem_id="ce-model-menu",
                            visible=len(library.labels) > 1)
        quality = _quality_slider(calibration)
        beside = gr.Dropdown(label="Third panel", elem_id="ce-beside", **_beside_menu(shape),
                             info="One more text next to the full model's, with other settings")
        controls = (dict(model=model, prompt=prompt, mode=mode, beside=beside) | _advanced_controls()
                    | _exit_controls(shape))
        with gr.Row(elem_id="ce-links"):
            retry = gr.Button("Run again, next seed", size="sm", scale=0, elem_id="ce-retry")
            clear = gr.Button("Clear", size="sm", scale=0, elem_id="ce-clear")
            link = gr.Button("Copy a link to these settings", size="sm", scale=0, elem_id="ce-link")
            upload = gr.UploadButton("Replay a saved run", size="sm", scale=0, file_types=[".json"],
                                     elem_id="ce-replay")
        training = training_panel() if allow_training else None
    view = token_view(page, replayed(TRACE) if _has_recorded_run(library) else stream.model_line(shape))
    measure = gr.Button("Measure again", elem_id="ce-measure")      # clicked by the token view's own button
    return OnePrompt(controls, preset, quality, run, stop, retry, clear, queue, view, measure, gr.State(""), link,
                     upload, training)


def _has_recorded_run(library: Library) -> bool:
    """Return True if the recorded run, which plays until a visitor's first run, was made with the first model."""
    return TRACE.exists() and library.shapes[library.labels[0]].name == hub.DEFAULT_MODEL


def page_script() -> str:
    """Return the JavaScript of the token view (the panels, charts and timeline below the controls).

    It joins the files of `SCRIPTS`, in the order of that list. So each file can use the functions of all others.
    """
    return "\n".join((ASSETS / "page" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)


def token_view(page: Page, value: str) -> gr.HTML:
    """Make the token view: a component that shows the texts, numbers and charts of a run.

    The browser draws it from the component's value, one growing string of JSON lines (see `cascadeexit.stream`).

    Args:
        page: answers the questions of the browser about single tokens and layers.
        value: the component's value until the first run.
    """
    # The template is constant on purpose: gradio runs template values as code, and model text is not trusted.
    def token_card(arguments):          # a function, since gradio cannot mark a method; it passes one argument
        return page.token_card(*_of_length(arguments, 3))

    def layer_map(arguments):
        return page.layer_map(*_of_length(arguments, 4))

    return gr.HTML(value, html_template="<div class='ce'></div>", apply_default_css=False, elem_id="ce-view",
                   js_on_load=page_script(),
                   server_functions=[token_card, layer_map])


def _of_length(arguments, n: int) -> list:
    """Turn arguments from the browser, which may be any JSON, into n values; missing ones are None."""
    values = arguments if isinstance(arguments, list) else []
    return values[:n] + [None] * (n - len(values))


def _quality_slider(calibration: Calibration | None) -> gr.Slider:
    """Make the slider of the wanted agreement. It sets all thresholds. Only calibrated exits have this slider."""
    return gr.Slider(**_quality_range(DEFAULT_THRESHOLD, calibration), step=1, label="Wanted agreement, %", buttons=[],
                     elem_id="ce-quality")


def _quality_range(threshold: float | None, calibration: Calibration | None) -> dict:
    """Return arguments of the quality slider: its ends, its info text, and its value for the first exit's threshold.

    If `threshold` is None, the slider keeps its value. Without a calibration, it is hidden.
    """
    if not calibration:
        return dict(minimum=0, maximum=100, visible=False)
    stops = quality_stops(calibration)
    value = {} if threshold is None else dict(value=max(stops[0], percent_at(threshold, calibration)))
    return dict(minimum=stops[0], maximum=stops[-1], visible=True, info=_certainty(calibration), **value)


def _certainty(calibration: Calibration) -> str:
    return (f"Share of tokens equal to the full model's choice, on average over prompts like the {calibration.prompts} "
            f"that were tested ({1 - calibration.delta:.0%} confidence). For 100%, choose Exact.")


def _exit_controls(shape: Shape) -> dict[str, Component]:
    """Make a threshold slider for each exit, and a menu to choose or disable an exit. Returns them by name."""
    menu = gr.Dropdown(label="Which exit writes tokens", elem_id="ce-force", **_exit_menu(shape))
    gr.HTML("<p>Confidence that each exit needs to write a token. Lower is faster, higher is closer to the full"
            " model, 1 disables the exit. “Always exit …” in the menu ignores these values. Exact mode"
            " uses them only if the menu disables an exit.</p>",
            elem_id="ce-hint", apply_default_css=False)
    sliders = {name: _slider(name, value=value, **_exit_slider(s, shape))
               for s, (name, value) in enumerate(zip(THRESHOLDS, thresholds_at(DEFAULT_THRESHOLD, shape)))}
    return dict(exit_choice=menu) | sliders


def _beside_menu(shape: Shape) -> dict:
    """Return the choices and the value of the menu of the third panel."""
    choices = [(choice or "None", choice) for choice in settings.beside_choices(shape)]
    return dict(value=Settings.beside, choices=choices)


def _exit_menu(shape: Shape) -> dict:
    """Return the choices and the value of the exit menu of a model."""
    return dict(value=settings.FIRST_CONFIDENT, choices=list(settings.exit_choices(shape).items()))


def _exit_slider(s: int, shape: Shape) -> dict:
    """Return the label of the threshold slider of exit s. The slider is hidden if the model has no such exit."""
    return dict(visible=s < shape.num_exits, label=exit_name(min(s, shape.num_exits), shape))


def _advanced_controls() -> dict[str, Component]:
    """Make the controls of the other settings. Returns them by name."""
    chat = gr.Checkbox(Settings.chat, label="Chat",
                       info="Off: the model continues your text instead of answering it")
    max_new_tokens = _slider("max_new_tokens", label="Maximum length, tokens")
    max_draft = _slider("max_draft", label="Draft length",
                        info="Exact mode: at most this many tokens are drafted for one pass of the full model")
    tolerance = _slider("tolerance", label="Tolerance",
                        info="Exact mode: above 0, a draft is also accepted when the full model finds it nearly as "
                             "likely as its own choice. The text may then differ from the full model's.")
    temperature = _slider("temperature", label="Temperature",
                          info="0: always the most likely token. Higher: more random")
    top_p = _slider("top_p", label="Top-p", info="Below 1: choose among the most likely tokens only, those that "
                                                 "together have this probability")
    seed = gr.Number(Settings.seed, label="Seed", precision=0,
                     info="Number that decides all random choices. The same seed gives the same text. "
                          "Above temperature 0, “Run again, next seed” adds 1")
    return dict(chat=chat, max_new_tokens=max_new_tokens, max_draft=max_draft, tolerance=tolerance,
                temperature=temperature, top_p=top_p, seed=seed)


def _slider(name: str, **options) -> gr.Slider:
    """Make the slider of a setting, with its limits and its default."""
    low, high, step = settings.limits("thresholds" if name in THRESHOLDS else name)
    return gr.Slider(low, high, options.pop("value", getattr(Settings, name, None)), step=step, buttons=[], **options)


def training_panel() -> TrainingPanel:
    """Make the part of the settings in which the owner of this machine trains exits for the chosen model."""
    gr.HTML(f"<h3>Train exits for this model</h3><p>The model writes its own training text, then exits, drafter and "
            f"confidence estimators are trained and calibrated: about {QUICK_MINUTES} minutes on a CPU, "
            f"{QUICK_GPU_MINUTES} on a GPU. Other runs wait until this ends. Cancel keeps what is done.</p>",
            elem_id="ce-train-words", apply_default_css=False)
    with gr.Row():
        start = gr.Button("Train exits", size="sm", scale=0, elem_id="ce-train")
        cancel = gr.Button("Cancel", size="sm", scale=0, elem_id="ce-train-cancel")
    return TrainingPanel(start, cancel, gr.HTML("<span></span>", elem_id="ce-train-status", apply_default_css=False))


def _many_prompts() -> ManyPrompts:
    gr.Markdown("Run many prompts with the settings of the first tab, and see how fast the exits are and how well they "
                "agree with the full model. Cancel keeps the results so far.", elem_id="ce-many-words")
    available = list(dict.fromkeys(p.kind for p in prompts.bundled_prompts()))
    with gr.Row():
        with gr.Column():
            kinds = gr.CheckboxGroup(available, value=available, label="Bundled prompts", elem_id="ce-kinds")
            each = gr.Slider(1, 12, 2, step=1, label="Number of prompts of each kind", buttons=[])
        pasted = gr.Textbox(label="Or paste prompts, one per line", lines=5, max_lines=10, elem_id="ce-pasted",
                            placeholder="What is a noun?\nWrite a haiku about rain.")
        file = gr.File(label="Or upload a file: .txt, .jsonl or .csv", type="filepath", height=170,
                       file_types=[".txt", ".jsonl", ".csv"], elem_id="ce-prompt-file")
    with gr.Row(elem_id="ce-many-actions"):
        start = gr.Button("Evaluate", variant="primary", scale=0, elem_id="ce-evaluate")
        cancel = gr.Button("Cancel", scale=0, interactive=False, elem_id="ce-cancel")
        files = dict(json=gr.DownloadButton("Save all (JSON)", scale=0, interactive=False),
                     csv=gr.DownloadButton("Save table (CSV)", scale=0, interactive=False))
    status = gr.HTML("<span></span>", elem_id="ce-many-status", apply_default_css=False)
    chart = gr.Plot(visible=False, show_label=False, container=False, elem_id="ce-chart")
    table = gr.Dataframe(headers=list(COLUMNS), interactive=False, wrap=True, elem_id="ce-results", buttons=[],
                         label="Results", column_widths=[f"{width}px" for width in RESULT_WIDTHS])
    source = dict(kinds=kinds, each=each, pasted=pasted, file=file)
    return ManyPrompts(source, start, cancel, status, table, chart, files, gr.State(""))


# -- handlers' plain values as updates of components ---------------------------------------------------------


def _shown(one: OnePrompt, frame: Frame) -> dict:
    """Return the updates of components for one change of the page during a run."""
    if frame.notice:
        _warn(frame.notice)
    changes = {}
    if frame.stream is not None:
        changes[one.view] = frame.stream
    if frame.run is not None:
        changes[one.current] = frame.run
    return changes or gr.skip()


def _shown_progress(many: ManyPrompts, progress: Progress) -> dict:
    """Return the updates of components for one change of the evaluation tab."""
    changes = {}
    if progress.status is not None:
        changes[many.status] = _status_html(progress.status, progress.kind)
        changes[many.cancel] = gr.Button(interactive=progress.kind == "busy")
    if progress.rows is not None:
        changes[many.table] = progress.rows
    if progress.figure is not None:
        changes[many.chart] = gr.Plot(progress.figure, visible=True)
    if progress.report is not None:
        changes[many.report] = progress.report
    for kind, path in (progress.files or {}).items():
        changes[many.files[kind]] = gr.DownloadButton(value=str(path), interactive=True)
    return changes or gr.skip()


def _warn(notice: Notice) -> None:
    gr.Warning(html.escape(notice.message), title=notice.title)        # gradio renders it as HTML


def _status_html(text: str, kind: str) -> str:
    return f"<p class='ce-status {kind}' role='status'>{html.escape(text)}</p>"


# -- events -------------------------------------------------------------------------------------------------


def _turns(place: Component) -> dict:
    """Return options of an event that runs a model.

    All such events share one queue, so two runs never use one device at the same time.

    place: where gradio shows the place in the queue.
    """
    return dict(show_progress="minimal", show_progress_on=[place], api_visibility="private", **AT_ONCE)


def _connect_runs(page: Page, one: OnePrompt) -> None:
    """Connect the controls of the first tab: run, stop, retry, clear, model menu, replay and measure."""
    outputs = [one.view, one.current]
    prompt, model, seed = (one.controls[name] for name in ("prompt", "model", "seed"))
    shown = partial(_shown, one)

    def streamed(frames: Iterator[Frame]) -> Iterator[dict]:
        with closing(frames):               # also when the visitor stops or leaves
            yield from map(shown, frames)

    def respond(*values) -> Iterator[dict]:
        yield from streamed(page.respond(Settings.from_controls(dict(zip(one.controls, values)))))

    def fork(event: gr.EventData) -> Iterator[dict]:
        chosen = event._data if isinstance(event._data, dict) else {}      # from the browser: any JSON
        yield from streamed(page.fork(*(chosen.get(name) for name in ("run", "side", "at", "id"))))

    def next_seed(seed, temperature) -> int:
        seed, notice = retried(seed, temperature)
        if notice:
            _warn(notice)
        return seed

    def analyse(run: str) -> Iterator[dict]:
        yield from streamed(page.analyse(run))

    def measure(run: str) -> Iterator[dict]:
        yield from streamed(page.measure(run))

    inputs = list(one.controls.values())
    running = gr.on([one.run.click, prompt.submit], respond, inputs, outputs, **_turns(one.queue))
    # In the queue, as the upload below: only there gradio can show a warning.
    reseeded = one.retry.click(next_seed, [seed, one.controls["temperature"]], seed, concurrency_limit=None, **QUIET)
    again = reseeded.then(respond, inputs, outputs, **_turns(one.queue))
    forking = one.view.fork(fork, None, outputs, **_turns(one.queue))
    forking.then(None, js=FORK_OVER, queue=False, **QUIET)
    repeated = one.measure.click(measure, one.current, outputs, **_turns(one.queue))
    check = one.stop.click(None, cancels=[running, again, forking, repeated]).then(
        stream.stopped, one.view, one.view, queue=False, **QUIET).then(
        analyse, one.current, outputs, **_turns(one.queue) | dict(show_progress="hidden"))
    all_runs = [running, again, forking, repeated, check]
    ends = dict(cancels=all_runs, queue=False, **QUIET)
    one.clear.click(lambda label: {prompt: ""} | shown(page.idle(label)), model, [prompt, *outputs], **ends)
    model.input(lambda label: shown(page.idle(label)), model, outputs, trigger_mode="always_last", **ends)
    # The drawer closes, so that nothing covers the run.
    one.upload.upload(lambda path: shown(replay_upload(path)), one.upload, outputs, cancels=all_runs,
                      concurrency_limit=None, **QUIET).then(None, js=CLOSE_SETTINGS, queue=False, **QUIET)


def _connect_settings(library: Library, calibrations: dict[str, Calibration | None], one: OnePrompt) -> None:
    """Let the model menu, the presets and the quality slider set the exit controls."""
    model, thresholds = one.controls["model"], [one.controls[name] for name in THRESHOLDS]

    def set_preset(threshold: float, label: str) -> dict:
        quality = _fitted_quality_controls(one, threshold, calibrations[label])[one.quality]
        return dict(zip(thresholds, thresholds_at(threshold, library.shapes[label]))) | {one.quality: quality}

    def set_quality(percent: float, label: str) -> dict:
        threshold = threshold_for(percent, calibrations[label])
        return dict(zip(thresholds, thresholds_at(threshold, library.shapes[label]))) | {one.preset: None}

    # Keep the last of several quick moves; Gradio would drop it while an earlier one is being answered.
    last = dict(QUIET, queue=False, trigger_mode="always_last")
    model.input(partial(_fitted_controls, library, calibrations, one), model, _fitted_outputs(one), **last)
    one.preset.input(set_preset, [one.preset, model], [*thresholds, one.quality], **last)
    one.quality.input(set_quality, [one.quality, model], [*thresholds, one.preset], **last)
    gr.on([slider.input for slider in thresholds], None, None, one.preset, js="() => null", **QUIET)


def _fitted_controls(library: Library, calibrations: dict[str, Calibration | None], one: OnePrompt, label: str) -> dict:
    """Return updates that fit the controls to the model with this label, with default values."""
    return (_fitted_exit_controls(one, library.shapes[label]) | {one.controls["mode"]: library.first_mode(label)}
            | _fitted_quality_controls(one, DEFAULT_THRESHOLD, calibrations[label]))


def _fitted_outputs(one: OnePrompt) -> list[Component]:
    return [*one.exit_controls, one.controls["mode"], one.preset, one.quality]


def _connect_training(library: Library, calibrations: dict[str, Calibration | None], one: OnePrompt) -> None:
    """Connect the training panel. After a training, the page offers the model with its new exits."""
    from training import quick  # here: only owners who allow training need its packages

    panel, model = one.training, one.controls["model"]

    def train(label: str) -> Iterator[dict]:
        steps = quick.trained_exits(library.source(label))
        with closing(steps):
            try:
                while True:
                    progress = next(steps)
                    yield {panel.status: _status_html(f"{progress.part}; {progress.done:.0%} of the whole training is "
                                                       "done", "")}
            except StopIteration as end:
                exits, words = end.value
            except (OSError, ValueError, hub.ModelUnavailable) as error:
                yield {panel.status: _status_html(str(error), "error")}
                return
        library.use_exits(label, exits)
        calibrations[label] = library.calibration(label)
        yield (_fitted_controls(library, calibrations, one, label)
               | {one.view: stream.model_line(library.shapes[label], label), panel.status: _status_html(words, "")})

    # In the queue of the runs: training and decoding would slow each other down.
    running = panel.start.click(train, model, [panel.status, one.view, *_fitted_outputs(one)], **_turns(panel.status))
    panel.cancel.click(lambda: None, cancels=[running], queue=False, **QUIET).then(
        lambda: _status_html("Cancelled. “Train exits” continues where the training stopped.", ""), None, panel.status,
        queue=False, **QUIET)


def _fitted_exit_controls(one: OnePrompt, shape: Shape, chosen: dict | None = None) -> dict:
    """Return updates that fit the exit controls to a model. `chosen` has values, by name, that replace the defaults."""
    values = dict(zip(THRESHOLDS, thresholds_at(DEFAULT_THRESHOLD, shape))) | (chosen or {})
    menu = gr.update(**_exit_menu(shape) | {"value": values.get("exit_choice", settings.FIRST_CONFIDENT)})
    beside = gr.update(**_beside_menu(shape) | {"value": values.get("beside", Settings.beside)})
    sliders = {name: gr.update(value=values[name], **_exit_slider(s, shape)) for s, name in enumerate(THRESHOLDS)}
    return {one.controls[name]: update for name, update in (dict(exit_choice=menu, beside=beside) | sliders).items()}


def _fitted_quality_controls(one: OnePrompt, threshold: float | None, calibration: Calibration | None) -> dict:
    """Return updates of the presets and of the quality slider.

    threshold: threshold of the first exit if all others follow from it (`thresholds_at`); else None.
    """
    preset = threshold if threshold in PRESETS.values() else None
    return {one.preset: gr.update(value=preset), one.quality: gr.update(**_quality_range(threshold, calibration))}


def _connect_many(page: Page, one: OnePrompt, many: ManyPrompts) -> None:
    """Connect the buttons of the second tab: Evaluate and Cancel."""
    def evaluate_many(*values) -> Iterator[dict]:
        chosen = dict(zip(inputs, values))
        source = PromptSource(**{name: chosen.pop(name) for name in many.source})
        with closing(page.evaluate(source, Settings.from_controls(chosen))) as moments:
            yield from map(partial(_shown_progress, many), moments)

    inputs = many.source | one.controls
    outputs = [many.status, many.table, many.chart, many.cancel, *many.files.values(), many.report]
    # At once: an evaluation that waits for its turn can be cancelled, too.
    begun = many.start.click(lambda: gr.Button(interactive=True), None, many.cancel, queue=False, **QUIET)
    running = begun.then(evaluate_many, list(inputs.values()), outputs, **_turns(many.status))
    many.cancel.click(lambda: gr.Button(interactive=False), None, many.cancel, cancels=[running], queue=False,
                      **QUIET).then(
        lambda report: _shown_progress(many, page.cancelled(report)), many.report, outputs, queue=False, **QUIET)


# -- a link that restores the settings ------------------------------------------------------------------------

# Values of controls that share a parameter (the thresholds) are separated by commas.
COPY_LINK = """(...values) => {
    const parameters = {};
    NAMES.forEach((name, i) => (parameters[name] ||= []).push(values[i]));
    const query = new URLSearchParams();
    for (const [name, all] of Object.entries(parameters))
        if (all.some(value => value !== null && value !== '')) query.set(name, all.join(','));
    const theme = new URLSearchParams(location.search).get('__theme');
    if (theme) query.set('__theme', theme);
    const link = location.origin + location.pathname + '?' + query;
    history.replaceState(null, '', link);
    const button = document.getElementById('ce-link'), words = button.textContent;
    const say = text => { button.textContent = text; setTimeout(() => { button.textContent = words; }, 2500); };
    const inAddress = () => say('Link is in the address bar');
    if (navigator.clipboard) navigator.clipboard.writeText(link).then(() => say('Link copied ✓'), inAddress);
    else inAddress();
}"""


def _connect_address(demo: gr.Blocks, library: Library, calibrations: dict[str, Calibration | None],
                     one: OnePrompt) -> None:
    """Write the settings into the page's address, and restore them from it."""
    names = json.dumps([settings.query_name(name) for name in one.controls])
    one.link.click(None, list(one.controls.values()), js=COPY_LINK.replace("NAMES", names), queue=False, **QUIET)
    first = library.labels[0]

    def restore(request: gr.Request) -> dict:
        values = settings.from_query(dict(request.query_params), library.shapes)
        label = values.get("model", first)
        shape = library.shapes[label]
        updates = {one.controls[name]: gr.update(value=value) for name, value in values.items()}
        if label != first:
            updates |= _fitted_exit_controls(one, shape, values)
        wanted = [values.get(name) for name in THRESHOLDS[:shape.num_exits]]
        if None not in wanted:
            updates |= _fitted_quality_controls(one, settings.first_threshold(wanted, shape), calibrations[label])
        if label != first:
            updates[one.view] = stream.model_line(shape)
        return updates or gr.skip()

    demo.load(restore, None, [*one.controls.values(), one.preset, one.quality, one.view], queue=False, **QUIET)


# -- endpoints for programs -----------------------------------------------------------------------------------


def _add_endpoints(endpoints: Endpoints) -> None:
    """Add the endpoints /models, /generate, /compare and /evaluate."""
    gr.api(endpoints.models, api_name="models", queue=False)
    for endpoint in (endpoints.generate, endpoints.compare, endpoints.evaluate):
        gr.api(_for_clients(endpoint), api_name=endpoint.__name__, **AT_ONCE)


def _for_clients(endpoint: Callable) -> Callable:
    """Wrap an endpoint: BadRequest and RunFailed become the error that gradio passes on to the caller."""
    @wraps(endpoint)
    def call(*args, **kwargs):
        try:
            yield from endpoint(*args, **kwargs)
        except (BadRequest, RunFailed) as error:
            raise one_sentence(str(error)) from None
    call.__signature__ = signature(endpoint).replace(return_annotation=dict)    # gradio describes the result by it
    return call


# -- ZeroGPU --------------------------------------------------------------------------------------------------

def on_zero_gpu(compute: Compute, seconds: Callable[..., int]) -> Compute:
    """Wrap a generator function so that it runs in a worker process that has a GPU of ZeroGPU.

    Args:
        compute: the generator function.
        seconds: function that estimates, from the arguments of `compute`, how many seconds of GPU time a call needs.

    Returns a generator function with the same arguments. It raises RunFailed for errors of `spaces`, such as a worker
    that died or a quota that is used up.
    """
    on_gpu = spaces.GPU(compute, duration=seconds)

    @wraps(compute)
    def call(*args) -> Iterator:
        try:
            yield from on_gpu(*args)
        except gr.Error as error:
            reason = str(error.message)
            if error.title == WORKER_DIED:
                reason = f"The process that ran the model on the GPU ended early ({reason}). Run the prompt again."
            raise RunFailed(error.title, reason) from error
    return call


# -- start --------------------------------------------------------------------------------------------------

def launch_options(demo: gr.Blocks, runner: Runner) -> dict:
    """Return the arguments of `demo.launch`: our theme and styles, no requests to other machines, the routes of
    `cascadeexit.openai` for programs, and the route of the report.
    """
    def visit(request: Request) -> None:
        # As gradio does before it calls a function: `spaces` reads from these who asks for a GPU, and for which server.
        LocalContext.blocks.set(demo)
        LocalContext.request.set(gr.Request(request))

    # Bold instead of gradio's semi-bold, because the semi-bold font file that gradio serves lacks most letters.
    font = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="lg", font=font).set(
        body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")    # the default is too pale
    routes = [Mount("/v1", app=openai.application(runner, visit)), *report_routes()]
    limits = Middleware(UploadLimits, request_bytes=MAX_REQUEST, total_bytes=MAX_UPLOADS, keep_seconds=KEEP_SECONDS,
                        folder=Path(get_upload_folder()))
    return dict(theme=theme, css_paths=styles(), ssr_mode=False, run_history=False, footer_links=[],
                max_file_size=MAX_UPLOAD, state_session_capacity=SESSIONS, enable_monitoring=False,
                app_kwargs=dict(routes=routes, middleware=[limits]))


def report_routes() -> list[Route]:
    """Return the route of the report of measured results, which is rendered once. [] if `training` is not installed."""
    page = cache(report.page) if report else None
    return [Route("/report", lambda request: HTMLResponse(page()))] if page else []


def styles() -> list[Path]:
    """Return the style sheets of the page."""
    return [ASSETS / "app.css", *sorted((ASSETS / "page").glob("*.css"))]


def offers(models: list[str], exits: str | None) -> list[Offer]:
    """Return the models for the page's menu: `models`, else the model of $CASCADEEXIT_MODEL, else the bundled model.

    If neither `models`, nor `exits`, nor $CASCADEEXIT_MODEL is given, the bundled model is in the list once for each
    set of exits that ships for it.

    Args:
        models: Hub ids, local folders, or the bundled model's name.
        exits: folder of trained exits; None = the exits that ship for the model.
    """
    if models or exits or os.environ.get("CASCADEEXIT_MODEL"):
        return [Offer(hub.short_name(model or hub.DEFAULT_MODEL), model, exits)
                for model in models or [os.environ.get("CASCADEEXIT_MODEL")]]
    others = sorted((ASSETS / "exits").glob(f"{hub.DEFAULT_MODEL}-*"))
    kinds = [folder.name.removeprefix(f"{hub.DEFAULT_MODEL}-") for folder in others]
    return [Offer(hub.DEFAULT_MODEL, None),
            *(Offer(f"{hub.DEFAULT_MODEL}, {kind} exits", None, folder) for kind, folder in zip(kinds, others))]


def main() -> None:
    parser = argparse.ArgumentParser(description="CascadeExit: early exits beside the full model.")
    parser.add_argument("--model", nargs="+", default=[], help="Hub ids, local folders, GGUF files (a path, or "
                        "owner/name:file.gguf on the Hub), or the bundled model's name; "
                        f"several make a menu (default: $CASCADEEXIT_MODEL, else {hub.DEFAULT_MODEL})")
    parser.add_argument("--exits", help="folder or Hub id of trained exits (default: those shipped for the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--device-map", help="'auto' spreads a model that is too large for one device over all "
                        "devices, main memory and disk")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="data type of the weights (default: bfloat16, or float16 on a GPU that only emulates "
                        "bfloat16)")
    parser.add_argument("--host", help="address to serve on, 0.0.0.0 for every network (default: 127.0.0.1)")
    parser.add_argument("--mcp", action="store_true", help="offer the endpoints as MCP tools too (needs gradio[mcp])")
    parser.add_argument("--allow-training", action="store_true", help="let everybody who can open the page train exits "
                        "for its models on this machine (a button in the settings)")
    parser.add_argument("--port", type=int, help="port to serve on (default: the first free one from 7860)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if problem := accelerator.space_problem():
        raise SystemExit(f"app.py: {problem}")
    log = partial(print, flush=True)
    if args.allow_training and ZERO_GPU:
        raise SystemExit("app.py: --allow-training needs a machine of your own, not ZeroGPU")
    if ZERO_GPU and spaces is None:
        raise SystemExit("app.py: on ZeroGPU the package `spaces` is needed: add it to requirements.txt")
    try:
        library = Library(offers(args.model, args.exits), device=args.device, device_map=args.device_map,
                          dtype=getattr(torch, args.dtype) if args.dtype else None)
        if ZERO_GPU:
            library.load_all(log)               # in this thread and before the launch, which moves weights to disk
        runner = make_runner(library)
        demo = build_demo(runner, args.allow_training)
        demo.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True,
                    mcp_server=args.mcp, **launch_options(demo, runner))
        log(f"Open {demo.local_url} (a recorded run plays there until your first own run)")
        library.get(library.labels[0], log)
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"app.py: {error}") from error
    log(f"{library.labels[0]} is ready: {demo.local_url}")
    demo.block_thread()


if __name__ == "__main__":
    main()
