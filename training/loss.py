"""The loss of an exit: its distance to the full model, plus a cross-entropy.

Loss in nats: (1 - hard) * distance + hard * cross-entropy with the label; `hard` is a weight in [0, 1]. The
distance is T^2 KL(full || exit) at temperature T (Hinton et al. 2015), total variation, or a mix of both. Losses are
summed over words and over rows; callers divide by the number of rows.

Letters: N rows (positions that `Features.wanted` selects), D hidden size, K words (entries of the vocabulary), E exits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from training.vocabulary import SampledHead

_BLOCK = 512            # rows whose logits exist at the same time


class _ExitLoss(torch.autograd.Function):
    """The loss of an exit, with a gradient in closed form. `exit_loss` describes the arguments.

    This is faster than autograd, which would read or write (N, K) tensors about five times as often.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor, labels: Tensor, hard: float, temperature: float, loss: str):
        log_q = F.log_softmax(logits / temperature, -1)
        kl = torch.xlogy(p, p).sum(-1) - torch.linalg.vecdot(p, log_q)
        q, known = log_q.exp(), (labels >= 0).nonzero()[:, 0]
        distance, gradient = temperature ** 2 * kl, temperature * (q - p)
        if loss != "kl":
            sign = (q - p).sign_()
            tv, tv_gradient = 0.5 * torch.linalg.vecdot(sign, q - p), sign.sub_(torch.linalg.vecdot(sign, q)[:, None])
            tv_gradient.mul_(q).mul_(0.5 / temperature)
            share = torch.exp(-3 * (1 - tv)) if loss == "hybrid" else torch.zeros_like(tv)
            distance = share * distance + (1 - share) * tv
            gradient = share[:, None] * gradient + (1 - share)[:, None] * tv_gradient
        gradient *= 1 - hard
        ce = logits.new_zeros(())
        if hard:
            log_q = log_q if temperature == 1 else F.log_softmax(logits, -1)
            ce = -log_q[known, labels[known]].sum()
            gradient[known] += hard * (q if temperature == 1 else log_q.exp())[known]
            gradient[known, labels[known]] -= hard
        ctx.save_for_backward(gradient)
        kl = kl.sum()
        ctx.mark_non_differentiable(kl, ce)
        return (1 - hard) * distance.sum() + hard * ce, kl, ce

    @staticmethod
    def backward(ctx, weight: Tensor, *_):
        return weight * ctx.saved_tensors[0], None, None, None, None, None


def exit_loss(logits: Tensor, full_probs: Tensor, labels: Tensor, *, hard: float, temperature: float = 1.0,
              loss: str = "kl") -> tuple[Tensor, Tensor, Tensor]:
    """Compute (loss, KL from the full model, cross-entropy), each summed over rows. Only the loss has a gradient.

    Args:
        logits: the exit's logits for K words (entries of the vocabulary) at N positions (N, K).
        full_probs: the full model's softmax over the same words, at `temperature` (N, K).
        labels: index of the correct word among the K words (N,). It is -1 if the correct word is none of
            the K words; the cross-entropy of this row is then 0.
        hard: weight of the cross-entropy. The distance has the weight 1 - hard.
        temperature: T of the KL divergence.
        loss: name of the distance. "kl" is T^2 KL. "tv" is total variation, which equals 1 - the acceptance rate of a
            draft (Leviathan et al. 2023). "hybrid" is a mix: T^2 KL has the weight exp(-3 * acceptance rate), and total
            variation has the rest.
    """
    return _ExitLoss.apply(logits, full_probs, labels, hard, temperature, loss)


def backward(hiddens: list[Tensor], top: Tensor, labels: Tensor, choices: Tensor, head: SampledHead, seed: int,
             rows: int, *, hard: float, temperature: float, loss: str) -> Tensor:
    """Compute the gradients of the loss for all exits, and add them to the `grad` of the adapters' weights.

    The loss is summed over these N rows and divided by `rows`. Logits are computed for a few hundred rows at a time, to
    save memory.

    Args:
        hiddens: adapted hidden states, one tensor (N, D) for each exit.
        top: the full model's hidden states after the final norm (N, D).
        labels: correct words for the cross-entropy, as token ids (N,).
        choices: the full model's choices, as token ids (N,). They are only used to count agreement.
        head: the vocabulary head that the loss uses.
        seed: decides which words `head.sample` adds.
        rows: number of rows of the whole training step, over all micro-batches and processes.
        hard: weight of the cross-entropy; see `exit_loss`.
        loss: name of the distance; see `exit_loss`.

    Returns a tensor (E, 3) with three sums over these N rows for each exit: KL, cross-entropy, and the number of rows
    where the exit's choice equals the full model's.
    """
    weight, added = head.sample(seed)
    sums = torch.zeros(len(hiddens), 3, device=top.device)
    gradients = [torch.empty_like(h) for h in hiddens]
    for a in range(0, len(top), _BLOCK):
        part = slice(a, a + _BLOCK)
        with torch.no_grad():
            full_logits = F.linear(top[part].to(weight.dtype), weight).float() + added
            full_probs = (full_logits / temperature).softmax(-1)
        for s, hidden in enumerate(hiddens):
            x = hidden[part].detach().requires_grad_()
            logits = F.linear(x.to(weight.dtype), weight).float() + added
            total, kl, ce = exit_loss(logits, full_probs, head.local[labels[part]], hard=hard, temperature=temperature,
                                      loss=loss)
            (total / rows).backward()
            gradients[s][part] = x.grad
            agreed = logits[:, :len(head.own)].argmax(-1) == head.local[choices[part]]
            sums[s] += torch.stack([kl, ce, agreed.sum()])
    for hidden, gradient in zip(hiddens, gradients):
        if hidden.requires_grad:
            hidden.backward(gradient)
    return sums
