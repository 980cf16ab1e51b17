"""How the inputs of linear layers are called in plans: by the layer, with ``.input`` behind its name."""

ACTIVATION = "input"


def activation_name(unit_name: str) -> str:
    """Returns the name of the activation unit of a unit of weights, or of a linear layer's input."""
    return f"{unit_name}.{ACTIVATION}"


def module_of(name: str) -> str:
    """Returns the linear layer whose input has this name."""
    return name.removesuffix(f".{ACTIVATION}")


def is_activation(name: str) -> bool:
    """Returns whether a name of a plan's part is that of an activation unit."""
    return name.rpartition(".")[2] == ACTIVATION
