// What scripts add to a page that is complete without them: thresholds to try, and a gallery to sort and to filter.
// Reads the scores that stand in the page; asks nobody for anything. Names are put in as text only.
"use strict";
(() => {
  const make = (tag, text = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const labelled = (text, control) => {
    const label = make("label", text);
    label.append(control);
    return label;
  };
  const choice = (options, value) => {
    const select = make("select");
    for (const [key, title] of options) select.append(make("option", title, { value: key }));
    if (value !== undefined) select.value = value;
    return select;
  };

  // --- thresholds --------------------------------------------------------------------------------------------------

  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const doublesOf = (text) => {
    const bytes = bytesOf(text);
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: bytes.length / 8 }, (_, at) => view.getFloat64(8 * at, true));
  };

  /** The four counts: an image is called PNEUMONIA when its score is above the threshold. */
  const count = ({ labels, scores }, threshold) => {
    const counts = [0, 0, 0, 0]; // tn, fn, fp, tp
    for (let at = 0; at < scores.length; at += 1) counts[2 * (scores[at] > threshold) + labels[at]] += 1;
    return counts;
  };
  // halves up, with room for what division leaves: as the tables of the page round
  const share = (part, whole) => (whole ? `${(Math.floor((1000 * part) / whole + 0.5 + 1e-9) / 10).toFixed(1)}\u00a0%` : "–");

  const addThresholds = (place, models) => {
    const splits = [...new Set(Object.values(models).flatMap((model) => Object.keys(model.splits)))];
    const split = choice(splits.map((name) => [name, `${name} images`]), splits[0]);
    const head = ["Model", "Threshold", "", "TN", "FP", "FN", "TP", "Sensitivity", "Specificity", "PPV", "NPV"];
    const table = make("table");
    const top = table.createTHead().insertRow();
    for (const text of head) top.append(make("th", text, { scope: "col" }));
    const body = table.createTBody();

    const updates = Object.entries(models).map(([name, model]) => {
      const row = body.insertRow();
      row.dataset.model = name;
      row.append(make("th", model.title, { scope: "row" }));
      const lowest = Math.min(0, model.threshold);
      const exact = make("input", "", { type: "number", step: "any", "aria-label": `Threshold of ${name}` });
      const slider = make("input", "", {
        type: "range", min: lowest, max: 1, step: "any", "aria-label": `Slider: threshold of ${name}`,
      });
      exact.value = model.threshold;
      slider.value = model.threshold;
      const back = make("button", "back", { type: "button", title: `To the operating point ${model.point}` });
      for (const control of [exact, slider]) row.insertCell().append(control);
      row.cells[1].append(back);
      const cells = head.slice(3).map((text) => {
        const cell = row.insertCell();
        cell.dataset.label = text;
        return cell;
      });
      const update = () => {
        const threshold = exact.value === "" ? NaN : Number(exact.value);
        const scored = model.splits[split.value];
        const usable = scored && Number.isFinite(threshold);
        const [tn, fn, fp, tp] = usable ? count(scored, threshold) : [];
        const shown = usable
          ? [tn, fp, fn, tp, share(tp, tp + fn), share(tn, tn + fp), share(tp, tp + fp), share(tn, tn + fn)]
          : Array(8).fill("–");
        cells.forEach((cell, at) => { cell.textContent = shown[at]; });
      };
      slider.addEventListener("input", () => { exact.value = slider.value; update(); });
      exact.addEventListener("input", () => { slider.value = exact.value; update(); });
      back.addEventListener("click", () => {
        exact.value = model.threshold;
        slider.value = model.threshold;
        update();
      });
      return update;
    });
    split.addEventListener("change", () => updates.forEach((update) => update()));
    const frame = make("div", "", { class: "scroll" });
    frame.append(table);
    place.append(
      make("h3", "Try other thresholds"),
      make("p", "Choosing a threshold while looking at test figures makes them flatter: choose on validation.", { class: "note" }),
      labelled("Counted on", split), frame,
    );
    updates.forEach((update) => update());
    place.hidden = false;
  };

  const place = document.getElementById("thresholds");
  const data = document.getElementById("scores");
  if (place && data) {
    const models = JSON.parse(data.textContent).models;
    for (const model of Object.values(models)) {
      for (const scored of Object.values(model.splits)) {
        scored.labels = bytesOf(scored.labels);
        scored.scores = doublesOf(scored.scores);
      }
    }
    if (Object.keys(models).length) addThresholds(place, models);
  }

  // --- gallery -----------------------------------------------------------------------------------------------------

  const cases = document.getElementById("cases");
  const tools = document.getElementById("gallery-tools");
  const said = document.getElementById("gallery-shown");
  if (cases && tools) {
    const cards = [...cases.children];
    const listed = (key, titles = key) => [
      ["", "all"], ...new Map(cards.map((card) => [card.dataset[key], card.dataset[titles]])),
    ].filter(([value], at) => at === 0 || value);
    const filters = {
      model: choice(listed("model")), kind: choice(listed("kind", "kindTitle")), subtype: choice(listed("subtype")),
    };
    const words = make("input", "", { type: "search" });
    const order = choice([["", "as given"], ["low", "score, lowest first"], ["high", "score, highest first"], ["path", "file"]]);
    const by = {
      "": () => 0,
      low: (a, b) => Number(a.dataset.score || 2) - Number(b.dataset.score || 2),
      high: (a, b) => Number(b.dataset.score || -1) - Number(a.dataset.score || -1),
      path: (a, b) => (a.dataset.path < b.dataset.path ? -1 : Number(a.dataset.path > b.dataset.path)),
    };
    const show = () => {
      const wanted = words.value.toLowerCase();
      for (const card of cards) {
        const fits = Object.entries(filters).every(([key, select]) => !select.value || card.dataset[key] === select.value);
        card.hidden = !(fits && card.textContent.toLowerCase().includes(wanted));
      }
      cases.append(...[...cards].sort(by[order.value]));
      said.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} shown`;
    };
    tools.append(
      labelled("Model", filters.model), labelled("Kind", filters.kind), labelled("Subtype", filters.subtype),
      labelled("Words in it", words), labelled("Order", order),
    );
    for (const select of [...Object.values(filters), order]) select.addEventListener("change", show);
    words.addEventListener("input", show);
    tools.hidden = false;
    show();
  }
})();
