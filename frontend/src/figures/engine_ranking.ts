// Which engine to offer first.
import type { Engine } from "../api/contract";

const UNQUANTIZED = new Set(["bf16", "fp16"]);

/** Our own packed checkpoint: every format, no rules. The service makes it by a job of another kind. */
export const OWN: Engine = {
  name: "bitplan",
  title: "bitplan: its own packed checkpoint, every format",
  formats: [],
  rules: ["every format, in every unit"],
  exporter: true,
  note: "Runs by bitplan generate, or allocator.load in Python.",
};

/** Returns the engines that files can be written for, those that run most of the measured formats first, our own last. */
export function rankEngines(engines: Engine[], measured: string[]): Engine[] {
  const known = new Set(measured.filter((format) => !UNQUANTIZED.has(format)));
  const shared = (engine: Engine) => engine.formats.filter((format) => known.has(format)).length;
  return [...engines.filter((engine) => engine.exporter).sort((a, b) => shared(b) - shared(a)), OWN];
}
