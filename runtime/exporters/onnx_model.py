"""ONNX: a decoder as one graph for ONNX Runtime, which OpenVINO reads too, every weight in a format of its own.

The graph has the inputs and outputs that tools expect of a decoder: ``input_ids`` and ``attention_mask``, logits, and
the keys and values of each layer as they were and as they become. Attention is ``com.microsoft::GroupQueryAttention``,
which turns queries and keys by itself. The numbers of all weights, norms and rotations are in ``model.onnx.data``,
which is as long as the formats say; ``model.onnx`` is the graph.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.apply import FormatsByWeight
from runtime.checkpoint import distinct_tensors
from runtime.exporters.onnx_weights import MICROSOFT, GraphWriter, WeightReader
from runtime.files import write_text
from runtime.formats import find_format
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule, encode_weight
from runtime.units import list_weights, read_weight

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ARCHITECTURES = ("llama", "mistral", "qwen2")
_OPSET, _IR_VERSION = 17, 10


def export_onnx(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``model.onnx``, its data, configuration and tokenizer; arguments as of ``export``.

    Raises:
        ValueError: If the architecture is none that can be written here.
        ModuleNotFoundError: If the package onnx is not installed.
    """
    try:
        from onnx import helper
    except ModuleNotFoundError as error:
        msg = "exports to ONNX need the package onnx: it is not installed. Run pip install 'bitplan[onnx]'."
        raise ModuleNotFoundError(msg) from error
    check_architecture(reference)
    graph = GraphWriter(directory / DATA_FILE)
    inputs, outputs = _Decoder(reference, formats_by_weight, quantizer, graph).build()
    made = helper.make_model(
        helper.make_graph(graph.nodes, reference.name, inputs, outputs, graph.tensors),
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)],
        producer_name="bitplan",
        ir_version=_IR_VERSION,
    )
    (directory / GRAPH_FILE).write_bytes(made.SerializeToString())
    write_text(directory / "config.json", reference.model.config.to_json_string())
    reference.tokenizer.save_pretrained(directory)


def onnx_fixed_bytes(reference: ReferenceModel, *, routers: bool = False) -> int:
    """Returns the bytes of ``model.onnx.data`` that no choice of formats changes: norms, biases, rotations in float32.

    Args:
        reference: The model.
        routers: Says nothing here: models with experts are refused.

    Raises:
        ValueError: If the architecture is none that can be written here.
    """
    check_architecture(reference)
    weights = {weight.parameter for weight in list_weights(reference.model).values()}
    rest = sum(t.numel() for name, t in distinct_tensors(reference.model).items() if name not in weights)
    return 4 * (rest + sum(table.numel() for table in find_rotations(reference)))


def check_architecture(reference: ReferenceModel) -> None:
    """Raises ValueError unless a model's layers are those that are written here."""
    config = reference.model.config
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if config.model_type not in ARCHITECTURES or sliding:
        msg = (
            f"a model must be one of {', '.join(ARCHITECTURES)} without a sliding window to be written as ONNX: got "
            f"'{config.model_type}' with sliding_window={sliding}. Export it with optimum, quantize its nodes there."
        )
        raise ValueError(msg)


def find_rotations(reference: ReferenceModel) -> tuple[Tensor, Tensor]:
    """Returns the cosines and the sines [positions, head_dim / 2] float32 of a model's rotations."""
    rotary: Any = reference.model.get_submodule("model.rotary_emb")
    positions = torch.arange(reference.model.config.max_position_embeddings, dtype=torch.float32)
    angles = positions.outer(rotary.inv_freq.to(torch.float32))
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


class _Decoder:
    """Builds the graph of one model."""

    def __init__(
        self, reference: ReferenceModel, formats: FormatsByWeight, quantizer: RenderingRule, graph: GraphWriter
    ) -> None:
        self._model, self._graph = reference.model, graph
        self._config = reference.model.config
        self._formats, self._quantizer = formats, quantizer
        self._weights = list_weights(reference.model)
        self._readers: dict[str, WeightReader] = {}
        self._rotations = [
            graph.store(name, t) for name, t in zip(("cosines", "sines"), find_rotations(reference), strict=True)
        ]

    def build(self) -> tuple[list[Any], list[Any]]:
        """Adds the whole model and returns descriptions of its inputs and outputs."""
        from onnx import TensorProto, helper

        graph, layers = self._graph, self._config.num_hidden_layers
        heads, width = self._config.num_key_value_heads, self._head_dim()
        ones = graph.constant("one", [1])
        lengths = graph.add(
            "Cast", [graph.add("ReduceSum", ["attention_mask", ones], keepdims=0)], to=TensorProto.INT32
        )
        one = graph.add("Cast", [ones], to=int(TensorProto.INT32))
        total = graph.add("Gather", [graph.add("Shape", ["attention_mask"]), ones])
        # Of each sequence the length less one, and the longest length, are what the attention asks for.
        self._lengths = [graph.add("Sub", [lengths, one]), graph.add("Cast", [total], to=int(TensorProto.INT32))]
        x = self._reader("model.embed_tokens.weight").gather("input_ids")
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
            for name, length in (("input_ids", "tokens"), ("attention_mask", "all_tokens"))
        ]
        outputs: list[Any] = []
        for layer in range(layers):
            x, states = self._add_layer(f"model.layers.{layer}", x, layer)
            for name, into, length in (
                *((s, inputs, "past") for s in states[:2]),
                *((s, outputs, "all") for s in states[2:]),
            ):
                shape = ["batch", heads, length, width]
                into.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        logits = self._reader("lm_head.weight").multiply(self._norm("model.norm", x))
        graph.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        vocabulary = helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, ["batch", "tokens", self._config.vocab_size]
        )
        return inputs, [vocabulary, *outputs]

    def _add_layer(self, stem: str, x: str, layer: int) -> tuple[str, list[str]]:
        """Adds a layer; returns its output and the names of the states it reads and writes."""
        graph = self._graph
        h = self._norm(f"{stem}.input_layernorm", x)
        projected = [self._linear(f"{stem}.self_attn.{part}_proj", h) for part in "qkv"]
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        attended = graph.add(
            "GroupQueryAttention",
            [*projected, *past, *self._lengths, *self._rotations],
            domain=MICROSOFT,
            outputs=3,
            num_heads=self._config.num_attention_heads,
            kv_num_heads=self._config.num_key_value_heads,
            scale=self._head_dim() ** -0.5,
            do_rotary=1,
        )
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        node = graph.nodes[-1]
        node.output[1], node.output[2] = present
        x = graph.add("Add", [x, self._linear(f"{stem}.self_attn.o_proj", attended)])
        h = self._norm(f"{stem}.post_attention_layernorm", x)
        gate = self._linear(f"{stem}.mlp.gate_proj", h)
        active = graph.add("Mul", [gate, graph.add("Sigmoid", [gate])])
        product = graph.add("Mul", [active, self._linear(f"{stem}.mlp.up_proj", h)])
        return graph.add("Add", [x, self._linear(f"{stem}.mlp.down_proj", product)]), [*past, *present]

    def _head_dim(self) -> int:
        return int(
            getattr(self._config, "head_dim", None) or self._config.hidden_size // self._config.num_attention_heads
        )

    def _reader(self, parameter: str) -> WeightReader:
        """Returns the operators of a weight, those of a tied one under either name."""
        weight = next(w for w in self._weights.values() if parameter in (w.parameter, *w.aliases))
        if weight.name not in self._readers:
            format_ = find_format(self._formats[weight.name])
            stored = encode_weight(weight, read_weight(self._model, weight), format_, self._quantizer)
            self._readers[weight.name] = WeightReader(self._graph, weight.name, stored, format_, weight.shape)
        return self._readers[weight.name]

    def _linear(self, module: str, x: str) -> str:
        product = self._reader(f"{module}.weight").multiply(x)
        bias = self._model.get_submodule(module).bias
        if bias is None:
            return product
        return self._graph.add("Add", [product, self._graph.store(f"{module}.bias", bias.to(torch.float32))])

    def _norm(self, module: str, x: str) -> str:
        norm: Any = self._model.get_submodule(module)
        weight = self._graph.store(f"{module}.weight", norm.weight.to(torch.float32))
        epsilon = float(self._config.rms_norm_eps)
        return self._graph.add("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=epsilon, stash_type=1)
