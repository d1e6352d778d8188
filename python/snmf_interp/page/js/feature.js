// One feature: contexts, effects, logit lens, neurons, strengths, labels, steering.

const FIRST_CONTEXTS = 10;

function featureView(feature) {
  const layer = LAYERS.get(feature.layer);
  return [
    h(
      "header",
      { class: "title" },
      h("p", { class: "crumb" }, `layer ${feature.layer} · feature ${feature.index}`),
      h("h2", { tabindex: "-1" }, feature.dead ? "Dead feature" : visible(feature.name) || "No words"),
      feature.named_by !== "words" && h("p", { class: "sub" }, `named by ${visible(feature.named_by)}`),
      feature.concept &&
        h(
          "p",
          { class: "sub" },
          "best concept ",
          h("b", {}, visible(feature.concept).replaceAll("_", " ")),
          `, average precision ${feature.precision.toFixed(2)} in sample; ${layer.chance_precision.toFixed(2)} by chance`,
        ),
    ),
    h(
      "dl",
      { class: "facts" },
      fact("clarity of its words", feature.word_clarity.toFixed(2), "0 to 1"),
      fact("fires on", percent(feature.firing_share), `${count(feature.firing)} of ${count(layer.tokens)} tokens`),
      fact("strong on", percent(feature.strong_share), `${count(feature.strong)} tokens, above a tenth of its largest`),
      fact("L0 of the layer", layer.mean_active.toFixed(0), "features a token, on average"),
      fact("energy", percent(feature.energy), "‖z‖²‖y‖², of all features"),
      fact("neurons", count(feature.n_neurons), `of ${count(layer.width)}`),
      fact("distinct words", percent(feature.distinct, 0), "of the strongest tokens"),
    ),
    feature.contexts.length > 0 && contextSection(feature),
    h(
      "div",
      { class: "columns" },
      h("div", {}, effectSection(feature), lensSection(feature)),
      h("div", {}, strengthSection(feature), labelSection(feature)),
    ),
    feature.neurons.length > 0 && neuronSection(feature),
    relatedSection(feature),
    ...steeringSections(feature),
  ];
}

function fact(name, value, note) {
  return h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, note)));
}

function section(title, note, ...children) {
  const id = `section-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
  return h(
    "section",
    { "aria-labelledby": id },
    h("h3", { id }, title, note && h("small", {}, note)),
    ...children,
  );
}

function contextSection(feature) {
  const list = h("ol", { class: "contexts" });
  const fill = (most) => list.replaceChildren(...feature.contexts.slice(0, most).map((c) => contextRow(c, feature)));
  fill(FIRST_CONTEXTS);
  const rest = feature.contexts.length - FIRST_CONTEXTS;
  const more = h("button", { type: "button", class: "quiet" }, `Show ${rest} more`);
  more.addEventListener("click", () => {
    fill(feature.contexts.length);
    more.remove();
    list.children[FIRST_CONTEXTS].focus();
  });
  const align = h("button", { type: "button", class: "quiet", "aria-pressed": "false" }, "Align on the token");
  const setAligned = (aligned) => {
    list.classList.toggle("aligned", aligned);
    align.setAttribute("aria-pressed", String(aligned));
  };
  setAligned(remembered("snmf-aligned") === "yes");
  align.addEventListener("click", () => {
    setAligned(!list.classList.contains("aligned"));
    remember("snmf-aligned", list.classList.contains("aligned") ? "yes" : "no");
  });
  return section(
    "Strongest tokens in context",
    "shade: strength y·‖z‖ of each token, relative to the feature’s largest",
    h("div", { class: "tools" }, align),
    list,
    rest > 0 && more,
  );
}

function contextRow(context, feature) {
  const pieces = context.pieces.map((text, i) => piece(text, context, i, feature));
  const { at } = context;
  // The space before the token stands with what is before it, also where the two are aligned.
  const [space, peak] = pieces[at];
  return h(
    "li",
    { tabindex: "-1", title: `${visible(context.sample)}, token ${context.position}` },
    h(
      "span",
      { class: "strength" },
      h("span", { class: "number" }, context.strength.toPrecision(3)),
      h("span", { class: "share" }, percent(context.share, 0)),
    ),
    h(
      "span",
      { class: "text", dir: "auto" },
      h("span", { class: "before" }, h("span", {}, context.cut_before && "…", pieces.slice(0, at), space)),
      peak,
      h("span", { class: "after" }, pieces.slice(at + 1), context.cut_after && "…"),
    ),
    context.label && h("span", { class: context.label === feature.concept ? "source concept" : "source" }, visible(context.label).replaceAll("_", " ")),
  );
}

function piece(text, context, i, feature) {
  const code = context.shade[i];
  const level = code === "-" ? 0 : parseInt(code, 16);
  const peak = i === context.at;
  // A leading space belongs to the token, but not to its shade.
  const bare = text.replace(/^ /, "");
  const strength = peak ? context.strength : (level / 15) * feature.strengths.max;
  const name = code === "-" ? "left out of the fit" : `${peak ? "" : "about "}${strength.toPrecision(peak ? 3 : 2)}`;
  return [
    bare !== text && " ",
    h(
      peak ? "mark" : "span",
      { class: level || peak ? "shaded" : undefined, vars: { s: level / 15 }, title: level || code === "-" ? name : undefined },
      visible(bare) || (peak ? "␣" : ""),
    ),
  ];
}

function wordColumn(name, title, pairs, unit) {
  const row = ([word, value]) => h("li", {}, h("code", {}, token(word)), h("span", { class: "number" }, signed(value, 1)));
  return h(
    "div",
    { class: `lens ${name}` },
    h("h4", {}, title),
    pairs.length ? h("ol", {}, pairs.map(row)) : h("p", { class: "none" }, "none"),
    h("small", {}, unit),
  );
}

function effectSection(feature) {
  const { effects } = feature;
  if (!effects) {
    return section("Effect on the next word", null, h("p", { class: "none" }, "not measured yet: snmf features --effects"));
  }
  const at = `measured: added at ${effects.kl.toPrecision(2)} nats${effects.reached ? "" : ", the most there is"}, beyond what random groups do; repeats ${effects.repeatability.toFixed(2)} on other prompts`;
  return section(
    "Effect on the next word",
    at,
    h(
      "div",
      { class: "lenses" },
      wordColumn("distinctive", "raises", effects.raised, "change of the logit"),
      wordColumn("suppressed", "lowers", effects.lowered, "change of the logit"),
    ),
  );
}

// The logit lens leaves out all later layers: how far it is right here is said, and where it is not it is not shown.
function lensSection(feature) {
  const agreement = LAYERS.get(feature.layer).lens_agreement;
  const trust =
    feature.effects !== null
      ? `rank correlation with what was measured: ${feature.effects.lens_correlation.toFixed(2)}`
      : agreement === null
        ? "not compared with measured effects in this layer"
        : `rank correlation with measured effects in this layer: ${agreement.toFixed(2)}`;
  if (!feature.lens) return section("Logit lens", trust, h("p", { class: "none" }, "left out: it does not tell what features of this layer do"));
  return section(
    "Logit lens",
    trust,
    h(
      "div",
      { class: "lenses" },
      wordColumn("distinctive", "stands out", feature.lens.distinctive, "σ above other features"),
      wordColumn("promoted", "promotes", feature.lens.promoted, "σ above random groups"),
      wordColumn("suppressed", "suppresses", feature.lens.suppressed, "σ above random groups"),
    ),
  );
}

function strengthSection(feature) {
  const { strengths } = feature;
  const zeros = LAYERS.get(feature.layer).tokens - strengths.positive;
  const text = strengths.positive
    ? `${count(zeros)} tokens have none; the other ${count(strengths.positive)} up to ${strengths.max.toPrecision(3)}.`
    : "No token has any.";
  const holder = h("div", { class: "chart", role: "img", "aria-label": `Histogram of strengths. ${text}` });
  if (strengths.positive) onceShown(holder, () => histogram(holder, strengths));
  return section("Strengths", "of all tokens", holder, h("p", { class: "note" }, text));
}

function labelSection(feature) {
  // Words alone cannot tell what a feature makes likelier: they are a list, neither clear nor not.
  const state = (label) =>
    label.reason ? "missing" : label.clear ? "clear" : label.source === "words" && label.side === "output" ? "list" : "not clear";
  return section(
    "Labels",
    null,
    feature.labels.length
      ? h(
          "ul",
          { class: "labels" },
          feature.labels.map((label) =>
            h(
              "li",
              { class: state(label).replace(" ", "-") },
              h("span", { class: "text" }, visible(label.text || label.reason || "no clear concept")),
              h("small", {}, `${label.side === "input" ? "fires on" : "makes likelier"} · ${visible(label.source)} · ${state(label)}`),
            ),
          ),
        )
      : h("p", { class: "none" }, "none yet: snmf label"),
  );
}

function neuronSection(feature) {
  const users = usersOf(feature.layer);
  const largest = Math.abs(feature.neurons[0][1]);
  const left = feature.n_neurons - feature.neurons.length;
  return section(
    "Neurons",
    `weights relative to ‖z‖${left > 0 ? `; the ${count(left)} weakest are left out` : ""}`,
    h(
      "ol",
      { class: "bars" },
      feature.neurons.map(([neuron, weight]) => {
        const others = users.get(neuron).length - 1;
        return h(
          "li",
          {},
          h("a", { href: `#/layer/${feature.layer}/neuron/${neuron}` }, count(neuron)),
          bar(weight / largest),
          h("span", { class: "number" }, signed(weight)),
          h("small", {}, others ? `in ${plural(others, "other")}` : "only here"),
        );
      }),
    ),
  );
}

function bar(share) {
  return h("span", { class: `bar ${share < 0 ? "negative" : "positive"}`, vars: { w: Math.abs(share) }, "aria-hidden": "true" });
}

// Features of the layer that share most neurons with this one.
function relatedSection(feature) {
  const users = usersOf(feature.layer);
  const shared = new Map();
  for (const [neuron] of feature.neurons) {
    for (const [other] of users.get(neuron)) if (other !== feature) shared.set(other, (shared.get(other) || 0) + 1);
  }
  const nearest = [...shared].sort((a, b) => b[1] - a[1] || a[0].index - b[0].index).slice(0, 6);
  return (
    nearest.length > 0 &&
    section(
      "Shares neurons with",
      null,
      h(
        "ul",
        { class: "related" },
        nearest.map(([other, n]) =>
          h("li", {}, h("a", { href: href(other) }, other.place), h("span", { class: "number" }, count(n)), h("span", {}, visible(other.name))),
        ),
      ),
    )
  );
}

function steeringSections(feature) {
  const records = DATA.steering.filter((r) => r.layer === feature.layer && r.feature === feature.index);
  return records.map((record) =>
    section(
      "Steering",
      "the same prompts without and with the feature",
      record.prompts.map((prompt) =>
        h(
          "table",
          { class: "steering" },
          h("caption", {}, visible(prompt.prompt)),
          h(
            "tbody",
            {},
            prompt.texts.map((row) => h("tr", {}, h("th", { scope: "row" }, visible(row.setting)), h("td", { dir: "auto" }, visible(row.text)))),
          ),
        ),
      ),
    ),
  );
}
