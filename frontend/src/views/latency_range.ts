import { ServiceError, service } from "../api/client";
import { latencyRange, type Range } from "../figures/budgets";

const UNREACHABLE_US = 1e-6;
const UNLIMITED_US = 1e15;

/** Returns the least latency that can be reached and that of the plan that minds nothing; null where they are one. */
export async function loadLatencyRange(profile_id: string, metric: string): Promise<Range | null> {
  const free = await service.makePlan({ profile_id, metric, budget: { latency_us: UNLIMITED_US } });
  try {
    await service.makePlan({ profile_id, metric, budget: { latency_us: UNREACHABLE_US } });
  } catch (error) {
    const least = error instanceof ServiceError ? error.problem.least_reachable?.latency_us : undefined;
    if (least === undefined) throw error;
    return latencyRange(least, free);
  }
  return null;
}
