// What is known of each expert, as tables [layers, experts].
import type { ExpertLayer, Profile } from "../api/contract";
import { bitsText, percentText, significant } from "./quantities";

export type ExpertField = "frequency" | "bits" | "coverage" | "gate_weight";

interface FieldForm {
  label: string;
  title: string;
  caption: string;
  text: (value: number) => string;
  /** Ends of the colour scale where they are not those of the values. */
  fixed: [number, number] | null;
  values: (layers: ExpertLayer[], bits: number[][] | null) => number[][];
}

export const EXPERT_FIELDS: Record<ExpertField, FieldForm> = {
  frequency: {
    label: "Frequency",
    title: "Share of tokens that take each expert",
    caption: "On the calibration text.",
    text: percentText,
    fixed: null,
    values: (layers) => layers.map((layer) => layer.frequency),
  },
  bits: {
    label: "Bits",
    title: "Stored bits per weight of each expert",
    caption: "In the plan for the memory that was last looked at.",
    text: bitsText,
    fixed: [1, 16],
    values: (layers, bits) => bits ?? layers.map((layer) => layer.frequency.map(() => Number.NaN)),
  },
  coverage: {
    label: "Coverage",
    title: "Calibration tokens that each expert saw",
    caption: "The losses of an expert that saw few lean on those of its layer.",
    text: (value) => String(Math.round(value)),
    fixed: null,
    values: (layers) => layers.map((layer) => layer.coverage),
  },
  gate_weight: {
    label: "Gate weight",
    title: "Mean gate weight of each expert",
    caption: "Over the tokens that take it.",
    text: (value) => significant(value, 3),
    fixed: null,
    values: (layers) => layers.map((layer) => layer.gate_weight),
  },
};

/** Returns the stored bits per weight of every expert in a plan, [layers, experts]; NaN where it has no units of its own. */
export function expertBits(profile: Profile, choice: Record<string, string>, layers: ExpertLayer[]): number[][] {
  const sums = new Map<string, { bytes: number; parameters: number }>();
  for (const unit of profile.units) {
    const format = choice[unit.name];
    if (unit.layer === null || format === undefined) continue;
    // A stack of experts is one unit of all of them.
    const key = `${unit.layer}\n${unit.expert ?? (unit.name.includes("experts") ? "all" : "none")}`;
    const sum = sums.get(key) ?? { bytes: 0, parameters: 0 };
    sum.bytes += unit.bytes_by_format[format] ?? Number.NaN;
    sum.parameters += unit.parameters;
    sums.set(key, sum);
  }
  return layers.map((layer) =>
    layer.frequency.map((_, expert) => {
      const sum = sums.get(`${layer.layer}\n${expert}`) ?? sums.get(`${layer.layer}\nall`);
      return sum === undefined ? Number.NaN : (8 * sum.bytes) / sum.parameters;
    }),
  );
}

export interface ExpertRow {
  layer: number;
  expert: number;
  frequency: number;
  coverage: number;
  gate_weight: number;
  bits: number;
}

/** Returns one row for each expert. */
export function expertRows(layers: ExpertLayer[], bits: number[][] | null): ExpertRow[] {
  return layers.flatMap((layer, row) =>
    layer.frequency.map((frequency, expert) => ({
      layer: layer.layer,
      expert,
      frequency,
      coverage: layer.coverage[expert] ?? Number.NaN,
      gate_weight: layer.gate_weight[expert] ?? Number.NaN,
      bits: bits?.[row]?.[expert] ?? Number.NaN,
    })),
  );
}

/** Returns the least and the largest finite value of a table; [0, 1] where there is none. */
export function extent(values: number[][]): [number, number] {
  const finite = values.flat().filter(Number.isFinite);
  return finite.length === 0 ? [0, 1] : [Math.min(...finite), Math.max(...finite)];
}
