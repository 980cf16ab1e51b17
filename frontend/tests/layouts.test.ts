import { describe, expect, it } from "vitest";
import { layOutAffinity } from "../src/figures/affinity_layout";
import { type Box, placeLabels } from "../src/figures/label_places";
import { hashOf, parseRoute, type Route } from "../src/figures/routes";

describe("labels", () => {
  const bounds: Box = { left: 0, top: 0, width: 200, height: 100 };
  const label = (x: number, y: number) => ({ x, y, width: 50, height: 12 });

  it("never lie on each other or outside, and are left out without room", () => {
    // A swarm of points: more labels than there is room for.
    const places = placeLabels(
      Array.from({ length: 60 }, (_, i) => label((37 * i) % 200, (23 * i) % 100)),
      bounds,
    );
    const boxes = places.filter((box) => box !== null);
    expect(boxes.length).toBeGreaterThan(8);
    expect(boxes.length).toBeLessThan(60);
    for (const [i, a] of boxes.entries()) {
      expect(a.left >= 0 && a.top >= 0 && a.left + a.width <= 200 && a.top + a.height <= 100).toBe(true);
      for (const b of boxes.slice(i + 1)) {
        const apart =
          a.left >= b.left + b.width ||
          b.left >= a.left + a.width ||
          a.top >= b.top + b.height ||
          b.top >= a.top + a.height;
        expect(apart).toBe(true);
      }
    }
  });

  it("keep off what is drawn already, and give the first its choice", () => {
    expect(placeLabels([label(20, 50)], bounds)[0]?.left).toBeGreaterThan(20);
    expect(placeLabels([label(20, 50)], bounds, [{ left: 0, top: 0, width: 200, height: 100 }])).toEqual([null]);
  });
});

describe("the affinity graph", () => {
  const { nodes, edges } = layOutAffinity(
    5,
    [[4], [0, 2, 1]],
    [
      [0, 1, 3],
      [0, 2, 9],
      [3, 4, 6],
      [2, 2, 50],
      [1, 9, 2],
    ],
    4,
  );

  it("puts the largest community first, every expert once, on the circle", () => {
    expect(nodes.map((node) => node.expert)).toEqual([0, 2, 1, 4, 3]);
    expect(nodes.map((node) => node.community)).toEqual([0, 0, 0, 1, 2]);
    for (const node of nodes) expect(Math.hypot(node.x, node.y)).toBeCloseTo(1, 12);
  });

  it("draws the heaviest edges between different experts that exist", () => {
    expect(edges.map((edge) => [edge.from.expert, edge.to.expert, edge.weight])).toEqual([
      [0, 2, 9],
      [3, 4, 6],
      [0, 1, 3],
    ]);
    expect(layOutAffinity(2, [], [], 10).nodes).toHaveLength(2);
  });
});

describe("addresses", () => {
  const routes: Route[] = [
    { view: "models" },
    { view: "plan", model: "a/b c" },
    { view: "experts", model: "m" },
    { view: "compare", model: "m", first: "p#1", second: "p2" },
  ];
  it.each(routes)("come back as they were: %j", (route) => expect(parseRoute(hashOf(route))).toEqual(route));

  it.each(["", "#", "#/nothing", "#/models/", "#/models"])("%j is the list of models", (hash) =>
    expect(parseRoute(hash)).toEqual({ view: "models" }),
  );

  it("survive what is no encoding", () => {
    expect(parseRoute("#/models/%E0%A4%A")).toEqual({ view: "plan", model: "%E0%A4%A" });
    expect(parseRoute("#/models/m/compare/only")).toEqual({ view: "plan", model: "m" });
  });
});
