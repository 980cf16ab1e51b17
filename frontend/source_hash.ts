// The hash of everything that the built page depends on. tests/service_page/test_assets.py computes the same in Python,
// so that assets that were not rebuilt are noticed on machines without node.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const FILES = ["index.html", "package-lock.json", "package.json", "source_hash.ts", "tsconfig.json", "vite.config.ts"];

function listSources(root: string): string[] {
  const below = readdirSync(join(root, "src"), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(root.length + 1));
  return [...FILES, ...below].sort();
}

/** Returns sha256, in hexadecimal digits, over name, NUL, bytes, NUL of every source in the order of their names. */
export function hashSources(root: string): string {
  const hash = createHash("sha256");
  for (const name of listSources(root)) {
    hash
      .update(`${name}\0`)
      .update(readFileSync(join(root, name)))
      .update("\0");
  }
  return hash.digest("hex");
}
