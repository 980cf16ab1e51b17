import { Fragment } from "preact";
import type { Plan, Profile } from "../api/contract";
import { bitsText, bytesText, percentText } from "../figures/quantities";
import { AsTable } from "../widgets/data_table";

interface RoleRow {
  role: string;
  bytes: number;
  bits: number | null;
}

function listRows(plan: Plan, profile: Profile): RoleRow[] {
  const rows = plan.bytes_by_role.map(({ role, bytes, bits_per_weight }) => ({ role, bytes, bits: bits_per_weight }));
  rows.sort((a, b) => b.bytes - a.bytes);
  return [...rows, { role: "not allocated", bytes: profile.fixed_bytes, bits: null }];
}

/** Where the bytes of a plan are. */
export function RoleBars({ plan, profile }: { plan: Plan; profile: Profile }) {
  const rows = listRows(plan, profile);
  const most = Math.max(...rows.map((row) => row.bytes));
  const total = rows.reduce((sum, row) => sum + row.bytes, 0);
  return (
    <div>
      <div class="bars" aria-hidden="true">
        <span class="soft small">role</span>
        <span />
        <span class="soft small number">bytes</span>
        <span class="soft small number">bits/weight</span>
        {rows.map((row) => (
          <Fragment key={row.role}>
            <span class="name" title={row.role}>
              {row.role}
            </span>
            <span class="bar-track">
              <span class="bar-fill" style={{ display: "block", width: `${(100 * row.bytes) / most}%` }} />
            </span>
            <span class="number">{bytesText(row.bytes)}</span>
            <span class="number">{bitsText(row.bits)}</span>
          </Fragment>
        ))}
      </div>
      <AsTable
        caption="Bytes by role"
        rows={() => rows}
        columns={[
          { title: "Role", cell: (row) => row.role },
          { title: "Bytes", cell: (row) => bytesText(row.bytes, 4), number: true },
          { title: "Share", cell: (row) => percentText(row.bytes / total), number: true },
          { title: "Bits per weight", cell: (row) => bitsText(row.bits), number: true },
        ]}
      />
    </div>
  );
}
