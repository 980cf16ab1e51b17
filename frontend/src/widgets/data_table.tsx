import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";

export interface Column<R> {
  title: string;
  cell: (row: R) => ComponentChildren;
  number?: boolean;
}

interface DataTableProps<R> {
  columns: Column<R>[];
  rows: R[];
  caption: string;
}

/** A table that scrolls in itself; numbers stand right. */
export function DataTable<R>({ columns, rows, caption }: DataTableProps<R>) {
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: what scrolls must be reached by the keyboard.
    <section class="table-scroll" tabIndex={0} aria-label={caption}>
      <table>
        <thead>
          <tr>
            {columns.map((column) => (
              <th key={column.title} scope="col" class={column.number ? "number" : ""}>
                {column.title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row, index) => (
            <tr key={index}>
              {columns.map((column) => (
                <td key={column.title} class={column.number ? "number" : ""}>
                  {column.cell(row)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </section>
  );
}

interface AsTableProps<R> {
  columns: Column<R>[];
  rows: () => R[];
  caption: string;
}

/** The numbers of a chart as a table, made when it is opened. */
export function AsTable<R>({ columns, rows, caption }: AsTableProps<R>) {
  const [open, setOpen] = useState(false);
  return (
    <details onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>{caption} as a table</summary>
      {open && <DataTable columns={columns} rows={rows()} caption={caption} />}
    </details>
  );
}
