"""What a measurement is asked to do: the metrics, the amounts of text, and the text itself."""

from dataclasses import asdict, dataclass, replace

from runtime.quantizers import QUANTIZERS, STATISTICAL
from sensitivity.calibration import TokenSequences
from sensitivity.estimators import ESTIMATORS
from sensitivity.prediction.prediction_fit import LEAST_PLANS

WEIGHT_ERROR = "weight_error"
OUTPUT_ERROR = "output_error"
FISHER = "fisher"
SINGLE_UNIT_KL = "single_unit_kl"
METRICS = (WEIGHT_ERROR, OUTPUT_ERROR, FISHER, SINGLE_UNIT_KL)
GRADIENT_DTYPES = ("float32", "bfloat16")
# What can be measured with the weights of one block in memory at a time.
BLOCKWISE_METRICS = (WEIGHT_ERROR, FISHER)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured, and on how much text.

    Args:
        metrics: Names in ``METRICS``, or of further estimators in ``ESTIMATORS``.
        fisher_sequences: Sequences of the Fisher sketch; the most, with ``until_stable``.
        sequence_tokens: Tokens of each of these.
        logit_sequences: Sequences of the logit sketch, run in one batch; even, as its halves are compared.
        logit_sequence_tokens: Tokens of each of these.
        logit_passes: Most pairs of unit and format whose single-unit KL is measured; the others are completed, and
            there are no cross terms. None to measure every pair.
        top_tokens: Most likely tokens of a position that the logit sketch keeps.
        fit_plans: Whole plans measured to correct the predictions; None to leave that out.
        fit_sequences: Sequences, of ``sequence_tokens`` each, that they are measured on.
        selection_sequences: Sequences that choose between plans.
        evaluation_sequences: Sequences of the final evaluation.
        evaluation_sequence_tokens: Tokens of each selection and evaluation sequence.
        quantizer: Rule that renders the candidates, a name in ``QUANTIZERS``.
        seed: Seed of labels, sampled text and the pairs that are measured.
        gradient_dtype: Type that the products of the Fisher sketch's passes are computed in, ``float32`` or
            ``bfloat16``.
        until_stable: Whether the Fisher sketch ends before its last sequence, when plans stop changing.

    Raises:
        ValueError: If a count is not positive, or a name is unknown.
    """

    metrics: tuple[str, ...] = METRICS
    fisher_sequences: int = 96
    sequence_tokens: int = 128
    logit_sequences: int = 4
    logit_sequence_tokens: int = 32
    logit_passes: int | None = 512
    top_tokens: int = 256
    fit_plans: int | None = 12
    fit_sequences: int = 8
    selection_sequences: int = 8
    evaluation_sequences: int = 10
    evaluation_sequence_tokens: int = 256
    quantizer: str = "rtn"
    seed: int = 0
    until_stable: bool = False
    gradient_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and name not in ("seed", "until_stable") and value < 2:
                msg = f"{name} must be at least 2 (a standard error needs two samples): got {value}. Raise it."
                raise ValueError(msg)
        if self.logit_sequences % 2:
            msg = f"logit_sequences must be even (two halves are compared): got {self.logit_sequences}. Add one."
            raise ValueError(msg)
        if self.fit_plans is not None and self.fit_plans < LEAST_PLANS:
            msg = f"fit_plans must be at least {LEAST_PLANS}, or None: got {self.fit_plans}. Raise it."
            raise ValueError(msg)
        known = list(dict.fromkeys([*METRICS, *ESTIMATORS]))
        unknown = [metric for metric in self.metrics if metric not in known]
        if unknown or not self.metrics:
            msg = f"metrics must be among {', '.join(known)}: got {list(self.metrics)}. Correct the names."
            raise ValueError(msg)
        if self.gradient_dtype not in GRADIENT_DTYPES:
            msg = f"gradient_dtype must be among {', '.join(GRADIENT_DTYPES)}: got '{self.gradient_dtype}'. Correct it."
            raise ValueError(msg)
        if self.quantizer not in QUANTIZERS:
            msg = f"quantizer must be among {', '.join(QUANTIZERS)}: got '{self.quantizer}'. Correct the name."
            raise ValueError(msg)


def make_blockwise(config: MeasureConfig) -> MeasureConfig:
    """Returns the settings for a model whose weights are in memory block by block: without metrics that need them all.

    Args:
        config: Settings; the default metrics are cut down, others must be possible.

    Raises:
        ValueError: If a metric that was asked for needs the whole model, or the quantizer does.
    """
    metrics = BLOCKWISE_METRICS if config.metrics == METRICS else config.metrics
    impossible = [metric for metric in metrics if metric not in BLOCKWISE_METRICS]
    if impossible:
        msg = (
            f"metrics of a model that is read block by block must be among {', '.join(BLOCKWISE_METRICS)}: got "
            f"{impossible}. Leave them out, or load the model as a whole."
        )
        raise ValueError(msg)
    if config.quantizer in STATISTICAL:
        msg = (
            f"the quantizer of a model that is read block by block must need no input statistics: got "
            f"'{config.quantizer}'. Use {', '.join(name for name in QUANTIZERS if name not in STATISTICAL)}."
        )
        raise ValueError(msg)
    return replace(config, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class MeasurementText:
    """The text of one measurement; no document serves two purposes.

    Args:
        fisher: Sequences of the Fisher sketch and of the input statistics.
        logit: Sequences of the logit sketch.
        selection: Sequences that choose between plans.
        evaluation: Sequences of the final evaluation.
        fit: Sequences that correct the predictions: calibration text, but none of the Fisher sketch's.
    """

    fisher: TokenSequences
    logit: TokenSequences
    selection: TokenSequences
    evaluation: TokenSequences
    fit: TokenSequences
