// Direct labels on a chart: each beside its point, none on another, none outside; a label without room is left out and
// stands in the table only.

export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

export interface LabelRequest {
  x: number;
  y: number;
  width: number;
  height: number;
}

const GAP = 7;

function overlaps(a: Box, b: Box): boolean {
  return a.left < b.left + b.width && b.left < a.left + a.width && a.top < b.top + b.height && b.top < a.top + a.height;
}

function inside(box: Box, bounds: Box): boolean {
  return (
    box.left >= bounds.left &&
    box.top >= bounds.top &&
    box.left + box.width <= bounds.left + bounds.width &&
    box.top + box.height <= bounds.top + bounds.height
  );
}

function placesAround({ x, y, width, height }: LabelRequest): Box[] {
  const size = { width, height };
  return [
    { left: x + GAP, top: y - height, ...size },
    { left: x + GAP, top: y, ...size },
    { left: x - width / 2, top: y - height - GAP, ...size },
    { left: x - width - GAP, top: y - height, ...size },
    { left: x - width - GAP, top: y, ...size },
    { left: x - width / 2, top: y + GAP, ...size },
  ];
}

/** Returns a place for each label, or null. The first labels choose first. */
export function placeLabels(requests: LabelRequest[], bounds: Box, taken: Box[] = []): (Box | null)[] {
  const occupied = [...taken];
  return requests.map((request) => {
    const place = placesAround(request).find(
      (box) => inside(box, bounds) && !occupied.some((other) => overlaps(box, other)),
    );
    if (place !== undefined) occupied.push(place);
    return place ?? null;
  });
}
