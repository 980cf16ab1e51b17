// One way to the service: the key on every request, problem details as errors, a question for the key on 401.
import type {
  Engine,
  Export,
  Frontier,
  Job,
  JobKind,
  Model,
  Page,
  Plan,
  PlanRequest,
  Problem,
  Profile,
  Report,
  UnitExplanation,
} from "./contract";

const KEY_ENTRY = "bitplan.key";

/** An answer of the service that is no success. */
export class ServiceError extends Error {
  readonly problem: Problem;
  constructor(problem: Problem) {
    super(problem.detail ?? problem.title);
    this.problem = problem;
  }
}

type AskForKey = (wrong: boolean) => Promise<string>;
let askForKey: AskForKey | null = null;
let asking: Promise<string> | null = null;

/** Says who asks the person for a key when the service demands one. */
export function onKeyDemanded(ask: AskForKey): void {
  askForKey = ask;
}

/** Returns the key of this tab, or null. */
export function currentKey(): string | null {
  return sessionStorage.getItem(KEY_ENTRY);
}

// Several requests may be refused at once; the person is asked once.
async function demandKey(refused: string | null): Promise<void> {
  if (currentKey() !== refused) return;
  if (askForKey === null) throw new ServiceError({ title: "A key is needed", status: 401 });
  asking ??= askForKey(refused !== null).finally(() => {
    asking = null;
  });
  sessionStorage.setItem(KEY_ENTRY, await asking);
}

async function readProblem(response: Response): Promise<Problem> {
  const title = response.statusText || `Error ${response.status}`;
  try {
    const body: unknown = await response.json();
    return { title, ...(typeof body === "object" ? body : {}), status: response.status };
  } catch {
    return { title, status: response.status };
  }
}

/** Sends a request with the key and returns the response once it is a success. */
export async function send(path: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    const key = currentKey();
    const headers = new Headers(init.headers);
    if (key !== null) headers.set("Authorization", `Bearer ${key}`);
    const response = await fetch(path, { ...init, headers });
    if (response.ok) return response;
    const problem = await readProblem(response);
    if (response.status !== 401) throw new ServiceError(problem);
    await demandKey(key);
  }
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await send(path, signal ? { signal } : {});
  return (await response.json()) as T;
}

async function post<T>(path: string, body: unknown, signal?: AbortSignal): Promise<T> {
  const headers = { "Content-Type": "application/json" };
  const init: RequestInit = { method: "POST", headers, body: JSON.stringify(body) };
  const response = await send(path, signal ? { ...init, signal } : init);
  return (await response.json()) as T;
}

async function list<T>(path: string): Promise<T[]> {
  const items: T[] = [];
  let cursor: string | null = null;
  do {
    const separator = path.includes("?") ? "&" : "?";
    const suffix: string = cursor === null ? "" : `${separator}cursor=${encodeURIComponent(cursor)}`;
    const page: Page<T> = await get<Page<T>>(path + suffix);
    items.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor !== null);
  return items;
}

const id = encodeURIComponent;

export interface JobRequest {
  kind: JobKind;
  model_id?: string;
  plan_id?: string;
  plan_ids?: [string, string];
  options?: Record<string, unknown>;
}

export interface FrontierQuery {
  resource: string;
  metric: string;
  points: number;
  context?: number;
  batch?: number;
}

function frontierPath(profile: string, query: FrontierQuery): string {
  const parameters = new URLSearchParams({ resource: query.resource, metric: query.metric });
  parameters.set("points", String(query.points));
  if (query.context !== undefined) parameters.set("context", String(query.context));
  if (query.batch !== undefined) parameters.set("batch", String(query.batch));
  return `/frontiers/${id(profile)}?${parameters}`;
}

export const service = {
  models: () => list<Model>("/models"),
  model: (model: string) => get<Model>(`/models/${id(model)}`),
  addModel: (body: { path: string; name?: string }) => post<Model>("/models", body),
  jobs: (query: string) => list<Job>(`/jobs?${query}`),
  job: (job: string) => get<Job>(`/jobs/${id(job)}`),
  startJob: (body: JobRequest) => post<Job>("/jobs", { options: {}, ...body }),
  cancelJob: async (job: string) => (await send(`/jobs/${id(job)}`, { method: "DELETE" })).json() as Promise<Job>,
  profile: (profile: string) => get<Profile>(`/profiles/${id(profile)}`),
  frontier: (profile: string, query: FrontierQuery) => get<Frontier>(frontierPath(profile, query)),
  makePlan: (body: PlanRequest, signal?: AbortSignal) => post<Plan>("/plans", body, signal),
  plan: (plan: string) => get<Plan>(`/plans/${id(plan)}`),
  explainUnit: (plan: string, unit: string) => get<UnitExplanation>(`/plans/${id(plan)}/units/${id(unit)}`),
  engines: () => list<Engine>("/engines"),
  report: (report: string) => get<Report>(`/reports/${id(report)}`),
  exported: (exported: string) => get<Export>(`/exports/${id(exported)}`),
};

function followAsFile(address: string, name: string): void {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
}

/** Saves what an address answers as a file. With a key it is fetched into memory first, as a link cannot carry one. */
export async function download(path: string, name: string): Promise<void> {
  if (currentKey() === null) {
    followAsFile(path, name);
    return;
  }
  const response = await send(path);
  const address = URL.createObjectURL(await response.blob());
  followAsFile(address, name);
  URL.revokeObjectURL(address);
}
