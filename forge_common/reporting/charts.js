// Draws the page's charts with uPlot, in the colours of page.css, again when the window or the theme changes.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const place = document.getElementById("plots");
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  let plots = [];
  let touched = false;

  const shown = (value) => {
    if (value == null) return "–";
    if (value !== 0 && Math.abs(value) < 0.01) return value.toExponential(2);
    if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(+value.toPrecision(5));
  };
  const tick = (value) => {
    if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential();
    return value.toLocaleString("en-US", { maximumFractionDigits: 6 });
  };
  const newest = Math.max(...charts.flatMap((chart) => chart.series.map((one) => one.x[one.x.length - 1])));
  // All charts have the same updates, but for one that is zoomed.
  const updates = (plot, low, high) => {
    const x = plot.data[0];
    return x.length === 1 || (low === x[0] && high === x[x.length - 1]) ? [0, newest * 1.015 + 0.1] : [low, high];
  };
  // The value under the cursor, or the last one before it: curves have points at different updates.
  const before = (plot, _, index, at) => {
    const values = plot.data[index];
    for (let i = at ?? values.length - 1; i >= 0; i--) if (values[i] != null) return shown(values[i]);
    return "–";
  };
  const axis = (more) => ({
    stroke: colour("--dim"),
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { stroke: colour("--line"), width: 1 },
    values: (_, values) => values.map((value) => (value == null ? "" : tick(value))),
    ...more,
  });

  const draw = () => {
    for (const plot of plots) plot.destroy();
    place.replaceChildren();
    plots = charts.map((chart) => {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = chart.title + " ";
      const unit = document.createElement("span");
      unit.textContent = chart.y;
      caption.append(unit);
      figure.append(caption);
      place.append(figure);
      const data = uPlot.join(chart.series.map((one) => [one.x, one.y]));
      const options = {
        width: figure.clientWidth,
        height: 250,
        scales: { x: { time: false, range: updates } },
        cursor: { sync: { key: "page" }, drag: { x: true, y: false } },
        axes: [
          axis({ label: "update", labelSize: 20, size: 34, space: 70 }),
          axis({ size: (_, values) => 18 + 7.2 * Math.max(3, ...(values ?? []).map((text) => text.length)) }),
        ],
        series: [
          { label: "update", value: (plot, value, _, at) => shown(value ?? plot.data[0][at ?? plot.data[0].length - 1]) },
          ...chart.series.map((one) => ({
            label: one.name,
            stroke: colour(`--c${one.colour % 8}`),
            dash: one.colour < 8 ? undefined : [8, 4],
            width: 1.75,
            points: { show: one.x.length <= 3 || undefined, size: 6, fill: colour(`--c${one.colour % 8}`) },
            value: before,
          })),
        ],
      };
      return new uPlot(options, data, figure);
    });
  };

  draw();
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("pointerdown", () => (touched = true));
  if (document.body.hasAttribute("data-running")) setInterval(() => touched || location.reload(), 30000);
})();
