"use strict";
// The page is complete without this script: it only marks tables that scroll, and filters the gallery.
document.documentElement.classList.add("js");

for (const scroller of document.querySelectorAll(".scroll")) {
  const card = scroller.closest(".table");
  const mark = () => {
    const hidden = scroller.scrollWidth - scroller.clientWidth;
    const scrolls = hidden > 1;
    card.classList.toggle("scrolls", scrolls);
    card.classList.toggle("end", scroller.scrollLeft >= hidden - 1);
    // Only what scrolls must be reachable with the keyboard.
    scrolls ? scroller.setAttribute("tabindex", "0") : scroller.removeAttribute("tabindex");
  };
  scroller.addEventListener("scroll", mark, { passive: true });
  new ResizeObserver(mark).observe(scroller);
  mark();
}

for (const gallery of document.querySelectorAll(".gallery")) {
  const filter = gallery.querySelector("form");
  const status = gallery.querySelector("[role=status]");
  const examples = [...gallery.querySelectorAll(".example")];
  const apply = () => {
    const chosen = new FormData(filter);
    let shown = 0;
    for (const example of examples) {
      const kind = !chosen.get("kind") || chosen.get("kind") === example.dataset.kind;
      const arm = !chosen.get("arm") || example.dataset.errs.split(" ").includes(chosen.get("arm"));
      example.hidden = !(kind && arm);
      shown += kind && arm;
    }
    status.textContent = shown === 1 ? "1 question shown" : `${shown} questions shown`;
  };
  filter.hidden = false;
  filter.addEventListener("change", apply);
  apply();
}
