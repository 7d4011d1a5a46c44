"use strict";
// Sorting: by the number in data-v where a cell has one, else by its text.
const valueOf = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
for (const table of document.querySelectorAll(".sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.tabIndex = 0;
    const sort = () => {
      const numbers = heading.classList.contains("n");
      const before = heading.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => numbers ? a - b : a.localeCompare(b, undefined, { numeric: true });
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? -1 : 1) * order(valueOf(a, column), valueOf(b, column)));
      table.tBodies[0].append(...rows);
    };
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}
// Showing only rows with some text.
const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  let shown = 0;
  for (const row of document.getElementById("values").tBodies[0].rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} values`;
});
// Pointing at a moment: a line in all charts of the step, and what is there.
const data = JSON.parse(document.getElementById("data").textContent);
const here = document.getElementById("here");
const charts = [...document.querySelectorAll(".timed .plot")];
const bytes = (n) => {
  const power = n >= 2 ** 30 ? 30 : n >= 2 ** 20 ? 20 : n >= 1024 ? 10 : 0;
  return `${(n / 2 ** power).toPrecision(3)} ${{ 30: "GiB", 20: "MiB", 10: "KiB", 0: "bytes" }[power]}`;
};
const pointAt = (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  const seconds = share * data.step_s;
  let at = 0;
  while (at + 1 < data.start_s.length && data.start_s[at + 1] <= seconds) at += 1;
  for (const chart of charts) {
    const line = chart.querySelector(".cursor");
    line.hidden = false;
    line.style.left = `${100 * share}%`;
  }
  const layers = data.bands.filter((band) => band.bytes[at]).map((band) => `${band.name} ${bytes(band.bytes[at])}`);
  const total = data.bands.reduce((sum, band) => sum + band.bytes[at], 0);
  here.textContent = `${(1e3 * seconds).toFixed(2)} ms, ${data.op[at]}: ${bytes(total)} (${layers.join(", ")})`;
};
if (data.op.length) charts.forEach((chart) => chart.addEventListener("pointermove", pointAt));
