// The console's own script: what is live, confirmations, keys, copying, plots. Every page works without it.
"use strict";

const live = document.querySelector("[data-live]");
const pulse = document.getElementById("pulse");
let stream = null;

// One event stream for each tab, closed while nobody looks at it. A browser has six connections to a host, for all of its
// tabs: so only four of them have a stream. The others, and those whose stream is refused, ask again and again.
const STREAMS = 4;
const tabs = new BroadcastChannel("qserve-console");
let others = 0;
let asking = null;
tabs.onmessage = (event) => {
  if (event.data === "who?" && stream) tabs.postMessage("I");
  if (event.data === "I") others += 1;
};
function source(rest) {
  const here = location.pathname + location.search;
  return document.documentElement.dataset.base + "/live?" + rest + "of=" + encodeURIComponent(here);
}
function connect() {
  if (!live || stream || asking || document.hidden) return;
  others = 0;
  tabs.postMessage("who?");
  asking = setTimeout(() => { asking = null; others < STREAMS ? listen() : ask(5); }, 100);
}
function listen() {
  stream = new EventSource(source(""));
  stream.onopen = () => shows("on", "Live");
  stream.onerror = () => {
    shows("off", "Not connected; trying again");
    if (stream.readyState !== EventSource.CLOSED) return;
    stream = null;
    ask(5);
  };
  stream.addEventListener("live", (event) => replace(event.data));
}
async function ask(times) {
  const mine = asking = {};
  const answer = await fetch(source("once=1&")).catch(() => null);
  const text = answer && answer.ok ? await answer.text() : null;
  if (asking !== mine) return;
  if (text !== null) replace(text);
  if (answer && answer.status === 401) shows("off", "Logged out: load the page again");
  else shows(text === null ? "off" : "on", text === null ? "Not connected; trying again" : "Live, every few seconds");
  asking = setTimeout(() => { asking = null; times ? ask(times - 1) : connect(); }, 4000);
}
function disconnect() {
  if (stream) stream.close();
  clearTimeout(asking);
  stream = asking = null;
  shows("", "Paused");
}
function shows(name, title) {
  if (!pulse) return;
  pulse.className = "dot " + name;
  pulse.title = title;
}

// Not while somebody selects, types, or reads something they have opened: it would be gone under their hands.
function isBusy() {
  const at = document.activeElement;
  return live.querySelector("input[type=checkbox]:checked, details[open]") !== null
    || (at && live.contains(at) && at.matches("input, textarea, select"))
    || document.querySelector("dialog[open]") !== null
    || String(getSelection()).length > 0;
}
function replace(html) {
  if (isBusy()) return;
  const focused = live.contains(document.activeElement) ? place(document.activeElement) : null;
  const kept = live.querySelector("[data-keep]");
  live.innerHTML = html;
  const place_of_kept = live.querySelector("[data-keep]");
  if (kept && place_of_kept) place_of_kept.replaceWith(kept);
  mark();
  if (focused !== null) {
    const found = live.querySelectorAll("a, button")[focused];
    if (found) found.focus({preventScroll: true});
  }
}
function place(element) {
  return Array.prototype.indexOf.call(live.querySelectorAll("a, button"), element);
}
document.addEventListener("visibilitychange", () => document.hidden ? disconnect() : connect());
addEventListener("pagehide", disconnect);

// Confirmations
const dialog = document.getElementById("confirm");
document.addEventListener("submit", (event) => {
  const form = event.target;
  const go = form.dataset.goto;
  if (go) {
    event.preventDefault();
    const id = form.elements.id.value.trim();
    if (id) location.href = go + encodeURIComponent(id);
    return;
  }
  const button = event.submitter;
  const question = (button && button.dataset.ask) || form.dataset.ask;
  if (!question || form.elements.confirmed) return;
  event.preventDefault();
  const chosen = form.querySelectorAll("input[name=id]:checked").length;
  const text = chosen ? question + " (" + chosen + ")" : question;
  document.getElementById("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  dialog.onclose = () => {
    if (dialog.returnValue !== "yes") return;
    add(form, "confirmed", "yes");
    if (button && button.name) add(form, button.name, button.value);
    form.submit();
  };
});
function add(form, name, value) {
  const field = document.createElement("input");
  field.type = "hidden";
  field.name = name;
  field.value = value;
  form.append(field);
}

// Selecting, copying, filters
document.addEventListener("change", (event) => {
  const from = event.target;
  if (from.matches("[data-all]")) {
    for (const box of from.closest("form").querySelectorAll("input[name=id]")) box.checked = from.checked;
    const more = from.closest("form").querySelector("details");
    if (more && from.checked) more.open = true;
  }
  if (from.matches("[data-submit]")) from.form.requestSubmit();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const said = button.textContent;
  navigator.clipboard.writeText(button.dataset.copy).then(
    () => { button.textContent = "copied"; setTimeout(() => { button.textContent = said; }, 1200); },
    () => prompt("Copy this:", button.dataset.copy),
  );
});

// Keys
let row = -1;
// A button of a dialog that is closed keeps the focus, and with it the keys.
for (const each of document.querySelectorAll("dialog")) each.addEventListener("close", () => document.activeElement.blur());
let went = 0;
function rows() { return [...document.querySelectorAll("tr.rowlink")]; }
function mark() {
  const all = rows();
  row = Math.min(row, all.length - 1);
  all.forEach((each, number) => each.classList.toggle("at", number === row));
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const all = rows();
  if (Date.now() - went < 1500) {
    const link = document.querySelector('nav a[data-key="' + CSS.escape(event.key) + '"]');
    went = 0;
    if (link) link.click();
    return;
  }
  if (event.key === "g") went = Date.now();
  else if (event.key === "?") document.getElementById("keys").showModal();
  else if (event.key === "/") {
    const search = document.querySelector("[data-search]");
    if (!search) return;
    event.preventDefault();
    search.focus();
    search.select();
  } else if ((event.key === "j" || event.key === "k") && all.length) {
    row = Math.max(0, Math.min(all.length - 1, row + (event.key === "j" ? 1 : -1)));
    mark();
    all[row].scrollIntoView({block: "nearest"});
  } else if (event.key === "Enter" && row >= 0 && (event.target.closest("dialog") || !event.target.matches("a, button, summary"))) {
    const link = all[row].querySelector("a, summary");
    if (link) link.click();
  } else if (event.key === "x" && row >= 0) {
    const box = all[row].querySelector("input[type=checkbox]");
    if (box) box.checked = !box.checked;
  }
});

// Plots
const style = getComputedStyle(document.documentElement);
const color = (name) => style.getPropertyValue("--" + name).trim();
const colors = {arrivals: "dim", failed: "bad", run99: "warn", wait99: "warn"};
const drawn = [];
async function plot(box) {
  const answer = await fetch(box.dataset.series, {headers: {Accept: "application/json"}});
  if (!answer.ok) return;
  const series = await answer.json();
  for (const place of box.querySelectorAll("[data-plot]")) draw(place, series);
}
function draw(place, series) {
  const names = place.dataset.plot.split(" ");
  const labels = place.dataset.names.split(",");
  const data = [series.time, ...names.map((name) => series[name])];
  const known = drawn.find((each) => each.place === place);
  if (known) return known.plot.setData(data);
  const axis = {stroke: color("dim"), grid: {stroke: color("line"), width: 1}, ticks: {stroke: color("line"), width: 1}, font: "11px system-ui"};
  const options = {
    width: place.clientWidth, height: 170, cursor: {sync: {key: "console"}, y: false}, legend: {live: true},
    axes: [axis, {...axis, size: 52, values: (_, ticks) => ticks.map((tick) => tick >= 1e6 ? tick / 1e6 + "M" : tick >= 1e4 ? tick / 1e3 + "k" : String(tick))}],
    scales: {x: {time: true}, y: {range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1]}},
    series: [{label: "time", value: (_, at) => at === null || at === undefined ? "-" : new Date(at * 1000).toLocaleTimeString()}, ...names.map((name, number) => ({
      label: labels[number], stroke: color(colors[name] || "accent"), width: 1.75, points: {show: false}, spanGaps: names[0] !== "replicas" && name !== "depth",
      fill: names.length === 1 ? color("accent-soft") : undefined, value: (_, value) => value === null || value === undefined ? "-" : String(Math.round(value * 100) / 100),
    }))],
  };
  drawn.push({place, plot: new uPlot(options, data, place)});
}
function plotAll() {
  if (!document.hidden) for (const box of document.querySelectorAll("[data-series]")) plot(box);
}
addEventListener("resize", () => drawn.forEach((each) => each.plot.setSize({width: each.place.clientWidth, height: 170})));

connect();
plotAll();
// As often as a plot can have another point.
const spans = {"6h": 60, "24h": 240, "72h": 720};
setInterval(plotAll, 1000 * (spans[new URLSearchParams(location.search).get("range")] || 10));
