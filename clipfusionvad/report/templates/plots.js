// Plotly's figures, in the colours of the page.

/** A copy of a figure's part in which "var(--name)" has become what that colour is just now. */
function withColours(value) {
  if (typeof value === "string") {
    const found = /^var\((--[\w-]+)\)$/.exec(value);
    return found ? colour(found[1]) : value;
  }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(withColours);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, withColours(item)]));
}

function pageLayout(layout) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--muted") };
  return {
    ...layout,
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--text") },
    margin: { l: 52, r: 14, t: 38, b: 46, ...layout.margin },
    hoverlabel: { bgcolor: colour("--surface"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--text") },
    xaxis: { ...axis, automargin: true, ...layout.xaxis },
    yaxis: { ...axis, automargin: true, ...layout.yaxis },
  };
}

function drawPlots() {
  for (const place of document.querySelectorAll(".plot")) {
    place.figure ??= JSON.parse(place.querySelector("script").textContent);
    const figure = withColours(place.figure);
    Plotly.react(place, figure.data, pageLayout(figure.layout), {
      responsive: true,
      displaylogo: false,
      modeBarButtons: [["toImage", "resetScale2d"]],
    });
  }
}

drawPlots();
document.addEventListener("themechange", drawPlots);
