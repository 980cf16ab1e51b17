import { BUDGETS, type BudgetKind, type Range, valueAfterKey } from "../figures/budgets";

interface BudgetHandleProps {
  kind: BudgetKind;
  value: number;
  range: Range;
  along: "x" | "y";
  /** Place of the line and its length, in CSS pixels of the surrounding chart. */
  place: { left: number; top: number; length: number };
  rightHalf: boolean;
  onValue: (value: number) => void;
}

/** The budget as a line with a grip: a slider for the keyboard, dragged by the chart around it. */
export function BudgetHandle({ kind, value, range, along, place, rightHalf, onValue }: BudgetHandleProps) {
  const form = BUDGETS[kind];
  const length = `${place.length}px`;
  function onKeyDown(event: KeyboardEvent): void {
    const next = valueAfterKey(kind, value, range, event.key);
    if (next === null) return;
    event.preventDefault();
    onValue(next);
  }
  return (
    <div
      class={`budget-handle along-${along} ${rightHalf ? "right-half" : ""}`}
      role="slider"
      tabIndex={0}
      aria-label={`Budget: ${form.label}`}
      aria-orientation={along === "x" ? "horizontal" : "vertical"}
      aria-valuemin={range.least}
      aria-valuemax={range.most}
      aria-valuenow={value}
      aria-valuetext={form.text(value)}
      style={{
        left: `${place.left}px`,
        top: `${place.top}px`,
        ...(along === "x" ? { height: length } : { width: length }),
      }}
      onKeyDown={onKeyDown}
    >
      <span class="reading">{form.text(value)}</span>
      <span class="grip" />
    </div>
  );
}
