"use strict";
(() => {
  const body = document.querySelector("tbody");
  const headers = [...document.querySelectorAll("thead th")];

  // Unknown numbers come last in either order.
  function compare(a, b, sign) {
    if (a.dataset.value === undefined) return sign * a.textContent.localeCompare(b.textContent);
    const [x, y] = [Number(a.dataset.value), Number(b.dataset.value)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number(Number.isNaN(x)) - Number(Number.isNaN(y));
    return x === y ? 0 : sign * (x < y ? -1 : 1);
  }

  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", other === header ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], sign));
      body.append(...rows);
    });
  });
})();
