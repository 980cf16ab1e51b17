import { useMemo } from "preact/hooks";
import type { ExpertLayer } from "../api/contract";
import { layOutAffinity } from "../figures/affinity_layout";
import { AsTable } from "./data_table";

const MOST_EDGES = 160;
const RADIUS = 100;
const MOST_NAMES = 64;

function communityText(communities: number[][]): string {
  const sizes = communities.map((members) => members.length).sort((a, b) => b - a);
  return `${communities.length === 1 ? "one community" : `${communities.length} communities`} of ${sizes.join(", ")} experts`;
}

/** Experts of one layer as a graph: neighbours on the circle form a community. */
export function AffinityGraph({ layer }: { layer: ExpertLayer }) {
  const experts = layer.frequency.length;
  const { nodes, edges } = useMemo(
    () => layOutAffinity(experts, layer.communities, layer.affinity, MOST_EDGES),
    [experts, layer],
  );
  const named = experts <= MOST_NAMES;
  const dot = named ? 7.5 : 3;
  return (
    <div>
      <svg
        class="affinity"
        viewBox="-125 -125 250 250"
        role="img"
        aria-label={`Affinity of the experts of layer ${layer.layer}: ${communityText(layer.communities)}`}
      >
        {edges.map(({ from, to, strength }) => (
          <line
            key={`${from.expert}-${to.expert}`}
            x1={RADIUS * from.x}
            y1={RADIUS * from.y}
            x2={RADIUS * to.x}
            y2={RADIUS * to.y}
            stroke-width={0.4 + 4 * strength}
            opacity={0.15 + 0.7 * strength}
          />
        ))}
        {nodes.map((node) => (
          <g key={node.expert}>
            <circle cx={RADIUS * node.x} cy={RADIUS * node.y} r={dot} class={`community-${node.community % 6}`} />
            {named && (
              <text
                x={(RADIUS + 15) * node.x}
                y={(RADIUS + 15) * node.y}
                text-anchor="middle"
                dominant-baseline="central"
              >
                {node.expert}
              </text>
            )}
          </g>
        ))}
      </svg>
      <p class="legend">{communityText(layer.communities)}</p>
      <AsTable
        caption="Affinity"
        rows={() => layer.affinity.toSorted((a, b) => b[2] - a[2])}
        columns={[
          { title: "Expert", cell: (row) => row[0], number: true },
          { title: "Expert", cell: (row) => row[1], number: true },
          { title: "Tokens of both", cell: (row) => row[2], number: true },
        ]}
      />
    </div>
  );
}
