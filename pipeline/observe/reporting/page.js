"use strict";
const charts = [...document.querySelectorAll(".chart")];
// On touch screens, dragging over a chart scrolls the page. No button uploads a chart.
const mouse = matchMedia("(hover: hover)").matches;
const config = {responsive: true, displaylogo: false, displayModeBar: mouse ? "hover" : false,
  showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
for (const chart of charts) {
  const {data, layout} = JSON.parse(chart.dataset.figure);
  Plotly.newPlot(chart, data, mouse ? layout : {...layout, dragmode: false}, config);
}
// Paper is narrower than a screen, and plots have a fixed width.
addEventListener("beforeprint", () => charts.forEach(chart =>
  Plotly.relayout(chart, {autosize: false, width: chart.closest(".charts") ? 310 : 620})));
addEventListener("afterprint", () => charts.forEach(chart =>
  Plotly.relayout(chart, {autosize: true, width: null})));
// Show one image at a time; without a script, and in print, the first and the last.
for (const steps of document.querySelectorAll(".steps")) {
  const frames = [...steps.querySelectorAll(".frame")], input = steps.querySelector("input");
  const show = () => {
    frames.forEach((frame, i) => frame.hidden = i !== input.valueAsNumber);
    steps.querySelector("output").textContent = frames[input.valueAsNumber].dataset.step;
  };
  steps.querySelector("label").hidden = false;
  input.addEventListener("input", show);
  show();
}
