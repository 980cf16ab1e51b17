// Numbers with their units, as text and back.

const BYTES: Record<string, number> = {
  "": 1,
  b: 1,
  kb: 1e3,
  mb: 1e6,
  gb: 1e9,
  tb: 1e12,
  kib: 2 ** 10,
  mib: 2 ** 20,
  gib: 2 ** 30,
  tib: 2 ** 40,
};
export const MIB = 2 ** 20;

/** Returns a number in `digits` significant digits without an exponent where it is of everyday size. */
export function significant(value: number, digits = 3): string {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const magnitude = Math.abs(value);
  if (magnitude < 1e-4 || magnitude >= 1e6)
    return value
      .toExponential(digits - 1)
      .replace("e+", "e")
      .replace("-", "−");
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(magnitude)));
  return value.toFixed(decimals).replace("-", "−");
}

/** Returns bytes in the binary unit that keeps the number short: "70.0 MiB". */
export function bytesText(bytes: number, digits = 3): string {
  if (!Number.isFinite(bytes)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, Math.abs(bytes))) / 10)));
  const value = bytes / 2 ** (10 * power);
  return `${power === 0 ? String(Math.round(value)) : significant(value, Math.max(digits, value >= 100 ? 4 : digits))} ${units[power]}`;
}

/** Returns the step in bytes whose worth is said of something so large, with its name. */
export function marginOf(bytes: number): { bytes: number; name: string } {
  return bytes < 8 * MIB ? { bytes: 1024, name: "KiB" } : { bytes: MIB, name: "MiB" };
}

/** Returns the bytes of a text such as "70MiB", "1.5 GB" or "73400320"; null if it is none. */
export function parseBytes(text: string): number | null {
  const match = /^\s*(\d*\.?\d+(?:e\d+)?)\s*([a-z]*)\s*$/i.exec(text);
  const factor = BYTES[match?.[2]?.toLowerCase() ?? "none"];
  if (match === null || factor === undefined) return null;
  return Number(match[1]) * factor;
}

/** Returns the positive number of a text, or null. A comma is taken for the decimal point. */
export function parsePositive(text: string): number | null {
  const value = Number(text.trim().replace(",", "."));
  return text.trim() !== "" && Number.isFinite(value) && value > 0 ? value : null;
}

/** Returns a loss: three significant digits, nats per token are said beside it. */
export function lossText(loss: number): string {
  return significant(loss, 3);
}

/** Returns a round number of an axis: 0.001, 1e−4. */
export function tickText(value: number): string {
  if (value === 0) return "0";
  const text = Math.abs(value) < 1e-3 ? value.toExponential() : String(Number(value.toPrecision(6)));
  return text.replaceAll("-", "−");
}

/** Returns bits per weight with two decimals. */
export function bitsText(bits: number | null): string {
  return bits === null || !Number.isFinite(bits) ? "–" : bits.toFixed(2);
}

/** Returns microseconds in the unit that keeps the number short. */
export function timeText(us: number): string {
  if (us >= 1e6) return `${significant(us / 1e6)} s`;
  return us >= 1e3 ? `${significant(us / 1e3)} ms` : `${significant(us)} µs`;
}

/** Returns a share in per cent, never rounding something down to nothing. */
export function percentText(share: number): string {
  const percent = 100 * share;
  if (percent !== 0 && Math.abs(percent) < 0.1) return `${percent < 0 ? "−" : ""}<0.1 %`;
  return `${percent.toFixed(Math.abs(percent) < 10 ? 1 : 0).replace("-", "−")} %`;
}

/** Returns a difference with its sign. */
export function signedText(value: number, text: (magnitude: number) => string): string {
  if (value === 0) return "±0";
  return `${value > 0 ? "+" : "−"}${text(Math.abs(value))}`;
}

/** Returns a count such as 134.5 M. */
export function countText(count: number | null): string {
  if (count === null) return "–";
  if (count >= 1e9) return `${significant(count / 1e9)} G`;
  if (count >= 1e6) return `${significant(count / 1e6, count >= 1e8 ? 4 : 3)} M`;
  return count >= 1e4 ? `${significant(count / 1e3)} k` : String(count);
}

/** Returns how long ago something was: "3 min ago". */
export function agoText(iso: string, now_ms: number): string {
  const seconds = Math.max(0, (now_ms - Date.parse(iso)) / 1000);
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return iso.slice(0, 10);
}
