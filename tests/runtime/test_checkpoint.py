"""The packed file: its size, its header, its types, and what a failure leaves."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runtime import checkpoint
from runtime.apply import apply_formats_
from runtime.checkpoint import (
    exact_dtype,
    fixed_bytes,
    further_header_bytes,
    header_reserve_bytes,
    load_tensors,
    read_metadata,
    reference_bytes,
    rest_bytes,
    save_checkpoint,
)
from runtime.formats import FORMATS
from runtime.units import Weight, list_weights
from tests.runtime.format_mixes import MODELS, draw_formats, round_parameters_
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1.0, -3.0, 2.0**100], torch.float32, torch.bfloat16),
        ([1 + 2.0**-10, 0.0], torch.float32, torch.float16),
        ([1 + 2.0**-10, 2.0**100], torch.float32, torch.float32),
        ([1 + 2.0**-20], torch.float32, torch.float32),
        ([65520.0 + 1], torch.float32, torch.float32),
        ([float("inf"), -0.0], torch.float32, torch.bfloat16),
        ([1.0], torch.float64, torch.bfloat16),
        ([1 + 2.0**-20], torch.float64, torch.float32),
        ([1 + 2.0**-40], torch.float64, torch.float64),
        ([1.0], torch.float16, torch.float16),
        ([1.0], torch.float8_e4m3fn, torch.float8_e4m3fn),
        ([1], torch.int64, torch.int64),
        ([1], torch.bool, torch.bool),
    ],
)
def test_narrowest_exact_type(values: list[float], dtype: torch.dtype, expected: torch.dtype) -> None:
    assert exact_dtype(torch.tensor(values, dtype=dtype)) == expected


def stored_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a float32 tensor in the narrowest type that numpy or bit patterns show to be exact."""
    values = tensor.detach().numpy()
    fits_bf16 = not (values.view("uint32") & 0xFFFF).any()
    fits_fp16 = (values.astype("float16").astype("float32") == values).all()
    return tensor.numel() * (2 if fits_bf16 or fits_fp16 else 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bytes_of_rest_and_reference(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]()
    round_parameters_(model, dtype)
    quantizable = {weight.parameter for weight in list_weights(model).values()}
    parameters = dict(model.named_parameters())
    assert rest_bytes(model) == sum(stored_bytes(p) for n, p in parameters.items() if n not in quantizable)
    assert reference_bytes(model) == sum(stored_bytes(p) for p in parameters.values())
    assert fixed_bytes(model) == rest_bytes(model) + header_reserve_bytes(model)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_file_is_as_long_as_predicted_and_readable(name: str, seed: int, tmp_path: Path) -> None:
    model = MODELS[name]()
    if seed == 1:
        round_parameters_(model, torch.bfloat16)  # the rest is stored in 16 bits then
    formats = draw_formats(model, seed)
    weights = list_weights(model)
    expected = fixed_bytes(model) + sum(FORMATS[f].storage_bytes(weights[n].shape) for n, f in formats.items())
    header_bytes = header_reserve_bytes(model)
    apply_formats_(model, formats)
    path = tmp_path / "packed.safetensors"
    assert save_checkpoint(model, path, {"plan": "a ü"}, header_bytes=header_bytes) == expected
    assert path.stat().st_size == expected
    assert_header(path, header_bytes)
    tensors, state = load_file(path), model.state_dict()
    assert all(torch.equal(tensor.to(state[n].dtype), state[n]) for n, tensor in tensors.items())
    # Tied tensors are there once; nothing else is missing.
    assert {t.data_ptr() for n, t in state.items()} == {state[n].data_ptr() for n in tensors}
    assert {n: t.dtype for n, t in tensors.items() if n.endswith((".scale", ".values"))} == {
        n: state[n].dtype for n in tensors if n.endswith((".scale", ".values"))
    }


def assert_header(path: Path, header_bytes: int) -> None:
    """Checks the file as the format is specified: a length, JSON padded with spaces, then aligned data."""
    data = path.read_bytes()
    assert int.from_bytes(data[:8], "little") == header_bytes - 8
    assert header_bytes % 8 == 0
    header = json.loads(data[8:header_bytes])
    assert header.pop("__metadata__") == {"format": "pt", "plan": "a ü"}
    itemsize = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}
    entries = sorted(header.values(), key=lambda entry: entry["data_offsets"])
    assert all(entry["data_offsets"][0] % itemsize[entry["dtype"]] == 0 for entry in entries)
    assert entries[-1]["data_offsets"][1] == len(data) - header_bytes


class Oddities(nn.Module):
    """State of types and shapes that models seldom have."""

    def __init__(self) -> None:
        super().__init__()
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float64):
            self.register_buffer(str(dtype).partition(".")[2], torch.arange(3).to(dtype))
        self.register_buffer("pi", torch.tensor(3.141592653589793, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 5))
        self.register_buffer("columns", torch.randn(3, 4).T)
        self.register_buffer("forgotten", torch.zeros(3), persistent=False)
        self.register_buffer("float8", torch.ones(5, dtype=torch.float8_e4m3fn))


def test_rest_of_any_type_is_kept(tmp_path: Path) -> None:
    model = Oddities()
    path = tmp_path / "model.safetensors"
    size = save_checkpoint(model, path, {}, header_bytes=header_reserve_bytes(model))
    assert size == fixed_bytes(model)
    tensors = load_tensors(path)
    assert set(tensors) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name].to(tensor.dtype), tensor), name
    assert tensors["pi"].dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_reserve_holds_the_longest_header(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    formats = dict.fromkeys(list_weights(model), "int4_g32")  # three tensors a weight
    header_bytes = header_reserve_bytes(model)
    apply_formats_(model, formats)
    room = {"provenance": "x" * 8000, "formats": json.dumps({n: "int4_channel_sym" for n in formats})}
    save_checkpoint(model, tmp_path / "model.safetensors", room, header_bytes=header_bytes)
    assert read_metadata(tmp_path / "model.safetensors") == {"format": "pt", **room}


def test_reserve_of_an_entry_holds_petabytes() -> None:
    entry = {"": {"dtype": "F8_E4M3", "shape": [10**8, 10**8], "data_offsets": [10**15, 10**15]}}
    # The braces around it take as much as its comma and one more.
    assert len(json.dumps(entry, separators=(",", ":"))) <= checkpoint._ENTRY_BYTES


def test_reserve_does_not_depend_on_formats_or_values() -> None:
    model = build_tiny_mixtral()
    assert header_reserve_bytes(model) == header_reserve_bytes(build_tiny_mixtral(seed=1))


def test_header_beyond_its_reserve_is_refused(tmp_path: Path) -> None:
    model = build_tiny_llama()
    header_bytes = header_reserve_bytes(model)
    path = tmp_path / "model.safetensors"
    with pytest.raises(
        ValueError, match=rf"must fit its reserve: got \d+ bytes of header, {header_bytes - 8} reserved"
    ):
        save_checkpoint(model, path, {"long": "x" * header_bytes}, header_bytes=header_bytes)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("first", torch.zeros(8, dtype=torch.int64))
    model.register_buffer("without_data", torch.zeros(3, dtype=torch.int32, device="meta"))
    path = tmp_path / "model.safetensors"
    with pytest.raises((NotImplementedError, RuntimeError, TypeError), match="meta"):
        save_checkpoint(model, path, {}, header_bytes=4096)
    assert list(tmp_path.iterdir()) == []
    path.write_text("what was there before")
    with pytest.raises((NotImplementedError, RuntimeError, TypeError), match="meta"):
        save_checkpoint(model, path, {}, header_bytes=4096)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was there before"]


@pytest.mark.parametrize("read", [load_tensors, read_metadata])
def test_files_that_cannot_be_read_are_refused(read: object, tmp_path: Path) -> None:
    assert callable(read)
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"got '.*model.safetensors', which is not there"):
        read(path)
    save_file({"x": torch.arange(100)}, path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"must be a complete safetensors file: got '.*model.safetensors' \("):
            read(path)
    path.write_text("this is no safetensors file, but it is long enough to be one " * 10)
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        read(path)
    with pytest.raises(ValueError, match="which is not there"):
        read(tmp_path)


def test_metadata_of_a_file_without_any(tmp_path: Path) -> None:
    save_file({"x": torch.arange(3)}, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_header_of_any_format_fits_what_is_set_aside(format_name: str, tmp_path: Path) -> None:
    format_ = FORMATS[format_name]
    model = nn.Module()
    model.longer_than_others = nn.Linear(768, 3, bias=False)
    weight = Weight(parameter="longer_than_others.weight", expert_index=None, shape=(3, 768), kind="linear")
    assert list_weights(model) == {weight.name: weight}
    expected = fixed_bytes(model) + format_.storage_bytes(weight.shape) + further_header_bytes(weight, format_)
    header_bytes = header_reserve_bytes(model) + further_header_bytes(weight, format_)
    apply_formats_(model, {weight.name: format_name})
    metadata = {"plan": "a ü", "formats": json.dumps({weight.name: format_name}), "filling": "x" * 8000}
    assert save_checkpoint(model, tmp_path / "file", metadata, header_bytes=header_bytes) == expected
    assert read_metadata(tmp_path / "file")["filling"] == metadata["filling"]
    assert load_tensors(tmp_path / "file").keys() == model.state_dict().keys()


def test_usual_formats_need_no_more_header_than_is_set_aside() -> None:
    weight = Weight(parameter="a.weight", expert_index=None, shape=(3, 768), kind="linear")
    for name in ("int4_g64", "int1_g64", "mxfp4", "nvfp4", "fp4_g64", "q4_k", "bf16"):
        assert further_header_bytes(weight, FORMATS[name]) == 0
    # Three codes and three scales, each with the name of the weight before it, where three zero points are set aside.
    names = 3 * (len("a.weight.codes_8") + len("a.weight.scale_8")) - 3 * len("a.weight.zero_point")
    needed = names + 3 * 110
    assert needed <= further_header_bytes(weight, FORMATS["nested8_g64"]) < needed + 8
