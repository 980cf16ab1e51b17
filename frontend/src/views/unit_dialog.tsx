import { useMemo, useState } from "preact/hooks";
import { service } from "../api/client";
import type { CurvePoint, Plan, UnitExplanation } from "../api/contract";
import type { Mark } from "../figures/chart_series";
import { explainChoice } from "../figures/explanation";
import { bytesText, lossText, MIB, significant } from "../figures/quantities";
import { BreakableName } from "../widgets/breakable_name";
import { Select } from "../widgets/controls";
import { DataTable } from "../widgets/data_table";
import { Dialog } from "../widgets/dialog";
import { useLoaded, useWidth } from "../widgets/hooks";
import { ErrorNote } from "../widgets/job_line";
import { Plot, type PlotShape } from "../widgets/plot";

type Placed = CurvePoint & { bytes: number; loss: number };

function isPlaced(point: CurvePoint): point is Placed {
  return point.allowed && point.bytes !== null && point.loss !== null;
}

function padded(values: number[]): [number, number] {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const margin = 0.08 * (most - least || Math.abs(most) || 1);
  return [least - margin, most + margin];
}

function drawCurve(explanation: UnitExplanation): { shape: PlotShape; marks: Mark[] } {
  const points = explanation.curve.filter(isPlaced).sort((a, b) => a.bytes - b.bytes);
  const hull = points.filter((point) => point.on_hull);
  const positive = points.map((point) => point.loss).filter((loss) => loss > 0);
  // Losses span decades; where one of them is not positive, a logarithm would hide it.
  const logarithmic = positive.length === points.length && points.length > 1;
  const [most, least] = [Math.max(...positive), Math.min(...positive)];
  const shape: PlotShape = {
    columns: [hull.map((point) => point.bytes / 1024), hull.map((point) => point.loss)],
    x: padded(points.map((point) => point.bytes / 1024)),
    y: logarithmic ? [least / 2, most * 2] : padded(points.map((point) => point.loss)),
    logarithmic,
    xLabel: "bytes of the unit, KiB",
    xText: (value) => String(Number(value.toPrecision(6))),
    xSpace: 60,
  };
  const marks = points
    .map(
      (point): Mark => ({
        x: point.bytes / 1024,
        y: point.loss,
        label: point.format,
        kind: point.chosen ? "plan" : "uniform",
      }),
    )
    .sort((a) => (a.kind === "plan" ? -1 : 1));
  return { shape, marks };
}

function Curve({ explanation }: { explanation: UnitExplanation }) {
  const [measure, width] = useWidth<HTMLDivElement>();
  const { shape, marks } = useMemo(() => drawCurve(explanation), [explanation]);
  return (
    <div ref={measure} class="chart">
      <Plot
        shape={shape}
        marks={marks}
        width={width}
        height={240}
        label={`Loss over bytes of each format in ${explanation.unit}. The numbers follow as a table.`}
      />
    </div>
  );
}

function FormatCell({ row }: { row: CurvePoint }) {
  const note = row.reason ?? (row.on_hull ? "" : "above the hull");
  return (
    <>
      {row.chosen ? <strong>{row.format}, chosen</strong> : row.format} <span class="soft small">{note}</span>
    </>
  );
}

function Formats({ explanation }: { explanation: UnitExplanation }) {
  const rows = [...explanation.curve].sort((a, b) => (a.price ?? Infinity) - (b.price ?? Infinity));
  return (
    <DataTable
      caption="Formats of this unit, the cheapest first"
      rows={rows}
      columns={[
        { title: "Format", cell: (row) => <FormatCell row={row} /> },
        { title: "Bytes", cell: (row) => (row.bytes === null ? "–" : bytesText(row.bytes)), number: true },
        { title: "Loss", cell: (row) => (row.loss === null ? "–" : lossText(row.loss)), number: true },
        { title: "Price", cell: (row) => (row.price === null ? "–" : significant(row.price, 4)), number: true },
      ]}
    />
  );
}

interface UnitDialogProps {
  plan: Plan;
  units: string[];
  onClose: () => void;
}

/** Why a unit got its format: its curve, its prices, and the sentence that they make. */
export function UnitDialog({ plan, units, onClose }: UnitDialogProps) {
  const [unit, setUnit] = useState(units[0] ?? "");
  const { value: explanation, error } = useLoaded(`${plan.id}\n${unit}`, () => service.explainUnit(plan.id, unit));
  return (
    <Dialog
      title={
        <>
          Why <BreakableName name={unit} /> is stored as {plan.choice[unit] ?? "it is"}
        </>
      }
      onClose={onClose}
    >
      {units.length > 1 && (
        <Select
          label={`One of ${units.length} units here`}
          options={units.map((name) => ({ value: name, label: `${name}: ${plan.choice[name] ?? ""}` }))}
          value={unit}
          onChange={setUnit}
        />
      )}
      <ErrorNote error={error} />
      {explanation !== null && (
        <>
          <p>{explainChoice(explanation)}</p>
          <p class="soft small">
            Price = loss + shadow price × bytes, in nats per token; the shadow price is{" "}
            {significant((explanation.shadow_price ?? 0) * MIB)} nats per MiB.
          </p>
          <p class="soft small">Loss, nats per token</p>
          <Curve explanation={explanation} />
          <p class="legend">
            <span>● chosen</span>
            <span>□ other formats</span>
            <span>— lower hull: formats that some price would choose</span>
          </p>
          <Formats explanation={explanation} />
        </>
      )}
    </Dialog>
  );
}
