"""llama.cpp's importance matrix from our input statistics, as ``llama-imatrix`` writes it and ``llama-quantize`` reads.

For every tensor NAME two float32 tensors: ``NAME.in_sum2`` [in_features, experts], the sums of x_j^2 over the inputs x,
and ``NAME.counts`` [1, experts], the numbers of these inputs. Rows of a tensor may be in another order there; columns,
which the sums belong to, are in ours. Experts that no input reached have sums and counts of zero, which llama-quantize
counts as columns alike. What has no statistics of its own (an embedding that is no head) is left out.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from runtime.exporters.gguf_metadata import find_architecture
from runtime.exporters.llama_cpp import find_name_map, list_parts
from runtime.loading import ReferenceModel
from runtime.quantizers import InputStatistics
from runtime.units import list_weights

IMATRIX_FILE = "imatrix.gguf"


def write_importance_matrix(
    reference: ReferenceModel,
    statistics: Mapping[str, InputStatistics],
    path: Path,
    *,
    source: str,
    tokens_shape: tuple[int, int],
) -> None:
    """Writes the importance matrix of a model.

    Args:
        reference: The model.
        statistics: Weight name -> statistics of its inputs.
        path: The file.
        source: Name of the text that they were collected on.
        tokens_shape: Number of its sequences, tokens of each.

    Raises:
        ValueError: If the architecture is none that llama.cpp has names for here.
    """
    names = find_name_map(reference.model.config)
    by_tensor: dict[str, list[InputStatistics | None]] = {}
    for name, weight in list_weights(reference.model).items():
        for tensor, _ in list_parts(weight, names):
            by_tensor.setdefault(tensor, []).append(_own_statistics(statistics.get(name)))
    writer = GGUFWriter(str(path), find_architecture(reference.model.config))
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", tokens_shape[0])
    writer.add_uint32("imatrix.chunk_size", tokens_shape[1])
    for tensor, known in sorted(by_tensor.items()):
        width = next((s.in_features for s in known if s is not None), None)
        if width is None:
            continue
        sums = [np.zeros(width) if s is None else s.second_moment.diagonal().numpy() for s in known]
        counts = [[0.0 if s is None else s.count] for s in known]
        writer.add_tensor(f"{tensor}.in_sum2", np.array(sums, dtype=np.float32))
        writer.add_tensor(f"{tensor}.counts", np.array(counts, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _own_statistics(statistics: InputStatistics | None) -> InputStatistics | None:
    """Returns the statistics of a weight's inputs; None where they only say that nothing is known."""
    return None if statistics is None or statistics.say_nothing else statistics
