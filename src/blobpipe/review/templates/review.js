// Keys for the candidate that has the focus; without this script, the buttons do the same.
"use strict";

const cards = [...document.querySelectorAll("article.card")];

function show(card) {
  card?.focus({ preventScroll: true });
  card?.scrollIntoView({ block: "start" });
}

function step(by) {
  const current = document.activeElement.closest("article.card");
  const next = current ? cards[cards.indexOf(current) + by] : cards[0];
  if (next) show(next);
  else document.querySelector(by > 0 ? "main a[rel=next]" : "main a[rel=prev]")?.click();
}

function decide(key) {
  document.activeElement.closest("article.card")?.querySelector(`button[data-key="${key}"]`)?.click();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input, select, textarea, .wide")) return;
  const work = {
    j: () => step(1), ArrowRight: () => step(1),
    k: () => step(-1), ArrowLeft: () => step(-1),
    c: () => decide("c"), r: () => decide("r"), u: () => decide("u"),
  }[event.key];
  if (!work) return;
  event.preventDefault();
  work();
});

// After a decision the server names the candidate to go on with.
show(cards.find((card) => "#" + card.id === location.hash));
