// Experts of a layer on a circle, those of a community side by side; the heaviest edges between them.

export interface AffinityNode {
  expert: number;
  community: number;
  /** Position on the unit circle. */
  x: number;
  y: number;
}

export interface AffinityEdge {
  from: AffinityNode;
  to: AffinityNode;
  weight: number;
  /** Share of the heaviest weight. */
  strength: number;
}

export interface AffinityLayout {
  nodes: AffinityNode[];
  edges: AffinityEdge[];
}

/** Returns the layout; communities are drawn largest first, with a gap of one place between them. */
export function layOutAffinity(
  experts: number,
  communities: number[][],
  affinity: [number, number, number][],
  mostEdges: number,
): AffinityLayout {
  const grouped = [...communities].sort((a, b) => b.length - a.length || (a[0] ?? 0) - (b[0] ?? 0));
  const known = new Set(grouped.flat());
  const alone = Array.from({ length: experts }, (_, expert) => expert).filter((expert) => !known.has(expert));
  const groups = [...grouped, ...alone.map((expert) => [expert])];
  const places = experts + groups.length;
  const nodes: AffinityNode[] = [];
  let place = 0;
  for (const [community, members] of groups.entries()) {
    for (const expert of members) {
      const angle = (2 * Math.PI * place) / places - Math.PI / 2;
      nodes.push({ expert, community, x: Math.cos(angle), y: Math.sin(angle) });
      place += 1;
    }
    place += 1;
  }
  const byExpert = new Map(nodes.map((node) => [node.expert, node]));
  const heaviest = affinity.toSorted((a, b) => b[2] - a[2]).slice(0, mostEdges);
  const most = heaviest[0]?.[2] ?? 1;
  const edges = heaviest.flatMap(([a, b, weight]) => {
    const from = byExpert.get(a);
    const to = byExpert.get(b);
    return from && to && a !== b ? [{ from, to, weight, strength: weight / most }] : [];
  });
  return { nodes, edges };
}
