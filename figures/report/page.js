"use strict";
(() => {
  const form = document.getElementById("filter");
  const names = ["category", "kind", "label"];
  const marked = [...document.querySelectorAll("main [data-category]")];
  const sliders = [];
  let linked = {}; // the threshold that was moved last, for the address

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

  // The address keeps the filter and a threshold, so that a view can be passed on:
  // report.html#category=brick, report.html#of=brick&seed=0&threshold=0.5. Without `of` it is for all.
  function fromAddress() {
    const address = location.hash.slice(1);
    if (!address.includes("=")) {
      reveal(document.getElementById(address));
      return apply();
    }
    const wanted = new URLSearchParams(address);
    for (const name of names) {
      const choices = [...form.elements[name].options].map((option) => option.value);
      const value = wanted.get(name) || "";
      form.elements[name].value = choices.includes(value) ? value : "";
    }
    apply();
    const text = (wanted.get("threshold") || "").trim();
    if (text === "" || Number.isNaN(Number(text))) return;
    for (const slider of sliders) slider.follow(wanted, Number(text));
  }

  function toAddress() {
    const wanted = new URLSearchParams();
    for (const name of names) if (form.elements[name].value) wanted.set(name, form.elements[name].value);
    for (const [name, value] of Object.entries(linked)) if (value !== "") wanted.set(name, value);
    history.replaceState(null, "", "#" + (wanted.toString() || document.querySelector("main > section").id));
    apply();
  }

  function reveal(element) {
    for (let one = element?.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
    return element;
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

  // How many of ascending numbers are at most the limit.
  function upTo(numbers, limit) {
    let low = 0;
    let high = numbers.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (numbers[middle] <= limit) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // As the tables, whose ties are rounded to the even digit: of one decimal, only at a quarter does
  // toFixed differ.
  function percent(part, whole) {
    if (!whole) return "–";
    const value = 100 * (part / whole);
    return (value % 1 === 0.25 ? value - 0.05 : value).toFixed(1) + " %";
  }

  const rounded = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(5))) : "below all scores");

  // Recounts false alarms and misses as a threshold moves: a step of the slider is a score.
  function makeSlider(panel) {
    // Scores of single precision are written short; compared is what they stand for.
    const fitted = JSON.parse(panel.querySelector("script").textContent).map((fit) => {
      const [normal, anomalous] = [fit.normal, fit.anomalous].map((scores) => (fit.single ? scores.map(Math.fround) : scores));
      const distinct = [...new Set([...normal, ...anomalous])].sort((a, b) => a - b);
      return { ...fit, normal, anomalous, steps: [-Infinity, ...distinct] };
    });
    const slider = panel.querySelector("input");
    const seeds = panel.querySelector("select");
    const presets = panel.querySelector(".presets");
    const output = panel.querySelector("output");
    const charts = [...panel.parentElement.querySelectorAll("figure[data-low]")];
    const { run, of } = panel.dataset;
    let fit = fitted[0];

    function show(threshold) {
      const falseAlarms = fit.normal.length - upTo(fit.normal, threshold);
      const misses = upTo(fit.anomalous, threshold);
      const found = fit.anomalous.length - misses;
      const called = found + falseAlarms;
      slider.value = Math.max(0, upTo(fit.steps, threshold) - 1);
      const facts = [
        ["threshold", rounded(threshold)],
        ["false alarms", `${falseAlarms} of ${fit.normal.length} (${percent(falseAlarms, fit.normal.length)})`],
        ["misses", `${misses} of ${fit.anomalous.length} (${percent(misses, fit.anomalous.length)})`],
        ["precision", percent(found, called)],
        ["recall", percent(found, fit.anomalous.length)],
        ["F1", fit.anomalous.length ? percent(2 * found, called + fit.anomalous.length) : "–"],
      ];
      slider.setAttribute("aria-valuetext", rounded(threshold));
      output.replaceChildren(
        ...facts.map(([name, text]) => {
          const fact = document.createElement("span");
          const value = document.createElement("b");
          value.dataset.count = name;
          value.textContent = text;
          fact.append(name + " ", value);
          return fact;
        }),
      );
      for (const button of presets.children) button.setAttribute("aria-pressed", Number(button.value) === threshold);
      for (const chart of charts) {
        if (chart.dataset.seed !== String(fit.seed)) continue;
        const { low, high, side } = chart.dataset;
        const x = Math.min(side, Math.max(0, (side * (threshold - low)) / (high - low)));
        for (const line of chart.querySelectorAll("svg[role] .threshold")) line.setAttribute("transform", `translate(${x} 0)`);
      }
    }

    function choose(seed) {
      fit = fitted.find((one) => String(one.seed) === String(seed)) || fit;
      if (seeds) seeds.value = fit.seed;
      slider.max = fit.steps.length - 1;
      // Charts and tables of other seeds than the first are folded.
      for (const one of panel.parentElement.querySelectorAll("details [data-seed]")) {
        const folded = one.closest("details");
        if (one.dataset.seed === String(fit.seed) && panel.parentElement.contains(folded)) folded.open = true;
      }
      presets.replaceChildren(
        ...fit.presets.map(({ label, threshold }) => {
          const button = document.createElement("button");
          button.type = "button";
          button.value = threshold;
          button.textContent = label;
          button.addEventListener("click", () => {
            show(threshold);
            link(threshold);
          });
          return button;
        }),
      );
    }

    function link(threshold) {
      linked = { run, of, seed: fit === fitted[0] ? "" : fit.seed, threshold };
      toAddress();
    }

    slider.addEventListener("input", () => show(fit.steps[slider.value]));
    slider.addEventListener("change", () => link(fit.steps[slider.value]));
    seeds?.addEventListener("change", () => {
      choose(seeds.value);
      show(fit.presets[fit.start].threshold);
      link(fit.presets[fit.start].threshold);
    });
    choose(fit.seed);
    show(fit.presets[fit.start].threshold);
    panel.hidden = false;

    function follow(wanted, threshold) {
      if (wanted.has("of") && wanted.get("of") !== of) return;
      if (wanted.has("run") && wanted.get("run") !== run) return;
      choose(wanted.has("seed") ? wanted.get("seed") : fitted[0].seed);
      show(threshold);
      if (!wanted.has("of")) return;
      linked = { run, of, seed: fit === fitted[0] ? "" : fit.seed, threshold };
      reveal(panel).scrollIntoView({ block: "center" });
    }
    return { follow };
  }

  // On paper nothing can be unfolded.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });

  if (!form) return;
  form.hidden = false;
  document.getElementById("keys").hidden = false;
  form.addEventListener("change", toAddress);
  form.addEventListener("reset", () => setTimeout(toAddress));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") form.reset();
  });
  window.addEventListener("hashchange", fromAddress);
  for (const table of document.querySelectorAll("table.images")) makeSortable(table);
  for (const panel of document.querySelectorAll(".move")) sliders.push(makeSlider(panel));
  fromAddress();
})();
