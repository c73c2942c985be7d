"""The training loop: steps, micro-batches, several processes, checkpoints, log, progress bar and time limit.

It trains any `Learner`: the adapters of the exits, or a drafter.
"""

import math
import time
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from training.batches import micro_batches
from training.checkpoint import RunFolder
from training.features import FeatureStore

CHECK_DOCUMENTS = 60        # a learner's `check` reads at most so many documents
_TIMED_STEPS = 5            # steps from which the time of a step is known


class Learner(Protocol):
    """Interface between `train` and what it trains, such as the adapters of the exits or a drafter."""

    name: str
    """Name of the module in the checkpoint."""
    module: nn.Module
    """Module whose state the checkpoint holds."""
    weights: list[Tensor]
    """Parameters that are trained."""

    def gradients(self, step: int, parts: list[list[int]], rows: int) -> Tensor:
        """Compute the gradients of one training step, and add them to the `grad` of the weights.

        The loss is summed over this process's rows and divided by `rows`. A row is a position that
        `Features.wanted` selects.

        Args:
            step: index of this step. This index and the index of the process decide all random choices.
            parts: the micro-batches of this process, each a list of document numbers.
            rows: number of rows of the step, over all processes.

        Returns sums over this process's rows, such as the loss. Their shape is the same in every step.
        """

    def record(self, means: Tensor) -> dict:
        """Convert the results of a step to a log record, {name: value}.

        Args:
            means: what `gradients` returned, summed over all processes and divided by the number of rows of the step.
        """

    def progress(self, record: dict) -> str:
        """Format a log record as a short text for the progress bar."""

    def check(self) -> list[float]:
        """Measure the agreement with the full model on held-out documents.

        Returns shares in [0, 1], one for each part that is measured: each trained exit, or each number of drafts in a
        row for a drafter. All processes must call this.
        """


def train(learner: Learner, store: FeatureStore, plan: list[list[int]], run: RunFolder, accelerator: Accelerator, *,
          learning_rate: float, micro_batch: int, save_every: int, minutes: float = math.inf,
          fit_minutes: float = math.inf) -> int:
    """Train the weights of a learner in place.

    A run that has a checkpoint continues from it. The result equals the result of a run without an interruption.

    Args:
        plan: document numbers of each step, for all processes together.
        run: folder with the log and the checkpoint.
        learning_rate: highest learning rate; see `optimizer_for`.
        micro_batch: number of tokens in one backward pass, at most.
        save_every: number of steps between two checkpoints.
        minutes: time limit. When it is over, the run saves a checkpoint and stops.
        fit_minutes: time for the whole training. The first steps are timed, and the plan is cut to as many steps as
            the time allows. The learning rate falls to 0 over these steps. A continued run keeps this number of steps.

    Returns the total number of steps done, including those before an interruption.
    """
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    lengths = {i: len(d.ids) for i, d in enumerate(store.documents)}
    optimizer, schedule = optimizer_for(learner.weights, learning_rate, len(plan))
    saved = {learner.name: learner.module, "optimizer": optimizer, "schedule": schedule}
    first = run.restore(saved)
    if world > 1:
        broadcast([weight.data for weight in learner.weights])      # first weights on several GPUs may differ slightly
    mine = [documents[rank::world] for documents in plan]
    rate, started, tokens = schedule.lr_lambdas[0], time.perf_counter(), 0
    bar = tqdm(range(first, len(plan)), initial=first, total=rate.steps, unit="step", desc=learner.name,
               disable=not main)
    for step in bar:
        if step == _TIMED_STEPS and not first:
            rate.steps = _steps_that_fit(time.perf_counter() - started, fit_minutes, len(plan), accelerator)
            bar.total = rate.steps
        if step == rate.steps:
            break
        if _is_late(started, minutes, accelerator):
            bar.write(f"stopped by --minutes at step {step} of {len(plan)}; the same command continues")
            run.save(step, saved)
            return step
        rows = sum(store.rows(i) for i in plan[step])
        store.expect(mine[step + 1] if step + 1 < len(plan) else [])
        sums = learner.gradients(step, micro_batches(mine[step], lengths, micro_batch), rows)
        if world > 1:
            sums = accelerator.reduce(sums)
        update(learner.weights, optimizer, schedule, accelerator)
        record = learner.record(sums / rows)
        run.log(step=step + 1, rows=rows, **record, lr=schedule.get_last_lr()[0])
        tokens += rows
        speed = tokens / (time.perf_counter() - started)
        bar.set_postfix_str(f"{learner.progress(record)}, {speed:.0f} tokens/s")
        if (step + 1) % save_every == 0 or step + 1 == rate.steps:
            run.save(step + 1, saved)
            rates = learner.check()
            run.log(step=step + 1, held_out_agreement=rates)
            if main:
                bar.write(f"step {step + 1}: held-out agreement " + " / ".join(f"{share:.1%}" for share in rates))
    return rate.steps


def _steps_that_fit(seconds: float, fit_minutes: float, planned: int, accelerator: Accelerator) -> int:
    """Return how many steps to train: as many as the time allows, at most the planned ones.

    The clock of the main process decides, so that all processes train the same number of steps.

    Args:
        seconds: time that the first `_TIMED_STEPS` steps took.
        fit_minutes: time for the whole training; `math.inf` = all planned steps.
    """
    if math.isinf(fit_minutes):
        return planned
    fit = _TIMED_STEPS * fit_minutes * 60 / seconds if accelerator.is_main_process else 0.0
    fit = accelerator.reduce(torch.tensor(fit, device=accelerator.device)).item()
    return min(planned, max(int(fit), _TIMED_STEPS + 1))


def _is_late(started: float, minutes: float, accelerator: Accelerator) -> bool:
    """Return True if the time is over. The main process's clock decides, so all processes stop at the same step."""
    if math.isinf(minutes):
        return False
    late = accelerator.is_main_process and time.perf_counter() - started > minutes * 60
    return bool(accelerator.reduce(torch.tensor(float(late), device=accelerator.device)).item())


def optimizer_for(weights: list[Tensor], rate: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Make an AdamW optimizer and the schedule of its learning rate.

    The learning rate rises linearly over the first twentieth of the steps. Then it falls to 0 along a cosine.

    Args:
        weights: the tensors to train.
        rate: highest learning rate.
        steps: number of steps of the whole training.
    """
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    return optimizer, LambdaLR(optimizer, WarmUpAndCosine(steps))


class WarmUpAndCosine:
    """Computes the learning rate of each step, as a share of the highest one.

    This is a class and not a function, so that checkpoints store its `steps`.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, step: int) -> float:
        warm_up = max(1, self.steps // 20)
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1, step / self.steps))))


def update(weights: list[Tensor], optimizer: torch.optim.Optimizer, schedule: LambdaLR,
           accelerator: Accelerator) -> None:
    """Make one optimizer step, with the gradients summed over all processes and clipped to norm 1.

    Then reset the gradients and move the learning-rate schedule one step on.
    """
    if accelerator.num_processes > 1:
        for weight in weights:
            weight.grad = accelerator.reduce(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
