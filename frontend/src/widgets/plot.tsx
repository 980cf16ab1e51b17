import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import type { Mark } from "../figures/chart_series";
import { tickText } from "../figures/quantities";
import { onThemeChange, themeColour } from "../style/theme";
import { drawMarks } from "./chart_drawing";

export interface PlotShape {
  /** The curve: x ascending, y beside it. */
  columns: [number[], number[]];
  x: [number, number];
  y: [number, number];
  logarithmic: boolean;
  xLabel: string;
  xText: (value: number) => string;
  /** Room between two ticks, in CSS pixels. */
  xSpace: number;
}

function axis(values: (value: number) => string, more: uPlot.Axis): uPlot.Axis {
  return {
    stroke: () => themeColour("--ink-soft"),
    grid: { stroke: () => themeColour("--line"), width: 1, ...(more.filter ? { filter: more.filter } : {}) },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    values: (_plot, splits) => splits.map((value) => (value === null ? "" : values(value))),
    ...more,
  };
}

// Of a decade the ticks at 1, 2 and 5 are named; of many decades those at 1.
function nameDecades(splits: number[], [least, most]: [number, number]): number[] {
  const named = Math.log10(most / least) > 2.5 ? /^1(\.0*)?e/ : /^[125](\.0*)?e/;
  return splits.map((value) => (value !== null && named.test(value.toExponential(3)) ? value : null)) as number[];
}

function makeOptions(
  shape: PlotShape,
  width: number,
  height: number,
  marks: { current: Mark[] },
  // Told once positions on the chart are known, which is after its first drawing.
  onReady: (plot: uPlot) => void,
): uPlot.Options {
  const points = { show: false };
  return {
    width,
    height,
    legend: { show: false },
    cursor: { show: false, drag: { x: false, y: false } },
    scales: {
      x: { time: false, range: () => shape.x },
      y: shape.logarithmic ? { distr: 3, log: 10, range: () => shape.y } : { range: () => shape.y },
    },
    axes: [
      axis(shape.xText, { space: shape.xSpace, size: 28, label: shape.xLabel, labelSize: 18 }),
      axis(tickText, {
        size: 48,
        ...(shape.logarithmic ? { filter: (_plot, splits) => nameDecades(splits, shape.y) } : {}),
      }),
    ],
    series: [{}, { stroke: () => themeColour("--accent"), width: 2, points }],
    hooks: { draw: [(plot) => drawMarks(plot, marks.current)], ready: [onReady] },
  };
}

interface PlotProps {
  shape: PlotShape;
  marks: Mark[];
  width: number;
  height: number;
  label: string;
  onPlot?: (plot: uPlot | null) => void;
}

/** A curve with marks on a canvas. Marks are redrawn without rebuilding the chart. */
export function Plot({ shape, marks, width, height, label, onPlot }: PlotProps) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const drawn = useRef<Mark[]>(marks);
  drawn.current = marks;
  useEffect(() => {
    if (host.current === null || width === 0) return;
    const made = new uPlot(
      makeOptions(shape, width, height, drawn, (ready) => onPlot?.(ready)),
      shape.columns,
      host.current,
    );
    plot.current = made;
    const stop = onThemeChange(() => made.redraw(false, true));
    return () => {
      stop();
      plot.current = null;
      onPlot?.(null);
      made.destroy();
    };
  }, [shape, width, height]);
  useLayoutEffect(() => {
    plot.current?.redraw(false, false);
  }, [marks]);
  return (
    <div role="img" aria-label={label} style={{ height: `${height}px` }}>
      <div ref={host} aria-hidden="true" />
    </div>
  );
}
