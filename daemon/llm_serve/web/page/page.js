// Asks /status once a second, with what is new in the history, and shows both. Whatever comes from there is text.

import { Plots, REQUESTS, duration, ofGpus, percent, short } from "./plots.js";

const EVERY_MS = 1000, PATIENCE_MS = 6000, KEPT_S = 900, EVENTS_SHOWN = 100;
const KEY = "llm-serve-key";
const STATES = {
  waiting_for_host: ["busy", "Waiting for the machine"],
  starting: ["busy", "Starting"],
  serving: ["good", "Serving"],
  recovering: ["busy", "Recovering"],
  reloading: ["busy", "Reloading"],
  drained: ["held", "Not admitting requests"],
  draining: ["held", "Stopping"],
  stopped: ["unknown", "Stopped"],
  failed: ["bad", "Failed"],
};
const SHAPES = {
  good: "M8 2a6 6 0 1 0 0 12a6 6 0 1 0 0-12z",
  busy: "M8 2a6 6 0 1 0 6 6h-2.5a3.5 3.5 0 1 1-3.5-3.5z",
  held: "M3 2h4v12h-4zM9 2h4v12h-4z",
  bad: "M8 1l7 7l-7 7l-7-7z",
  unknown: "M8 2a6 6 0 1 0 0 12a6 6 0 1 0 0-12zm0 2a4 4 0 1 1 0 8a4 4 0 1 1 0-8z",
};
const SIGNALS = { 1: "SIGHUP", 2: "SIGINT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM" };

const $ = (id) => document.getElementById(id);
const timeOfDay = new Intl.DateTimeFormat(undefined, { timeStyle: "medium", hourCycle: "h23" });
const dayAndTime = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

// What is known.
let key = sessionStorage.getItem(KEY) ?? "";
let windowS = 300;
let since = 0, started = null, lastAnswer = null;
let columns = null;
let seen = {};
const plots = new Plots($("plots")), gpuPlots = new Plots($("gpu-plots"));

// Small makers. Texts are never read as HTML.
function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function text(id, words) {
  if ($(id).textContent !== words) $(id).textContent = words;
}

/** True when this is not what was shown under that name before: what has not changed stays, with its focus and scroll. */
function isNew(name, value) {
  const now = JSON.stringify(value);
  if (seen[name] === now) return false;
  seen[name] = now;
  return true;
}

function pairs(rows) {
  return rows.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", {}, value)]);
}

function row(cells, options = {}) {
  const [first, ...rest] = cells;
  return make("tr", options, make("th", { scope: "row", textContent: first }), ...rest.map((cell) => make("td", { textContent: cell })));
}

function table(id, heads, rows) {
  const head = make("tr", {}, ...heads.map((words) => make("th", { scope: "col", textContent: words })));
  $(id).replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function age(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s / 60) % 60} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s / 3600) % 24} h`;
}

const bytes = (value) => (value === null || value === undefined ? "–" : `${short(value / 2 ** 30)} GiB`);

// How it is.
function showTone(tone) {
  if (!isNew("tone", tone)) return;
  document.body.dataset.tone = tone;
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[tone]);
  path.setAttribute("stroke", "none");
  $("mark").replaceChildren(path);
  const color = getComputedStyle(document.body).getPropertyValue("--tone").trim();
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="${SHAPES[tone]}" fill="${color}"/></svg>`;
  $("icon").href = `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

function showHead(now) {
  const [tone, words] = STATES[now.state] ?? ["unknown", now.state];
  const clock = now.started + now.uptime_s;
  showTone(tone);
  text("state", words);
  text("for", `for ${age(clock - now.since)}`);
  text("why", now.why);
  text("instance", now.instance);
  text("model", now.model);
  document.title = `${words} · ${now.instance}`;
  const isUnderWay = tone === "busy";
  $("start").hidden = !isUnderWay;
  if (isUnderWay) {
    $("progress").value = now.progress;
    text("phase", `${now.phase}, ${Math.round(now.progress * 100)} %`);
  }
  const notes = [
    now.is_drained && "Admission was stopped by hand: llm-serve resume lets requests in again.",
    now.too_hot && `Admission pauses: ${now.too_hot}`,
    now.reload_failed && `The last reload changed nothing: ${now.reload_failed}`,
  ].filter(Boolean);
  if (isNew("notes", notes)) $("notes").replaceChildren(...notes.map((words) => make("li", { textContent: words })));
}

function showFigures(now) {
  const last = (name) => columns[name].at(-1);
  const figures = [
    ["In flight", short(now.requests_in_flight)],
    ["Held at the gate", short(now.requests_held), "", now.requests_held > 0],
    ["Running", short(now.requests_running), now.max_num_seqs ? `of ${now.max_num_seqs}` : ""],
    ["Queued in the engine", short(now.requests_waiting)],
    ["KV cache", percent(now.kv_cache_usage), "", now.kv_cache_usage > 0.9],
    ["Generated", short(last("generated_tokens_per_s")), "tokens/s"],
    ["First token", duration(last("ttft_median_s")), "median"],
    ["First token", duration(last("ttft_p99_s")), "P99"],
  ];
  if (!isNew("figures", figures)) return;
  $("figures").replaceChildren(...figures.map(([name, value, unit, isMuch]) => make("div", { className: isMuch ? "is-much" : "" },
    make("dt", { textContent: name }), make("dd", {}, value, unit ? make("small", { textContent: ` ${unit}` }) : null))));
}

function shown(value) {
  if (value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function showPlan(now) {
  const { asked, engine_arguments: used, max_model_len, max_num_seqs, rung, steps } = now;
  if (!isNew("plan", [asked, used, max_model_len, max_num_seqs, rung, steps])) return;
  text("rung", rung ? `Rung ${rung}: ${rung === 1 ? "one step" : `${rung} steps`} below what the file asks for.`
    : steps.length ? "As large as the file asks for, computed in another way." : "Rung 0: what the file asks for.");
  $("steps").replaceChildren(...steps.map((words) => make("li", { textContent: words })));
  const built = { max_model_len, max_num_seqs };
  const rows = [];
  for (const part of ["arguments", "env"]) {
    const before = asked[part] ?? {}, after = used[part] ?? {};
    const names = new Set([...Object.keys(before), ...Object.keys(after), ...(part === "arguments" ? Object.keys(built) : [])]);
    for (const name of names) {
      const chosen = part === "arguments" ? built[name] ?? undefined : undefined;
      const isChanged = shown(before[name]) !== shown(after[name]);
      const inUse = isChanged ? after[name] : after[name] ?? chosen;
      const cells = [name, before[name] === undefined ? "vLLM’s default" : shown(before[name]), inUse === undefined ? "vLLM’s default" : shown(inUse)];
      rows.push(row(cells, { className: isChanged ? "changed" : "" }));
    }
  }
  table("plan", ["setting", "asked for", "in use"], rows);
}

function showEngine(now) {
  const idle = now.seconds_since_engine_step;
  const rows = [
    ["engine", now.engine_starts ? `start ${now.engine_starts}, pids ${now.engine_pids.join(", ") || "none"}` : "not started yet"],
    ["last step", idle === null ? "none yet" : `${age(idle)} ago`],
    ["daemon", `pid ${now.pid}, ${Math.round(now.memory_bytes / 2 ** 20)} MiB, up ${age(now.uptime_s)}`],
    ["listens on", now.listen],
    ["file", now.source],
  ];
  if (isNew("engine", rows)) $("engine").replaceChildren(...pairs(rows));
  text("versions", `llm-serve ${now.version}, vLLM ${now.vllm_version}`);
  $("front-ends").hidden = !now.front_ends.length;
  if (now.front_ends.length && isNew("front-ends", now.front_ends)) {
    table("front-ends", ["front end", "pid", "engine", "in flight", "held", "connections", "memory"], now.front_ends.map((each) =>
      row([each.place, each.pid, each.epoch || "–", each.requests_in_flight, each.requests_held, each.connections, `${Math.round(each.memory_bytes / 2 ** 20)} MiB`])));
  }
}

function showGpus(now) {
  if (isNew("gpus", now.gpus.map((gpu) => gpu.uuid))) {
    $("no-gpu").hidden = now.gpus.length > 0;
    $("gpus").hidden = !now.gpus.length;
    gpuPlots.show(now.gpus.length ? ofGpus(now.gpus) : []);
  }
  if (!now.gpus.length || !isNew("gpu-values", now.gpus)) return;
  const known = (value, words) => (value === null ? "–" : words(value));
  const counted = (counts) => Object.entries(counts).filter(([, count]) => count).map(([name, count]) => `${name} ×${count}`).join(", ");
  table("gpus", ["GPU", "name", "temperature", "power", "memory", "busy", "slowed by", "errors"], now.gpus.map((gpu) => row([
    gpu.index, gpu.name, known(gpu.temperature_celsius, (value) => `${short(value)} °C`),
    known(gpu.power_watts, (value) => `${short(value)} W${gpu.power_limit_watts ? ` of ${short(gpu.power_limit_watts)}` : ""}`),
    known(gpu.memory_used_bytes, (value) => `${bytes(value)} of ${bytes(gpu.memory_total_bytes)}`), percent(gpu.utilization_ratio),
    gpu.slowed_by.join(", ") || "nothing", [counted(gpu.xids) && `Xid ${counted(gpu.xids)}`, counted(gpu.ecc_errors) && `ECC ${counted(gpu.ecc_errors)}`].filter(Boolean).join("; ") || "none",
  ])));
}

// What went wrong.
const lines = (all) => (all?.length ? make("pre", { textContent: all.join("\n"), tabIndex: 0 }) : null);

function evidence({ failure, evidence: found }) {
  const seconds = (value) => (value === null || value === undefined ? null : `${short(value)} s`);
  const codes = Object.entries(found.exit_codes ?? {}).map(([name, code]) => `${name}: ${code < 0 ? `signal ${-code} ${SIGNALS[-code] ?? ""}` : `status ${code}`}`);
  const errors = [...(found.errors ?? []), ...(found.parent_error ? [found.parent_error] : [])];
  return pairs([
    ["when", found.has_served ? "after it had served" : `during its start${found.phase ? `: ${found.phase}` : ""}`],
    ["processes ended", codes.join(", ")],
    ["exceptions", lines(errors.map(({ process, type, text, frames }) => `${process ? `${process}: ` : ""}${type}: ${text}${frames?.length ? `\n  in ${frames.join(" > ")}` : ""}`))],
    ["stood still for", seconds(found.stalled_for_s)],
    ["waiting for", found.stalled_on],
    ["ended after", seconds(found.timed_out_after_s)],
    ["OOM kills", found.oom_kills || null],
    ["Xids", found.xids?.join(", ")],
    ["kernel's log", lines(found.kernel_log)],
    ["GPU memory held by", lines(found.gpu_holders?.map((each) => `${each.name} (pid ${each.pid}): ${bytes(each.used_bytes)} of GPU ${each.gpu}`))],
    ["not to be killed", lines(found.unkillable)],
    ["no P2P between", found.no_p2p?.join(", ")],
    ["tried to take", failure.tried_bytes ? bytes(failure.tried_bytes) : null],
    ["last output", lines(found.output_tail)],
  ]);
}

function showFailures(now) {
  if (!isNew("failures", now.failures)) return;
  const open = new Set([...document.querySelectorAll("details.failure[open]")].map((each) => each.dataset.time));
  $("no-failures").hidden = now.failures.length > 0;
  $("failures").replaceChildren(...now.failures.map((each) => {
    const { failure } = each;
    const what = make("span", { className: "what" }, failure.detail, failure.advice ? make("span", { className: "advice", textContent: failure.advice }) : null);
    const when = make("time", { dateTime: new Date(each.time * 1000).toISOString(), textContent: dayAndTime.format(each.time * 1000) });
    const made = make("details", { className: "failure", open: open.has(String(each.time)) },
      make("summary", {}, when, make("b", { textContent: failure.kind.replaceAll("_", " ") }), what), make("dl", { className: "pairs" }, ...evidence(each)));
    made.dataset.time = each.time;
    return made;
  }));
}

function showEvents(events) {
  $("no-events").hidden = $("events").childElementCount + events.length > 0;
  for (const { time, level, event, said } of events) {
    const more = Object.entries(said).map(([name, value]) => `${name}: ${value}`).join("; ");
    const item = make("li", {}, make("time", { dateTime: new Date(time * 1000).toISOString(), title: dayAndTime.format(time * 1000), textContent: timeOfDay.format(time * 1000) }),
      make("span", { className: "level", textContent: level }),
      make("span", { className: "text" }, event, more ? make("span", { className: "said", textContent: ` ${more}` }) : null));
    item.dataset.level = level;
    $("events").prepend(item);
  }
  while ($("events").childElementCount > EVENTS_SHOWN) $("events").lastElementChild.remove();
}

// What was.
function remember({ columns: names, gpu_columns: ofGpu, samples }) {
  columns ??= Object.fromEntries(names.map((name) => [name, []]));
  for (const sample of samples) {
    names.forEach((name, number) => {
      const value = sample[number];
      columns[name].push(name === "gpus" ? value.map((gpu) => Object.fromEntries(ofGpu.map((each, place) => [each, gpu[place]]))) : value);
    });
  }
  const over = columns.time.length - KEPT_S;
  if (over > 0) for (const name of names) columns[name].splice(0, over);
}

function showCourse() {
  const to = columns.time.at(-1) ?? Date.now() / 1000, from = to - windowS;
  const first = columns.time.findIndex((at) => at >= from - 1);
  const inSight = Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, first > 0 ? values.slice(first) : values]));
  plots.update(inSight, from, to);
  gpuPlots.update(inSight, from, to);
  showStrip(inSight, from, to);
}

/** States as coloured stretches, each with its words. */
function showStrip({ time, state }, from, to) {
  const stretches = [];
  time.forEach((at, number) => {
    const last = stretches.at(-1);
    if (last?.state === state[number]) last.end = at + 1;
    else {
      if (last) last.end = at;
      stretches.push({ state: state[number], begin: at, end: at + 1 });
    }
  });
  const [width, height] = [1000, 12];
  $("strip").setAttribute("viewBox", `0 0 ${width} ${height}`);
  const x = (at) => Math.max(0, Math.min(width, ((at - from) / (to - from)) * width));
  const words = ({ state: name, begin, end }) => `${STATES[name]?.[1] ?? name} ${timeOfDay.format(begin * 1000)} to ${timeOfDay.format(end * 1000)}`;
  $("strip").replaceChildren(...stretches.filter(({ end }) => end > from).map((each) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const [begin, end] = [x(each.begin), x(each.end)];
    for (const [name, value] of Object.entries({ x: begin, y: 0, width: Math.max(end - begin, 2), height })) made.setAttribute(name, value);
    made.dataset.tone = STATES[each.state]?.[0] ?? "unknown";
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = words(each);
    made.append(title);
    return made;
  }));
  $("strip").setAttribute("aria-label", `States: ${stretches.slice(-8).map(words).join("; ")}`);
}

// Asking.
class KeyNeeded extends Error {}
class NoAnswer extends Error {}

async function ask() {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  let answer, body;
  try {
    answer = await fetch(`status?since=${since}`, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    body = await answer.json();
  } catch {
    throw new NoAnswer("The daemon does not answer. The page goes on asking.");
  }
  if (answer.status === 401) throw new KeyNeeded();
  if (!answer.ok) throw new NoAnswer(body.error?.message ?? `The answer had the status ${answer.status}.`);
  return body;
}

function forget() {
  [since, columns, seen] = [0, null, {}];
  $("events").replaceChildren();
}

function show(now) {
  if (started !== null && Math.abs(now.started - started) > 2) {
    // Another daemon: what was is not its history, and this answer has only a part of that.
    forget();
    started = now.started;
    return false;
  }
  started = now.started;
  since = now.history.last;
  remember(now.history);
  $("door").hidden = true;
  $("main").hidden = false;
  $("forget").hidden = !key;
  $("links").hidden = key !== ""; // a browser would follow them without it
  document.body.classList.remove("stale");
  if (isNew("plots", "shown")) plots.show(REQUESTS);
  showHead(now);
  showFigures(now);
  showPlan(now);
  showEngine(now);
  showGpus(now);
  showFailures(now);
  showEvents(now.history.events);
  showCourse();
  lastAnswer = Date.now();
  return true;
}

/** Whoever has no key, or none any more, keeps nothing of what was shown either. */
function leave() {
  sessionStorage.removeItem(KEY);
  location.reload();
}

function showDoor(wasOffered) {
  key = "";
  sessionStorage.removeItem(KEY);
  $("main").hidden = true;
  $("door").hidden = false;
  $("forget").hidden = true;
  showTone("unknown");
  text("state", "Locked");
  for (const id of ["for", "why", "instance", "model"]) text(id, "");
  $("start").hidden = true;
  $("notes").replaceChildren();
  document.title = "llm-serve";
  text("door-word", wasOffered ? "This key is not valid here." : "");
  $("key").focus();
}

function showTrouble(error) {
  showTone("unknown");
  text("state", "No answer");
  text("for", lastAnswer ? `for ${age((Date.now() - lastAnswer) / 1000)}` : "");
  text("why", error.message);
  document.body.classList.add("stale");
  document.title = "No answer";
}

let next = null, isAsking = false;

async function turn() {
  if (isAsking) return; // two answers to the same question would be remembered twice
  clearTimeout(next);
  isAsking = true;
  let wait = EVERY_MS;
  try {
    if (!show(await ask())) wait = 0;
  } catch (error) {
    if (error instanceof KeyNeeded) {
      wait = null; // there is nothing to ask before there is a key
      if (lastAnswer) leave();
      else showDoor(key !== "");
    } else if (error instanceof NoAnswer) showTrouble(error);
    else throw error;
  } finally {
    isAsking = false;
    if (wait !== null && !document.hidden) next = setTimeout(turn, wait);
  }
}

$("door-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  sessionStorage.setItem(KEY, key);
  turn();
});
$("forget").addEventListener("click", leave);
$("window").addEventListener("change", (event) => {
  windowS = Number(event.target.value);
  if (columns) showCourse();
});
document.addEventListener("visibilitychange", () => document.hidden || !$("door").hidden || turn());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  const { tone } = document.body.dataset;
  delete seen.tone;
  showTone(tone);
});
turn();
