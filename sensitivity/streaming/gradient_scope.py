"""Which parameters of a model take gradients, for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from runtime.units import EMBEDDING_SCALE


@contextmanager
def only_gradients_of(
    model: nn.Module, parameters: Iterable[nn.Parameter], *, sparse: bool | None = None
) -> Iterator[None]:
    """Lets these parameters and no others take gradients, complete ones, and restores the model's state at the end.

    An embedding withholds the gradient of its padding token, but reads that row like any other: here it does not.

    Args:
        model: The model.
        parameters: Parameters of the model.
        sparse: Whether embeddings give sparse gradients; None leaves that to each of them.
    """
    took_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    embeddings = {
        module: (module.padding_idx, module.sparse)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and (type(module).forward is nn.Embedding.forward or hasattr(module, EMBEDDING_SCALE))
    }
    chosen = set(parameters)
    try:
        for parameter in took_gradient:
            parameter.requires_grad_(parameter in chosen)
        for module in embeddings:
            module.padding_idx = None
            module.sparse = module.sparse if sparse is None else sparse
        yield
    finally:
        for parameter, took in took_gradient.items():
            parameter.requires_grad_(took)
        for module, (padding_idx, was_sparse) in embeddings.items():
            module.padding_idx, module.sparse = padding_idx, was_sparse
