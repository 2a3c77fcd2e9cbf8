"""AdamW with the arguments and the state layout of Apex's and Transformer Engine's FusedAdam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW; `step` lives in the group, `exp_avg` and `exp_avg_sq` with each parameter."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        capturable: bool = False,
        **unsupported: object,
    ) -> None:
        if unsupported.get("master_weights"):
            raise ValueError("master weights inside the optimizer need Transformer Engine")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def initialize_state(self, parameter: torch.Tensor) -> None:
        """Make zero moments for one parameter."""
        for name, dtype in self.dtypes.items():
            self.state[parameter][name] = torch.zeros_like(parameter.data, dtype=dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for parameter in params:
                if not self.state[parameter]:
                    self.initialize_state(parameter)
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        step, lr, decay = group["step"], group["lr"], group["weight_decay"]
        first = [self.state[p]["exp_avg"].float() for p in params]
        second = [self.state[p]["exp_avg_sq"].float() for p in params]
        grads: Any = [p.grad.float() for p in params if p.grad is not None]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominators = torch._foreach_sqrt(torch._foreach_div(second, correction2))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, first, denominators, -lr / correction1)
        if any(dtype is not torch.float32 for dtype in self.dtypes.values()):
            for parameter, m, v in zip(params, first, second, strict=True):
                self.state[parameter]["exp_avg"].copy_(m)
                self.state[parameter]["exp_avg_sq"].copy_(v)
