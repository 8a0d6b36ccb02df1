"use strict";
(function () {
  const spec = JSON.parse(document.getElementById("figures").textContent);
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  const narrow = window.matchMedia("(max-width: 760px)");

  function render() {
    for (const div of document.querySelectorAll(".live")) {
      const figure = spec[div.dataset.figure];
      const data = figure.data.filter((trace) => !(narrow.matches && trace.mode === "text"));
      Plotly.react(div, data, structuredClone(narrow.matches ? figure.narrow : figure.wide), config);
    }
  }

  document.documentElement.classList.add("js");
  narrow.addEventListener("change", render);
  render();
})();
