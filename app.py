"""The page: layout and events only. cascadeexit.views says what is shown, the engine computes it.

    python app.py                        the bundled model on this machine
    python app.py --model my-model       any Llama-like model: a Hub id or a local folder
"""

import argparse
import html
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")     # read when gradio is imported

import gradio as gr  # noqa: E402
import torch  # noqa: E402

from cascadeexit import hub, views  # noqa: E402
from cascadeexit.engine import DecodeConfig, Engine, Mode  # noqa: E402
from cascadeexit.race import race  # noqa: E402

log = logging.getLogger("cascadeexit.app")
ASSETS = Path(__file__).parent / "assets"
EXAMPLES = ("Explain why the sky is blue.", "Reverse a string in Python.",
            "List five fruits and their colours.", "Tell a short story about a lighthouse.")
MODES = [("Cascade: fast, keeps what a sure exit says", Mode.CASCADE),
         ("Verified: exact, the full model checks every guess", Mode.VERIFIED)]
MAX_PROMPT_CHARACTERS = 20_000
NEVER = 1.0             # a threshold slider at its end closes the exit


def token_view(value: str) -> gr.HTML:
    """Both texts, live numbers and charts, drawn in the browser from one growing string of JSON lines.

    The template is constant on purpose: gradio runs template values as code, and model text is not trusted.
    """
    return gr.HTML(value, html_template="<div class='ce'></div>", apply_default_css=False, elem_id="ce-view",
                   js_on_load=(ASSETS / "app.js").read_text(encoding="utf-8"))


# -- what happens -------------------------------------------------------------------------------------------

def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The visitor's words as token ids. Raises ValueError with a message for the visitor."""
    prompt = (prompt or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # half characters
    if not prompt.strip():
        raise ValueError("Please write a prompt first.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"This prompt has {len(prompt):,} characters, the limit {MAX_PROMPT_CHARACTERS:,}.")
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(prompt, add_special_tokens=not (chat and tokenizer.chat_template)).input_ids


def compare(engine: Engine, tokenizer, prompt, mode, chat, max_new_tokens, max_draft, temperature, top_p,
            seed, *thresholds) -> Iterator[tuple]:
    """Race the exits against the full model: yields (stream, routing, latency and confidence figure)."""
    wait = (gr.skip(),) * 3
    try:
        shared = dict(max_new_tokens=int(max_new_tokens), temperature=temperature, top_p=top_p,
                      seed=int(seed or 0) % 2**63)
        config = DecodeConfig(mode=mode, max_draft=int(max_draft), **shared,
                              thresholds=[None if t >= NEVER else t for t in thresholds])
        ids = prompt_ids(tokenizer, prompt, chat)
        contest = race({views.CASCADE: engine.generate(ids, config),
                        views.FULL: engine.generate(ids, DecodeConfig(mode=Mode.FULL, **shared))})
    except (ValueError, TypeError) as error:
        message = str(error) if isinstance(error, ValueError) else "A setting is empty: give it a value."
        gr.Warning(html.escape(message), title="Not started")       # gradio renders it as HTML
        yield views.error_line(message), *wait
        return

    stream = views.TokenStream(engine, tokenizer, config, len(ids))
    try:
        yield stream.text, *wait
        for text in views.frames(stream, contest):
            yield text, *wait
        stream.close_text()
        yield stream.text, *wait
        choices = engine.full_choices(ids, stream.sides[views.CASCADE].ids)
        stream.end(choices)
        yield stream.text, *(gr.Plot(figure, visible=True) for figure in views.figures(stream, choices))
    except Exception:
        log.exception("a run failed")
        stream.fail("Something went wrong while the model was running. The server's log tells what.")
        yield stream.text, *wait
    finally:
        contest.close()                                         # also when the visitor stops or leaves


# -- what it looks like -------------------------------------------------------------------------------------

def build_demo(engine: Engine, tokenizer) -> gr.Blocks:
    """The page around one model."""
    with gr.Blocks(title="CascadeExit", analytics_enabled=False) as demo:
        gr.HTML("<h1>CascadeExit</h1><p>A language model that stops early when it is already sure,"
                " racing itself.</p>", elem_id="ce-title", apply_default_css=False)
        with gr.Row(elem_id="ce-controls"):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=3, max_lines=8, scale=6, min_width=300,
                                placeholder="Ask something, or give a text to continue", elem_id="ce-prompt")
            mode = gr.Radio(MODES, value=Mode.CASCADE, label="Mode", scale=5, min_width=300,
                            elem_id="ce-mode")
        with gr.Row(elem_id="ce-actions"):
            run = gr.Button("Run", variant="primary", size="md", scale=0, elem_id="ce-run")
            stop = gr.Button("Stop", size="md", scale=0, elem_id="ce-stop")
            clear = gr.Button("Clear", size="md", scale=0, elem_id="ce-clear")
            gr.Examples([[text] for text in EXAMPLES], prompt, label="Examples", elem_id="ce-examples")
        thresholds = _threshold_sliders(engine)
        settings = [mode, *_more_settings(engine, tokenizer), *thresholds]
        view = token_view(views.model_line(engine))
        with gr.Row(elem_id="ce-figures"):
            figures = [gr.Plot(visible=False, show_label=False, container=False, min_width=300)
                       for _ in range(3)]

        def respond(*values):
            yield from compare(engine, tokenizer, *values)

        # One model, one queue: everything that computes shares this id, so runs never share the device.
        quiet = dict(show_progress="hidden", api_visibility="private")
        running = gr.on([run.click, prompt.submit], respond, [prompt, *settings], [view, *figures], **quiet,
                        concurrency_id="model", concurrency_limit=1)
        stop.click(None, cancels=[running]).then(views.stopped, view, view, queue=False, **quiet)
        clear.click(lambda: ("", views.model_line(engine), *[gr.Plot(None, visible=False)] * 3), None,
                    [prompt, view, *figures], cancels=[running], queue=False, **quiet)
    return demo.queue(max_size=20)


def _threshold_sliders(engine: Engine) -> list[gr.Slider]:
    hint = "How sure must an exit be? Lower is faster, higher is closer to the full model, 1 closes it"
    with gr.Accordion(hint, elem_id="ce-sure"):
        with gr.Row():
            return [gr.Slider(0, NEVER, 0.7, step=0.01, label=views.exit_name(s, engine), buttons=[],
                              min_width=220) for s in range(engine.num_exits)]


def _more_settings(engine: Engine, tokenizer) -> list[gr.components.Component]:
    """The controls that `compare` takes between mode and thresholds, in its order."""
    can_chat = bool(tokenizer.chat_template)
    longest, most_drafts = min(1024, engine.model.max_positions // 2), engine.model.max_verify_rows - 1
    with gr.Accordion("More settings", open=False, elem_id="ce-more"):
        with gr.Row():
            chat = gr.Checkbox(can_chat, label="Chat", interactive=can_chat,
                               info="Off: the model continues your text instead of answering it")
            tokens = gr.Slider(1, longest, min(200, longest), step=1, label="Most new tokens", buttons=[])
            draft = gr.Slider(1, min(16, most_drafts), min(4, most_drafts), step=1, label="Guesses per check",
                              info="Verified mode: the most guesses before the full model looks", buttons=[])
        with gr.Row():
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", buttons=[],
                                    info="0: always the likeliest token")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", buttons=[],
                              info="Below 1: choose among the likeliest tokens only")
            seed = gr.Number(0, label="Seed", precision=0, info="Same seed, same text")
    return [chat, tokens, draft, temperature, top_p, seed]


def launch_options() -> dict:
    """How this page is served: no outside request, our own looks; tests and scripts start it the same way."""
    # Bold, not gradio's usual semi-bold: the semi-bold file that gradio serves lacks most letters.
    font = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="lg", font=font)
    return dict(theme=theme, css_paths=ASSETS / "app.css", ssr_mode=False, run_history=False, footer_links=[])


# -- start --------------------------------------------------------------------------------------------------

def main() -> None:
    parser = argparse.ArgumentParser(description="CascadeExit: a model leaving early, beside itself in full.")
    parser.add_argument("--model", help="a Hub id, a local folder, or the bundled model's name"
                                        f" (default: $CASCADEEXIT_MODEL, else {hub.DEFAULT_MODEL})")
    parser.add_argument("--exits", help="folder of trained exits (default: those shipped for the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--host", help="address to serve on, 0.0.0.0 for every network (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    say = partial(print, flush=True)
    try:
        engine, tokenizer = hub.load(args.model, args.exits, device=args.device, progress=say,
                                     dtype=getattr(torch, args.dtype) if args.dtype else None)
        engine.run([0], DecodeConfig(max_new_tokens=4))     # warm: no visitor's clock pays for it
        demo = build_demo(engine, tokenizer)
        demo.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True,
                    **launch_options())
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"app.py: {error}") from error
    say(f"{engine.model.name} is ready: open {demo.local_url}")
    demo.block_thread()


if __name__ == "__main__":
    main()
