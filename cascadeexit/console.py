"""Console: the command `cascadeexit`, which is also `python -m cascadeexit`. It has four subcommands (`COMMANDS`)."""

import argparse
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import cascadeexit
from cascadeexit import doctor, hub
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.folders import project_folder
from cascadeexit.metrics import summarize
from cascadeexit.prompts import token_ids
from cascadeexit.shape import Shape
from cascadeexit.terminal import print_tokens, summary

EXTRAS = {"app": ("gradio", "plotly"), "train": ("datasets", "jinja2", "plotly", "tqdm")}       # {extra: its packages}
STEPS = ("quick", "data", "distill", "drafter", "confidence", "evaluate", "calibrate")      # modules of `training`
_PIPE_CLOSED = 141      # exit status, as shells report it
_WRONG_INPUT = (hub.ModelUnavailable, ValueError, OSError)

_ABOUT = """Make a language model faster: easy tokens leave at early exits, and the full model can verify each of them.

    cascadeexit run "Explain why the sky is blue."    answer a prompt in the terminal
    cascadeexit serve                                 serve the page, which shows how each token was decoded
    cascadeexit doctor                                say how this machine runs a model, and what is missing
    cascadeexit train --model ./my-llama              train exits for a model

cascadeexit COMMAND --help describes the options of a command."""

_RUN = """Decode one prompt and print the text while it is decoded.

Speed, acceptance rate and routing follow on the standard error stream. On a terminal, each token has the colour of the
exit that produced it; tokens of the full model keep the terminal's colour."""

_TRAIN = f"""Train exits for a model: training text that the model writes, adapters, drafter, confidence estimators,
evaluation, calibration. If the command is interrupted, start it again: it continues.

    cascadeexit train quick --model ./my-llama              useful exits in a quarter of an hour
    cascadeexit train --model ./my-llama --out runs/my-llama
    cascadeexit train --smoke                 a tiny random model on a CPU, in about a minute
    cascadeexit train STEP [option ...]       quick, or one step; STEP --help has its options

STEP is one of {', '.join(STEPS)}."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `cascadeexit`. Most commands end the process with an exit status.

    arguments: words after the program's name; default: the arguments of this process.
    """
    parser = _parser("cascadeexit", _ABOUT)
    parser.add_argument("--version", action="version", version=f"cascadeexit {cascadeexit.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    args = parser.parse_args(arguments)
    COMMANDS[args.command](args.options)


def run(words: list[str]) -> None:
    """Run `cascadeexit run`: decode one prompt and print its text.

    words: the words after `run`. Raises SystemExit with a message for wrong input.
    """
    parser = _parser("cascadeexit run", _RUN)
    parser.add_argument("prompt", help="the user's turn; - reads it from the standard input")
    parser.add_argument("--mode", choices=[mode.value for mode in Mode], default=Mode.VERIFIED.value,
                        help="verified: the full model's own text; cascade: tokens leave at early exits, the text may "
                        "differ; full: no exits (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest text (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="confidence from which the first exit is taken; deeper exits "
                        "need more (default: the default of the mode)")
    parser.add_argument("--target-disagreement", type=float, help="only in mode cascade: largest share of the tokens "
                        "that may differ from the full model's choice")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: %(default)s, all tokens)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True,
                        help="put the prompt into the model's chat template")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction,
                        help="colour the tokens by exit (default: if the output is a terminal and NO_COLOR is not set)")
    doctor.add_model_options(parser)
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.stdout.reconfigure(errors="replace")                # a terminal may lack characters that a model writes
    try:
        _answer(args)
    except BrokenPipeError:                                 # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python's last flush would fail, too
        raise SystemExit(_PIPE_CLOSED) from None
    except _WRONG_INPUT as error:
        raise SystemExit(f"cascadeexit run: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None                     # as shells report it


def serve(words: list[str]) -> None:
    """Run `cascadeexit serve`: serve the page until the process ends.

    words: the words after `serve`, the options of `app.py`. Raises SystemExit if packages are missing.
    """
    _need("serve", "app")
    sys.argv = ["cascadeexit serve", *words]
    sys.path.insert(0, str(project_folder()))
    importlib.import_module("app").main()


def examine(words: list[str]) -> None:
    """Run `cascadeexit doctor`: print a report about this machine, and end the process.

    words: the words after `doctor`, the options of `cascadeexit.doctor`.
    """
    sys.argv = ["cascadeexit doctor", *words]
    doctor.main()


def train(words: list[str]) -> None:
    """Run `cascadeexit train`: train exits with the whole recipe or one step of it, and end the process.

    words: the words after `train`. If the first word is one of `STEPS`, only this step runs.
    """
    if words and words[0] in STEPS:
        _need("train", "train")
        raise SystemExit(subprocess.run([sys.executable, "-m", f"training.{words[0]}", *words[1:]],
                                        env=_training_environment()).returncode)
    recipe = _recipe_variables(words)
    _need("train", "train")
    if (bash := shutil.which("bash")) is None:
        raise SystemExit("cascadeexit train: the recipe is a bash script, and bash is not installed: install it, or "
                         f"run the steps {', '.join(STEPS)} one by one")
    script = project_folder() / "training" / "run.sh"
    raise SystemExit(subprocess.run([bash, str(script)], env=_training_environment() | recipe).returncode)


COMMANDS = {"run": run, "serve": serve, "doctor": examine, "train": train}


def _parser(program: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(program, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def _answer(args: argparse.Namespace) -> None:
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: write it as an argument, or pipe it in and give -")
    config = DecodeConfig(mode=args.mode, max_new_tokens=args.max_new_tokens, thresholds=args.threshold,
                          target_disagreement=args.target_disagreement, temperature=args.temperature,
                          top_p=args.top_p, seed=args.seed)

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    engine, tokenizer = hub.load(args.model, args.exits, device=args.device, dtype=args.dtype, progress=say)
    events = engine.generate(token_ids(tokenizer, prompt, chat=args.chat), config)
    seen = print_tokens(events, tokenizer, num_exits=engine.num_exits, eos_ids=engine.model.eos_ids, out=sys.stdout,
                        color=_colored(args.color, sys.stdout))
    say(summary(summarize(seen, engine.costs_for(config)), Shape.of(engine), _colored(args.color, sys.stderr)))


def _colored(wanted: bool | None, stream) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") if wanted is None else wanted


def _need(command: str, extra: str) -> None:
    """End the program with a message if packages of this extra (a key of `EXTRAS`) are not installed."""
    missing = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    if missing:
        raise SystemExit(f"cascadeexit {command}: {' and '.join(missing)} missing: run "
                         f"pip install 'cascadeexit[{extra}]'")


def _training_environment() -> dict[str, str]:
    """Return environment variables with which `python -m training.STEP` finds the package `training` anywhere."""
    path = os.pathsep.join(filter(None, (str(project_folder()), os.environ.get("PYTHONPATH"))))
    # Safe path: a folder `training` where the user works must not hide ours.
    return os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "PYTHONSAFEPATH": "1",
                         "PAGE": "cascadeexit serve"}


def _recipe_variables(words: list[str]) -> dict[str, str]:
    """Convert the options of `cascadeexit train` to variables of training/run.sh, such as {"MODEL": "./my-llama"}."""
    parser = _parser("cascadeexit train", _TRAIN)
    parser.add_argument("--model", help=f"bundled name, Hub id or local folder (default: {hub.DEFAULT_MODEL})")
    parser.add_argument("--out", help="folder for data, checkpoints and exits (default: runs/MODEL)")
    parser.add_argument("--exits", help="layers, or shares of the depth (default: 0,0.3,0.57,0.8)")
    parser.add_argument("--tokens", type=int, help="tokens of training text that the model writes (default: 2000000)")
    parser.add_argument("--prompts", nargs="+", help='JSONL files with rows {"prompt": ...}: user turns that the model '
                        "answers")
    parser.add_argument("--texts", nargs="+", help="text files: passages that the model continues, and plain training "
                        "text")
    parser.add_argument("--processes", type=int, help="number of training processes or GPUs (default: 1)")
    parser.add_argument("--smoke", action="store_true", default=None, help="train exits of a tiny random model, in "
                        "about a minute; the default of --out is then runs/smoke")
    for step in ("distill", "drafter", "confidence"):
        parser.add_argument(f"--{step}", metavar="OPTIONS", help=f"more options for the step {step}, in one argument: "
                            f"--{step}='--epochs 1'")
    given = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    if "smoke" in given and "out" in given:
        given["smoke_out"] = given.pop("out")
    return {name.upper(): " ".join(value) if isinstance(value, list) else str(value) for name, value in given.items()}
