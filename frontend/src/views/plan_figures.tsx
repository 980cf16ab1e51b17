import type { Plan } from "../api/contract";
import { uniformRival } from "../figures/chart_series";
import {
  bitsText,
  bytesText,
  lossText,
  marginOf,
  percentText,
  signedText,
  significant,
  timeText,
} from "../figures/quantities";

interface PlanFiguresProps {
  plan: Plan;
}

function proofText(plan: Plan): string {
  if (plan.lower_bound === null || plan.gap === null) return `${plan.termination}; no bound is known`;
  const objective = plan.budget.max_kl === undefined ? plan.predicted_loss : plan.bytes;
  const share = objective > 0 ? plan.gap / objective : 0;
  if (plan.gap <= 0 || share < 1e-9) return "no plan can lose less, by these predictions";
  return `no plan can be better by more than ${percentText(share)}`;
}

function Rival({ plan }: PlanFiguresProps) {
  const rival = uniformRival(plan);
  if (rival === null) return <>no uniform format is as small</>;
  const gain = 1 - plan.predicted_loss / rival.predicted_loss;
  return (
    <>
      {rival.name}: {lossText(rival.predicted_loss)} at {bytesText(rival.bytes, 4)}
      {gain >= 0 ? `, this plan ${percentText(gain)} less` : `, this plan ${percentText(-gain)} more`}
    </>
  );
}

/** The numbers of a plan, the two that decide first. */
export function PlanFigures({ plan }: PlanFiguresProps) {
  const margin = marginOf(plan.bytes);
  const error = plan.standard_error === null ? "" : ` ± ${significant(plan.standard_error, 2)}`;
  return (
    <dl class="figures" aria-label="The plan in numbers">
      <div class="large">
        <dt>Predicted loss, nats per token</dt>
        <dd>
          <span data-figure="loss">{lossText(plan.predicted_loss)}</span>
          <span class="note">
            {error ? `standard error${error}; ` : ""}
            <Rival plan={plan} />
          </span>
        </dd>
      </div>
      <div class="large">
        <dt>Memory</dt>
        <dd>
          <span data-figure="bytes">{bytesText(plan.bytes, 4)}</span>
          <span class="note">
            <span data-figure="bits">{bitsText(plan.bits_per_weight)}</span> bits per weight
            {plan.latency_us !== null && `, ${timeText(plan.latency_us)} per token`}
          </span>
        </dd>
      </div>
      <div>
        <dt>Measured KL, nats per token</dt>
        <dd>
          {plan.measured_kl === null ? "not yet" : lossText(plan.measured_kl)}
          <span class="note">
            {plan.interval === null
              ? "verify to measure it on held-out text"
              : `95 % between ${lossText(plan.interval[0])} and ${lossText(plan.interval[1])}`}
          </span>
        </dd>
      </div>
      <div>
        <dt>One more {margin.name} buys</dt>
        <dd>
          {plan.shadow_price === null || plan.shadow_price === 0
            ? "nothing"
            : `${signedText(-plan.shadow_price * margin.bytes, (x) => significant(x))} nats`}
          <span class="note">the shadow price of memory</span>
        </dd>
      </div>
      <div>
        <dt>Proof</dt>
        <dd>
          {plan.termination.toLowerCase().replaceAll("_", " ")}
          <span class="note">{proofText(plan)}</span>
        </dd>
      </div>
      <div>
        <dt>Metric</dt>
        <dd>
          {plan.metric}
          <span class="note">solved in {significant(plan.solve_ms, 2)} ms</span>
        </dd>
      </div>
    </dl>
  );
}
