import { useMemo, useRef, useState } from "preact/hooks";
import type uPlot from "uplot";
import type { EvaluationRow, Frontier, FrontierPoint, Plan } from "../api/contract";
import { BUDGETS, type BudgetKind, type Range } from "../figures/budgets";
import { alongAxis, axisRanges, curveColumns, listMarks, type Mark, type UniformPlace } from "../figures/chart_series";
import { bitsText, bytesText, lossText, MIB } from "../figures/quantities";
import { BudgetHandle } from "../widgets/budget_handle";
import { AsTable } from "../widgets/data_table";
import { useWidth } from "../widgets/hooks";
import { Plot, type PlotShape } from "../widgets/plot";

interface FrontierChartProps {
  kind: BudgetKind;
  value: number;
  range: Range;
  frontier: Frontier;
  /** Those of its points that are drawn. */
  points: FrontierPoint[];
  plan: Plan | null;
  uniforms: UniformPlace[];
  measured: EvaluationRow[];
  pinned: Plan | null;
  onValue: (value: number) => void;
}

const X_LABELS: Record<BudgetKind, string> = {
  memory: "memory, MiB",
  bits_per_weight: "bits per weight",
  max_kl: "memory, MiB",
  latency_us: "latency of a step, µs",
};

function makeShape(kind: BudgetKind, points: FrontierPoint[], marks: Mark[]): PlotShape {
  const columns = curveColumns(kind, points);
  return {
    columns,
    ...axisRanges(columns, marks),
    logarithmic: true,
    xLabel: X_LABELS[kind],
    xText: (value) => String(Number(value.toPrecision(6))),
    xSpace: 60,
  };
}

interface Place {
  left: number;
  top: number;
  length: number;
}

// From the chart's own numbers: to ask the browser for them would have it lay the page out for every move.
function placeHandle(plot: uPlot, along: "x" | "y", value: number): Place {
  const [left, top, width, height] = [plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height].map(
    (pixels) => pixels / devicePixelRatio,
  ) as [number, number, number, number];
  return along === "x"
    ? { left: left + plot.valToPos(value, "x") - 1, top, length: height }
    : { left, top: top + plot.valToPos(value, "y") - 1, length: width };
}

/** The frontier, with everything else on its axes, and the budget as a line that can be dragged. */
export function FrontierChart(props: FrontierChartProps) {
  const { kind, value, range, frontier, points, plan, uniforms, measured, pinned, onValue } = props;
  const [measure, width] = useWidth<HTMLDivElement>();
  const [plot, setPlot] = useState<uPlot | null>(null);
  // While the line is dragged: where the axes lie in the window.
  const dragging = useRef<DOMRect | null>(null);
  const along = kind === "max_kl" ? "y" : "x";
  const others = useMemo(() => listMarks(kind, uniforms, measured, pinned), [kind, uniforms, measured, pinned]);
  const shape = useMemo(() => makeShape(kind, points, others), [kind, points, others]);
  const marks = useMemo<Mark[]>(() => {
    if (plan === null || plan.predicted_loss <= 0) return others;
    const x = alongAxis(kind, plan);
    if (!Number.isFinite(x)) return others;
    return [{ x, y: plan.predicted_loss, label: "", kind: "plan" }, ...others];
  }, [kind, plan, others]);
  const height = Math.round(Math.min(430, Math.max(280, 0.48 * width)));

  function take(event: PointerEvent): void {
    const box = dragging.current;
    if (plot === null || box === null) return;
    const at =
      along === "x" ? plot.posToVal(event.clientX - box.left, "x") : plot.posToVal(event.clientY - box.top, "y");
    const value = kind === "memory" ? at * MIB : at;
    onValue(Math.min(range.most, Math.max(range.least, value)));
  }
  function onPointerDown(event: PointerEvent): void {
    if (plot === null || event.button !== 0 || !plot.over.contains(event.target as Node)) return;
    dragging.current = plot.over.getBoundingClientRect();
    (event.currentTarget as HTMLElement).setPointerCapture(event.pointerId);
    (event.currentTarget as HTMLElement).querySelector<HTMLElement>("[role=slider]")?.focus({ preventScroll: true });
    event.preventDefault();
    take(event);
  }
  const place = plot === null ? null : placeHandle(plot, along, kind === "memory" ? value / MIB : value);
  return (
    <div>
      <h2>Least predicted loss at every {kind === "latency_us" ? "latency" : "size"}</h2>
      <p class="caption">Nats per token, logarithmic. Drag the line, or move it with the arrow keys.</p>
      <div
        ref={measure}
        class={`chart draggable along-${along}`}
        onPointerDown={onPointerDown}
        onPointerMove={take}
        onPointerUp={() => {
          dragging.current = null;
        }}
        onPointerCancel={() => {
          dragging.current = null;
        }}
      >
        <Plot
          shape={shape}
          marks={marks}
          width={width}
          height={height}
          onPlot={setPlot}
          label="Least predicted loss at every size, with uniform formats and measured plans. The numbers follow as a table."
        />
        {place !== null && (
          <BudgetHandle
            kind={kind}
            value={value}
            range={range}
            along={along}
            place={place}
            rightHalf={place.left > width / 2}
            onValue={onValue}
          />
        )}
      </div>
      <ChartKey measured={measured.length > 0} />
      <FrontierTables uniforms={uniforms} frontier={frontier} measured={measured} />
    </div>
  );
}

function ChartKey({ measured }: { measured: boolean }) {
  return (
    <p class="legend">
      <span>— best plan at each size, predicted</span>
      <span>● this plan</span>
      <span>□ one format everywhere, predicted</span>
      {measured && <span class="measured">◆ plan, ■ one format: measured on held-out text, 95 % interval</span>}
    </p>
  );
}

interface FrontierRow {
  what: string;
  bytes: number;
  bits_per_weight: number;
  predicted_loss?: number;
  kl?: EvaluationRow;
}

function intervalText(row: EvaluationRow): string {
  return `${lossText(row.kl)} (${lossText(row.kl_low)} – ${lossText(row.kl_high)})`;
}

type TablesProps = Pick<FrontierChartProps, "uniforms" | "frontier" | "measured">;

function FrontierTables({ uniforms, frontier, measured }: TablesProps) {
  const rows = (): FrontierRow[] => [
    ...frontier.points.map((point) => ({ what: "best plan", ...point })),
    ...uniforms.map((uniform) => ({ what: `uniform ${uniform.format}`, ...uniform })),
    ...measured.map((row) => ({
      what: row.name,
      bytes: row.memory_bytes,
      kl: row,
      bits_per_weight: row.bits_per_weight,
    })),
  ];
  return (
    <AsTable
      caption="The frontier"
      rows={rows}
      columns={[
        { title: "What", cell: (row) => row.what },
        { title: "Memory", cell: (row) => bytesText(row.bytes, 4), number: true },
        { title: "Bits per weight", cell: (row) => bitsText(row.bits_per_weight), number: true },
        {
          title: "Predicted loss, nats/token",
          cell: (row) => (row.predicted_loss === undefined ? "–" : lossText(row.predicted_loss)),
          number: true,
        },
        { title: "Measured KL, nats/token", cell: (row) => (row.kl ? intervalText(row.kl) : "–"), number: true },
      ]}
    />
  );
}

/** Returns what a plan was asked for. */
export function planBudget(plan: Plan): string {
  const { bytes, bits_per_weight, max_kl, latency_us } = plan.budget;
  if (bits_per_weight !== undefined) return BUDGETS.bits_per_weight.text(bits_per_weight);
  if (max_kl !== undefined) return `KL ≤ ${BUDGETS.max_kl.text(max_kl)}`;
  if (latency_us !== undefined) return BUDGETS.latency_us.text(latency_us);
  return bytes === undefined ? bytesText(plan.bytes, 4) : BUDGETS.memory.text(bytes);
}
