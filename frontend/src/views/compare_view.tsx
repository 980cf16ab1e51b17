import { useMemo, useState } from "preact/hooks";
import { service } from "../api/client";
import type { Plan, Profile } from "../api/contract";
import { diffPlans, type UnitChange } from "../figures/plan_difference";
import { bitsText, bytesText, lossText, MIB, signedText, significant } from "../figures/quantities";
import { type Cell, makeGrid } from "../figures/unit_grid";
import { BreakableName } from "../widgets/breakable_name";
import { DataTable } from "../widgets/data_table";
import { type CellLook, describeCell, HeatMap } from "../widgets/heat_map";
import { useLoaded } from "../widgets/hooks";
import { ErrorNote } from "../widgets/job_line";
import { planBudget } from "./frontier_chart";
import { ReportDialog } from "./report_dialog";
import { UnitDialog } from "./unit_dialog";

interface CompareViewProps {
  first: string;
  second: string;
}

/** Two plans side by side, and the units on which they differ. */
export function CompareView({ first, second }: CompareViewProps) {
  const { value, error } = useLoaded(`${first}\n${second}`, async () => {
    const plans = await Promise.all([service.plan(first), service.plan(second)]);
    return { profile: await service.profile(plans[1].profile_id), first: plans[0], second: plans[1] };
  });
  if (value === null) return error === null ? <p class="soft">Loading …</p> : <ErrorNote error={error} />;
  return <Comparison {...value} />;
}

interface FigureRow {
  what: string;
  value: (plan: Plan) => number | null;
  text: (value: number) => string;
}

const FIGURES: FigureRow[] = [
  { what: "Predicted loss, nats per token", value: (plan) => plan.predicted_loss, text: lossText },
  { what: "Measured KL, nats per token", value: (plan) => plan.measured_kl, text: lossText },
  { what: "Memory", value: (plan) => plan.bytes, text: (value) => bytesText(value, 4) },
  { what: "Bits per weight", value: (plan) => plan.bits_per_weight, text: bitsText },
  {
    what: "Shadow price, nats per MiB",
    value: (plan) => (plan.shadow_price === null ? null : plan.shadow_price * MIB),
    text: (value) => significant(value),
  },
];

function differenceText(row: FigureRow, first: Plan, second: Plan): string {
  const [before, after] = [row.value(first), row.value(second)];
  return before === null || after === null ? "–" : signedText(after - before, row.text);
}

interface ComparisonProps {
  profile: Profile;
  first: Plan;
  second: Plan;
}

function Comparison({ profile, first, second }: ComparisonProps) {
  const [reporting, setReporting] = useState(false);
  const changes = useMemo(() => diffPlans(profile, first, second), [profile, first, second]);
  const text = (row: FigureRow, plan: Plan) => {
    const value = row.value(plan);
    return value === null ? "–" : row.text(value);
  };
  return (
    <div class="stack">
      <DataTable
        caption="Two plans in numbers"
        rows={FIGURES}
        columns={[
          { title: "", cell: (row) => row.what },
          { title: `First: ${planBudget(first)}`, cell: (row) => text(row, first), number: true },
          { title: `Second: ${planBudget(second)}`, cell: (row) => text(row, second), number: true },
          { title: "Second less first", cell: (row) => differenceText(row, first, second), number: true },
        ]}
      />
      <div class="row spread">
        <p>
          {changes.length === 0
            ? "Both plans store every unit alike."
            : `${changes.length} of ${Object.keys(second.choice).length} units are stored otherwise.`}
        </p>
        <button type="button" onClick={() => setReporting(true)}>
          Report of both …
        </button>
      </div>
      {reporting && (
        <ReportDialog
          title="Report of both plans"
          of={{ plan_ids: [first.id, second.id] }}
          onClose={() => setReporting(false)}
        />
      )}
      <div class="two-columns even">
        <ChangeMap profile={profile} first={first} second={second} />
        <ChangeList changes={changes} />
      </div>
    </div>
  );
}

function ChangeMap({ profile, first, second }: ComparisonProps) {
  const grid = useMemo(() => makeGrid(profile, second.choice), [profile, second]);
  const before = useMemo(() => makeGrid(profile, first.choice), [profile, first]);
  const [open, setOpen] = useState<Cell | null>(null);
  function look(cell: Cell): CellLook {
    const old =
      cell.layer === null
        ? before.outside.find((other) => other.role === cell.role)
        : before.cells.get(cell.role)?.get(cell.layer);
    const change = cell.bits - (old?.bits ?? Number.NaN);
    const same = Number.isNaN(change) || Math.abs(change) < 0.005;
    const word = same ? "·" : signedText(Math.round(change) || Number(change.toFixed(1)), String);
    const text = `${describeCell(cell)}; in the first plan ${old ? `${old.formats.join(" and ")}, ${bitsText(old.bits)}` : "unknown"}`;
    return { word, tone: same ? "bits-0" : change > 0 ? "more" : "less", text };
  }
  const legend = (
    <p class="legend">
      <span>
        <span class="swatch more">+2</span> more bits in the second plan
      </span>
      <span>
        <span class="swatch less">−2</span> fewer
      </span>
    </p>
  );
  return (
    <section class="panel" aria-label="Difference by layer and role">
      <h2>Bits per weight, second plan less first</h2>
      <HeatMap grid={grid} label="Difference in bits by layer and role" onCell={setOpen} look={look} legend={legend} />
      {open !== null && <UnitDialog plan={second} units={open.units} onClose={() => setOpen(null)} />}
    </section>
  );
}

function ChangeList({ changes }: { changes: UnitChange[] }) {
  if (changes.length === 0) return null;
  return (
    <section class="panel" aria-label="Units that differ">
      <h2>Units that differ, most bytes first</h2>
      <DataTable
        caption="Units that differ"
        rows={changes}
        columns={[
          { title: "Unit", cell: (row) => <BreakableName name={row.unit} /> },
          { title: "First", cell: (row) => row.before },
          { title: "Second", cell: (row) => row.after },
          { title: "Bytes", cell: (row) => signedText(row.bytes, bytesText), number: true },
          { title: "Loss", cell: (row) => signedText(row.loss, lossText), number: true },
        ]}
      />
    </section>
  );
}
