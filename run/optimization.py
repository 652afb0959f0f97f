"""Optimizers with one schedule and one limit for the gradient, dropout masks, and moving averages of weights."""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from run.files import InputError

WARMUP = 0.03       # share of the steps in which the learning rate rises
SLOWER = "start anew with lower learning rates (--lr and others, see --help)"
MAX_NLL = 50.0      # nats per token or row, above which training has diverged; equal probabilities give log V, about 10


def lr_factor(step: int, steps: int) -> float:
    """Factor of the peak learning rate: it rises linearly during the warm-up and falls as a cosine to 1 %."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min((step + 1) / max(1.0, WARMUP * steps), cosine)


def clip_gradients(weights: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients by one factor to a total norm of at most `max_norm`; returns the norm before that, a scalar.

    `nn.utils.clip_grad_norm_` refuses sparse gradients. The norm of a coalesced one is the norm of its values.
    """
    gradients = []
    for weight in weights:
        if weight.grad is None:
            continue
        if weight.grad.is_sparse:
            weight.grad = weight.grad.coalesce()
            gradients.append(weight.grad.values())
        else:
            gradients.append(weight.grad)
    norm = nn.utils.get_total_norm(gradients)
    scale = (max_norm / norm.clamp(min=1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


def check_loss(loss: Tensor | float, norm: Tensor | float, items: int, first: int, last: int) -> None:
    """Raises InputError if training has diverged in the steps `first` to `last`.

    That means: the loss or the gradient norm is not finite, or the mean loss is above MAX_NLL. loss: summed over
    `items` tokens or rows; norm: summed over the steps. Reading them makes the program wait for a GPU.
    """
    nll = float(loss) / max(1, items)
    norm = float(norm)
    if math.isfinite(norm) and nll <= MAX_NLL:
        return
    steps = f"step {first}" if first == last else f"one of the steps {first} to {last}"
    raise InputError(f"the loss diverged at {steps}: it is {nll:.4g}, and the gradient norm {norm:.4g}; {SLOWER}")


class Optimizers:
    """AdamW for weights with dense gradients and SparseAdam for weights with sparse ones, with one schedule.

    dense, sparse: lists of `group(..)`. SparseAdam updates only the rows of a table that a step used.
    """

    def __init__(self, dense: list[dict], sparse: list[dict], betas: tuple[float, float]):
        self.optimizers = [torch.optim.AdamW(dense, betas=betas, fused=True)]
        if sparse:
            self.optimizers.append(torch.optim.SparseAdam(sparse, betas=betas))     # has no weight decay

    @property
    def groups(self) -> list[dict]:
        """The groups of all optimizers. They are not stored here, because load_state_dict replaces them."""
        groups = []
        for optimizer in self.optimizers:
            groups += optimizer.param_groups
        return groups

    def freeze(self, done: float) -> None:
        """Sets .grad to None in all groups that do not learn yet; done: the share of the steps that are done."""
        for group in self.groups:
            if done < group["start"]:
                for weight in group["params"]:
                    weight.grad = None

    def step(self, factor: float) -> None:
        """Updates the weights with this factor of the peak learning rates, and removes the gradients."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, state: list[dict]) -> None:
        for optimizer, saved in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(saved)


def group(weights: list[nn.Parameter], peak_lr: float, weight_decay: float = 0.0, start: float = 0.0) -> dict:
    """Weights with the same learning rate; start: share of the steps before they begin to learn."""
    return {"params": weights, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": weight_decay, "start": start}


def dropout_mask(p: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A mask that is 0 with probability p and 1 / (1 - p) otherwise, so that the expected value stays the same.

    It is made on the device of the generator.
    """
    return torch.empty(shape, device=generator.device).bernoulli_(1 - p, generator=generator).div_(1 - p)


@torch.no_grad()
def update_average(average: nn.Module, modules: nn.Module, count: int, decay: float) -> None:
    """Moving average: sets each weight a of `average` to d a + (1 - d) w, where w is the same weight of `modules`.

    d is `decay`, but at most count / (count + 9) after `count` updates. So the first update copies w.
    """
    d = min(decay, count / (count + 9))
    for a, new in zip(average.parameters(), modules.parameters(), strict=True):
        a.lerp_(new, 1 - d)
