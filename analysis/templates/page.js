"use strict";
(function () {
  const spec = JSON.parse(document.getElementById("figures").textContent);
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  const scaled = ["error", "kept"]; // figures whose y axis the log / linear buttons change
  const narrow = window.matchMedia("(max-width: 760px)");
  const hidden = new Set(); // names that a legend click has hidden, in every figure and view
  let view = spec.main;
  let scale = "log";

  function show(div, figure) {
    const layout = structuredClone(narrow.matches ? figure.narrow : figure.wide);
    const linear = scale === "linear" && scaled.includes(div.dataset.figure);
    const data = figure.data.map(function (trace) {
      const copy = Object.assign({}, trace);
      if (hidden.has(trace.name)) copy.visible = "legendonly";
      if ((linear || narrow.matches) && trace.mode === "text") copy.visible = false; // no room for names beside the curves
      return copy;
    });
    if (linear) {
      for (const key of Object.keys(layout)) {
        if (key.startsWith("yaxis")) {
          Object.assign(layout[key], { type: "linear", rangemode: "tozero" });
          delete layout[key].range;
          delete layout[key].dtick;
        }
      }
    }
    return Plotly.react(div, data, layout, config).then(function () {
      if (div.dataset.ready) return;
      div.dataset.ready = "yes";
      div.on("plotly_restyle", function () {
        for (const trace of div.data) {
          if (trace.visible === "legendonly") hidden.add(trace.name);
          else if (trace.visible !== false) hidden.delete(trace.name);
        }
      });
    });
  }

  function render() {
    for (const div of document.querySelectorAll(".live")) {
      const name = div.dataset.figure;
      const figure = spec.fixed[name] || (spec.views.length && spec.views[view].figures[name]);
      div.closest("figure").hidden = !figure;
      if (figure) show(div, figure);
    }
    for (const label of document.querySelectorAll(".view")) label.textContent = spec.views[view].label;
  }

  function buttons(id, labels, chosen, choose) {
    const bar = document.getElementById(id);
    labels.forEach(function (label, i) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.setAttribute("aria-pressed", String(i === chosen));
      button.addEventListener("click", function () {
        for (const other of bar.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
        choose(i);
        render();
      });
      bar.appendChild(button);
    });
  }

  document.documentElement.classList.add("js");
  if (spec.views.length) {
    buttons("views", spec.views.map((v) => v.label), spec.main, function (i) { view = i; });
    buttons("scales", ["log", "linear"], 0, function (i) { scale = i ? "linear" : "log"; });
  }
  narrow.addEventListener("change", render);
  render();
})();
