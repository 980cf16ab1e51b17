// What stands on the axes of the frontier: the curve, the uniform formats, what was measured.
import type { EvaluationRow, Frontier, Plan, Profile } from "../api/contract";
import type { BudgetKind } from "./budgets";

export interface Mark {
  x: number;
  y: number;
  label: string;
  kind: "uniform" | "uniform measured" | "verified" | "pinned" | "plan";
  /** 95 % interval of a measured value. */
  interval?: [number, number];
}

/** Returns the position on the horizontal axis: MiB would round, so bytes, or bits per weight where these are asked for. */
export function alongAxis(kind: BudgetKind, bytes: number, bits: number): number {
  return kind === "bits_per_weight" ? bits : bytes;
}

/** Returns the curve as columns, only where a logarithm exists. */
export function curveColumns(kind: BudgetKind, frontier: Frontier): [number[], number[]] {
  const points = frontier.points
    .filter((point) => point.predicted_loss > 0)
    .map((point) => [alongAxis(kind, point.use, point.bits_per_weight), point.predicted_loss] as const)
    .sort((a, b) => a[0] - b[0]);
  return [points.map(([x]) => x), points.map(([, y]) => y)];
}

/** Returns the marks beside the curve, those that matter most first: their labels choose their places first. */
export function listMarks(kind: BudgetKind, profile: Profile, measured: EvaluationRow[], pinned: Plan | null): Mark[] {
  const marks: Mark[] = [];
  if (pinned !== null) {
    const x = alongAxis(kind, pinned.bytes, pinned.bits_per_weight);
    marks.push({ x, y: pinned.predicted_loss, label: "pinned", kind: "pinned" });
  }
  for (const row of measured) {
    marks.push({
      x: alongAxis(kind, row.memory_bytes, row.bits_per_weight),
      y: row.kl,
      label: row.kind === "plan" ? "plan, measured" : "",
      kind: row.kind === "plan" ? "verified" : "uniform measured",
      interval: [row.kl_low, row.kl_high],
    });
  }
  for (const uniform of profile.uniform) {
    const x = alongAxis(kind, uniform.bytes, uniform.bits_per_weight);
    marks.push({ x, y: uniform.predicted_loss, label: uniform.format, kind: "uniform" });
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

/** Returns the predicted losses of the uniform formats at most so large, the best first: what a plan must beat. */
export function uniformRival(profile: Profile, bytes: number): { format: string; loss: number; bytes: number } | null {
  const fitting = profile.uniform.filter((uniform) => uniform.bytes <= bytes);
  const best = fitting.sort((a, b) => a.predicted_loss - b.predicted_loss)[0];
  return best === undefined ? null : { format: best.format, loss: best.predicted_loss, bytes: best.bytes };
}
