import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { bitsText, bytesText } from "../figures/quantities";
import { BIT_STEPS, bitStep, type Cell, type UnitGrid } from "../figures/unit_grid";
import { AsTable } from "./data_table";
import { useWidth } from "./hooks";

const NAMES_PX = 92;
const LEAST_CELL_PX = 19;
const MOST_CELL_PX = 96;
const LEAST_WORD_PX = 15;

/** What a cell shows: the word in it, its class for the colour, and all of it in words. */
export interface CellLook {
  word: string;
  tone: string;
  text: string;
}

interface HeatMapProps {
  grid: UnitGrid;
  label: string;
  onCell: (cell: Cell) => void;
  look?: (cell: Cell) => CellLook;
  legend?: ComponentChildren;
}

/** Returns where a cell is and what its units are stored in. */
export function describeCell(cell: Cell): string {
  const where = cell.layer === null ? cell.role : `Layer ${cell.layer}, ${cell.role}`;
  const formats = cell.formats.length > 2 ? `${cell.formats.length} formats` : cell.formats.join(" and ");
  return `${where}: ${formats}, ${bitsText(cell.bits)} bits per weight, ${bytesText(cell.bytes)}`;
}

function lookOfBits(cell: Cell): CellLook {
  const word = Number.isFinite(cell.bits) ? String(Math.round(cell.bits)) : "";
  return { word, tone: `bits-${bitStep(cell.bits)}`, text: describeCell(cell) };
}

interface CellButtonProps {
  cell: Cell;
  look: (cell: Cell) => CellLook;
  focusable: boolean;
  onCell: (cell: Cell) => void;
}

function CellButton({ cell, look, focusable, onCell }: CellButtonProps) {
  const { word, tone, text } = look(cell);
  return (
    <button
      type="button"
      class={`cell ${tone}`}
      tabIndex={focusable ? 0 : -1}
      aria-label={text}
      title={text}
      onClick={() => onCell(cell)}
    >
      {word}
    </button>
  );
}

function BitsLegend() {
  return (
    <p class="legend">
      <span>stored bits per weight, rounded:</span>
      <span>
        {BIT_STEPS.map((step) => (
          <span key={step} class={`swatch bits-${step}`}>
            {step}
          </span>
        ))}
      </span>
    </p>
  );
}

// Keys move between the cells of a grid, one of which is a stop of the Tab key.
const MOVES: Record<string, [number, number]> = {
  ArrowRight: [0, 1],
  ArrowLeft: [0, -1],
  ArrowDown: [1, 0],
  ArrowUp: [-1, 0],
  Home: [0, -1e6],
  End: [0, 1e6],
};

/** Bits by layer and role. Wide: layers run from left to right; narrow: from top to bottom. */
export function HeatMap({ grid, label, onCell, look = lookOfBits, legend = <BitsLegend /> }: HeatMapProps) {
  const [measure, width] = useWidth<HTMLDivElement>();
  const [stop, setStop] = useState<[number, number]>([0, 0]);
  const sideways = width - NAMES_PX >= LEAST_CELL_PX * Math.min(grid.layers.length, 48) && width > 520;
  const rows = sideways ? grid.roles : grid.layers.map(String);
  const columns = sideways ? grid.layers.map(String) : grid.roles;
  const at = (row: number, column: number): Cell | undefined => {
    const role = grid.roles[sideways ? row : column] ?? "";
    return grid.cells.get(role)?.get(grid.layers[sideways ? column : row] ?? -1);
  };
  const cellWidth = (width - (sideways ? NAMES_PX : 30)) / Math.max(1, columns.length);
  function onKeyDown(event: KeyboardEvent): void {
    const move = MOVES[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const clamp = (value: number, count: number) => Math.min(count - 1, Math.max(0, value));
    const next: [number, number] = [clamp(stop[0] + move[0], rows.length), clamp(stop[1] + move[1], columns.length)];
    setStop(next);
    const body = (event.currentTarget as HTMLElement).querySelector("tbody");
    body?.rows[next[0]]?.cells[next[1] + 1]?.querySelector<HTMLElement>("button")?.focus();
  }
  return (
    <div>
      {grid.outside.length > 0 && (
        <div class="outside">
          {grid.outside.map((cell) => (
            <span key={cell.role}>
              {cell.role}
              <CellButton cell={cell} look={look} focusable onCell={onCell} />
            </span>
          ))}
        </div>
      )}
      <div ref={measure} class={`heat ${sideways ? "" : "upright"} ${cellWidth < LEAST_WORD_PX ? "wordless" : ""}`}>
        <table
          // biome-ignore lint/a11y/noNoninteractiveElementToInteractiveRole: a table whose cells are buttons is a grid.
          role="grid"
          aria-label={label}
          style={{ maxWidth: `${NAMES_PX + MOST_CELL_PX * columns.length}px` }}
          onKeyDown={onKeyDown}
        >
          <colgroup>
            <col class="names" />
            {columns.map((column) => (
              <col key={column} />
            ))}
          </colgroup>
          <thead>
            <tr>
              <th scope="col">
                <span class="visually-hidden">{sideways ? "Role" : "Layer"}</span>
              </th>
              {columns.map((column, index) => (
                <th key={column} scope="col">
                  <span>{!sideways || columns.length <= 40 || index % 5 === 0 ? column : ""}</span>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows.map((row, r) => (
              <tr key={row}>
                <th scope="row" class="role" title={row}>
                  {row}
                </th>
                {columns.map((column, c) => {
                  const cell = at(r, c);
                  return (
                    <td key={column} onFocusCapture={() => setStop([r, c])}>
                      {cell && (
                        <CellButton
                          cell={cell}
                          look={look}
                          focusable={stop[0] === r && stop[1] === c}
                          onCell={onCell}
                        />
                      )}
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {legend}
      <AsTable
        caption="Bits by layer and role"
        rows={() => [...grid.outside, ...grid.roles.flatMap((role) => [...(grid.cells.get(role)?.values() ?? [])])]}
        columns={[
          { title: "Layer", cell: (cell) => cell.layer ?? "–", number: true },
          { title: "Role", cell: (cell) => cell.role },
          { title: "Format", cell: (cell) => cell.formats.join(", ") },
          { title: "Bits per weight", cell: (cell) => bitsText(cell.bits), number: true },
          { title: "Bytes", cell: (cell) => bytesText(cell.bytes), number: true },
        ]}
      />
    </div>
  );
}
