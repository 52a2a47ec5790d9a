"""Flat state dictionaries: of training after an epoch, and of an optimizer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

TrainingState = dict[str, Tensor]


class WeightAverages:
    """Exponential moving average of parameters, from the first update on:
    average = decay average + (1 - decay) parameter. With a decay of None it does nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.parameters, self.decay = parameters, decay
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of one more step into the average."""
        if self.decay is None:
            return
        if not self.values:
            self.values = [p.detach().clone() for p in self.parameters]
            return
        torch._foreach_lerp_(self.values, list(self.parameters), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages."""
        for parameter, value in zip(self.parameters, self.values, strict=self.decay is not None):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def pack_state(
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: WeightAverages,
    device: torch.device | str,
) -> TrainingState:
    """All that later epochs depend on, flat, on the CPU: the number of epochs done, the model, the
    optimizer, the averages and the state of the generator that layers draw from.
    """
    cuda = torch.device(device).type == "cuda"
    generator = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    state = {"epoch": torch.tensor(epoch), "generator": generator}
    state |= {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{index}/{k}": v for k, v in values.items() if v is not None}
    state |= {f"average/{index}": value for index, value in enumerate(averages.values)}
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def load_state(
    state: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: WeightAverages,
    device: torch.device | str,
) -> int:
    """Put a state of `pack_state` back; returns the number of epochs done."""
    model.load_state_dict(_below(state, "model/"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(state, "optimizer/").items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = value.clone()  # it is kept
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    kept = _below(state, "average/")
    averages.values = [kept[str(index)].to(device, copy=True) for index in range(len(kept))]
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["generator"], device)
    else:
        torch.set_rng_state(state["generator"])
    return int(state["epoch"])


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, prefix: str
) -> TrainingState:
    """What an optimizer keeps of one parameter, by names that start with a prefix."""
    values = optimizer.state[parameter].items()
    return {f"{prefix}{name}": torch.as_tensor(v) for name, v in values if v is not None}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    state: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Put what `optimizer_state` returned back, on the parameter's device."""
    # The step counter stays on the CPU, where torch's optimisers keep it.
    optimizer.state[parameter] = {
        name: value.clone() if name == "step" else value.to(parameter.device, copy=True)
        for name, value in _below(state, prefix).items()
    }


def _below(state: Mapping[str, Tensor], prefix: str) -> TrainingState:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
