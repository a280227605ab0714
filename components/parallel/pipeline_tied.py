"""Parameters that two stages hold, such as an embedding that is the head as well.

Each stage has its own tensor, and both are kept equal rather than one of them sent around: their gradients are added
up before the norm is taken and the step is made, so that equal values and equal optimizer states get equal updates. The
price is the second stage's optimizer state; the gain is that between steps nothing has to wait for the other stage.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.mesh.collectives import Axis
from components.parallel.pipeline import Stage, Tie


class TiedParameters:
    """This rank's part in keeping tied parameters equal."""

    def __init__(self, stages: Sequence[Stage], axis: Axis, device: torch.device) -> None:
        self._axis, self._device = axis, device
        self._ranks = stages[0].ranks
        held = {stage.index: stage.module for stage in stages}
        self._held: list[tuple[Tie, list[nn.Parameter | None]]] = [
            (tie, [held[index].get_parameter(tie.name) if index in held else None for index in tie.stages])
            for tie in stages[0].ties
        ]

    @property
    def held(self) -> list[nn.Parameter]:
        """All of them that this rank has."""
        return [parameter for _, pair in self._held for parameter in pair if parameter is not None]

    @property
    def copies(self) -> set[nn.Parameter]:
        """Those that a norm over all stages leaves out, so that each parameter of the model counts once."""
        return {last for _, (_, last) in self._held if last is not None}

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Those of which this rank has both: the first stage's, and the last stage's."""
        return [(first, last) for _, (first, last) in self._held if first is not None and last is not None]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Let both stages have the sum of both gradients. All pipeline ranks call it; it waits for those concerned."""
        for tie, held in self._held:
            first, last = held
            if first is not None and last is not None:
                total = _gradient(first).add_(_gradient(last))
                _gradient(last).copy_(total)
            elif mine := [parameter for parameter in held if parameter is not None]:
                peer = self._ranks[tie.stages[0 if first is None else 1]]
                gradient = _gradient(mine[0])
                gradient.add_(self._exchange(gradient, peer).to(gradient.device))

    def _exchange(self, mine: Tensor, peer: int) -> Tensor:
        """What the peer has; it gets what is here. On the device that the group communicates from."""
        mine = mine.to(self._device).contiguous()
        theirs = torch.empty_like(mine)
        group = self._axis.group
        both = [
            dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(both) if mine.numel() else []:
            work.wait()
        return theirs


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The local gradient, zeros where backward did not reach the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
