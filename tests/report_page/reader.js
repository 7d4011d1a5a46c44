// What a reader does with the page, and what comes of it; a test carries this out in a browser.
// SMALLEST and LARGEST are sizes of values, as the page's table has them.
(() => {
  const said = {};
  said.width = window.innerWidth;
  said.overflow = document.documentElement.scrollWidth - window.innerWidth;
  said.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  said.paper = getComputedStyle(document.body).backgroundColor;

  const table = document.getElementById("values");
  const size = (row) => row.cells[3];
  const first = () => size(table.tBodies[0].rows[0]).dataset.v;
  size(table.tHead.rows[0]).click();
  said.smallest_first = first() === "SMALLEST";
  size(table.tHead.rows[0]).click();
  said.largest_first = first() === "LARGEST";

  const plot = document.querySelector("#memory .plot");
  const box = plot.getBoundingClientRect();
  const middle = { clientX: box.left + box.width / 2, clientY: box.top + 5, bubbles: true };
  plot.dispatchEvent(new PointerEvent("pointermove", middle));
  said.pointed = / ms, .*(GiB|MiB)/.test(document.getElementById("here").textContent);

  const filter = document.getElementById("filter");
  const type = (text) => {
    filter.value = text;
    filter.dispatchEvent(new Event("input"));
  };
  type("no such module");
  const shown = [...table.tBodies[0].rows].filter((row) => row.getClientRects().length);
  said.filtered = shown.length === 0 && document.getElementById("count").textContent === "0 values";
  type("");

  // Nothing of a value has to be scrolled to sideways.
  const cells = [...table.tBodies[0].rows].slice(0, 20).flatMap((row) => [...row.cells]);
  said.values_in_sight = cells.every((cell) => cell.getBoundingClientRect().right <= window.innerWidth);

  const words = [...document.querySelectorAll("body *")].filter((e) => e.textContent.trim()
    && !e.closest("svg") && !e.closest("script"));
  said.readable = words.every((e) => parseFloat(getComputedStyle(e).fontSize) >= 10);
  const drawings = [...document.querySelectorAll(".plot svg")];
  said.drawn = drawings.length >= 3 && drawings.every((svg) => svg.getBoundingClientRect().width > 200);
  return said;
})()
