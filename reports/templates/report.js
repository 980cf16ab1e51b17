"use strict";
(() => {
  // Places narrower than this get the narrow shape of a chart.
  const NARROW_PX = 620;
  // Width of the charts on paper: A4 or Letter less its margins.
  const PRINT_PX = 700;
  const figures = JSON.parse(document.getElementById("chart-data").textContent);
  const holders = [...document.querySelectorAll(".chart")];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false };
  let printing = false;

  // The figures name their colours as the style sheet does: "var(--accent)".
  function withColours(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => withColours(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, withColours(item, style)]));
  }

  function choose(figure, menus) {
    if (!menus.length) return;
    const wanted = menus.filter((menu) => menu.value !== "");
    for (const trace of figure.data) {
      trace.visible = wanted.every((menu) => {
        const own = (trace.meta || {})[menu.dataset.axis];
        return own === undefined || own === menu.value;
      });
    }
  }

  function draw(holder) {
    const width = printing ? PRINT_PX : holder.clientWidth;
    const shape = width < NARROW_PX ? "narrow" : "wide";
    const figure = withColours(figures[holder.dataset.chart][shape], getComputedStyle(document.documentElement));
    choose(figure, [...holder.closest("section").querySelectorAll("select[data-axis]")]);
    figure.layout.width = width;
    // What plotly keeps of the other shape (a colour bar lying down, turned labels) would spoil this one.
    if (holder.dataset.shape !== shape) window.Plotly.purge(holder);
    holder.dataset.shape = shape;
    holder.style.minHeight = `${figure.layout.height}px`;
    holder.dataset.width = width;
    window.Plotly.react(holder, figure.data, figure.layout, config);
  }

  function save(holder) {
    const size = { width: holder.clientWidth, height: holder.clientHeight };
    window.Plotly.downloadImage(holder, { ...size, format: "svg", filename: holder.dataset.chart });
  }

  const drawAll = () => holders.forEach(draw);
  const watcher = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (!printing && target.clientWidth !== Number(target.dataset.width)) draw(target);
    }
  });
  drawAll();
  holders.forEach((holder) => watcher.observe(holder));
  dark.addEventListener("change", drawAll);
  document.querySelectorAll("select[data-axis]").forEach((menu) => {
    menu.addEventListener("change", () => {
      menu.closest("section").querySelectorAll(".chart").forEach(draw);
    });
  });

  document.querySelectorAll("button[data-save]").forEach((button) => {
    button.addEventListener("click", () => save(document.querySelector(`[data-chart="${button.dataset.save}"]`)));
  });

  function setPrinting(value) {
    printing = value;
    document.documentElement.toggleAttribute("data-printing", value);
    drawAll();
  }
  window.addEventListener("beforeprint", () => setPrinting(true));
  window.addEventListener("afterprint", () => setPrinting(false));
})();
