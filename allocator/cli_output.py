"""What the command ``bitplan`` prints: one document or one text on stdout, and nothing beside it."""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.plans import Plan
    from allocator.prefixes import PrefixFound
    from sensitivity.profile import SensitivityProfile


@contextmanager
def stray_output_to_stderr() -> Iterator[None]:
    """Sends to stderr what libraries write to the process's standard output: HiGHS prints there now and then."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        # What C code has printed may still be in the C library's own buffer.
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def render(document: dict[str, Any], as_json: bool, describe: Callable[[dict[str, Any]], str]) -> str:
    """Returns a document as JSON, or as the text that describes it."""
    from allocator.json_values import jsonable

    return json.dumps(jsonable(document), allow_nan=False) if as_json else describe(document)


def describe_profile(profile: "SensitivityProfile") -> dict[str, Any]:
    return {
        "profile": profile.fingerprint,
        "units": len(profile.candidates.units),
        "formats": [f.name for f in profile.candidates.formats],
        "metrics": list(profile.losses),
        "reference_bytes": profile.reference_bytes,
        **{
            f"{name}_formats": [f.name for f in part.candidates.formats]
            for name, part in (("cache", profile.cache), ("activation", profile.activations))
            if part is not None
        },
        "provenance": dict(profile.provenance),
    }


def profile_text(document: dict[str, Any]) -> str:
    return (
        f"profile {document['profile'][:16]}: {document['units']} units x {len(document['formats'])} formats, "
        + (f"caches x {len(document['cache_formats'])} formats, " if "cache_formats" in document else "")
        + (f"activations x {len(document['activation_formats'])} formats, " if "activation_formats" in document else "")
        + f"metrics {', '.join(document['metrics'])}, measured in {document['provenance']['measured_in_s']} s"
    )


def blockwise_text() -> str:
    """Returns what is said before a model is measured block by block."""
    from sensitivity.measure_config import BLOCKWISE_METRICS, METRICS

    left_out = [metric for metric in METRICS if metric not in BLOCKWISE_METRICS]
    return f"the model is read block by block: {' and '.join(left_out)} need it in memory and are left out."


def describe_prefix(found: "PrefixFound") -> dict[str, Any]:
    return {
        "tokens": [] if found.prefix is None else found.prefix.tokens.tolist(),
        "text": found.text,
        "prefix_bytes": found.prefix_bytes,
        "search_kl": list(found.search_kl),
        "scores": [vars(score) for score in found.scores],
        "verdict": found.verdict,
    }


def prefix_text(document: dict[str, Any]) -> str:
    search = " -> ".join(f"{kl:.4g}" for kl in document["search_kl"])
    lines = [
        f"prefix {document['tokens']} {document['text']!r}, {document['prefix_bytes']} bytes of keys and values",
        f"KL on the search's text: {search}",
        document["verdict"],
    ]
    return "\n".join(lines + ([table(document["scores"])] if document["scores"] else []))


def skipping_text(document: dict[str, Any]) -> str:
    skipping = document["skipping"]
    names = ("layers", "ratio", "magnitude")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(skipping[name] for name in names), strict=True)]
    return f"{table(rows)}\n\n{table(document['scores'])}"


def plan_text(made: "Plan") -> str:
    from collections import Counter

    counts = Counter(unit.format for unit in made.units)
    gap = f"{made.relative_gap:.2g}" if made.relative_gap < float("inf") else "not bounded"
    error = "" if made.predicted_std_error is None else f" ± {made.predicted_std_error:.2g}"
    lines = [
        f"plan '{made.name}' for {made.budget}: {made.memory_bytes / 2**20:.2f} MiB, "
        f"{made.bits_per_weight:.3f} bits per weight (reference {made.reference_memory_bytes / 2**20:.1f} MiB)",
        f"predicted KL {made.predicted_kl:.4g}{error} nats per token, relative gap to the best possible {gap} "
        f"({made.termination}, {made.solve_s * 1e3:.1f} ms)",
        *([made.latency_text] if made.latency_text else []),
        *([] if made.cache is None else [_cache_text(made)]),
        *([] if made.activations is None else [made.activations.describe()]),
        "formats: " + ", ".join(f"{name} x {count}" for name, count in counts.most_common()),
        made.verdict,
        *([made.rules.describe()] if made.rules else []),
    ]
    if transforms := made.provenance.get("transforms"):
        added = made.provenance["transforms_added_weights"]
        lines.insert(1, f"under the transforms {transforms} ({added} weights added)")
    rows = [_brief(vars(evaluation)) for evaluation in made.evaluations]
    return "\n".join(lines + ([table(rows)] if rows else []))


def _cache_text(made: "Plan") -> str:
    from collections import Counter

    assert made.cache is not None
    counts = Counter((unit.role, unit.format) for unit in made.units if unit.unit in made.cache.formats)
    formats = ", ".join(f"{role} {name} x {count}" for (role, name), count in counts.most_common())
    return (
        f"weights {made.file_bytes / 2**20:.2f} MiB, cache {made.cache.memory_bytes / 2**20:.2f} MiB "
        f"({made.cache.context} tokens, batch {made.cache.batch}): {formats}"
    )


def devices_text(document: dict[str, Any]) -> str:
    """Returns the table of devices, and below it where its figures are from."""
    rows = [{name: value for name, value in row.items() if name != "source"} for row in document["devices"]]
    return "\n".join([table(rows), "", *(f"{row['name']}: {row['source']}" for row in document["devices"])])


def engines_text(document: dict[str, Any]) -> str:
    """Returns the table of engines, one paragraph each."""
    paragraphs = []
    for engine in document["engines"]:
        rows = {
            "reads": engine["reads"],
            "formats": "; ".join(engine["formats"]),
            "one format for": "; ".join([*engine["fuse"], f"experts: each {engine['experts'].replace('_', ' ')}"]),
            "checked": engine["checked"],
            "runs with": engine["command"],
            "note": " ".join(engine["notes"]),
        }
        lines = [f"  {name}: {text}" for name, text in rows.items() if text]
        paragraphs.append("\n".join([engine["name"], *lines]))
    return "\n\n".join(paragraphs)


def exported_text(document: dict[str, Any]) -> str:
    """Returns what an export wrote, and the command that runs it."""
    rows = [{"file": name, "bytes": count} for name, count in document["files"].items()]
    predicted = document["predicted_bytes"]
    expected = [] if predicted is None else [f"predicted bytes of the weight file: {predicted}"]
    lines = [document["directory"], table(rows), *expected, f"run it in {document['engine']}:", document["command"]]
    return "\n".join(lines)


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("name", "memory_bytes", "predicted_kl", "kl", "kl_low", "kl_high", "shipped")}


def formats_text(rows: Sequence[dict[str, Any]]) -> str:
    shown = []
    for row in rows:
        runs_on = row["refusal"] or ", ".join(row["runs_on"])
        shown.append({**{name: value for name, value in row.items() if name != "refusal"}, "runs_on": runs_on})
    return table(shown)


def table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "nothing to show"
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
    return "-" if value is None else str(value)
