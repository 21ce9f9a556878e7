"use strict";
// All content is there without this. It adds: the choice of a theme, sorting of tables, legends that
// hide and show lines, values under the pointer or by the arrow keys, and open details on paper.

const tell = (text) => {
  const place = document.getElementById("told");
  if (place) place.textContent = text;
};

const addThemeSwitch = (box) => {
  const root = document.documentElement;
  const inputs = [...box.querySelectorAll("input")];
  for (const input of inputs) {
    input.checked = input.value === (root.dataset.theme || "system");
    input.addEventListener("change", () => {
      if (input.value === "system") delete root.dataset.theme;
      else root.dataset.theme = input.value;
      try {
        if (input.value === "system") localStorage.removeItem("fa-theme");
        else localStorage.setItem("fa-theme", input.value);
      } catch {
        // No storage: the choice holds until the page is closed.
      }
    });
  }
  box.hidden = false;
};

const MISSING = /^(-|\u2013|\u2014|nan|n\/a|none)?$/i;
const NUMBER = /^([<>])?\s*\[?([+-]?(?:inf|\u221e|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?))\s*(?:%|\u00d7)?(?:\s*(?:\u00b1|to |,|\.\.).*)?\]?$/i;

// What a cell is sorted by: null if it is empty or a dash, else a number or its text.
const sortKey = (cell) => {
  const raw = cell.dataset.sort ?? cell.textContent;
  const text = raw.trim().replace(/\s+/g, " ").replaceAll("\u2212", "-");
  if (MISSING.test(text)) return null;
  const found = NUMBER.exec(text.replace(/(\d)[ \u2009\u202f](?=\d{3}(?!\d))/g, "$1"));
  if (!found) return text;
  const value = Number(found[2].replace(/inf|\u221e/i, "Infinity"));
  const nudge = Math.abs(value) * 1e-9 || 1e-300;
  return found[1] === "<" ? value - nudge : found[1] === ">" ? value + nudge : value;
};

const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

// Rows in their new order; equal ones stay as they are, those without a value come last.
const sortedRows = (rows, column, direction) => {
  const keys = new Map(rows.map((row) => [row, sortKey(row.cells[column])]));
  const known = [...keys.values()].filter((key) => key !== null);
  const areNumbers = known.every((key) => typeof key === "number");
  const compare = areNumbers
    ? (a, b) => (a > b) - (a < b)
    : (a, b) => words.compare(String(a), String(b));
  return [...rows].sort((first, second) => {
    const [a, b] = [keys.get(first), keys.get(second)];
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * compare(a, b);
  });
};

const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

const makeSortable = (table) => {
  const heads = [...(table.tHead?.rows[0]?.cells ?? [])];
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2 || table.tHead.rows.length !== 1) return;
  const first = [...body.rows];
  if (first.some((row) => row.cells.length !== heads.length)) return;
  for (const [column, head] of heads.entries()) {
    const name = head.textContent.trim();
    if (!name) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = NEXT[head.getAttribute("aria-sort") ?? "none"];
      for (const other of heads) other.removeAttribute("aria-sort");
      if (order === "none") {
        body.append(...first);
        tell("Rows in their first order");
        return;
      }
      head.setAttribute("aria-sort", order);
      body.append(...sortedRows([...body.rows], column, order === "ascending" ? 1 : -1));
      tell(`Sorted by ${name}, ${order}`);
    });
  }
  const note = Object.assign(document.createElement("span"), { className: "unseen" });
  note.textContent = " Buttons in the column headings sort the rows.";
  table.caption?.append(note);
};

const chartsOf = new WeakMap();

const makeToggles = (legend) => {
  const scope = legend.closest("[data-scope]") ?? legend.closest("section");
  for (const item of legend.querySelectorAll("[data-series]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      const isOn = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(isOn));
      for (const part of scope.querySelectorAll(".chart [data-series]")) {
        if (part.dataset.series === item.dataset.series) part.classList.toggle("off", !isOn);
      }
      for (const box of scope.querySelectorAll(".chartbox")) chartsOf.get(box)?.(item.dataset.series, isOn);
    });
  }
};

const addTips = (box) => {
  const chart = box.querySelector("svg.chart");
  const all = JSON.parse(chart?.dataset.points || "[]");
  if (!all.length) return;
  let points = all;
  const off = new Set();
  const view = chart.viewBox.baseVal;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  tip.setAttribute("role", "status");
  const mark = document.createElementNS(chart.namespaceURI, "circle");
  mark.setAttribute("class", "mark");
  mark.setAttribute("r", "6");
  box.append(tip);
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  const title = chart.getAttribute("aria-label").split(". ")[0];
  box.setAttribute("aria-label", `${title}: values by the arrow keys`);
  let chosen = -1;

  const hide = () => {
    mark.remove();
    tip.hidden = true;
    chosen = -1;
  };
  const show = (index) => {
    if (!points.length) return hide();
    chosen = Math.max(0, Math.min(points.length - 1, index));
    const [x, y, text] = points[chosen];
    mark.setAttribute("cx", x);
    mark.setAttribute("cy", y);
    chart.append(mark);
    tip.textContent = text;
    tip.hidden = false;
    const width = box.clientWidth;
    const half = tip.offsetWidth / 2;
    tip.style.left = `${Math.max(half, Math.min(width - half, (x / view.width) * width))}px`;
    tip.style.top = `${Math.max(36, (y / view.height) * chart.clientHeight)}px`;
  };
  const nearest = (event) => {
    const frame = chart.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * view.width;
    const y = ((event.clientY - frame.top) / frame.height) * view.height;
    const far = (point) => (point[0] - x) ** 2 + 0.25 * (point[1] - y) ** 2;
    return points.reduce((best, point, i) => (far(point) < far(points[best]) ? i : best), 0);
  };
  chartsOf.set(box, (series, isOn) => {
    if (isOn) off.delete(series);
    else off.add(series);
    points = all.filter((point) => !off.has(point[3]));
    hide();
  });
  box.addEventListener("pointermove", (event) => show(nearest(event)));
  box.addEventListener("pointerleave", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(chosen + 1);
    else if (event.key === "ArrowLeft") show(chosen < 0 ? points.length - 1 : chosen - 1);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(points.length - 1);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
};

const openedForPaper = [];
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) {
    part.open = true;
    openedForPaper.push(part);
  }
});
addEventListener("afterprint", () => {
  for (const part of openedForPaper.splice(0)) part.open = false;
});

document.querySelectorAll("#theme").forEach(addThemeSwitch);
document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".chartbox").forEach(addTips);
document.querySelectorAll(".legend[data-toggles]").forEach(makeToggles);
