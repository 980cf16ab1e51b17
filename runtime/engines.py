"""What each engine can load, as data, so that legality is settled before any solve.

An entry says which formats an engine runs in which kind of weight and at which row lengths, which weights it fuses
(they must agree), how finely experts may differ, and what it would store without a word where a format does not fit.
What the rules mean is in ``runtime/engine_rules.py``; who writes the files, in ``runtime/exporters/``.
"""

import re
from typing import TYPE_CHECKING, Any

from runtime.engine_rules import Engine, FormatRule

if TYPE_CHECKING:
    from runtime.formats import Format

# Weights that match and are equal once the match is taken out get one format (`runtime.units.find_units`).
QKV = r"\.(q|k|v)_proj(?=\.)"
GATE_UP = r"\.(gate|up)_proj(?=\.)"
LATENT_QKV = r"\.(q_a_proj|kv_a_proj_with_mqa)(?=\.)"
EVERY_LAYER = r"(?<=\.)\d+(?=\.)"


def _integers(bits: str, groups: str = "g32|g64|g128|channel", suffix: str = "(_sym)?") -> str:
    """Returns the pattern of integer formats: alternatives of bits and groups, and their symmetry."""
    return f"int({bits})_({groups}){suffix}"


# MatMulNBits takes whole blocks of codes of these widths.
_ONNX = _integers("2|4|8", groups="g16|g32|g64|g128|g256")
# The tokens of a prompt, and a past of no tokens for each input that the models of ONNX graphs have for it.
_ONNX_INPUTS = (
    "words = AutoTokenizer.from_pretrained('{out}'); ids = words('The', return_tensors='np').input_ids; "
    "past = {{i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], 'f4') for i in "
)
_COMPRESSED = _integers("2|3|4|5|6|7|8", groups="g16|g32|g64|g128|g256|channel", suffix="_sym")
_SYMMETRIC = (*(f"int{bits}_g64_sym" for bits in (2, 3, 4, 5, 6, 8)), "bf16")
_GGUF_KINDS = ("linear", "head", "embedding", "expert")

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="llama.cpp",
            reads="GGUF, every tensor in a type of its own",
            rules=(
                FormatRule(
                    formats=r"q[458]_0|q[45]_1|iq4_nl|mxfp4|int(4|5|8)_g32_sym", kinds=_GGUF_KINDS, in_multiple=32
                ),
                FormatRule(formats=r"q[23456]_k|iq4_xs", kinds=_GGUF_KINDS, in_multiple=256),
            ),
            experts="stack_projection",
            menu=("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_k", "q5_k", "q6_k", "q4_1", "q5_0", "q5_1", "q8_0", "bf16"),
            instead={
                "q2_k": "q4_0",
                "q3_k": "q4_0",
                "iq4_xs": "iq4_nl",
                "q4_k": "q5_0",
                "q5_k": "q5_1",
                "q6_k": "q8_0",
            },
            exporter="llama.cpp",
            command="llama-cli -m {out}/model.gguf -p 'The'",
            checked="loaded by llama.cpp on a CPU; tensors' types and bytes equal, logits compared",
            notes=(
                "All experts of a projection are one tensor of one type; norms, biases and routers stay float32.",
                "tensor-types.txt is for llama-quantize --tensor-type-file, which ignores it under the base types F32, "
                "F16 and BF16: name a quantized one.",
            ),
        ),
        Engine(
            name="transformers",
            reads="compressed-tensors, pack-quantized",
            rules=(FormatRule(formats=_COMPRESSED),),
            experts="stack_projection",
            menu=_SYMMETRIC,
            exporter="compressed-tensors",
            command=(
                "python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}')('The'))\""
            ),
            checked="loaded by transformers on a CPU; weights equal bit for bit, logits equal",
            notes=(
                "Asymmetric formats are refused: transformers 5.23 expects zero points in another shape than "
                "compressed-tensors 0.20 writes, and stops.",
                "3, 5, 6 and 7 bits need compressed-tensors 0.18 or newer, which packs them densely.",
                "Embeddings, and experts that transformers stores as one 3-D parameter, stay unquantized.",
            ),
        ),
        Engine(
            name="vllm",
            reads="compressed-tensors, pack-quantized",
            rules=(
                FormatRule(formats=_integers("4"), kinds=("linear", "expert"), in_multiple=32, out_multiple=32),
                FormatRule(
                    formats=_integers("8", suffix="_sym"), kinds=("linear", "expert"), in_multiple=32, out_multiple=32
                ),
            ),
            fuse=(QKV, GATE_UP, LATENT_QKV),
            experts="stack",
            menu=("int4_g32", "int4_g64", "int4_g128", "int4_channel", "int8_g64_sym", "int8_channel_sym", "bf16"),
            exporter="compressed-tensors for vLLM",
            command="vllm serve {out} --dtype float16",
            checked="the same files are loaded by transformers, quantized experts included; vLLM was not run",
            notes=(
                "8 bits without activations' quantization, and all of Marlin, need a GPU.",
                "vLLM reads one scheme for all experts of a layer.",
            ),
        ),
        Engine(
            name="mlx-lm",
            reads="MLX affine quantization, a setting a module",
            rules=(
                FormatRule(
                    formats=_integers("2|3|4|5|6|8", groups="g32|g64|g128"), kinds=("linear", "head", "embedding")
                ),
            ),
            menu=("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64", "bf16"),
            exporter="mlx-lm",
            command="mlx_lm.generate --model {out} --prompt 'The'",
            checked="read back by mlx on a CPU: mx.dequantize gives the planned numbers",
            notes=(
                "Symmetric formats are exact; of asymmetric ones MLX rounds scale * zero_point to float16.",
                "Experts stay unquantized.",
            ),
        ),
        Engine(
            name="gptqmodel",
            reads="quantize_config.json with dynamic rules; it quantizes by itself",
            rules=(FormatRule(formats=_integers("2|3|4|8", groups="g32|g64|g128|channel"), kinds=("linear",)),),
            fuse=(QKV, GATE_UP, LATENT_QKV),
            menu=("int2_g64", "int3_g64", "int4_g64", "int8_g64", "bf16"),
            exporter="gptqmodel",
            command=(
                'python -c "import json; from gptqmodel import GPTQModel, QuantizeConfig; '
                "config = QuantizeConfig(**json.load(open('{out}/quantize_config.json'))); "
                "GPTQModel.load('{model}', config)\""
            ),
            checked="each rule matched with the names of every module, fused ones included; GPTQModel was not run",
            notes=(
                "vLLM reads dynamic rules by fused names, hence the fusions; of these formats it runs int4 and int8, "
                "symmetric.",
                "transformers 5.23 does not load checkpoints with dynamic rules.",
                "The codes are GPTQModel's own: measure the result.",
            ),
        ),
        Engine(
            name="auto-round",
            reads="layer_config; it quantizes by itself",
            rules=(FormatRule(formats=_integers("2|3|4|8", groups="g32|g64|g128|channel")),),
            fuse=(QKV, GATE_UP, LATENT_QKV),
            menu=("int2_g64_sym", "int3_g64_sym", "int4_g64_sym", "int8_g64_sym", "bf16"),
            exporter="auto-round",
            command=(
                'python -c "import json; from auto_round import AutoRound; '
                "layers = json.load(open('{out}/layer_config.json')); "
                "AutoRound('{model}', layer_config=layers).quantize_and_save('{out}/quantized', format='auto_round')\""
            ),
            checked="names and keys against its documentation; AutoRound was not run",
            notes=(
                "vLLM refuses fused projections that differ, hence the fusions.",
                "The codes are AutoRound's own: measure the result.",
            ),
        ),
        Engine(
            name="torchao",
            reads="FqnToConfig; it rounds to nearest by itself",
            rules=(FormatRule(formats=_integers("2|3|4|5|6|7|8", groups="g16|g32|g64|g128|g256|channel")),),
            menu=_SYMMETRIC,
            exporter="torchao",
            command=(
                'python -c "import json; from torchao.core.config import config_from_dict; '
                "from transformers import AutoModelForCausalLM, TorchAoConfig; "
                "config = TorchAoConfig(config_from_dict(json.load(open('{out}/torchao.json')))); "
                "AutoModelForCausalLM.from_pretrained('{model}', quantization_config=config)\""
            ),
            checked="read and applied by torchao on a CPU",
            notes=(
                "On a CPU torchao keeps every code in a byte: files do not shrink below 8 bits.",
                "The codes are torchao's own: measure the result.",
            ),
        ),
        Engine(
            name="onnxruntime",
            reads="an ONNX graph whose weights are read by MatMulNBits",
            rules=(
                FormatRule(formats=_ONNX),
                FormatRule(formats=_ONNX.replace("2|", ""), kinds=("embedding",)),
            ),
            menu=("int2_g64", "int4_g32", "int4_g64", "int8_g64", "bf16"),
            exporter="onnx",
            command=(
                'python -c "import numpy as np, onnxruntime; from transformers import AutoTokenizer; '
                "model = onnxruntime.InferenceSession('{out}/model.onnx'); "
                + _ONNX_INPUTS
                + "model.get_inputs()[2:]}}; "
                "print(words.decode(model.run(['logits'], {{'input_ids': ids, 'attention_mask': np.ones_like(ids), "
                '**past}})[0][0, -1].argmax()))"'
            ),
            checked="run by ONNX Runtime on a CPU; bytes equal the prediction, logits compared",
            notes=(
                "Weights are in model.onnx.data, which is what a budget counts.",
                "Llama, Mistral without a sliding window, and Qwen2; experts stay unquantized and are not written.",
                "Its own quantizer leaves a node in float32 without a word where 2 bits are asked for; here the codes "
                "are written.",
            ),
        ),
        Engine(
            name="openvino",
            reads="the same ONNX graph",
            rules=(FormatRule(formats=_ONNX),),
            menu=("int2_g64", "int4_g32", "int4_g64", "int8_g64", "bf16"),
            exporter="onnx",
            command=(
                'python -c "import numpy as np, openvino; from transformers import AutoTokenizer; '
                "model = openvino.Core().compile_model('{out}/model.onnx', 'CPU'); "
                + _ONNX_INPUTS.replace("i.name", "i.any_name")
                .replace("i.shape[1]", "i.partial_shape[1].get_length()")
                .replace("i.shape[3]", "i.partial_shape[3].get_length()")
                + "model.inputs[2:]}}; "
                "print(words.decode(model({{'input_ids': ids, 'attention_mask': np.ones_like(ids), **past}})['logits']"
                '[0, -1].argmax()))"'
            ),
            checked="run by OpenVINO on a CPU; logits compared",
            notes=(
                "On a CPU it rounds inputs to 8 bits by itself; DYNAMIC_QUANTIZATION_GROUP_SIZE=0 turns that off.",
                "Batches of one sequence; embeddings stay unquantized.",
                "NNCF has no format for plans: it would choose the layers itself, so it is not used.",
            ),
        ),
        Engine(
            name="bitsandbytes",
            reads="BitsAndBytesConfig, all weights at one width but for those it skips; it quantizes by itself",
            rules=(FormatRule(formats="int8_channel_sym", kinds=("linear",)),),
            menu=("int8_channel_sym", "bf16"),
            exporter="bitsandbytes",
            command=(
                'python -c "import json; from transformers import AutoModelForCausalLM, BitsAndBytesConfig; '
                "config = BitsAndBytesConfig(**json.load(open('{out}/bitsandbytes_config.json'))); "
                "AutoModelForCausalLM.from_pretrained('{model}', quantization_config=config)\""
            ),
            checked="read by transformers' BitsAndBytesConfig; bitsandbytes was not run",
            notes=(
                "It cannot mix widths: 4 and 8 bits exclude each other, and its 4-bit types are no format here. Left "
                "are 8 bits and 16; a plan says what that costs.",
                "The codes are its own: measure the result.",
            ),
        ),
        Engine(
            name="hqq",
            reads="HqqConfig with a setting a type of weight; it quantizes by itself",
            rules=(FormatRule(formats=_integers("2|3|4|8", groups="g32|g64|g128", suffix=""), kinds=("linear",)),),
            fuse=(EVERY_LAYER,),
            menu=("int2_g64", "int3_g64", "int4_g64", "int8_g64", "bf16"),
            exporter="hqq",
            command=(
                'python -c "import json; from transformers import AutoModelForCausalLM, HqqConfig; '
                "config = HqqConfig(**json.load(open('{out}/hqq_config.json'))); "
                "AutoModelForCausalLM.from_pretrained('{model}', quantization_config=config)\""
            ),
            checked="keys against transformers' source; HQQ was not run",
            notes=(
                "It cannot tell layers apart: the same projection has one format in all of them.",
                "The codes are HQQ's own: measure the result.",
            ),
        ),
        Engine(
            name="tensorrt-llm",
            reads="ModelOpt's hf_quant_config.json, mixed precision",
            rules=(FormatRule(formats="nvfp4|mxfp8_e4m3", kinds=("linear",), in_multiple=32, out_multiple=32),),
            fuse=(QKV, GATE_UP, LATENT_QKV),
            menu=("nvfp4", "mxfp8_e4m3", "bf16"),
            exporter="modelopt",
            command="cat {out}/hf_quant_config.json  # for trtllm-serve, beside weights that ModelOpt quantized",
            checked="keys against its documentation; it needs a GPU, and none was used",
            notes=("Weights come from ModelOpt itself; its runs on activations of 4 or 8 bits are other formats.",),
        ),
    )
}


def find_engine(name: str) -> Engine:
    """Returns the engine called ``name``.

    Raises:
        ValueError: If there is none; the message lists the known names.
    """
    if name not in ENGINES:
        msg = f"engine must be a known name: got '{name}'. Known engines: {', '.join(ENGINES)}."
        raise ValueError(msg)
    return ENGINES[name]


def engines_of(format_: "Format") -> tuple[str, ...]:
    """Returns the names of the engines that run a format in some weight, bitplan itself first."""
    named = (e.name for e in ENGINES.values() if any(re.fullmatch(rule.formats, format_.name) for rule in e.rules))
    return ("bitplan", *(ENGINES if format_.unquantized else named))


def describe_engines() -> list[dict[str, Any]]:
    """Returns the table as JSON values, one record an engine."""
    return [
        {
            "name": engine.name,
            "reads": engine.reads,
            "formats": [rule.describe() for rule in engine.rules],
            "menu": list(engine.menu),
            "fuse": list(engine.fuse),
            "experts": engine.experts,
            "exporter": engine.exporter,
            "command": engine.command,
            "instead": dict(engine.instead),
            "checked": engine.checked,
            "notes": list(engine.notes),
        }
        for engine in ENGINES.values()
    ]
