// Charts by uPlot: they are drawn when they are first seen, and again when the theme or the width changes.

let drawn = [];

function onceShown(holder, draw) {
  drawn.push({ holder, draw });
}

function drawCharts() {
  drawn = drawn.filter(({ holder }) => holder.isConnected);
  for (const { holder, draw } of drawn) {
    holder.replaceChildren();
    draw();
  }
}

function axis(options) {
  return {
    stroke: colour("soft"),
    font: '11px ui-sans-serif, system-ui, "Segoe UI", Roboto, sans-serif',
    labelFont: '11px ui-sans-serif, system-ui, "Segoe UI", Roboto, sans-serif',
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
    ...options,
  };
}

function histogram(holder, strengths) {
  const width = strengths.max / strengths.counts.length;
  const x = strengths.counts.map((_, i) => (i + 0.5) * width);
  const y = strengths.counts.map((n) => n || null);
  const top = Math.max(...strengths.counts);
  new uPlot(
    {
      width: holder.clientWidth,
      height: 150,
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { time: false, range: [0, strengths.max] },
        // A logarithmic scale from one half, so that a single token is still a bar.
        y: { distr: 3, range: [0.5, Math.max(10, 10 ** Math.ceil(Math.log10(top)))] },
      },
      axes: [
        axis({ size: 24, space: 60, grid: { show: false } }),
        axis({
          size: 46,
          splits: (_u, _axis, low, high) => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((e) => 10 ** e).filter((n) => n >= low && n <= high),
          filter: (_u, splits) => splits,
          values: (_, ticks) => ticks.map(count),
        }),
      ],
      series: [
        {},
        {
          fill: colour("accent"),
          width: 0,
          points: { show: false },
          paths: uPlot.paths.bars({ size: [0.9, 60], align: 0 }),
        },
      ],
    },
    [x, y],
    holder,
  );
}
