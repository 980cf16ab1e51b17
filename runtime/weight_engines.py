"""Engines that run the weights as they are written here: the codes of a plan are theirs, unchanged."""

from runtime.engine_rules import GATE_UP, LATENT_QKV, QKV, SYMMETRIC_MENU, Engine, FormatRule, integer_formats

# MatMulNBits takes whole blocks of codes of these widths.
_ONNX = integer_formats("2|4|8", groups="g16|g32|g64|g128|g256")
# The tokens of a prompt, and a past of no tokens for each input that the models of ONNX graphs have for it.
_ONNX_INPUTS = (
    "words = AutoTokenizer.from_pretrained('{out}'); ids = words('The', return_tensors='np').input_ids; "
    "past = {{i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], 'f4') for i in "
)
_COMPRESSED = integer_formats("2|3|4|5|6|7|8", groups="g16|g32|g64|g128|g256|channel", suffix="_sym")
_GGUF_KINDS = ("linear", "head", "embedding", "expert")

WEIGHT_ENGINES = (
    Engine(
        name="llama.cpp",
        reads="GGUF, every tensor in a type of its own",
        rules=(
            FormatRule(formats=r"q[458]_0|q[45]_1|iq4_nl|mxfp4|int(4|5|8)_g32_sym", kinds=_GGUF_KINDS, in_multiple=32),
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
        menu=SYMMETRIC_MENU,
        exporter="compressed-tensors",
        command=("python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}')('The'))\""),
        checked="loaded by transformers on a CPU; weights and logits equal bit for bit, bytes equal the prediction",
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
            FormatRule(formats=integer_formats("4"), kinds=("linear", "expert"), in_multiple=32, out_multiple=32),
            FormatRule(
                formats=integer_formats("8", suffix="_sym"), kinds=("linear", "expert"), in_multiple=32, out_multiple=32
            ),
        ),
        fuse=(QKV, GATE_UP, LATENT_QKV),
        experts="stack",
        menu=("int4_g32", "int4_g64", "int4_g128", "int4_channel", "int8_g64_sym", "int8_channel_sym", "bf16"),
        exporter="compressed-tensors for vLLM",
        command="vllm serve {out} --dtype float16",
        checked="loaded and run by vLLM on a CPU; formats of all modules and bytes equal, logits compared",
        notes=(
            "On a CPU 4 bits need AVX-512. 8 bits whose inputs stay unquantized, and all of Marlin, need a GPU.",
            "Experts were resolved by its classes, and loaded by transformers.",
            "Its inputs of 8 bits have 127 steps on either side of zero, those of compressed-tensors 127.5.",
            "vLLM reads one scheme for all experts of a layer.",
        ),
    ),
    Engine(
        name="mlx-lm",
        reads="MLX affine quantization, a setting a module",
        rules=(
            FormatRule(
                formats=integer_formats("2|3|4|5|6|8", groups="g32|g64|g128"), kinds=("linear", "head", "embedding")
            ),
        ),
        menu=("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64", "bf16"),
        exporter="mlx-lm",
        command="mlx_lm.generate --model {out} --prompt 'The'",
        checked="loaded by mlx-lm on a CPU; numbers, bytes and logits compared",
        notes=(
            "MLX stores a bias of two bytes for each group, which a budget counts.",
            "Symmetric formats are exact; of asymmetric ones MLX rounds scale * zero_point to float16.",
            "Experts stay unquantized.",
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
            "model = onnxruntime.InferenceSession('{out}/model.onnx'); " + _ONNX_INPUTS + "model.get_inputs()[2:]}}; "
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
            "NNCF is not used: it has no format for plans, and 3.4 stops at the attention of this graph.",
        ),
    ),
)
