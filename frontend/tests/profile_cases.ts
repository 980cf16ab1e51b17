// A profile of three units in two layers, and plans on it, by hand.
import type { Plan, Profile, ProfileUnit } from "../src/api/contract";

export function unit(name: string, layer: number | null, role: string, expert: number | null = null): ProfileUnit {
  return {
    name,
    layer,
    role,
    expert,
    parameters: 800,
    bytes_by_format: { int2: 200, int4: 400, int8: 800 },
    loss_by_format: { int2: 0.4, int4: 0.1, int8: 0.01 },
    standard_error_by_format: null,
  };
}

export const profile: Profile = {
  id: "p",
  model_id: "m",
  created_at: "2026-01-01T00:00:00Z",
  metric_names: ["fisher"],
  default_metric: "fisher",
  metric_units: { fisher: "nats/token" },
  resources: ["memory_bytes"],
  formats: ["int2", "int4", "int8"],
  units: [unit("embed", null, "embed"), unit("0.q", 0, "q"), unit("1.q", 1, "q"), unit("1.down", 1, "down")],
  fixed_bytes: 10,
  has_cache: false,
  has_latency: false,
  uniform: [
    { format: "int2", bytes: 810, bits_per_weight: 2, predicted_loss: 1.6, measured_kl: null },
    { format: "int4, 8-bit embeddings", bytes: 2010, bits_per_weight: 5, predicted_loss: 0.3, measured_kl: null },
    { format: "int4", bytes: 1610, bits_per_weight: 4, predicted_loss: 0.4, measured_kl: null },
  ],
  experts: null,
};

export function plan(choice: Record<string, string>, changes: Partial<Plan> = {}): Plan {
  return {
    id: "plan",
    profile_id: "p",
    model_id: "m",
    budget: { bytes: 1700 },
    engine: null,
    metric: "fisher",
    predicted_loss: 0.2,
    standard_error: null,
    measured_kl: null,
    interval: null,
    bytes: 1600,
    bits_per_weight: 4,
    latency_us: null,
    termination: "optimal",
    lower_bound: 0.2,
    gap: 0,
    shadow_price: 1e-6,
    solve_ms: 1,
    choice,
    bytes_by_role: [],
    baselines: [],
    engine_price: null,
    ...changes,
  };
}
