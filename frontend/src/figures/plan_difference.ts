// Two plans side by side: the units whose formats differ, and what each change costs and saves.
import type { Plan, Profile } from "../api/contract";

export interface UnitChange {
  unit: string;
  layer: number | null;
  role: string;
  before: string;
  after: string;
  /** Bytes and loss of the second plan less those of the first. */
  bytes: number;
  loss: number;
}

/** Returns the units on which two plans differ, those that move most bytes first. */
export function diffPlans(profile: Profile, first: Plan, second: Plan): UnitChange[] {
  const changes: UnitChange[] = [];
  for (const unit of profile.units) {
    const before = first.choice[unit.name];
    const after = second.choice[unit.name];
    if (before === undefined || after === undefined || before === after) continue;
    changes.push({
      unit: unit.name,
      layer: unit.layer,
      role: unit.role,
      before,
      after,
      bytes: (unit.bytes_by_format[after] ?? Number.NaN) - (unit.bytes_by_format[before] ?? Number.NaN),
      loss: (unit.loss_by_format[after] ?? Number.NaN) - (unit.loss_by_format[before] ?? Number.NaN),
    });
  }
  return changes.sort((a, b) => Math.abs(b.bytes) - Math.abs(a.bytes) || a.unit.localeCompare(b.unit));
}
