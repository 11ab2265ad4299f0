"""AdamW on float32 master weights, learning-rate schedules, clipping.

With bf16 compute the model's parameters are bf16 working copies; masters, gradients and moments stay float32. Each
parameter's bf16 gradient is added to its float32 gradient the moment autograd has it, and freed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.parts import is_sharded, local


class MasterWeights:
    """Float32 masters of a model's trainable parameters, and their float32 gradients.

    For a float32 model (or `pure=True`) the masters are the parameters themselves. So they are for a sharded model,
    whose parameters are float32 shards that FSDP2 gathers in the compute dtype.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype, pure: bool = False) -> None:
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._working = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model = model
        self.sharded = any(is_sharded(parameter) for parameter in self._working)
        self.same = pure or compute_dtype == torch.float32 or self.sharded
        if self.same:
            self.masters = self._working
            return
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self._working]
        self._fresh = [True] * len(self.masters)
        for index, (working, master) in enumerate(zip(self._working, self.masters, strict=True)):
            working.data = working.data.to(compute_dtype)
            master.grad = torch.empty_like(master)  # the first backward of every step overwrites it
            working.register_post_accumulate_grad_hook(lambda parameter, index=index: self._take(parameter, index))

    def _take(self, working: Tensor, index: int) -> None:
        grad = self.masters[index].grad
        if self._fresh[index]:
            grad.copy_(working.grad)
            self._fresh[index] = False
        else:
            grad.add_(working.grad)
        working.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients; float32 buffers of a bf16 run stay allocated and are overwritten."""
        if self.same:
            for parameter in self.masters:
                parameter.grad = None
        else:
            self._fresh = [True] * len(self.masters)

    def finish_backward(self) -> None:
        """After a step's last backward: a parameter that got no gradient gets zeros (every rank has every gradient)."""
        for index, parameter in enumerate(self.masters):
            if self.same and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not self.same and self._fresh[index]:
                parameter.grad.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the masters into the working copies; once a step. Of a sharded model, what is gathered is dropped."""
        if self.sharded:
            self._model.reshard()
        if not self.same:
            for working, master in zip(self._working, self.masters, strict=True):
                working.copy_(master)

    def named(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, self.masters, strict=True))


class AdamW:
    """torch's fused AdamW (Loshchilov and Hutter 2019) on a list of parameters with one learning rate, `lr`.

    Calls the function behind `torch.optim.AdamW`: the class itself imports torch's compiler as soon as one is made,
    about a second of every start. `state` is laid out as the class has it.
    """

    def __init__(
        self, parameters: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.lr = lr
        self.state: dict[Tensor, dict[str, Tensor]] = {parameter: {} for parameter in parameters}
        self._options = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}

    @torch.no_grad()
    def step(self) -> None:
        """One update with every parameter's `.grad`; moments are made at the first. Of a sharded parameter each rank
        updates its own rows, of which it may have none."""
        for parameter, state in self.state.items():
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(local(parameter))
                state["exp_avg_sq"] = torch.zeros_like(local(parameter))
        held = [parameter for parameter in self.state if local(parameter).numel()]
        states = [self.state[parameter] for parameter in held]
        adamw(
            [local(parameter) for parameter in held],
            [local(parameter.grad) for parameter in held],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=self.lr,
            **self._options,
        )


@torch.no_grad()
def clip_by_global_norm(
    parameters: list[Tensor], max_norm: float, *, total: Callable[[float], float] = lambda squares: squares
) -> float:
    """Scale all gradients so that their joint 2-norm is at most `max_norm` (0: measure only); returns the old norm.

    total: sums the squares of this rank's rows over the ranks, for sharded parameters.
    """
    gradients = [local(parameter.grad) for parameter in parameters]
    squares = [torch.linalg.vector_norm(gradient, dtype=torch.float32).double() ** 2 for gradient in gradients]
    norm = math.sqrt(total(torch.stack(squares).sum().item()))
    # the small constant is the one of torch.nn.utils.clip_grad_norm_, so that numbers compare
    if max_norm > 0 and math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


def learning_rate_at(step: int, *, peak: float, schedule: str, total_steps: int, warmup_ratio: float) -> float:
    """Learning rate of update number `step` (0-based): warm-up from 0, then constant, linear to 0 or cosine to 0.

    The same values as transformers' schedules at the same warm-up steps (ceil(ratio * total)).
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
