// The data island, and what can be looked up in it. Its fields are described in snmf_interp/report_data.py.

const DATA = JSON.parse(document.getElementById("data").textContent);
const LAYERS = new Map(DATA.layers.map((layer) => [layer.layer, layer]));
const FEATURES = DATA.layers.flatMap((layer) => layer.features.map((feature) => prepare(layer.layer, feature)));
const BY_PLACE = new Map(FEATURES.map((feature) => [`${feature.layer}/${feature.index}`, feature]));

function prepare(layer, feature) {
  const labels = feature.labels.filter((label) => label.text);
  const words = feature.words.map(([word, n]) => (n > 1 ? `${visible(word)} ×${n}` : visible(word))).join(", ");
  const prepared = Object.assign(feature, { layer, place: `${layer}/${feature.index}`, wordList: words });
  // What it makes likelier: measured, else by the logit lens where that is not known to be wrong.
  prepared.likelier = feature.effects ? feature.effects.raised : feature.lens ? feature.lens.distinctive : [];
  prepared.clear = labels.some((label) => label.clear);
  prepared.haystack = [
    prepared.place,
    feature.concept || "",
    (feature.concept || "").replaceAll("_", " "),
    feature.name,
    ...labels.map((label) => label.text),
    ...feature.words.map(([word]) => word),
    ...prepared.likelier.map(([word]) => word),
    ...(feature.lens ? [feature.lens.promoted, feature.lens.suppressed].flat().map(([word]) => word) : []),
    ...feature.contexts.map((context) => context.pieces.join("")),
  ]
    .join("\n")
    .toLowerCase();
  return prepared;
}

// neuron → [[feature, weight]] by falling |weight|, for one layer; made when it is first wanted.
const reverse = new Map();

function usersOf(layer) {
  if (!reverse.has(layer)) {
    const users = new Map();
    for (const feature of LAYERS.get(layer).features) {
      for (const [neuron, weight] of feature.neurons) {
        if (!users.has(neuron)) users.set(neuron, []);
        users.get(neuron).push([feature, weight]);
      }
    }
    for (const list of users.values()) list.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    reverse.set(layer, users);
  }
  return reverse.get(layer);
}

function href(feature) {
  return `#/layer/${feature.layer}/feature/${feature.index}`;
}
