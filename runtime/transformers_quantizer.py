"""Packed models through transformers' own door: ``AutoModelForCausalLM.from_pretrained(directory)``.

Importing this module registers the quantization method ``bitplan``, which the ``config.json`` of a packed model names.
Weights are read as they are stored; numbers that a codec multiplies stay in the types of the file.
"""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from runtime.apply import install_empty_formats_
from runtime.formats import find_format
from runtime.loading import PACKED_CONFIG_KEY
from runtime.packed_model import ACTIVATIONS_KEY, MAP_KEY, prepare_generation_
from runtime.simulated_activations import install_activations_
from runtime.units import list_weights


@register_quantization_config(PACKED_CONFIG_KEY)
class PackedConfig(QuantizationConfigMixin):
    """The formats of a packed model."""

    def __init__(self, formats: dict[str, str] | None = None, **_: Any) -> None:
        method: Any = PACKED_CONFIG_KEY  # transformers types it as one of its own methods
        self.quant_method = method
        self.formats = formats or {}


@register_quantizer(PACKED_CONFIG_KEY)
class PackedQuantizer(HfQuantizer):
    """Puts packed modules without data where the weights were, before transformers fills them."""

    requires_calibration = True

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Returns float32, in which packed weights are read back."""
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if getattr(model.config, PACKED_CONFIG_KEY, {}).get(MAP_KEY):
            msg = (
                "transformers loads what the architecture says: got a packed model with a matrix behind its last norm "
                "(a rotated model whose embedding is tied). Load it with allocator.load, or measure with the "
                "transform 'untie' before the rotation."
            )
            raise ValueError(msg)
        # transformers ties weights after it has loaded them; a tied head is to hold the embedding's own packed weight.
        if model.config.tie_word_embeddings:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        settings: Any = self.quantization_config
        formats, weights = settings.formats, list_weights(model, routers=True)
        router = next((name for name in formats if name in weights and weights[name].kind == "router"), None)
        if router is not None:
            # transformers looks for modules by name, and a router reads its packed weight through a property.
            msg = (
                f"routers must be unquantized for transformers to load a packed model: got '{router}' in "
                f"{formats[router]}. Load it with allocator.load."
            )
            raise ValueError(msg)
        tied = {
            f"{alias}.{tensor.name}": f"{weight.parameter}.{tensor.name}"
            for name, weight in weights.items()
            if name in formats
            for alias in weight.aliases
            for tensor in find_format(formats[name]).stored_tensors(weight.shape)
        }
        install_empty_formats_(model, formats)
        model.all_tied_weights_keys = tied
        # They are one module already: nothing is tied or marked, and the report must not miss the second name.
        model.mark_tied_weights_as_initialized = lambda _: None
        model.tie_weights = lambda missing_keys=None, **_: missing_keys and missing_keys.difference_update(tied)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        install_activations_(model, getattr(model.config, PACKED_CONFIG_KEY, {}).get(ACTIVATIONS_KEY, {}))
        prepare_generation_(model)
        return model

    def is_serializable(self, **_: Any) -> bool:
        """Whether transformers may save it again: bitplan does."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False
