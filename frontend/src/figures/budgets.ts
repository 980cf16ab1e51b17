// The kinds of budget: their range, their steps, and what they are in a request.
import type { BudgetRequest, FrontierPoint, Plan } from "../api/contract";
import { bitsText, bytesText, lossText, MIB, parseBytes, parsePositive, significant, timeText } from "./quantities";

export type BudgetKind = "memory" | "bits_per_weight" | "max_kl" | "latency_us";

export interface Range {
  least: number;
  most: number;
}

interface BudgetForm {
  label: string;
  unit: string;
  /** Steps of the slider are equal in value, or equal in ratio. */
  logarithmic: boolean;
  request: (value: number) => BudgetRequest;
  text: (value: number) => string;
  /** What stands in the field, without the unit that stands beside it. */
  fieldText: (value: number) => string;
  parse: (text: string) => number | null;
  /** The use of a plan in these terms. */
  ofPlan: (plan: Plan) => number | null;
}

function parseMebibytes(text: string): number | null {
  const plain = parsePositive(text);
  return plain === null ? parseBytes(text) : plain * MIB;
}

export const BUDGETS: Record<BudgetKind, BudgetForm> = {
  memory: {
    label: "Memory",
    unit: "MiB",
    logarithmic: false,
    request: (value) => ({ bytes: Math.floor(value) }),
    text: (value) => bytesText(value, 4),
    fieldText: (value) => significant(value / MIB, 4),
    parse: parseMebibytes,
    ofPlan: (plan) => plan.bytes,
  },
  bits_per_weight: {
    label: "Bits per weight",
    unit: "bits",
    logarithmic: false,
    request: (value) => ({ bits_per_weight: value }),
    text: (value) => `${bitsText(value)} bits per weight`,
    fieldText: bitsText,
    parse: parsePositive,
    ofPlan: (plan) => plan.bits_per_weight,
  },
  max_kl: {
    label: "KL ceiling",
    unit: "nats/token",
    logarithmic: true,
    request: (value) => ({ max_kl: value }),
    text: (value) => `${lossText(value)} nats per token`,
    fieldText: lossText,
    parse: parsePositive,
    ofPlan: (plan) => (plan.predicted_loss > 0 ? plan.predicted_loss : null),
  },
  latency_us: {
    label: "Latency",
    unit: "µs/token",
    logarithmic: false,
    request: (value) => ({ latency_us: value }),
    text: (value) => `${timeText(value)} per token`,
    fieldText: (value) => String(Math.round(value)),
    parse: parsePositive,
    ofPlan: (plan) => plan.latency_us,
  },
};
export const BUDGET_KINDS = Object.keys(BUDGETS) as BudgetKind[];

const STEPS = 200;
const PAGE_STEPS = 20;

/** Returns where a value lies in its range, from 0 to 1. */
export function shareOf(kind: BudgetKind, value: number, range: Range): number {
  const scale = BUDGETS[kind].logarithmic ? Math.log : (x: number) => x;
  const span = scale(range.most) - scale(range.least);
  return span > 0 ? Math.min(1, Math.max(0, (scale(value) - scale(range.least)) / span)) : 0;
}

/** Returns the value at a share of the range. */
export function valueAt(kind: BudgetKind, share: number, range: Range): number {
  const inside = Math.min(1, Math.max(0, share));
  if (BUDGETS[kind].logarithmic) return range.least * (range.most / range.least) ** inside;
  return range.least + inside * (range.most - range.least);
}

/** Returns the value that a key of the keyboard leads to, or null for a key that means nothing here. */
export function valueAfterKey(kind: BudgetKind, value: number, range: Range, key: string): number | null {
  const share = shareOf(kind, value, range);
  const steps: Record<string, number> = {
    ArrowRight: 1,
    ArrowUp: 1,
    ArrowLeft: -1,
    ArrowDown: -1,
    PageUp: PAGE_STEPS,
    PageDown: -PAGE_STEPS,
  };
  if (key === "Home") return range.least;
  if (key === "End") return range.most;
  const step = steps[key];
  return step === undefined ? null : valueAt(kind, share + step / STEPS, range);
}

/** Returns the range that points of a frontier along a kind of budget span; null where they are too few. */
export function rangeOf(kind: BudgetKind, points: FrontierPoint[]): Range | null {
  const values = points
    .map((point) =>
      kind === "bits_per_weight" ? point.bits_per_weight : kind === "max_kl" ? point.predicted_loss : point.use,
    )
    .filter((value) => value > 0);
  return values.length < 2 ? null : { least: Math.min(...values), most: Math.max(...values) };
}

/** Returns the resource whose frontier shows a kind of budget. */
export function resourceOf(kind: BudgetKind): string {
  return kind === "latency_us" ? "latency_us" : "bytes";
}
