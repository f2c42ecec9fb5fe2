// Reads charts out under the pointer, and pages through rollouts. Texts are set as text, never as HTML.
"use strict";
const {charts, rollouts} = JSON.parse(document.getElementById("data").textContent);

const number = v => v === null || v === undefined ? "–" : Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2)
  : String(+v.toPrecision(3));
// Control characters, halves of characters and what turns the direction of writing as symbols; line breaks and tabs stay.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]|\p{Cs}/gu,
    c => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
const make = (name, attributes = {}, ...inside) => {
  const out = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) key === "onclick" ? out.onclick = value : out.setAttribute(key, value);
  out.append(...inside);
  return out;
};
const row = (tag, cells) => make("tr", {}, ...cells.map(c => make(tag, {}, c)));

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const {left, right, width, x, range, series} = charts[figure.dataset.chart];
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), told = figure.querySelector("output");
  const place = v => left + (v - range[0]) / (range[1] - range[0]) * (right - left);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    const i = x.reduce((best, v, j) => Math.abs(place(v) - at) < Math.abs(place(x[best]) - at) ? j : best, 0);
    cursor.setAttribute("transform", `translate(${place(x[i])} 0)`);
    cursor.style.visibility = "visible";
    told.textContent = `step ${+x[i].toFixed(1)}: ` + series.filter(s => s.y[i] !== null)
      .map(s => `${s.name} ${number(s.y[i])}`).join(", ");
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; told.textContent = ""; });
}

const KINDS = {all: () => true, cut: r => r.fate === "cut", "survived, right": r => r.fate === "right",
  "survived, wrong": r => r.fate === "wrong", ungraded: r => r.fate === "ungraded"};
let kind = "all", at = 0;
const chosen = () => rollouts.map((r, i) => i).filter(i => KINDS[kind](rollouts[i]));

function go(to) {
  at = to;
  show();
}

function move(by) {  // to the next of this kind
  const list = chosen(), here = list.indexOf(at);
  const to = list[here < 0 ? 0 : here + by];
  if (to !== undefined) go(to);
}

function moveStep(by) {  // to the first of this kind in another step
  const list = chosen().filter(i => by * (rollouts[i].step - rollouts[at].step) > 0);
  if (!list.length) return;
  const step = rollouts[by > 0 ? list[0] : list[list.length - 1]].step;
  go(list.find(i => rollouts[i].step === step));
}

function controls() {
  const list = chosen(), here = list.indexOf(at);
  const button = (text, act, off) => {
    const out = make("button", {type: "button", onclick: act}, text);
    out.disabled = off;
    return out;
  };
  const steps = [...new Set(list.map(i => rollouts[i].step))];
  const select = (label, options, value, act) => {
    const out = make("select", {"aria-label": label}, ...options.map(([v, text]) => make("option", {value: v}, text)));
    out.value = value;
    out.onchange = () => { act(out.value); document.activeElement.blur(); };
    return out;
  };
  const counted = Object.keys(KINDS).map(k => [k, `${k} (${rollouts.filter(KINDS[k]).length})`]);
  return make("div", {class: "bar"},
    select("which", counted, kind, v => { kind = v; const first = chosen(); go(first.includes(at) || !first.length ? at : first[0]); }),
    select("step", steps.map(s => [s, `step ${s}`]), rollouts[at].step, v => go(list.find(i => rollouts[i].step === +v))),
    button("← step (p)", () => moveStep(-1), !steps.length || rollouts[at].step <= steps[0]), button("← previous", () => move(-1), here <= 0),
    button("next →", () => move(1), here < 0 || here === list.length - 1),
    button("step (n) →", () => moveStep(1), !steps.length || rollouts[at].step >= steps[steps.length - 1]),
    make("span", {class: "note"}, list.length ? `${here + 1} of ${list.length}` : "none of this kind"));
}

function decisions(r) {
  if (!r.decisions.length) return make("p", {class: "note"}, "It was not scored: it ended before the first decision.");
  const rows = r.decisions.map(([length, score, posterior, keep], i) => {
    const last = i === r.decisions.length - 1;
    return row("td", [length === null ? "last" : `${length} tokens`, number(score), number(posterior), number(keep),
      last && r.fate === "cut" ? "cut" : "went on"]);
  });
  return make("table", {}, make("thead", {}, row("th", ["at", "score", "posterior", "kept with", ""])),
    make("tbody", {}, ...rows));
}

function members(r) {
  const g = r.group, count = g.tokens.length, longest = Math.max(1, ...g.tokens);
  const of = (name, i) => Array.isArray(g[name]) ? g[name][i] : null;
  const body = make("tbody", {});
  for (let i = 0; i < count; i++) {
    const fate = of("pruned", i) ? "cut" : of("right", i) ? "right" : "wrong";
    const there = rollouts.findIndex(x => x.step === r.step && x.prompt === r.prompt && x.member === i);
    const name = there >= 0 && i !== r.member ? make("button", {type: "button", onclick: () => go(there)}, `${i}`) : `${i}`;
    const bar = make("i", {class: fate, style: `width:${Math.round(80 * g.tokens[i] / longest)}%`});
    const line = row("td", [name, "", number(of("score", i)), number(of("posterior", i)), fate]);
    line.children[1].className = "length";
    line.children[1].append(bar, ` ${g.tokens[i]}`);
    if (i === r.member) line.className = "here";
    body.append(line);
  }
  const kept = g.tokens.filter((_, i) => !of("pruned", i)).length;
  const right = g.tokens.filter((_, i) => !of("pruned", i) && of("right", i)).length;
  const cut = count === r.shown ? ` (the first ${count})` : "";
  return make("div", {}, make("h3", {}, `Its group${cut}: ${kept} of ${count} survived, ${right} of them right`),
    make("table", {class: "members"}, make("thead", {}, row("th", ["member", "tokens", "score", "posterior", ""])), body));
}

function show() {
  const browser = document.getElementById("browser");
  if (!rollouts.length) return;
  const r = rollouts[at], facts = r.facts.map(([k, v]) => `${k} ${visible(v)}`).join("; ");
  const place = `step ${r.step}, prompt ${r.prompt} of the step` + (r.member === null ? "" : `, member ${r.member} of its group`);
  const left = make("div", {}, make("p", {}, make("span", {class: `fate ${r.fate}`}, r.fate), ` ${visible(r.why)}`),
    make("p", {class: "note"}, place + (facts ? "; " + facts : "")));
  if (r.problem) left.append(make("h3", {}, "Problem"), make("pre", {}, visible(r.problem)));
  left.append(make("h3", {}, `Response, ${r.tokens} tokens`), make("pre", {id: "text", tabindex: 0}, visible(r.text)));
  const side = make("div", {}, make("h3", {}, "Decisions"), decisions(r));
  if (r.group && Array.isArray(r.group.tokens)) side.append(members(r));
  browser.replaceChildren(controls(), make("div", {class: "two"}, left, side));
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input") || !rollouts.length) return;
  const act = {ArrowRight: () => move(1), ArrowLeft: () => move(-1), n: () => moveStep(1), p: () => moveStep(-1)}[event.key];
  if (act) { act(); event.preventDefault(); }
});
show();
