"""Step in backward: each parameter moves as soon as its gradient is complete, and the gradient is freed at once.

So there is never more than one whole gradient (under FSDP: one unit's), instead of one as large as the model. The
price: nothing can look at all gradients first. They cannot be clipped, and a step that is not finite has moved weights
by the time it is known. Under accumulation only the last microbatch's backward steps; gradients then wait for it, and
are freed one by one. One optimizer per parameter, as TorchTitan has it, was rejected: state would no longer be found by
name in one place.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from components.optim.clip import Squares
from components.optim.optimizers import Optimizers


class EarlyStep:
    """Steps the parameters of an optimizer in backward, and keeps what their gradients' norm needs.

    FSDP2 calls these hooks for its shards too, once it has reduced them.
    """

    def __init__(self, optimizers: Optimizers, late: Collection[nn.Parameter] = ()) -> None:
        """`late` are left to `finish`: parameters whose gradients are not complete when this rank's backward ends."""
        self._optimizers, self._squares, self._armed = optimizers, Squares(), False
        self._late = set(late)
        self._stepped: set[nn.Parameter] = set()
        for parameter in optimizers.parameters:
            if parameter not in self._late:
                parameter.register_post_accumulate_grad_hook(self._gradient_is_there)

    def arm(self, last: bool) -> None:
        """Before each microbatch's backward: `last` of the step, so that gradients are complete after it?"""
        self._armed = last

    def finish(
        self,
        group: ProcessGroup | None = None,
        uncounted: Collection[nn.Parameter] = (),
        device: torch.device | None = None,
    ) -> Tensor:
        """After the last backward: step what it did not reach, such as experts without tokens, and give the norm.

        As `gradient_norm`; collective. `uncounted` are second copies of a parameter, which the norm leaves out.
        """
        for parameter in self._optimizers.parameters:
            if parameter.grad is not None:
                self._step(parameter, counted=parameter not in uncounted)
        norm = self._squares.norm(group, device)
        self._armed, self._squares, self._stepped = False, Squares(), set()
        return norm

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if self._armed and isinstance(parameter, nn.Parameter):
            self._step(parameter)

    @torch.no_grad()
    def _step(self, parameter: nn.Parameter, counted: bool = True) -> None:
        if parameter in self._stepped:
            raise RuntimeError("a parameter's gradient came in two parts: it cannot be stepped in backward")
        if parameter.grad is not None:
            if counted:
                self._squares.add([parameter.grad])
            self._optimizers.step_one(parameter)
            parameter.grad = None
            self._stepped.add(parameter)
