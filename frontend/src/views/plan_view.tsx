import { useCallback, useMemo, useState } from "preact/hooks";
import { ServiceError, service } from "../api/client";
import type { Model, Plan, Profile } from "../api/contract";
import { BUDGETS, type BudgetKind } from "../figures/budgets";
import { significant } from "../figures/quantities";
import { hashOf } from "../figures/routes";
import { type Cell, listCaches, makeGrid } from "../figures/unit_grid";
import { Select } from "../widgets/controls";
import { HeatMap } from "../widgets/heat_map";
import { useLoaded } from "../widgets/hooks";
import { ErrorNote } from "../widgets/job_line";
import { BudgetControls } from "./budget_controls";
import { type Desk, inside, POINTS, useDesk } from "./desk_state";
import { FrontierChart, planBudget } from "./frontier_chart";
import { PlanActions } from "./plan_actions";
import { PlanFigures } from "./plan_figures";
import { RoleBars } from "./role_bars";
import { UnitDialog } from "./unit_dialog";

interface PlanViewProps {
  model: Model;
  reloadModel: () => void;
}

/** The page of a model: a budget that moves, and everything that follows from it. */
export function PlanView({ model, reloadModel }: PlanViewProps) {
  const [profileId, setProfileId] = useState(model.profiles[0]?.id ?? "");
  const loadedProfile = useLoaded(profileId, () => service.profile(profileId));
  const profile = loadedProfile.value;
  if (profile === null) {
    return loadedProfile.error === null ? <p class="soft">Loading …</p> : <ErrorNote error={loadedProfile.error} />;
  }
  return (
    <>
      {model.profiles.length > 1 && (
        <div class="row profile-choice">
          <Select
            label="Measurement"
            options={model.profiles.map(({ id, created_at }) => ({
              value: id,
              label: created_at.slice(0, 16).replace("T", " "),
            }))}
            value={profileId}
            onChange={setProfileId}
          />
          <span class="soft small">of {profile.formats.join(", ")}</span>
        </div>
      )}
      <PlanDesk key={profile.id} model={model} profile={profile} reloadModel={reloadModel} />
    </>
  );
}

interface PlanDeskProps {
  model: Model;
  profile: Profile;
  reloadModel: () => void;
}

function PlanDesk({ model, profile, reloadModel }: PlanDeskProps) {
  const desk = useDesk(model.id, profile);
  const { plan, waiting } = desk;
  const [pinned, setPinned] = useState<Plan | null>(null);
  // Drawn again for a new plan, not for every move of the budget.
  const maps = useMemo(() => plan && <PlanMaps plan={plan} profile={profile} />, [plan, profile]);
  return (
    <div class="stack">
      <BudgetControls budget={desk.budget} profile={profile} onChange={desk.setBudget} onKind={desk.setKind} />
      <ErrorNote error={desk.failure} />
      <div class="two-columns">
        <Frontier desk={desk} pinned={pinned} />
        <section class={`panel stack ${waiting ? "stale" : ""}`} aria-label="Plan" aria-busy={waiting}>
          <Infeasible error={desk.error} kind={desk.budget.kind} onValue={(value) => desk.setBudget({ value })} />
          {plan !== null && (
            <>
              <h2>Plan for {planBudget(plan)}</h2>
              <PlanFigures plan={plan} />
              <PlanActions
                model={model}
                plan={plan}
                profile={profile}
                request={desk.request}
                onVerified={() => {
                  desk.reloadMeasured();
                  reloadModel();
                }}
              />
              <Pin model={model.id} plan={plan} pinned={pinned} onPin={setPinned} />
              <SeenTime seen_ms={desk.seen_ms} />
            </>
          )}
        </section>
      </div>
      <div class={waiting ? "stale" : ""}>{maps}</div>
    </div>
  );
}

function SeenTime({ seen_ms }: { seen_ms: number | null }) {
  const text = seen_ms === null ? "" : `From the move of the budget to this picture: ${significant(seen_ms, 2)} ms`;
  return <p class="soft small">{text}</p>;
}

function Frontier({ desk, pinned }: { desk: Desk; pinned: Plan | null }) {
  const { budget, frontier, points, range, setBudget } = desk;
  const onValue = useCallback((value: number) => setBudget({ value }), [setBudget]);
  return (
    <section class="panel" aria-label="Frontier">
      {frontier.value === null && frontier.error === null && (
        <p class="chart-place soft">Solving {POINTS} budgets along the frontier …</p>
      )}
      {frontier.value !== null && points !== null && range !== null && (
        <FrontierChart
          kind={budget.kind}
          value={inside(budget.value, range)}
          range={range}
          uniforms={desk.uniforms}
          frontier={frontier.value}
          points={points}
          plan={desk.plan}
          measured={desk.measured}
          pinned={pinned}
          onValue={onValue}
        />
      )}
    </section>
  );
}

interface InfeasibleProps {
  error: Error | null;
  kind: BudgetKind;
  onValue: (value: number) => void;
}

function Infeasible({ error, kind, onValue }: InfeasibleProps) {
  if (error === null) return null;
  const least = error instanceof ServiceError ? error.problem.least_reachable : undefined;
  const reachable = least?.[kind === "memory" ? "bytes" : kind];
  if (reachable === undefined) return <ErrorNote error={error} />;
  // Rounded up, as the least value itself may fall on the wrong side of the last digit.
  const enough = reachable * (1 + 1e-9);
  return (
    <div class="warning" role="alert">
      <p>No plan keeps this budget. The least that can be reached is {BUDGETS[kind].text(reachable)}.</p>
      <button type="button" onClick={() => onValue(kind === "memory" ? Math.ceil(reachable) : enough)}>
        Take that
      </button>
    </div>
  );
}

interface PinProps {
  model: string;
  plan: Plan;
  pinned: Plan | null;
  onPin: (plan: Plan | null) => void;
}

function Pin({ model, plan, pinned, onPin }: PinProps) {
  const other = pinned !== null && pinned.id !== plan.id;
  return (
    <div class="row">
      <button type="button" onClick={() => onPin(plan)}>
        {pinned === null ? "Pin, to compare" : "Pin this one instead"}
      </button>
      {other && (
        <a href={hashOf({ view: "compare", model, first: pinned.id, second: plan.id })}>
          Compare with the pinned plan ({planBudget(pinned)})
        </a>
      )}
    </div>
  );
}

function PlanMaps({ plan, profile }: { plan: Plan; profile: Profile }) {
  const grid = useMemo(() => makeGrid(profile, plan.choice), [profile, plan]);
  const caches = useMemo(() => listCaches(profile, plan.choice), [profile, plan]);
  const [open, setOpen] = useState<Cell | null>(null);
  return (
    <div class="two-columns">
      <section class="panel" aria-label="Bits by layer and role">
        <h2>Bits by layer and role</h2>
        <p class="caption">Choose a cell to see why its unit is stored so.</p>
        <HeatMap grid={grid} label="Bits per weight by layer and role" onCell={setOpen} />
        {caches.length > 0 && (
          <p class="small">
            Cache: {caches.map(({ role, format, count }) => `${role} ${format} in ${count} layers`).join(", ")}
          </p>
        )}
      </section>
      <section class="panel" aria-label="Bytes by role">
        <h2>Bytes by role</h2>
        <p class="caption">Codes, scales and zero points; what no choice changes stands last.</p>
        <RoleBars plan={plan} profile={profile} />
      </section>
      {open !== null && <UnitDialog plan={plan} units={open.units} onClose={() => setOpen(null)} />}
    </div>
  );
}
