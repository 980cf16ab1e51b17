import { describe, expect, it } from "vitest";
import type { FrontierPoint } from "../src/api/contract";
import { BUDGET_KINDS, BUDGETS, rangeOf, resourceOf, shareOf, valueAfterKey, valueAt } from "../src/figures/budgets";
import { MIB } from "../src/figures/quantities";

const memory = { least: 40 * MIB, most: 140 * MIB };
const ceiling = { least: 1e-3, most: 1 };

describe("a budget on its range", () => {
  it.each(BUDGET_KINDS)("%s: share and value are each other's inverse", (kind) => {
    for (const share of [0, 0.125, 0.5, 1]) {
      expect(shareOf(kind, valueAt(kind, share, ceiling), ceiling)).toBeCloseTo(share, 12);
    }
  });

  it("goes in equal ratios where losses span decades", () => {
    expect(valueAt("max_kl", 0.5, ceiling)).toBeCloseTo(Math.sqrt(1e-3), 12);
    expect(valueAt("memory", 0.5, memory)).toBe(90 * MIB);
  });

  it("stays inside", () => {
    expect(valueAt("memory", 1.5, memory)).toBe(memory.most);
    expect(shareOf("memory", 0, memory)).toBe(0);
    expect(shareOf("memory", 5, { least: 5, most: 5 })).toBe(0);
  });
});

describe("keys", () => {
  it("make a step of a two-hundredth, a page of a tenth, and go to the ends", () => {
    const at = (key: string) => valueAfterKey("memory", 90 * MIB, memory, key);
    expect(at("ArrowRight")).toBeCloseTo(90.5 * MIB, 3);
    expect(at("ArrowDown")).toBeCloseTo(89.5 * MIB, 3);
    expect(at("PageUp")).toBeCloseTo(100 * MIB, 3);
    expect(at("Home")).toBe(memory.least);
    expect(at("End")).toBe(memory.most);
    expect(at("a")).toBeNull();
  });

  it("never leave the range", () => {
    expect(valueAfterKey("memory", memory.most, memory, "PageUp")).toBe(memory.most);
    expect(valueAfterKey("max_kl", ceiling.least, ceiling, "ArrowLeft")).toBeCloseTo(ceiling.least, 15);
  });
});

describe("requests", () => {
  it("are what the service takes", () => {
    expect(BUDGETS.memory.request(1234.7)).toEqual({ bytes: 1234 });
    expect(BUDGETS.max_kl.request(0.05)).toEqual({ max_kl: 0.05 });
  });

  it("read a plain number in the unit that stands beside the field", () => {
    expect(BUDGETS.memory.parse("70")).toBe(70 * MIB);
    expect(BUDGETS.memory.parse("1.5 GB")).toBe(1.5e9);
    expect(BUDGETS.bits_per_weight.parse("nothing")).toBeNull();
  });
});

describe("ranges", () => {
  const points: FrontierPoint[] = [
    { use: 10, bytes: 10, bits_per_weight: 2, predicted_loss: 1, gap: 0 },
    { use: 30, bytes: 30, bits_per_weight: 8, predicted_loss: 0.01, gap: 0 },
    { use: 50, bytes: 50, bits_per_weight: 16, predicted_loss: 0, gap: 0 },
  ];

  it("span the points, in every kind", () => {
    expect(rangeOf("memory", points)).toEqual({ least: 10, most: 50 });
    expect(rangeOf("bits_per_weight", points)).toEqual({ least: 2, most: 16 });
    // A logarithm knows no zero.
    expect(rangeOf("max_kl", points)).toEqual({ least: 0.01, most: 1 });
    expect(rangeOf("memory", points.slice(1, 2))).toBeNull();
  });

  it("of latency are those of a frontier along it", () => {
    expect(resourceOf("latency_us")).toBe("latency_us");
    expect(resourceOf("max_kl")).toBe("bytes");
    expect(rangeOf("latency_us", points)).toEqual({ least: 10, most: 50 });
  });
});
