import { useMemo, useState } from "preact/hooks";
import { service } from "../api/client";
import type { ExpertLayer, Plan, Profile } from "../api/contract";
import { EXPERT_FIELDS, type ExpertField, expertBits, expertRows } from "../figures/expert_fields";
import { AffinityGraph } from "../widgets/affinity_graph";
import { Segments, Select } from "../widgets/controls";
import { AsTable } from "../widgets/data_table";
import { ExpertMap } from "../widgets/expert_map";
import { useLoaded } from "../widgets/hooks";
import { ErrorNote } from "../widgets/job_line";

/** The experts of a mixture: how often each is taken, how well it was seen, what it got, and with whom it works. */
export function ExpertsView({ profileId }: { profileId: string }) {
  const { value: profile, error } = useLoaded(profileId, () => service.profile(profileId));
  if (profile === null) return error === null ? <p class="soft">Loading …</p> : <ErrorNote error={error} />;
  if (profile.experts === null) return <p class="soft">This profile holds no routing statistics.</p>;
  return <Experts profile={profile} layers={profile.experts.layers} />;
}

function useMiddlePlan(profile: Profile): { plan: Plan | null; error: Error | null } {
  const near = profile.uniform.toSorted(
    (a, b) => Math.abs(a.bits_per_weight - 4.3) - Math.abs(b.bits_per_weight - 4.3),
  )[0];
  const { value, error } = useLoaded(profile.id, () =>
    service.makePlan({ profile_id: profile.id, budget: { bytes: storedBytes(profile) ?? near?.bytes ?? 2 ** 40 } }),
  );
  return { plan: value, error };
}

// The plan that the person last looked at, where its budget was one of memory.
function storedBytes(profile: Profile): number | null {
  const stored = sessionStorage.getItem(`bitplan.budget.${profile.model_id}`);
  const budget =
    stored === null ? null : (JSON.parse(stored) as { kind: string; value: number; context: number | null });
  return budget?.kind === "memory" && budget.context === null ? Math.floor(budget.value) : null;
}

function Experts({ profile, layers }: { profile: Profile; layers: ExpertLayer[] }) {
  const [field, setField] = useState<ExpertField>("frequency");
  const [layer, setLayer] = useState(0);
  const { plan, error } = useMiddlePlan(profile);
  const bits = useMemo(
    () => (plan === null ? null : expertBits(profile, plan.choice, layers)),
    [profile, plan, layers],
  );
  const form = EXPERT_FIELDS[field];
  const values = useMemo(() => form.values(layers, bits), [form, layers, bits]);
  const shown = layers[layer];
  return (
    <div class="stack">
      <ErrorNote error={error} />
      <Segments
        legend="What the map shows"
        options={(Object.keys(EXPERT_FIELDS) as ExpertField[]).map((key) => ({
          value: key,
          label: EXPERT_FIELDS[key].label,
        }))}
        value={field}
        onChange={setField}
      />
      <div class="two-columns">
        <section class="panel" aria-label="Experts by layer">
          <h2>{form.title}</h2>
          <p class="caption">{form.caption}</p>
          <ExpertMap
            layers={layers.map((each) => each.layer)}
            values={values}
            text={form.text}
            label={form.title}
            fixed={form.fixed}
            onLayer={setLayer}
          />
          <AsTable
            caption="Experts"
            rows={() => expertRows(layers, bits)}
            columns={[
              { title: "Layer", cell: (row) => row.layer, number: true },
              { title: "Expert", cell: (row) => row.expert, number: true },
              { title: "Frequency", cell: (row) => EXPERT_FIELDS.frequency.text(row.frequency), number: true },
              { title: "Tokens seen", cell: (row) => row.coverage, number: true },
              {
                title: "Mean gate weight",
                cell: (row) => EXPERT_FIELDS.gate_weight.text(row.gate_weight),
                number: true,
              },
              { title: "Bits per weight", cell: (row) => EXPERT_FIELDS.bits.text(row.bits), number: true },
            ]}
          />
        </section>
        {shown !== undefined && (
          <section class="panel" aria-label="Affinity">
            <h2>Experts that are taken together</h2>
            <p class="caption">
              Neighbours on the circle form a community; the width of a line is the number of tokens that take both.
            </p>
            <Select
              label="Layer"
              options={layers.map((each, index) => ({ value: String(index), label: `Layer ${each.layer}` }))}
              value={String(layer)}
              onChange={(value) => setLayer(Number(value))}
            />
            <AffinityGraph layer={shown} />
          </section>
        )}
      </div>
    </div>
  );
}
