"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const names = ["category", "kind", "label"];
  const marked = [...document.querySelectorAll("main [data-category]")];

  // An element that has no kind or label is about all of them.
  const fits = (element, wanted) =>
    names.every((name) => !wanted[name] || !(name in element.dataset) || element.dataset[name] === wanted[name]);

  function apply() {
    const wanted = Object.fromEntries(names.map((name) => [name, form.elements[name].value]));
    for (const element of marked) element.hidden = !fits(element, wanted);
    for (const note of document.querySelectorAll(".nothing")) {
      const shown = note.parentElement.querySelector("[data-kind]:not([hidden])");
      note.hidden = Boolean(shown);
    }
  }

  // The address keeps the filter, so that a view can be passed on: report.html#category=brick.
  function fromAddress() {
    const address = location.hash.slice(1);
    if (!address.includes("=")) return apply();
    const wanted = new URLSearchParams(address);
    for (const name of names) {
      const choices = [...form.elements[name].options].map((option) => option.value);
      const value = wanted.get(name) || "";
      form.elements[name].value = choices.includes(value) ? value : "";
    }
    apply();
  }

  function toAddress() {
    const wanted = new URLSearchParams();
    for (const name of names) if (form.elements[name].value) wanted.set(name, form.elements[name].value);
    history.replaceState(null, "", "#" + (wanted.toString() || "results"));
    apply();
  }

  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const kind = head.dataset.sort;
      if (!kind) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const first = kind === "number" ? "descending" : "ascending";
        const other = kind === "number" ? "ascending" : "descending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        for (const one of heads) one.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const value = (row) => {
          const cell = row.cells[column];
          return kind === "number" ? Number(cell.dataset.value) || 0 : cell.textContent;
        };
        const compare = (a, b) => (kind === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => sign * compare(value(a), value(b)));
        table.tBodies[0].append(...rows);
      });
    });
  }

  form.hidden = false;
  form.addEventListener("change", toAddress);
  form.addEventListener("reset", () => setTimeout(toAddress));
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", fromAddress);
  const images = document.getElementById("images");
  if (images) makeSortable(images);
  fromAddress();
})();
