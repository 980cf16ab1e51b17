"""The command in this process: what it prints where, and its exit code, for every command and every bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from allocator.cli import run
from allocator.store import Store
from runtime.kernels.dispatch import kernel_path
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import FLAGS

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def store(tiny_store: Store, tiny_profile: SensitivityProfile, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store with the measured profile is the default one."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tiny_store.root))
    tiny_store.make_latest(tiny_profile)
    return tiny_store


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> str:
    return str(tiny_llama_dir)


def ask(capsys: Captured, *arguments: str | Path) -> Any:
    """Returns the one JSON document that a command prints."""
    assert run([str(a) for a in arguments] + ["--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    return json.loads(printed.out, parse_constant=pytest.fail)


def fail(capsys: Captured, code: int, *arguments: str | Path) -> str:
    """Returns the message on stderr of a command that ends with a code and prints nothing on stdout."""
    assert run([str(a) for a in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.fixture
def plan_path(model: str, tmp_path: Path, capsys: Captured) -> Path:
    ask(capsys, "plan", model, "--bits-per-weight", "4.5", "--no-verify", "--out", tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_measure(model: str, tiny_text: Path, tmp_path: Path, capsys: Captured, tiny_profile: Any) -> None:
    out = tmp_path / "profile"
    document = ask(capsys, "measure", model, "--calibration", tiny_text, *FLAGS, "--out", out)
    assert document["profile"] == tiny_profile.fingerprint
    assert document["metrics"] == ["weight_error", "output_error", "fisher", "single_unit_kl", "combined"]
    assert document["units"] == len(tiny_profile.candidates.units)
    assert sorted(p.name for p in out.iterdir()) == ["arrays.safetensors", "profile.json"]
    assert run(["measure", model, "--calibration", str(tiny_text), *FLAGS]) == 0
    assert capsys.readouterr().out.startswith(f"profile {tiny_profile.fingerprint[:16]}: ")


def test_plan(model: str, plan_path: Path, tmp_path: Path, capsys: Captured) -> None:
    written = json.loads(plan_path.read_text())
    assert written["bits_per_weight"] <= 4.5
    document = ask(capsys, "plan", model, "--bits-per-weight", "4.5")
    assert document["evaluations"] and document["weights"]
    assert run(["plan", model, "--bits-per-weight", "4.5", "--no-verify"]) == 0
    text = capsys.readouterr().out
    assert "bits per weight <= 4.5" in text and "relative gap" in text and "Not verified" in text
    assert run(["plan", model, "--bits-per-weight", "4.5"]) == 0
    assert "uniform int3_g64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "budget",
    [
        ["--memory", "100KB"],
        ["--max-kl", "0.5"],
        ["--bits-per-weight", "5", "--limit", "latency_us=1e9", "--limit", "read_bytes=1MiB"],
    ],
    ids=lambda budget: budget[0],
)
def test_every_kind_of_budget(budget: list[str], model: str, capsys: Captured) -> None:
    document = ask(capsys, "plan", model, *budget, "--no-verify")
    for name, limit in document["limits"].items():
        assert document["use"][name] <= limit


def test_latency_of_a_device_that_is_not_here(model: str, capsys: Captured) -> None:
    names = [row["name"] for row in ask(capsys, "devices")["devices"]]
    assert "h100-sxm" in names and "loom" in names
    arguments = ["plan", model, "--bits-per-weight", "5", "--no-verify", "--limit", "latency_us=100"]
    document = ask(capsys, *arguments, "--device", "h100-sxm")
    assert document["use"]["latency_us"] <= 100
    assert document["provenance"]["latency"].startswith("modelled for NVIDIA H100 SXM")
    assert run([*arguments, "--device", "h100-sxm"]) == 0
    assert "us of 100 us allowed, modelled for NVIDIA H100 SXM" in capsys.readouterr().out
    assert run(["devices"]) == 0
    assert "h100-sxm: NVIDIA H100 Tensor Core GPU architecture whitepaper" in capsys.readouterr().out


def test_profile_from_a_directory(model: str, tiny_text: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "profile"
    ask(capsys, "measure", model, "--calibration", tiny_text, *FLAGS, "--out", out)
    arguments = ("plan", model, "--bits-per-weight", "4.5", "--no-verify")
    apart, known = ask(capsys, *arguments, "--profile", out), ask(capsys, *arguments)
    assert apart["weights"] == known["weights"]


def test_frontier(model: str, capsys: Captured) -> None:
    points = ask(capsys, "frontier", model, "--points", "5", "--metric", "fisher")["points"]
    assert len(points) == 5
    assert set(points[0]) == {
        "memory_bytes",
        "bits_per_weight",
        "predicted_loss",
        "lower_bound",
        "shadow_price_per_mib",
    }
    assert run(["frontier", model, "--points", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].split()[0] == "memory_bytes"


def test_evaluate(model: str, plan_path: Path, tmp_path: Path, capsys: Captured, tiny_text: Path) -> None:
    own = ask(capsys, "evaluate", model, "--plan", plan_path)["evaluations"]
    assert [e["kind"] for e in own][:2] == ["reference", "plan"]
    longer = ask(capsys, "evaluate", model, "--plan", plan_path, "--text", tiny_text)["evaluations"]
    assert longer[0]["tokens"] > own[0]["tokens"]
    assert run(["evaluate", model, "--plan", str(plan_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("reference")


def test_apply_and_generate(model: str, plan_path: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "packed"
    document = ask(capsys, "apply", model, "--plan", plan_path, "--out", out)
    assert document["difference_bytes"] == 0
    assert document["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert run(["apply", model, "--plan", str(plan_path), "--out", str(out)]) == 0
    assert "difference_bytes: 0" in capsys.readouterr().out
    assert run(["generate", str(out), "--prompt", "The cache", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The cache")
    with kernel_path("reference"):
        assert run(["generate", str(out), "--prompt", "The cache", "--max-new-tokens", "1"]) == 0
    assert "generating module by module" in capsys.readouterr().err


def test_report(model: str, plan_path: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run(["report", model, "--plan", str(plan_path), "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path / 'report' / 'report.html'}\n"
    names = {p.name for p in (tmp_path / "report").iterdir()}
    assert names >= {"report.html", "plan.csv", "frontier.csv", "evaluations.csv", "sensitivities.csv"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([c, "-h"] for c in ("measure", "plan", "demo"))])
def test_help_and_version(arguments: list[str], capsys: Captured) -> None:
    assert run(arguments) == 0
    assert "bitplan" in capsys.readouterr().out


USAGE: dict[str, tuple[list[str], str]] = {
    "no command": ([], "Usage: bitplan"),
    "unknown command": (["squeeze"], "No such command 'squeeze'"),
    "no budget": (["plan", "MODEL"], "exactly one of memory, bits_per_weight and max_kl: got none"),
    "two goals": (["plan", "MODEL", "--memory", "1MiB", "--max-kl", "1"], "exactly one"),
    "size": (["plan", "MODEL", "--memory", "plenty"], "a size must be a number and a unit of bytes: got 'plenty'"),
    "resource": (["plan", "MODEL", "--memory", "1MB", "--limit", "joules=3"], "known resources: got ['joules']"),
    "format": (["measure", "MODEL", "--formats", "int9_g64"], "got 'int9_g64'"),
    "embedding format": (["measure", "MODEL", "--embedding-formats", "int4_g7x"], "got 'int4_g7x'"),
    "metric": (["measure", "MODEL", "--metrics", "taste"], "metrics must be among"),
    "count": (["measure", "MODEL", "--sequences", "1"], "fisher_sequences must be at least 2"),
    "passes": (["measure", "MODEL", "--logit-passes", "most"], "must be a whole number or 'all': got 'most'"),
    "improved without measuring": (
        ["plan", "MODEL", "--memory", "1MB", "--evolve", "300", "--no-verify"],
        "refinement and evolution measure: got --refine or --evolve with --no-verify",
    ),
    "few passes": (["measure", "MODEL", "--logit-passes", "1"], "logit_passes must be at least 2"),
    "fit plans": (
        ["measure", "MODEL", "--fit-plans", "some"],
        "--fit-plans must be a whole number or 'none': got 'some'",
    ),
    "few fit plans": (["measure", "MODEL", "--fit-plans", "3"], "fit_plans must be at least 4, or None: got 3"),
    "fit sequences": (["measure", "MODEL", "--fit-sequences", "1"], "fit_sequences must be at least 2"),
    "pin": (["measure", "MODEL", "--pin", "q_proj"], "a pin must be REGEX=FORMAT: got 'q_proj'"),
    "points": (["frontier", "MODEL", "--points", "1"], "points"),
    "demo budget": (["demo", "--memory", "x"], "a size must be"),
    "plan in a directory": (["plan", "MODEL", "--memory", "1MB", "--out", "DIRECTORY"], "a plan is written to a file"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_usage(arguments: list[str], message: str, model: str, tmp_path: Path, capsys: Captured) -> None:
    places = {"MODEL": model, "DIRECTORY": str(tmp_path)}
    assert message in fail(capsys, 2, *(places.get(a, a) for a in arguments))


def test_infeasible_budget(model: str, capsys: Captured, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", model, "--memory", "10KB", "--limit", "read_bytes=1GB", "--no-verify", "--out", str(out)]
    assert "a budget must be reachable: got 'memory <= 0.01 MiB" in fail(capsys, 3, *arguments)
    assert run([*arguments, "--json"]) == 3
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert set(document["least_use"]) == {"memory_bytes", "read_bytes"}
    assert document["error"] in printed.err
    assert not out.exists()
    arguments[3] = str(int(document["least_use"]["memory_bytes"]))
    assert run(arguments) == 0
    assert out.exists()


@pytest.mark.parametrize("arguments", [["plan", "MODEL", "--json"], ["plan", "gone", "--memory", "1MB", "--json"]])
def test_failure_is_one_document_too(arguments: list[str], model: str, capsys: Captured) -> None:
    assert run([a if a != "MODEL" else model for a in arguments]) in (1, 2)
    assert set(json.loads(capsys.readouterr().out)) == {"error"}


def copy_model(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def test_missing_model(capsys: Captured, tmp_path: Path) -> None:
    message = fail(capsys, 1, "measure", tmp_path / "nowhere")
    assert "a model must be a directory, a GGUF file or a Hugging Face id: got" in message
    (tmp_path / "empty").mkdir()
    assert "must hold config.json and *.safetensors" in fail(capsys, 1, "measure", tmp_path / "empty")


def test_truncated_model(tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path, capsys: Captured) -> None:
    model = copy_model(tiny_llama_dir, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = fail(capsys, 1, "measure", model, "--calibration", tiny_text)
    assert "a model must be readable by transformers: got" in message and "Check that its files are complete" in message


def test_non_finite_weight(tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path, capsys: Captured) -> None:
    model = copy_model(tiny_llama_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    message = fail(capsys, 1, "measure", model, "--calibration", tiny_text)
    assert "weights must be finite: got 1 non-finite values in 'model.layers.1.mlp.up_proj.weight'" in message


def test_calibration_that_cannot_be(model: str, tmp_path: Path, capsys: Captured) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("Too short.")
    binary.write_bytes(bytes(range(256)))
    assert "text must hold" in fail(capsys, 1, "measure", model, "--calibration", short, *FLAGS)
    message = fail(capsys, 1, "measure", model, "--calibration", binary, *FLAGS)
    assert f"must be UTF-8 text: got '{binary}'" in message


def test_plan_for_another_model(plan_path: Path, tiny_tied_llama_dir: Path, tmp_path: Path, capsys: Captured) -> None:
    for command in (["evaluate"], ["apply", "--out", tmp_path / "out"], ["report", "--out", tmp_path / "out"]):
        message = fail(capsys, 1, command[0], tiny_tied_llama_dir, "--plan", plan_path, *command[1:])
        assert "a plan must be used with the model it was made for: got a plan for" in message
    assert not (tmp_path / "out").exists()


def test_profile_of_another_model(tiny_tied_llama_dir: Path, store: Store, tiny_profile: Any, capsys: Captured) -> None:
    profile = store.root / "profiles" / tiny_profile.fingerprint
    message = fail(capsys, 1, "plan", tiny_tied_llama_dir, "--profile", profile, "--memory", "1MB")
    assert "a profile must be used with the model it was measured on" in message


def test_damaged_plan(model: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 1')
    assert "a plan must be a JSON file" in fail(capsys, 1, "evaluate", model, "--plan", tmp_path / "plan.json")


def test_plan_whose_profile_is_gone(
    model: str, plan_path: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "elsewhere"))
    message = fail(capsys, 1, "evaluate", model, "--plan", plan_path)
    assert "the profile a plan was made from must be stored" in message and "--text" in message


def test_other_directories_are_never_replaced(
    model: str, plan_path: Path, tiny_text: Path, tmp_path: Path, capsys: Captured, tiny_llama_dir: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("ten years")
    for arguments in (
        ["apply", model, "--plan", str(plan_path)],
        ["measure", model, "--calibration", str(tiny_text), *FLAGS],
    ):
        message = fail(capsys, 1, *arguments, "--out", precious)
        assert f"hold a p{'acked model' if arguments[0] == 'apply' else 'rofile'} already: got '{precious}'" in message
        assert "a directory with thesis.txt. Use another directory." in message
        assert (precious / "thesis.txt").read_text() == "ten years"
        assert "a file" in fail(capsys, 1, *arguments, "--out", plan_path)
    # Not even the model itself.
    before = sorted(p.name for p in tiny_llama_dir.iterdir())
    assert "must be free, empty" in fail(capsys, 1, "apply", model, "--plan", plan_path, "--out", model)
    assert sorted(p.name for p in tiny_llama_dir.iterdir()) == before
    assert not list(tmp_path.glob(".*"))


def test_generate_from_what_is_no_packed_model(model: str, tmp_path: Path, capsys: Captured) -> None:
    assert "must name its formats" in fail(capsys, 1, "generate", model, "--prompt", "a")
    assert "a checkpoint must be" in fail(capsys, 1, "generate", tmp_path, "--prompt", "a")


def test_packed_model_is_no_reference(model: str, plan_path: Path, tmp_path: Path, capsys: Captured) -> None:
    ask(capsys, "apply", model, "--plan", plan_path, "--out", tmp_path / "packed")
    assert "must not be packed already" in fail(capsys, 1, "measure", tmp_path / "packed")
