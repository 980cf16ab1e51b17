import { describe, expect, it } from "vitest";
import type { Engine, EvaluationRow, Job, UnitExplanation } from "../src/api/contract";
import {
  axisRanges,
  curveColumns,
  listMarks,
  placeUniforms,
  uniformRival,
  usefulPoints,
} from "../src/figures/chart_series";
import { rankEngines } from "../src/figures/engine_ranking";
import { expertBits, expertRows, extent } from "../src/figures/expert_fields";
import { explainChoice } from "../src/figures/explanation";
import { collectMeasured } from "../src/figures/measured_plans";
import { diffPlans } from "../src/figures/plan_difference";
import { bitStep, listCaches, makeGrid } from "../src/figures/unit_grid";
import { plan, profile, unit } from "./profile_cases";

const choice = { embed: "int8", "0.q": "int2", "1.q": "int4", "1.down": "int8" };

describe("the heat map", () => {
  it("has a cell for each layer and role, and the rest outside", () => {
    const grid = makeGrid(profile, choice);
    expect(grid.layers).toEqual([0, 1]);
    expect(grid.roles).toEqual(["q", "down"]);
    expect(grid.cells.get("q")?.get(0)?.bits).toBe(2);
    expect(grid.cells.get("down")?.get(0)).toBeUndefined();
    expect(grid.outside.map((cell) => cell.role)).toEqual(["embed"]);
  });

  it("gathers the experts of a layer in one cell, weighted by their weights", () => {
    const experts = [unit("a", 0, "up", 0), { ...unit("b", 0, "up", 1), parameters: 2400 }];
    const grid = makeGrid({ ...profile, units: experts }, { a: "int2", b: "int8" });
    const cell = grid.cells.get("up")?.get(0);
    expect(cell?.units).toEqual(["a", "b"]);
    expect(cell?.formats).toEqual(["int2", "int8"]);
    expect(cell?.bits).toBe((8 * (200 + 800)) / 3200);
  });

  it("counts caches, which are no units of the profile", () => {
    const caches = {
      ...choice,
      "layers.0.keys": "int8",
      "layers.1.keys": "int8",
      "layers.0.values": "int4",
      "layers.1.values": "bf16",
    };
    expect(listCaches(profile, caches).map((row) => [row.role, row.format, row.count])).toEqual([
      ["keys", "int8", 2],
      ["values", "int4", 1],
      ["values", "bf16", 1],
    ]);
    expect(listCaches(profile, choice)).toEqual([]);
  });

  it("leaves out what the plan does not name", () => {
    expect(makeGrid(profile, { "0.q": "int2" }).roles).toEqual(["q"]);
  });

  it.each([
    [1.6, 2],
    [2.28, 2],
    [4.31, 4],
    [4.5, 4],
    [7.1, 8],
    [12, 8],
    [16, 16],
    [Number.NaN, 0],
  ])("colours %d bits as %d", (bits, step) => expect(bitStep(bits)).toBe(step));
});

describe("two plans", () => {
  it("differ in the units that are stored otherwise, most bytes first", () => {
    const changes = diffPlans(profile, plan(choice), plan({ ...choice, "0.q": "int8", "1.q": "int2" }));
    expect(changes.map((change) => [change.unit, change.bytes])).toEqual([
      ["0.q", 600],
      ["1.q", -200],
    ]);
    expect(changes[0]?.loss).toBeCloseTo(-0.39, 12);
    expect(diffPlans(profile, plan(choice), plan(choice))).toEqual([]);
  });
});

describe("the chart", () => {
  const points = [3, 1, 0.2, 0.02, 0].map((predicted_loss, index) => ({
    use: (index + 1) * 2 ** 20,
    bytes: (index + 1) * 2 ** 20,
    bits_per_weight: index + 1,
    predicted_loss,
    gap: 0,
  }));
  const frontier = { profile_id: "p", resource: "bytes", metric: "fisher", points };

  it("leaves out what no one sees a difference in, and what has no logarithm", () => {
    expect(usefulPoints(frontier, profile).map((point) => point.predicted_loss)).toEqual([3, 1, 0.2]);
    expect(usefulPoints(frontier, { ...profile, uniform: [] })).toHaveLength(4);
  });

  it("has MiB or bits on its axis", () => {
    expect(curveColumns("memory", points.slice(0, 2))).toEqual([
      [1, 2],
      [3, 1],
    ]);
    expect(curveColumns("bits_per_weight", points.slice(0, 2).toReversed())[0]).toEqual([1, 2]);
  });

  it("has the latencies that are known", () => {
    expect(
      curveColumns("latency_us", [{ use: 7, bytes: 2 ** 20, bits_per_weight: 4, predicted_loss: 1, gap: 0 }]),
    ).toEqual([[7], [1]]);
    const timed = { format: "int4", bytes: 1, bits_per_weight: 4, predicted_loss: 1 };
    const places = [
      { ...timed, latency_us: 900 },
      { ...timed, latency_us: null },
    ];
    expect(listMarks("latency_us", places, [], null).map((mark) => mark.x)).toEqual([900]);
  });

  it("labels a format once and puts measured plans before uniform ones", () => {
    const untimed = profile.uniform.map((uniform) => ({ ...uniform, latency_us: null }));
    const row = {
      kind: "plan",
      memory_bytes: 2 ** 20,
      bits_per_weight: 4,
      kl: 0.3,
      kl_low: 0.2,
      kl_high: 0.4,
    } as EvaluationRow;
    const marks = listMarks("memory", untimed, [row], plan(choice));
    expect(marks.map((mark) => mark.label)).toEqual(["pinned", "plan, measured", "int2", "int4", ""]);
    expect(marks[1]?.interval).toEqual([0.2, 0.4]);
    const { x, y } = axisRanges(curveColumns("memory", points.slice(0, 3)), marks);
    expect(x[0]).toBeLessThan(810 / 2 ** 20);
    expect(y[0]).toBeLessThan(0.2);
    expect(y[1]).toBeGreaterThan(3);
    expect(axisRanges([[], []], [])).toEqual({ x: [0, 1], y: [1e-3, 1] });
  });

  it("places uniform formats where the question of a plan sees them", () => {
    const baselines = [
      { name: "uniform int2", bytes: 900, predicted_loss: 1.7, latency_us: 40 },
      { name: "uniform int3", bytes: 1, predicted_loss: 1, latency_us: null },
    ];
    expect(placeUniforms(profile, baselines)).toEqual([
      { format: "int2", bytes: 900, predicted_loss: 1.7, latency_us: 40, bits_per_weight: 2 },
      { format: "int3", bytes: 1, predicted_loss: 1, latency_us: null, bits_per_weight: Number.NaN },
    ]);
  });

  it("names as rival the best uniform format within the budget", () => {
    const baselines = [
      { name: "uniform int2", bytes: 810, predicted_loss: 1.6, latency_us: null },
      { name: "uniform int4", bytes: 1650, predicted_loss: 0.4, latency_us: null },
      { name: "uniform int8", bytes: 3210, predicted_loss: 0.04, latency_us: null },
    ];
    expect(uniformRival(plan(choice, { baselines }))?.name).toBe("uniform int4");
    expect(uniformRival(plan(choice, { baselines, bytes: 700, budget: { max_kl: 1 } }))).toBeNull();
  });
});

describe("measurements", () => {
  const rows = (kl: number) => [
    { name: "uniform int4", kind: "uniform", kl },
    { name: "fisher", kind: "plan", kl },
    { name: "r", kind: "reference" },
  ];
  const job = (created_at: string, plan_id: string, kl: number, state = "succeeded") =>
    ({ kind: "evaluate", state, created_at, plan_id, result: { evaluation: rows(kl) } }) as unknown as Job;

  it("keep the newest of each plan and of each uniform format", () => {
    const found = collectMeasured([
      job("2026-01", "a", 1),
      job("2026-03", "a", 3),
      job("2026-02", "b", 2),
      job("2026-04", "c", 4, "failed"),
    ]);
    expect(found.map((row) => [row.kind, row.kl])).toEqual([
      ["uniform", 3],
      ["plan", 3],
      ["plan", 2],
    ]);
  });
});

describe("why a unit got its format", () => {
  const point = (format: string, bytes: number, loss: number, chosen: boolean, price_per_byte = 1e-3) => ({
    format,
    bytes,
    loss,
    standard_error: null,
    price: loss + price_per_byte * bytes,
    chosen,
    on_hull: true,
    allowed: true,
    reason: null,
  });
  const explain = (curve: UnitExplanation["curve"], shadow_price: number | null = 1e-3) =>
    explainChoice({ unit: "u", chosen: "", shadow_price, curve });

  it("names the next best and what it would cost", () => {
    const text = explain([point("int4", 400, 0.1, true), point("int8", 800, 0.01, false)]);
    expect(text).toContain("int4 has the least price");
    expect(text).toContain("int8, costs 0.310 more (62 %): −0.0900 nats for +400 B");
  });

  it("says when the whole plan, not the price, decided", () => {
    expect(explain([point("int4", 400, 0.1, false), point("int8", 800, 0.01, true)])).toContain(
      "int4 would be 0.310 cheaper",
    );
  });

  it("says when there was nothing to decide", () => {
    expect(explain([point("int4", 400, 0.1, true)])).toBe("int4 is the only format that is allowed here.");
    expect(explain([point("a", 4, 0.1, true, 0), point("b", 8, 0.2, false, 0)], 0)).toContain("a byte is free");
    expect(explain([point("a", 4, 0.1, true)], null)).toBe("");
  });
});

describe("engines", () => {
  const engine = (name: string, formats: string[], exporter = true): Engine => ({
    name,
    title: name,
    formats,
    rules: [],
    exporter,
    note: null,
  });

  it("that run most of what was measured come first; what cannot be written for is left out", () => {
    const engines = [
      engine("a", ["q4", "bf16"]),
      engine("b", ["int2", "int4"]),
      engine("c", ["int4"]),
      engine("d", ["int4"], false),
    ];
    expect(rankEngines(engines, ["int2", "int4", "bf16"]).map((each) => each.name)).toEqual(["b", "c", "a", "bitplan"]);
  });
});

describe("experts", () => {
  const layer = {
    layer: 0,
    frequency: [0.75, 0.25],
    coverage: [30, 10],
    gate_weight: [0.6, 0.4],
    affinity: [],
    communities: [],
  };

  it("get the bits of their own units, or of the stack they are in", () => {
    const own = { ...profile, units: [unit("x0", 0, "up", 0), unit("x1", 0, "up", 1)] };
    expect(expertBits(own, { x0: "int2", x1: "int8" }, [layer])).toEqual([[2, 8]]);
    const stack = { ...profile, units: [unit("layers.0.experts", 0, "experts")] };
    expect(expertBits(stack, { "layers.0.experts": "int4" }, [layer])).toEqual([[4, 4]]);
    expect(expertBits(own, {}, [layer])).toEqual([[Number.NaN, Number.NaN]]);
  });

  it("are rows of a table", () => {
    expect(expertRows([layer], [[2, 8]])[1]).toEqual({
      layer: 0,
      expert: 1,
      frequency: 0.25,
      coverage: 10,
      gate_weight: 0.4,
      bits: 8,
    });
    expect(
      extent([
        [1, Number.NaN],
        [3, 2],
      ]),
    ).toEqual([1, 3]);
    expect(extent([[Number.NaN]])).toEqual([0, 1]);
  });
});
