// Units × plan → the cells of the heat map: one for each layer and role, with the bits that are stored there.
import type { Profile, ProfileUnit } from "../api/contract";

export interface Cell {
  layer: number | null;
  role: string;
  /** Units of the cell: one, or the experts of a layer. */
  units: string[];
  formats: string[];
  bytes: number;
  /** Stored bits per weight, scales and zero points included. */
  bits: number;
}

export interface UnitGrid {
  layers: number[];
  roles: string[];
  /** Role → layer → cell. */
  cells: Map<string, Map<number, Cell>>;
  /** Units outside of the layers: embedding, head. */
  outside: Cell[];
}

function bytesOf(unit: ProfileUnit, format: string): number {
  return unit.bytes_by_format[format] ?? Number.NaN;
}

function makeCell(units: ProfileUnit[], choice: Record<string, string>): Cell {
  const first = units[0] as ProfileUnit;
  const bytes = units.reduce((sum, unit) => sum + bytesOf(unit, choice[unit.name] ?? ""), 0);
  const parameters = units.reduce((sum, unit) => sum + unit.parameters, 0);
  return {
    layer: first.layer,
    role: first.role,
    units: units.map((unit) => unit.name),
    formats: [...new Set(units.map((unit) => choice[unit.name] ?? "–"))],
    bytes,
    bits: (8 * bytes) / parameters,
  };
}

/** Returns the cells of a plan. Units that the plan does not name (another engine's fusions) are left out. */
export function makeGrid(profile: Profile, choice: Record<string, string>): UnitGrid {
  const groups = new Map<string, ProfileUnit[]>();
  const roles: string[] = [];
  const layers = new Set<number>();
  for (const unit of profile.units) {
    if (!(unit.name in choice)) continue;
    const key = `${unit.role}\n${unit.layer ?? ""}`;
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [unit]);
    else group.push(unit);
    if (unit.layer === null) continue;
    layers.add(unit.layer);
    if (!roles.includes(unit.role)) roles.push(unit.role);
  }
  const cells = new Map<string, Map<number, Cell>>(roles.map((role) => [role, new Map()]));
  const outside: Cell[] = [];
  for (const units of groups.values()) {
    const cell = makeCell(units, choice);
    if (cell.layer === null) outside.push(cell);
    else cells.get(cell.role)?.set(cell.layer, cell);
  }
  return { layers: [...layers].sort((a, b) => a - b), roles, cells, outside };
}

export interface CacheRow {
  role: string;
  format: string;
  count: number;
}

/** Returns what a plan stores beside the weights: the last part of a cache's name, its format, and in how many layers. */
export function listCaches(profile: Profile, choice: Record<string, string>): CacheRow[] {
  const weights = new Set(profile.units.map((unit) => unit.name));
  const rows = new Map<string, CacheRow>();
  for (const [name, format] of Object.entries(choice)) {
    if (weights.has(name)) continue;
    const role = name.slice(name.lastIndexOf(".") + 1);
    const row = rows.get(`${role}\n${format}`) ?? { role, format, count: 0 };
    row.count += 1;
    rows.set(`${role}\n${format}`, row);
  }
  return [...rows.values()].sort((a, b) => a.role.localeCompare(b.role) || b.count - a.count);
}

export const BIT_STEPS = [1, 2, 3, 4, 5, 6, 8, 16] as const;

/** Returns the step of the colour scale that stored bits fall on: the nearest, of two alike the lower. */
export function bitStep(bits: number): number {
  const nearest = BIT_STEPS.reduce((best, step) => (Math.abs(step - bits) < Math.abs(best - bits) ? step : best));
  return Number.isFinite(bits) ? nearest : 0;
}
