"""Engines that quantize by themselves: what is written for them is the formats of a plan, in their own words."""

from runtime.engine_rules import (
    EVERY_LAYER,
    GATE_UP,
    LATENT_QKV,
    QKV,
    SYMMETRIC_MENU,
    Engine,
    FormatRule,
    integer_formats,
)

QUANTIZING_ENGINES = (
    Engine(
        name="gptqmodel",
        reads="quantize_config.json with dynamic rules; it quantizes by itself",
        rules=(FormatRule(formats=integer_formats("2|3|4|8", groups="g32|g64|g128|channel"), kinds=("linear",)),),
        fuse=(QKV, GATE_UP, LATENT_QKV),
        menu=("int2_g64", "int3_g64", "int4_g64", "int8_g64", "bf16"),
        exporter="gptqmodel",
        command=(
            'python -c "import json; from gptqmodel import GPTQModel, QuantizeConfig; '
            "config = QuantizeConfig(**json.load(open('{out}/quantize_config.json'))); "
            "model = GPTQModel.load('{model}', config); model.quantize(open('calibration.txt').readlines()); "
            "model.save('{out}/quantized')\""
        ),
        checked="quantized by GPTQModel on a CPU, formats and bytes read back; rules resolved by vLLM's own classes",
        notes=(
            "calibration.txt is yours, a text a line. On two cores set GPTQMODEL_CPU_WORKERS=2.",
            "vLLM reads dynamic rules by fused names, hence the fusions; of these formats it runs int4 and int8, "
            "symmetric.",
            "transformers 5.23 does not load checkpoints with dynamic rules.",
            "The codes are GPTQModel's own: measure the result.",
        ),
    ),
    Engine(
        name="auto-round",
        reads="layer_config; it quantizes by itself",
        rules=(FormatRule(formats=integer_formats("2|3|4|8", groups="g32|g64|g128|channel")),),
        fuse=(QKV, GATE_UP, LATENT_QKV),
        menu=("int2_g64_sym", "int3_g64_sym", "int4_g64_sym", "int8_g64_sym", "bf16"),
        exporter="auto-round",
        command=(
            # Given a path it takes another way, on which it leaves layers of 3 bits as they are.
            'python -c "import json; from auto_round import AutoRound; '
            "from transformers import AutoModelForCausalLM, AutoTokenizer; "
            "layers = json.load(open('{out}/layer_config.json')); "
            "parts = [kind.from_pretrained('{model}') for kind in (AutoModelForCausalLM, AutoTokenizer)]; "
            "AutoRound(*parts, layer_config=layers, iters=0, disable_opt_rtn=True)"
            ".quantize_and_save('{out}/quantized', format='auto_round')\""
        ),
        checked="quantized by AutoRound on a CPU, formats and bytes read back; layers resolved by vLLM's own classes",
        notes=(
            "Without iters=0 and disable_opt_rtn=True it tunes its rounding, with text that it fetches.",
            "vLLM refuses fused projections that differ, hence the fusions.",
            "The codes are AutoRound's own: measure the result.",
        ),
    ),
    Engine(
        name="torchao",
        reads="FqnToConfig; it rounds to nearest by itself",
        rules=(FormatRule(formats=integer_formats("2|3|4|5|6|7|8", groups="g16|g32|g64|g128|g256|channel")),),
        menu=SYMMETRIC_MENU,
        exporter="torchao",
        command=(
            'python -c "import json; from torchao.core.config import config_from_dict; '
            "from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig; "
            "config = TorchAoConfig(config_from_dict(json.load(open('{out}/torchao.json')))); "
            "model = AutoModelForCausalLM.from_pretrained('{model}', quantization_config=config); "
            "words = AutoTokenizer.from_pretrained('{model}'); "
            "print(words.decode(model.generate(**words('The', return_tensors='pt'), max_new_tokens=8)[0]))\""
        ),
        checked="quantized by torchao on a CPU; formats read back, logits compared",
        notes=(
            "On a CPU torchao keeps every code in a byte: files do not shrink below 8 bits.",
            "The codes are torchao's own: measure the result.",
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
        rules=(FormatRule(formats=integer_formats("2|3|4|8", groups="g32|g64|g128", suffix=""), kinds=("linear",)),),
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
        checked="resolved by vLLM's own classes; it needs a GPU, and none was used",
        notes=("Weights come from ModelOpt itself; its runs on activations of 4 or 8 bits are other formats.",),
    ),
)
