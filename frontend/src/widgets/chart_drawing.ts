// Marks and direct labels on a uPlot canvas.
import type uPlot from "uplot";
import type { Mark } from "../figures/chart_series";
import { type Box, placeLabels } from "../figures/label_places";
import { themeColour } from "../style/theme";

const FONT_PX = 11.5;
const FONT = `${FONT_PX}px system-ui, sans-serif`;

function trace(context: CanvasRenderingContext2D, kind: Mark["kind"], x: number, y: number, radius: number): void {
  context.beginPath();
  if (kind === "verified" || kind === "pinned") {
    context.moveTo(x, y - 1.35 * radius);
    context.lineTo(x + 1.35 * radius, y);
    context.lineTo(x, y + 1.35 * radius);
    context.lineTo(x - 1.35 * radius, y);
    context.closePath();
  } else if (kind === "plan") context.arc(x, y, 1.3 * radius, 0, 2 * Math.PI);
  else context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
}

const COLOURS: Record<Mark["kind"], string> = {
  uniform: "--ink-soft",
  "uniform measured": "--measured",
  verified: "--measured",
  pinned: "--ink",
  plan: "--accent",
};
const FILLED = new Set<Mark["kind"]>(["uniform measured", "verified", "plan"]);

function drawMark(plot: uPlot, mark: Mark, scale: number): { x: number; y: number } {
  const context = plot.ctx;
  const x = plot.valToPos(mark.x, "x", true);
  const y = plot.valToPos(mark.y, "y", true);
  const colour = themeColour(COLOURS[mark.kind]);
  context.strokeStyle = colour;
  context.fillStyle = FILLED.has(mark.kind) ? colour : themeColour("--ground");
  context.lineWidth = 1.5 * scale;
  if (mark.interval) {
    context.beginPath();
    context.moveTo(x, plot.valToPos(Math.max(mark.interval[0], plot.scales.y?.min ?? 0), "y", true));
    context.lineTo(x, plot.valToPos(mark.interval[1], "y", true));
    context.stroke();
  }
  trace(context, mark.kind, x, y, 3.5 * scale);
  context.fill();
  context.stroke();
  return { x, y };
}

/** Draws marks and, where there is room, their labels. Earlier marks get their labels first. */
export function drawMarks(plot: uPlot, marks: Mark[]): void {
  const context = plot.ctx;
  const scale = devicePixelRatio;
  context.save();
  // Back to front: what matters most lies on top.
  const places = marks.toReversed().map((mark) => drawMark(plot, mark, scale));
  places.reverse();
  context.font = FONT.replace(`${FONT_PX}`, String(FONT_PX * scale));
  context.textBaseline = "top";
  context.textAlign = "left";
  const labelled = marks.flatMap((mark, index) => (mark.label === "" ? [] : [{ mark, at: places[index] }]));
  const boxes = placeLabels(
    labelled.map(({ mark, at }) => ({
      x: at?.x ?? 0,
      y: at?.y ?? 0,
      width: context.measureText(mark.label).width,
      height: FONT_PX * 1.25 * scale,
    })),
    plot.bbox,
    places.map(({ x, y }): Box => ({ left: x - 4 * scale, top: y - 4 * scale, width: 8 * scale, height: 8 * scale })),
  );
  for (const [index, box] of boxes.entries()) {
    const mark = labelled[index]?.mark;
    if (box === null || mark === undefined) continue;
    context.fillStyle = themeColour(COLOURS[mark.kind]);
    context.fillText(mark.label, box.left, box.top);
  }
  context.restore();
}
