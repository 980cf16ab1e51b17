import { fileURLToPath } from "node:url";
import type { Plugin } from "vite";
import { defineConfig } from "vite";
import { hashSources } from "./source_hash.ts";

const root = fileURLToPath(new URL(".", import.meta.url)).replace(/\/$/, "");

function recordSources(): Plugin {
  return {
    name: "record-sources",
    generateBundle() {
      this.emitFile({ type: "asset", fileName: "sources.sha256", source: `${hashSources(root)}\n` });
    },
  };
}

export default defineConfig({
  root,
  // The service's address in development: `bitplan serve` there, `npm run dev` here.
  server: {
    proxy: Object.fromEntries(
      ["models", "jobs", "profiles", "frontiers", "plans", "engines", "reports", "exports"].map((name) => [
        `/${name}`,
        process.env.BITPLAN_SERVER ?? "http://127.0.0.1:8377",
      ]),
    ),
  },
  build: {
    outDir: "../allocator/service/page",
    emptyOutDir: true,
    // Data URLs would not pass the page's own security policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
    rollupOptions: {
      output: {
        // Plain names: the server sends ETags, and a diff of the repository stays readable.
        entryFileNames: "assets/page.js",
        chunkFileNames: "assets/[name].js",
        assetFileNames: ({ names }) => (names[0]?.endsWith(".css") ? "assets/page.css" : "assets/[name][extname]"),
      },
    },
  },
  plugins: [recordSources()],
});
