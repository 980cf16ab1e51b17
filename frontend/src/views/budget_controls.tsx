import type { Profile } from "../api/contract";
import { BUDGET_KINDS, BUDGETS, type BudgetKind } from "../figures/budgets";
import { parsePositive } from "../figures/quantities";
import { NumberField, Segments, Select } from "../widgets/controls";

/** What is asked for: a kind of budget, how much of it, and what a cache must hold. */
export interface Budget {
  kind: BudgetKind;
  value: number;
  /** Tokens that each sequence keeps, or null to leave the cache out. */
  context: number | null;
  batch: number;
  metric: string;
}

interface BudgetControlsProps {
  budget: Budget;
  profile: Profile;
  onChange: (change: Partial<Budget>) => void;
  onKind: (kind: BudgetKind) => void;
}

function parseCount(text: string): number | null {
  const value = parsePositive(text);
  return value !== null && Number.isInteger(value) ? value : null;
}

function whyBarred(kind: BudgetKind, withCache: boolean, profile: Profile): string | null {
  if (withCache && (kind === "bits_per_weight" || kind === "latency_us")) {
    return "says nothing of a cache: empty the context first";
  }
  if (kind === "latency_us" && !profile.has_latency) {
    return "its formats were not timed: measure the model again, with times";
  }
  return null;
}

/** The budget as fields, for those who know what they want. */
export function BudgetControls({ budget, profile, onChange, onKind }: BudgetControlsProps) {
  const form = BUDGETS[budget.kind];
  // Losses in another unit would not stand on the same axis.
  const unit = profile.metric_units[profile.default_metric];
  const comparable = profile.metric_names.filter((name) => profile.metric_units[name] === unit);
  const withCache = budget.context !== null;
  const options = BUDGET_KINDS.map((kind) => {
    const why = whyBarred(kind, withCache, profile);
    return { value: kind, label: BUDGETS[kind].label, disabled: why !== null, title: why ?? BUDGETS[kind].unit };
  });
  return (
    <div class="stack">
      <Segments legend="What the budget limits" options={options} value={budget.kind} onChange={onKind} />
      <div class="row">
        <NumberField
          label={budget.kind === "memory" && withCache ? "At most, weights and cache" : "At most"}
          unit={form.unit}
          text={form.fieldText(budget.value)}
          parse={form.parse}
          onValue={(value) => onChange({ value })}
        />
        {profile.has_cache && (
          <>
            <NumberField
              label="Context for the cache"
              unit="tokens"
              text={budget.context === null ? "" : String(budget.context)}
              parse={parseCount}
              onValue={(context) => onChange({ context })}
              onEmpty={() => onChange({ context: null })}
            />
            <NumberField
              label="Batch"
              unit="sequences"
              text={String(budget.batch)}
              parse={parseCount}
              onValue={(batch) => onChange({ batch })}
            />
          </>
        )}
        <Select
          label="Metric"
          options={comparable.map((name) => ({ value: name, label: name }))}
          value={budget.metric}
          onChange={(metric) => onChange({ metric })}
        />
      </div>
    </div>
  );
}
