// Addresses within the page, after the #: they can be kept as bookmarks and passed on.

export type Route =
  | { view: "models" }
  | { view: "plan"; model: string }
  | { view: "experts"; model: string }
  | { view: "compare"; model: string; first: string; second: string };

/** Returns the route of a hash; the list of models for one that means nothing. */
export function parseRoute(hash: string): Route {
  const [root, model, view, first, second] = hash
    .replace(/^#?\/?/, "")
    .split("/")
    .map(decodePart);
  if (root !== "models" || !model) return { view: "models" };
  if (view === "experts") return { view, model };
  if (view === "compare" && first && second) return { view, model, first, second };
  return { view: "plan", model };
}

function decodePart(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** Returns the hash of a route. */
export function hashOf(route: Route): string {
  const parts = ["models"];
  if (route.view !== "models") parts.push(route.model);
  if (route.view === "experts") parts.push("experts");
  if (route.view === "compare") parts.push("compare", route.first, route.second);
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}
