"""Blocks: Gradio's app class and queue as the page needs them. No other module here imports Gradio."""

import html
import logging

import gradio as gr
from gradio.components import Component
from gradio.queueing import Queue

from cascadeexit.values import shown

log = logging.getLogger("cascadeexit.app")
MODEL = "model"                 # name of the queue of events that run a model
MAX_WAITING = 20                # runs that wait for the model
MAX_QUEUED = 200                # all events that wait


class Demo(gr.Blocks):
    """The page's Blocks. Every error becomes one sentence for the visitor or the program that caused it.

    Without this class, Gradio answers {"error": null} to most wrong values.
    """

    async def preprocess_data(self, block_fn, inputs, *args, **options):
        """Convert the values of an event as Gradio does. A wrong value raises an error that names its control."""
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **options)
        except Exception as error:      # components raise errors of many kinds
            raise one_sentence(_wrong_input(block_fn.inputs, inputs)) from error

    async def process_api(self, *args, **options):
        """Answer an event as Gradio does. An error that nobody expected goes to the log."""
        try:
            return await super().process_api(*args, **options)
        except gr.Error:
            raise
        except Exception as error:
            log.exception("an event failed")
            raise one_sentence("Something went wrong. The server's log has the details.") from error

    def queue(self, **options):
        """Set up the queue as Gradio does, but as a `ModelQueue`. Returns the app."""
        super().queue(**options)
        self._queue = ModelQueue(True, self.max_threads, 1, MAX_QUEUED, self, "not_set")
        return self


class ModelQueue(Queue):
    """Gradio's queue, but only events that run a model wait for each other, and only they find it full.

    Replays, menus and the list of models are answered although `MAX_WAITING` runs wait.
    """

    async def push(self, body, request, username):
        """Add an event to the queue. Returns what Gradio's queue returns."""
        event = self.blocks.fns.get(body.fn_index)
        waiting = self.event_queue_per_concurrency_id.get(MODEL)
        if event is not None and event.concurrency_id == MODEL and waiting and len(waiting.queue) >= MAX_WAITING:
            return False, f"{MAX_WAITING} runs already wait here: try again later.", "queue_full"
        return await super().push(body, request, username)


def one_sentence(text: str) -> gr.Error:
    """Return the error with which Gradio shows this plain text to a visitor or a program. The caller raises it."""
    # Gradio renders it as HTML. Quotes do no harm there, and programs read them.
    return gr.Error(html.escape(text, quote=False), print_exception=False)


def _wrong_input(components: list[Component], values: list) -> str:
    """Return a sentence about the first of these values that its component refuses."""
    if len(values) < len(components):
        return f"This event needs {len(components)} values, got {len(values)}."
    for component, value in zip(components, values):
        if component.stateful or getattr(component, "data_model", None):        # files: their paths are not trusted
            continue
        try:
            component.preprocess(value)
        except Exception:               # as above
            return f"{component.label} cannot be {shown(value)}: choose a value that this control offers."
    return "A file cannot be used here: upload one of a type that this control takes."
