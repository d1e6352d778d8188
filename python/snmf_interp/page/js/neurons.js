// Neurons: which features use them.

const MOST_NEURONS = 100;

function neuronsView(layer) {
  const users = usersOf(layer.layer);
  const sorted = [...users].sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
  const field = h("input", { id: "neuron", inputmode: "numeric", pattern: "[0-9]*", autocomplete: "off", placeholder: `0–${layer.width - 1}` });
  const problem = h("p", { class: "problem", role: "alert" });
  const form = h("form", { class: "tools" }, h("label", { for: "neuron" }, "Neuron"), field, h("button", { type: "submit" }, "Show"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const number = Number(field.value);
    if (field.value.trim() && Number.isInteger(number) && number >= 0 && number < layer.width) {
      location.hash = `#/layer/${layer.layer}/neuron/${number}`;
    } else {
      problem.textContent = `Wanted a number from 0 to ${layer.width - 1}.`;
    }
  });
  const rest = sorted.length - MOST_NEURONS;
  return [
    h(
      "header",
      { class: "title" },
      h("h2", { tabindex: "-1" }, `Neurons of layer ${layer.layer}`),
      h("p", { class: "sub" }, `${count(users.size)} of ${count(layer.width)} neurons are in a feature. ${layer.neurons_cut}`),
    ),
    form,
    problem,
    section(
      "Most used",
      rest > 0 ? `${MOST_NEURONS} of ${count(sorted.length)}` : null,
      h(
        "table",
        { class: "table" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "number" }, "neuron"), h("th", { scope: "col", class: "number" }, "features"), h("th", { scope: "col" }, "strongest in"))),
        h(
          "tbody",
          {},
          sorted.slice(0, MOST_NEURONS).map(([neuron, list]) =>
            h(
              "tr",
              {},
              h("td", { class: "number" }, h("a", { href: `#/layer/${layer.layer}/neuron/${neuron}` }, count(neuron))),
              h("td", { class: "number" }, count(list.length)),
              h("td", {}, list.slice(0, 3).map(([f], i) => [i > 0 && " · ", h("a", { href: href(f) }, f.place), h("span", { class: "name" }, ` ${visible(f.name)}`)])),
            ),
          ),
        ),
      ),
    ),
  ];
}

function neuronView(layer, neuron) {
  const list = usersOf(layer.layer).get(neuron) || [];
  return [
    h(
      "header",
      { class: "title" },
      h("p", { class: "crumb" }, h("a", { href: `#/layer/${layer.layer}/neurons` }, `layer ${layer.layer} · neurons`)),
      h("h2", { tabindex: "-1" }, `Neuron ${count(neuron)}`),
      h("p", { class: "sub" }, list.length ? `in ${plural(list.length, "feature")}` : `No feature uses it. ${layer.neurons_cut}`),
    ),
    list.length > 0 &&
      h(
        "ol",
        { class: "bars wide" },
        list.map(([feature, weight]) =>
          h(
            "li",
            {},
            h("a", { href: href(feature) }, feature.place),
            bar(weight),
            h("span", { class: "number" }, signed(weight)),
            h("span", { class: "name" }, visible(feature.name)),
          ),
        ),
      ),
    list.length > 0 && h("p", { class: "note" }, "Weights relative to ‖z‖ of their feature."),
  ];
}
