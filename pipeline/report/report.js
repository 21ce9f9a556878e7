"use strict";
// All content is there without this. It adds: the choice of a theme, sorting of tables, open details
// on paper; boxes by score and class, and enlarged pictures.

// Before anything is drawn: the theme that was chosen last, where the browser keeps such things.
try {
  const kept = localStorage.getItem("fa-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {
  // No storage: the system's theme.
}

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

// Boxes by score and class; pictures with none of the class are hidden.
const addBoxControls = (form) => {
  const [score, chosen] = [form.querySelector("input"), form.querySelector("select")];
  const show = () => {
    const isChosen = (box) => !chosen.value || box.dataset.class === chosen.value;
    let count = 0;
    for (const shot of document.querySelectorAll(".shot")) {
      const boxes = [...shot.querySelectorAll("[data-class]")];
      for (const box of boxes) {
        box.toggleAttribute("hidden", !isChosen(box) || Number(box.dataset.score ?? 1) < Number(score.value));
        count += Number(!box.hasAttribute("hidden") && box.matches("[data-score]:not(.name)"));
      }
      shot.hidden = chosen.value !== "" && !boxes.some(isChosen);
    }
    form.querySelector("output").value = Number(score.value).toFixed(2);
    tell(`${count} boxes`);
  };
  score.addEventListener("input", show);
  chosen.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.reset();
  form.hidden = false;
};

// A button over a picture shows a copy of it in a dialog.
const addEnlarging = (place, dialog) => {
  const drawing = place.querySelector("svg");
  const button = Object.assign(document.createElement("button"), { type: "button" });
  button.setAttribute("aria-label", `Enlarge ${drawing.getAttribute("aria-label").split(". ")[0]}`);
  button.addEventListener("click", () => {
    const head = document.createElement("p");
    const close = Object.assign(document.createElement("button"), { type: "button", textContent: "Close" });
    close.addEventListener("click", () => dialog.close());
    head.append(button.getAttribute("aria-label").slice(8), close);
    const copy = place.cloneNode(true);
    copy.querySelector("button").remove();
    copy.querySelector("image")?.removeAttribute("id");
    dialog.replaceChildren(head, copy);
    dialog.showModal();
  });
  place.append(button);
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

addEventListener("DOMContentLoaded", () => {
  addThemeSwitch(document.getElementById("theme"));
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  const form = document.getElementById("controls");
  if (form) addBoxControls(form);
  const dialog = document.getElementById("enlarged");
  dialog?.addEventListener("click", (event) => event.target === dialog && dialog.close());
  for (const place of document.querySelectorAll(".overlay")) addEnlarging(place, dialog);
});
