// How many neurons the features of a layer share: an image under uPlot's axes, cursor and zoom.

const PAIRS = 20;

function overlapView(layer) {
  const { overlap } = layer;
  const n = overlap.features.length;
  const at = (i, j) => (i < j ? overlap.shared[i][j - i] : overlap.shared[j][i - j]);
  const size = (i) => at(i, i);
  const likeness = (i, j) => (i === j ? 0 : at(i, j) / Math.max(1, size(i) + size(j) - at(i, j)));
  const feature = (i) => BY_PLACE.get(`${layer.layer}/${overlap.features[i]}`);
  let order = overlap.order;
  let most = 0;
  for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) most = Math.max(most, likeness(i, j));

  const readout = h("p", { class: "readout", role: "status" }, "Point at a cell, or tap it. Drag to zoom in, double-click to zoom out.");
  const describe = (i, j) => {
    if (i === j) return [link(i), `: ${plural(size(i), "neuron")}`];
    const chance = (size(i) * size(j)) / layer.width;
    return [link(i), " and ", link(j), ` share ${at(i, j)} of ${size(i)} and ${size(j)} neurons; by chance ${chance.toFixed(1)}`];
  };
  const link = (i) => h("a", { href: href(feature(i)) }, `${feature(i).place} ${visible(feature(i).name)}`);

  const holder = h("div", {
    class: "chart heat",
    role: "img",
    "aria-label": `Heat map of the neurons that ${n} features share. The pairs that share most are in the table that follows.`,
  });
  const draw = () => heatMap(holder, n, (x, y) => likeness(order[x], order[y]) / (most || 1), (x) => feature(order[x]).index, (x, y) => {
    readout.replaceChildren(...describe(order[y], order[x]));
  });
  onceShown(holder, draw);

  const sorting = h(
    "select",
    { id: "overlap-order" },
    h("option", { value: "cluster" }, "clustering"),
    h("option", { value: "index" }, "index"),
  );
  sorting.addEventListener("change", () => {
    order = sorting.value === "cluster" ? overlap.order : overlap.order.map((_, i) => i);
    drawCharts();
  });

  const pairs = [];
  for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) if (at(i, j)) pairs.push([i, j, likeness(i, j)]);
  pairs.sort((a, b) => b[2] - a[2] || a[0] - b[0] || a[1] - b[1]);
  return [
    h(
      "header",
      { class: "title" },
      h("h2", { tabindex: "-1" }, `Shared neurons of layer ${layer.layer}`),
      h("p", { class: "sub" }, `${plural(n, "feature")}, pair by pair: neurons in both, as a share of those in either. The diagonal is left blank.`),
    ),
    h("div", { class: "tools" }, h("label", { for: "overlap-order" }, "Order by"), sorting, legend(most)),
    h("div", { class: "figure" }, holder),
    readout,
    section(
      "Most alike",
      pairs.length > PAIRS ? `${PAIRS} of ${plural(pairs.length, "pair")} with a neuron in common` : null,
      h(
        "table",
        { class: "table" },
        h("thead", {}, h("tr", {}, ["shared", "by chance", "feature", "feature"].map((name, i) => h("th", { scope: "col", class: i < 2 ? "number" : undefined }, name)))),
        h(
          "tbody",
          {},
          pairs.slice(0, PAIRS).map(([i, j]) =>
            h(
              "tr",
              {},
              h("td", { class: "number" }, `${at(i, j)} of ${Math.min(size(i), size(j))}`),
              h("td", { class: "number" }, ((size(i) * size(j)) / layer.width).toFixed(1)),
              h("td", {}, link(i)),
              h("td", {}, link(j)),
            ),
          ),
        ),
      ),
    ),
  ];
}

function legend(most) {
  return h("span", { class: "legend", "aria-hidden": "true" }, "0", h("span", { class: "ramp" }), percent(most, 0));
}

function heatMap(holder, n, likeness, name, onPoint) {
  const image = heatImage(n, likeness);
  const side = Math.max(280, Math.min(holder.clientWidth, 640, innerHeight - 260));
  // Names where there is room for them: whole cells only.
  const named = (u, splits) => {
    const roomy = u.scales.x.max - u.scales.x.min <= 26;
    return splits.map((v) => (roomy && Number.isInteger(v - 0.5) && v > 0 && v < n ? String(name(v - 0.5)) : ""));
  };
  const splits = (u, _, low, high) => {
    const first = Math.max(0, Math.ceil(low - 0.5));
    return high - low > 26 ? [] : Array.from({ length: Math.max(0, Math.floor(high - 0.5) - first + 1) }, (_, i) => first + i + 0.5);
  };
  const edge = axis({ size: 30, gap: 4, grid: { show: false }, splits, values: named });
  const plot = new uPlot(
    {
      width: side,
      height: side,
      legend: { show: false },
      cursor: { points: { show: false }, drag: { x: true, y: true, uni: 20 } },
      scales: { x: { time: false, range: (_, low, high) => [Math.max(0, low), Math.min(n, high)] }, y: { dir: -1, range: (_, low, high) => [Math.max(0, low ?? 0), Math.min(n, high ?? n)] } },
      axes: [edge, { ...edge, side: 3 }],
      series: [{}, { show: true, paths: () => null, points: { show: false } }],
      hooks: {
        draw: [
          (u) => {
            const { left, top, width, height } = u.bbox;
            const { x, y } = u.scales;
            u.ctx.save();
            u.ctx.imageSmoothingEnabled = false;
            u.ctx.drawImage(image, x.min, y.min, x.max - x.min, y.max - y.min, left, top, width, height);
            u.ctx.strokeStyle = colour("line");
            u.ctx.strokeRect(left, top, width, height);
            u.ctx.restore();
          },
        ],
        setCursor: [
          (u) => {
            const { left, top } = u.cursor;
            if (left < 0 || top < 0) return;
            const [x, y] = [Math.floor(u.posToVal(left, "x")), Math.floor(u.posToVal(top, "y"))];
            if (x >= 0 && y >= 0 && x < n && y < n) onPoint(x, y);
          },
        ],
      },
    },
    [
      [0, n],
      [0, n],
    ],
    holder,
  );
  return plot;
}

function heatImage(n, likeness) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(n, n);
  const [low, high] = [colour("heat-low"), colour("heat-high")].map(rgb);
  for (let y = 0; y < n; y++) {
    for (let x = 0; x < n; x++) {
      // The square root lifts small overlaps into view.
      const t = Math.sqrt(likeness(x, y));
      for (let c = 0; c < 3; c++) pixels.data[4 * (y * n + x) + c] = low[c] + t * (high[c] - low[c]);
      pixels.data[4 * (y * n + x) + 3] = x === y ? 0 : 255;
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
