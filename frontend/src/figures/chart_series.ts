// What stands on the axes of the frontier: the curve, the uniform formats, what was measured.
import type { EvaluationRow, Frontier, FrontierPoint, Plan, Profile, UniformBaseline } from "../api/contract";
import type { BudgetKind } from "./budgets";
import { MIB } from "./quantities";

export interface Mark {
  x: number;
  y: number;
  label: string;
  kind: "uniform" | "uniform measured" | "verified" | "pinned" | "plan";
  /** 95 % interval of a measured value. */
  interval?: [number, number];
}

/** What stands on the axes: its size, and its latency where it is known. */
export interface Placed {
  bytes: number;
  bits_per_weight: number;
  latency_us?: number | null;
}

/** Returns the position on the horizontal axis: MiB, or what else is asked for; NaN where it is not known. */
export function alongAxis(kind: BudgetKind, placed: Placed): number {
  if (kind === "latency_us") return placed.latency_us ?? Number.NaN;
  return kind === "bits_per_weight" ? placed.bits_per_weight : placed.bytes / MIB;
}

/** Returns the points worth a look: beyond a tenth of what the best uniform format loses nobody sees a difference. */
export function usefulPoints(frontier: Frontier, profile: Profile): FrontierPoint[] {
  const losses = profile.uniform.map((uniform) => uniform.predicted_loss).filter((loss) => loss > 0);
  const positive = frontier.points.filter((point) => point.predicted_loss > 0);
  const floor = losses.length === 0 ? 0 : Math.min(...losses) / 10;
  const useful = positive.filter((point) => point.predicted_loss >= floor);
  return useful.length < 2 ? positive : useful;
}

/** Returns the curve as columns. */
export function curveColumns(kind: BudgetKind, useful: FrontierPoint[]): [number[], number[]] {
  const points = useful
    .map((point) => [alongAxis(kind, { ...point, latency_us: point.use }), point.predicted_loss] as const)
    .sort((a, b) => a[0] - b[0]);
  return [points.map(([x]) => x), points.map(([, y]) => y)];
}

export interface UniformPlace extends Pick<UniformBaseline, "format" | "bytes" | "bits_per_weight" | "predicted_loss"> {
  latency_us: number | null;
}

/** Returns the uniform formats as a plan's question sees them: by its metric, and with the cache where it is part of the plan. */
export function placeUniforms(profile: Profile, baselines: Plan["baselines"]): UniformPlace[] {
  const bits = new Map(profile.uniform.map((uniform) => [uniform.format, uniform.bits_per_weight]));
  return baselines.map(({ name, bytes, predicted_loss, latency_us }) => {
    const format = name.replace(/^uniform /, "");
    return { format, bytes, predicted_loss, latency_us, bits_per_weight: bits.get(format) ?? Number.NaN };
  });
}

/** Returns the marks beside the curve, those that matter most first: their labels choose their places first. */
export function listMarks(
  kind: BudgetKind,
  uniforms: UniformPlace[],
  measured: EvaluationRow[],
  pinned: Plan | null,
): Mark[] {
  const marks: Mark[] = [];
  if (pinned !== null) {
    const x = alongAxis(kind, pinned);
    marks.push({ x, y: pinned.predicted_loss, label: "pinned", kind: "pinned" });
  }
  for (const row of measured) {
    marks.push({
      x: alongAxis(kind, { bytes: row.memory_bytes, bits_per_weight: row.bits_per_weight }),
      y: row.kl,
      label: row.kind === "plan" ? "plan, measured" : "",
      kind: row.kind === "plan" ? "verified" : "uniform measured",
      interval: [row.kl_low, row.kl_high],
    });
  }
  const named = new Set<string>();
  for (const uniform of uniforms) {
    const x = alongAxis(kind, uniform);
    // What follows a comma (the embedding of such a format) stands in the table.
    const name = uniform.format.split(",")[0] ?? "";
    marks.push({ x, y: uniform.predicted_loss, label: named.has(name) ? "" : name, kind: "uniform" });
    named.add(name);
  }
  return marks.filter((mark) => mark.y > 0 && Number.isFinite(mark.x));
}

/** Returns the ends of both axes, with room around everything that is drawn. */
export function axisRanges(columns: [number[], number[]], marks: Mark[]): { x: [number, number]; y: [number, number] } {
  const xs = [...columns[0], ...marks.map((mark) => mark.x)];
  const ys = [...columns[1], ...marks.flatMap((mark) => [mark.y, ...(mark.interval ?? [])])].filter((y) => y > 0);
  if (xs.length === 0 || ys.length === 0) return { x: [0, 1], y: [1e-3, 1] };
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const margin = 0.03 * (right - left || right);
  const ratio = (Math.max(...ys) / Math.min(...ys)) ** 0.05 || 1.2;
  return {
    x: [left - margin, right + margin],
    y: [Math.min(...ys) / Math.max(ratio, 1.1), Math.max(...ys) * Math.max(ratio, 1.1)],
  };
}

/** Returns what a plan must beat: of the uniform formats that keep its budget of bytes the one that loses least, or null. */
export function uniformRival(plan: Plan): Plan["baselines"][number] | null {
  const most = Math.max(plan.bytes, plan.budget.bytes ?? 0);
  const fitting = plan.baselines.filter((baseline) => baseline.bytes <= most);
  return fitting.sort((a, b) => a.predicted_loss - b.predicted_loss)[0] ?? null;
}
