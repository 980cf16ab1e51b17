import { useEffect, useRef, useState } from "preact/hooks";
import { extent } from "../figures/expert_fields";
import { onThemeChange, themeColour } from "../style/theme";
import { useWidth } from "./hooks";

const SCALE = ["--bits-1", "--bits-2", "--bits-3", "--bits-4", "--bits-5", "--bits-6", "--bits-8", "--bits-16"];
const LAYER_NAMES_PX = 34;
const MOST_NAMES = 32;
const MOST_CELL_PX = 72;

interface ExpertMapProps {
  layers: number[];
  /** [layers, experts] */
  values: number[][];
  text: (value: number) => string;
  label: string;
  fixed: [number, number] | null;
  onLayer: (row: number) => void;
}

interface Place {
  row: number;
  expert: number;
}

function paint(
  canvas: HTMLCanvasElement,
  values: number[][],
  ends: [number, number],
  width: number,
  cell: number,
): void {
  const context = canvas.getContext("2d");
  if (context === null) return;
  const colours = SCALE.map(themeColour);
  const scale = devicePixelRatio;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(values.length * cell * scale);
  const experts = values[0]?.length ?? 1;
  const step = canvas.width / experts;
  const span = ends[1] - ends[0] || 1;
  for (const [row, line] of values.entries()) {
    for (const [expert, value] of line.entries()) {
      if (!Number.isFinite(value)) continue;
      const share = Math.min(1, Math.max(0, (value - ends[0]) / span));
      context.fillStyle = colours[Math.round(share * (colours.length - 1))] ?? "";
      const gap = step > 6 * scale ? scale : 0;
      const left = Math.round(expert * step);
      context.fillRect(left, row * cell * scale, Math.round((expert + 1) * step) - left - gap, cell * scale - gap);
    }
  }
}

const MOVES: Record<string, [number, number]> = {
  ArrowRight: [0, 1],
  ArrowLeft: [0, -1],
  ArrowDown: [1, 0],
  ArrowUp: [-1, 0],
};

/** Experts from left to right, layers from top to bottom, on a canvas: there may be tens of thousands. */
export function ExpertMap({ layers, values, text, label, fixed, onLayer }: ExpertMapProps) {
  const [measure, width] = useWidth<HTMLDivElement>();
  const canvas = useRef<HTMLCanvasElement>(null);
  const [place, setPlace] = useState<Place | null>(null);
  const experts = values[0]?.length ?? 0;
  const cell = layers.length <= 12 ? 28 : layers.length <= 32 ? 18 : 12;
  const mapWidth = Math.min(MOST_CELL_PX * experts, Math.max(0, width - LAYER_NAMES_PX));
  const ends = fixed ?? extent(values);
  useEffect(() => {
    const redraw = () => canvas.current && mapWidth > 0 && paint(canvas.current, values, ends, mapWidth, cell);
    redraw();
    return onThemeChange(redraw);
  }, [values, mapWidth, cell, ends[0], ends[1]]);
  function placeOf(event: PointerEvent | MouseEvent): Place {
    const box = (event.currentTarget as HTMLElement).getBoundingClientRect();
    const clamp = (value: number, count: number) => Math.min(count - 1, Math.max(0, Math.floor(value)));
    return {
      row: clamp((event.clientY - box.top) / cell, layers.length),
      expert: clamp(((event.clientX - box.left) / box.width) * experts, experts),
    };
  }
  function onKeyDown(event: KeyboardEvent): void {
    const move = MOVES[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const at = place ?? { row: 0, expert: -1 };
    const next = {
      row: Math.min(layers.length - 1, Math.max(0, at.row + move[0])),
      expert: Math.min(experts - 1, Math.max(0, at.expert + move[1])),
    };
    setPlace(next);
    onLayer(next.row);
  }
  const reading =
    place === null
      ? "Point at an expert, or move with the arrow keys."
      : `Layer ${layers[place.row]}, expert ${place.expert}: ${text(values[place.row]?.[place.expert] ?? Number.NaN)}`;
  const every = layers.length <= 16 ? 1 : 5;
  return (
    <div ref={measure} class="expert-map">
      <p class="reading" aria-live="polite">
        {reading}
      </p>
      <div class="expert-frame">
        <div class="layer-names" aria-hidden="true">
          {layers.map((layer, row) => (
            <span key={layer} style={{ height: `${cell}px`, lineHeight: `${cell}px` }}>
              {row % every === 0 ? layer : ""}
            </span>
          ))}
        </div>
        <div class="expert-canvas" style={{ maxWidth: `${mapWidth}px` }}>
          <canvas
            ref={canvas}
            tabIndex={0}
            role="img"
            aria-label={`${label}. Layers from top to bottom, experts from left to right; arrow keys read single experts.`}
            style={{ height: `${layers.length * cell}px` }}
            onPointerMove={(event) => setPlace(placeOf(event))}
            onClick={(event) => onLayer(placeOf(event).row)}
            onKeyDown={onKeyDown}
          />
          {place !== null && (
            <span
              class="cursor"
              style={{
                left: `${(100 * place.expert) / experts}%`,
                width: `${100 / experts}%`,
                top: `${place.row * cell}px`,
                height: `${cell}px`,
              }}
            />
          )}
          {experts <= MOST_NAMES && (
            <div class="expert-names" aria-hidden="true">
              {(values[0] ?? []).map((_, expert) => (
                <span key={expert}>{expert}</span>
              ))}
            </div>
          )}
        </div>
      </div>
      <p class="legend">
        <span>{text(ends[0])}</span>
        <span class="ramp" aria-hidden="true">
          {SCALE.map((name) => (
            <span key={name} style={{ background: `var(${name})` }} />
          ))}
        </span>
        <span>{text(ends[1])}</span>
        <span>
          {experts} experts from left to right, {layers.length} layers from top to bottom
        </span>
      </p>
    </div>
  );
}
