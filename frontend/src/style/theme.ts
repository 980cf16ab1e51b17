// The theme: the system's unless the person chose another. Colours of the style sheet for what is drawn on a canvas.

export type Theme = "system" | "light" | "dark";
const ENTRY = "bitplan.theme";
export const THEMES: Theme[] = ["system", "light", "dark"];

/** Returns the theme that was chosen in this browser. */
export function storedTheme(): Theme {
  const stored = localStorage.getItem(ENTRY);
  return stored === "light" || stored === "dark" ? stored : "system";
}

/** Shows a theme and remembers it; everything drawn is told by the event `themechange` of the window. */
export function applyTheme(theme: Theme): void {
  if (theme === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(ENTRY);
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem(ENTRY, theme);
  }
  window.dispatchEvent(new Event("themechange"));
}

/** Calls back when the theme changes, by the person or by the system; returns what stops this. */
export function onThemeChange(redraw: () => void): () => void {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  window.addEventListener("themechange", redraw);
  system.addEventListener("change", redraw);
  return () => {
    window.removeEventListener("themechange", redraw);
    system.removeEventListener("change", redraw);
  };
}

// A drawing asks for the same few colours again and again, and each resolving makes the browser compute styles.
const resolved = new Map<string, string>();
onThemeChange(() => resolved.clear());

/** Returns a colour of the style sheet, such as "--accent", resolved in the theme that is shown. */
export function themeColour(name: string): string {
  const known = resolved.get(name);
  if (known !== undefined) return known;
  // A custom property itself would read "light-dark(…)"; the colour of an element is resolved.
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  resolved.set(name, colour);
  return colour;
}
