"""A dense tiny model wholly in float64, to take differences of."""

import copy

from torch import nn
from transformers import PreTrainedModel


def make_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy in float64, norms included: those of transformers compute in float32 in any dtype."""
    exact = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            norm.weight = module.weight
            exact.set_submodule(name, norm)
    return copy.deepcopy(exact).double().requires_grad_(False)
