// Which engine to offer first.
import type { Engine } from "../api/contract";

const UNQUANTIZED = new Set(["bf16", "fp16"]);

/** Returns the engines that files can be written for, those that run most of the measured formats first. */
export function rankEngines(engines: Engine[], measured: string[]): Engine[] {
  const known = new Set(measured.filter((format) => !UNQUANTIZED.has(format)));
  const shared = (engine: Engine) => engine.formats.filter((format) => known.has(format)).length;
  return engines.filter((engine) => engine.exporter).sort((a, b) => shared(b) - shared(a));
}
