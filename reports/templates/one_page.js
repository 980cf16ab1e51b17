"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("chart-data").textContent);
  const style = getComputedStyle(document.documentElement);

  // The figures name their colours as the style sheet does: "var(--accent)".
  function withColours(value) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map(withColours);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, withColours(item)]));
  }

  for (const holder of document.querySelectorAll("[data-chart]")) {
    const { data, layout } = withColours(figures[holder.dataset.chart].wide);
    window.Plotly.newPlot(holder, data, { ...layout, width: 700 }, { staticPlot: true });
  }

  // What is too long for the sheet is drawn smaller.
  const content = document.getElementById("content");
  const most = document.getElementById("sheet").clientHeight;
  if (content.scrollHeight > most) content.style.transform = `scale(${most / content.scrollHeight})`;
})();
