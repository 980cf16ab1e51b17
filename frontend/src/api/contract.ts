// What the service says, as types. Losses are nats per token, sizes bytes, times microseconds unless named otherwise.

export interface Page<T> {
  items: T[];
  next_cursor: string | null;
}

/** RFC 9457; `least_reachable` comes with an infeasible budget. */
export interface Problem {
  type?: string;
  title: string;
  status: number;
  detail?: string;
  least_reachable?: Record<string, number>;
}

export type JobKind = "measure" | "evaluate" | "apply" | "export" | "report";
export type JobState = "queued" | "running" | "succeeded" | "failed" | "cancelled";

export interface JobProgress {
  stage: string;
  done: number;
  total: number | null;
  unit: string;
}

/** Measured quality of one assignment, nats per token. */
export interface EvaluationRow {
  name: string;
  kind: "reference" | "plan" | "uniform";
  memory_bytes: number;
  bits_per_weight: number;
  kl: number;
  kl_low: number;
  kl_high: number;
}

export interface JobResult {
  evaluation?: EvaluationRow[];
  profile_id?: string;
  plan_id?: string;
  export_id?: string;
  report_id?: string;
}

export interface Job {
  id: string;
  kind: JobKind;
  state: JobState;
  model_id: string | null;
  plan_id: string | null;
  /** The two plans that a report compares. */
  plan_ids: string[] | null;
  options: Record<string, unknown>;
  progress: JobProgress | null;
  result: JobResult | null;
  error: Problem | null;
  created_at: string;
  started_at: string | null;
  finished_at: string | null;
}

export interface Model {
  id: string;
  name: string;
  reference: string;
  created_at: string;
  architecture: string;
  /** Null for a GGUF file that was not measured yet, as the next three. */
  parameters: number | null;
  units: number | null;
  layers: number | null;
  experts_per_layer: number | null;
  bytes: number;
  latest_job: Job | null;
  profiles: { id: string; created_at: string }[];
  plans: { id: string; created_at: string; summary: unknown }[];
}

export interface ProfileUnit {
  name: string;
  layer: number | null;
  role: string;
  expert: number | null;
  parameters: number;
  bytes_by_format: Record<string, number>;
  loss_by_format: Record<string, number>;
  standard_error_by_format: Record<string, number> | null;
}

export interface UniformBaseline {
  format: string;
  bytes: number;
  bits_per_weight: number;
  predicted_loss: number;
  measured_kl: number | null;
}

export interface ExpertLayer {
  layer: number;
  frequency: number[];
  coverage: number[];
  gate_weight: number[];
  affinity: [number, number, number][];
  communities: number[][];
}

export interface Profile {
  id: string;
  model_id: string;
  created_at: string;
  metric_names: string[];
  default_metric: string;
  /** What each metric is measured in; plans and frontiers share an axis where it is that of the default one. */
  metric_units: Record<string, string>;
  resources: string[];
  formats: string[];
  units: ProfileUnit[];
  fixed_bytes: number;
  /** Whether a cache may be part of a plan. */
  has_cache: boolean;
  /** Whether its formats were timed, so that latency can be limited. */
  has_latency: boolean;
  uniform: UniformBaseline[];
  experts: { layers: ExpertLayer[] } | null;
}

export interface FrontierPoint {
  /** Of the resource that the frontier is along. */
  use: number;
  bytes: number;
  bits_per_weight: number;
  predicted_loss: number;
  gap: number;
}

export interface Frontier {
  profile_id: string;
  resource: string;
  metric: string;
  points: FrontierPoint[];
}

export interface BudgetRequest {
  bits_per_weight?: number;
  bytes?: number;
  memory?: number;
  max_kl?: number;
  latency_us?: number;
}

export interface PlanRequest {
  profile_id: string;
  budget: BudgetRequest;
  metric?: string;
  context?: number;
  batch?: number;
  engine?: string;
}

export interface EnginePrice {
  unrestricted_loss: number;
  unrestricted_bytes: number;
  refusals: { reason: string; candidates: number }[];
}

export interface Plan {
  id: string;
  profile_id: string;
  model_id: string;
  budget: BudgetRequest;
  engine: string | null;
  metric: string;
  predicted_loss: number;
  standard_error: number | null;
  measured_kl: number | null;
  interval: [number, number] | null;
  bytes: number;
  bits_per_weight: number;
  latency_us: number | null;
  termination: string;
  lower_bound: number | null;
  gap: number | null;
  shadow_price: number | null;
  solve_ms: number;
  choice: Record<string, string>;
  bytes_by_role: { role: string; bytes: number; bits_per_weight: number | null }[];
  /** Latencies are null where none is limited. */
  baselines: { name: string; bytes: number; predicted_loss: number; latency_us: number | null }[];
  engine_price: EnginePrice | null;
}

/** Bytes, loss and price are null where the format is not allowed. */
export interface CurvePoint {
  format: string;
  bytes: number | null;
  loss: number | null;
  standard_error: number | null;
  price: number | null;
  chosen: boolean;
  on_hull: boolean;
  allowed: boolean;
  reason: string | null;
}

export interface UnitExplanation {
  unit: string;
  chosen: string;
  shadow_price: number | null;
  curve: CurvePoint[];
}

export interface Engine {
  name: string;
  title: string;
  formats: string[];
  rules: string[];
  exporter: boolean;
  note: string | null;
}

export interface ArtefactFile {
  name: string;
  bytes: number;
  media_type?: string;
  url?: string;
}

export interface Report {
  id: string;
  files: ArtefactFile[];
}

export interface Export {
  id: string;
  engine: string;
  command: string | null;
  files: ArtefactFile[];
}
