// Keys for the candidate that has the focus, and sorting of short tables; without this script, the buttons do the same.
"use strict";

const cards = [...document.querySelectorAll("article.card")];

function show(card) {
  card?.focus({ preventScroll: true });
  card?.scrollIntoView({ block: "start" });
}

// The candidate that a key is for: the only one of its page, or that in focus.
function meant() {
  return cards.length === 1 ? cards[0] : document.activeElement.closest("article.card");
}

function step(by) {
  const current = meant();
  const next = current ? cards[cards.indexOf(current) + by] : cards[0];
  if (next) show(next);
  else document.querySelector(by > 0 ? "main a[rel=next]" : "main a[rel=prev]")?.click();
}

function press(within, key) {
  within?.querySelector(`button[data-key="${key}"]`)?.click();
}

// Without a focus among several, the first gets it, so that nobody decides on one unseen.
function onMeant(work) {
  const card = meant();
  if (card) work(card);
  else show(cards[0]);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input:not([type=checkbox]), select, textarea")) return;
  // In a wide table, arrows scroll
  if (event.key.startsWith("Arrow") && event.target.closest(".wide")) return;
  const bulk = document.getElementById("bulk");
  const work = {
    j: () => step(1), ArrowRight: () => step(1),
    k: () => step(-1), ArrowLeft: () => step(-1),
    ...Object.fromEntries(["c", "r", "u"].map((key) => [key, () => onMeant((card) => press(card, key))])),
    x: () => onMeant((card) => card.querySelector(".pick input")?.click()),
    C: () => press(bulk, "C"), R: () => press(bulk, "R"), U: () => press(bulk, "U"),
    z: () => press(document.querySelector(".said"), "z"),
  }[event.key];
  if (!work) return;
  event.preventDefault();
  work();
});

// How many are selected, and nothing is sent without any.
const bulk = document.getElementById("bulk");
const boxes = [...document.querySelectorAll("input[form=bulk]")];

function count() {
  const selected = boxes.filter((box) => box.checked).length;
  bulk.querySelector("output").textContent = `${selected} selected`;
  for (const button of bulk.querySelectorAll("button[data-key]")) button.disabled = !selected;
}

if (bulk) {
  for (const box of boxes) box.addEventListener("change", count);
  count();
}

// A click on the head of a column sorts the rows that are there: numbers by size, all else by its letters.
function sortBy(table, column, head) {
  const down = head.getAttribute("aria-sort") !== "descending";
  const key = (row) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace("−", "-"));
    return /^\d{4}-\d\d/.test(text) || Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b)) * (down ? -1 : 1));
  table.tBodies[0].append(...rows);
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column, head));
    head.append(button);
  });
}

// After a decision the server names the candidate to go on with.
show(cards.find((card) => "#" + card.id === location.hash));

// A browser leaves what is half in sight where it is; in a wide table the rest would stay hidden.
document.addEventListener("focusin", ({ target }) => {
  if (target.closest(".wide table")) target.scrollIntoView({ block: "nearest", inline: "nearest" });
});
