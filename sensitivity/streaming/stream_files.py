"""The files of a layer-wise pass: hidden states, boundary gradients and results, each whole or not at all.

``hidden_k`` [S, T, d] is the input of layer k (k = L: the output of the last), ``gradient_k`` the gradient with respect
to it, ``result_k`` what was made of the gradients of layer k's weights. A file is there when it is complete, so what
is left to do follows from the files that are there. One process at a time works in a directory.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.files import atomic_path

HIDDEN, GRADIENT, RESULT = "hidden", "gradient", "result"


class StreamFiles:
    """The files in a directory, which is made when the first one is written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def has(self, kind: str, index: int) -> bool:
        """Tells whether a file is there and complete."""
        try:
            with safe_open(self._path(kind, index), framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def read(self, kind: str, index: int) -> dict[str, Tensor]:
        """Returns the tensors of a file."""
        return load_file(self._path(kind, index))

    def read_states(self, kind: str, index: int) -> Tensor:
        """Returns the one tensor [S, T, d] of a file."""
        return self.read(kind, index)[kind]

    def write(self, kind: str, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a file."""
        with atomic_path(self._path(kind, index)) as temporary:
            save_file(dict(tensors), temporary)

    def write_states(self, kind: str, index: int, states: Tensor) -> None:
        """Writes a file of one tensor [S, T, d]."""
        self.write(kind, index, {kind: states})

    def keep_only(self, needed: Collection[tuple[str, int]]) -> None:
        """Deletes hidden states and gradients that are not needed any more, and what an interrupt left half written."""
        kept = {self._path(kind, index) for kind, index in needed}
        for kind in (HIDDEN, GRADIENT):
            for path in self._directory.glob(f"{kind}_*.safetensors"):
                if path not in kept:
                    path.unlink()
        for path in self._directory.glob(".*.safetensors.*.tmp"):
            path.unlink()

    def _path(self, kind: str, index: int) -> Path:
        return self._directory / f"{kind}_{index:05d}.safetensors"


@dataclass(frozen=True)
class Step:
    """One step of a pass.

    Args:
        kind: ``forward`` makes the hidden states of an index, ``head`` the gradient of the last layer's output,
            ``backward`` the result and the input's gradient of a layer, ``outside`` the result outside of the layers.
        index: Index of the layer or hidden states; L for ``head`` and ``outside``.
    """

    kind: str
    index: int

    def inputs(self, layer_count: int) -> set[tuple[str, int]]:
        """Returns the files that the step reads."""
        if self.kind == "forward":
            return {(HIDDEN, self.index - 1)} if self.index else set()
        if self.kind == "head":
            return {(HIDDEN, layer_count)}
        if self.kind == "backward":
            return {(HIDDEN, self.index), (GRADIENT, self.index + 1)}
        return {(HIDDEN, layer_count), (GRADIENT, 0)}

    def resident_layer(self) -> int | None:
        """Returns the layer whose weights the step reads, or None for those outside of the layers."""
        if self.kind == "forward":
            return self.index - 1 if self.index else None
        return self.index if self.kind == "backward" else None


@dataclass(frozen=True, kw_only=True)
class StreamSteps:
    """The steps of a pass.

    Args:
        layer_count: Number of layers, L.
        blocks: Indices of the layers whose weights are streamed; L stands for the weights outside of the layers.
    """

    layer_count: int
    blocks: frozenset[int]

    @property
    def lowest(self) -> int:
        """The last layer that the backward pass reaches."""
        return 0 if self.layer_count in self.blocks else min(self.blocks)

    def list_steps(self) -> list[Step]:
        """Returns all steps of a pass from the start."""
        L = self.layer_count
        backward = [Step("backward", k) for k in range(L - 1, self.lowest - 1, -1)]
        outside = [Step("outside", L)] if L in self.blocks else []
        return [*(Step("forward", k) for k in range(L + 1)), Step("head", L), *backward, *outside]

    def list_pending(self, files: StreamFiles) -> list[Step]:
        """Returns the steps that are left to do, given the files that are there."""
        L = self.layer_count
        missing = {k for k in self.blocks if not files.has(RESULT, k)}
        if not missing:
            return []
        # The backward pass goes on at the lowest boundary whose gradient is there and above which all is done.
        boundary = next((k for k in range(L + 1) if files.has(GRADIENT, k) and not missing & set(range(k, L))), L + 1)
        steps = [
            step
            for step in self.list_steps()
            if (step.kind == "head" and boundary > L)
            or (step.kind == "backward" and step.index < boundary)
            or (step.kind == "outside" and L in missing)
        ]
        needed = {index for step in steps for kind, index in step.inputs(L) if kind == HIDDEN}
        lost = [index for index in needed if not files.has(HIDDEN, index)]
        forward = [Step("forward", k) for k in range(max(lost, default=-1) + 1) if not files.has(HIDDEN, k)]
        return [*forward, *steps]
