// The page at "/": sends images to this server, lists the answers, and shows pictures with their evidence.
//
// Owns what a person sees and does. Decides nothing about images: scores, reasons and evidence are the server's, and the
// call is score > threshold, as everywhere. Nothing is stored; file names never leave the browser and are only ever text.

"use strict";

const BATCH_FILES = 8; // small requests: progress is seen, and a refusal costs little
const BATCH_BYTES = 24 * 2 ** 20;
const IN_FLIGHT = 2;
const TRIES_BUSY = 8; // answers 429 and 503
const TRIES_NETWORK = 3;
const LONGEST_WAIT_S = 60;
const LARGEST_SIDE_PX = 3072; // a larger picture is drawn smaller: windowing must follow the mouse
const KEPT_PICTURES = 6;
const THUMB_PX = 104; // twice its size on the page, for dense screens

const at = (id) => document.getElementById(id);

const state = {
  model: null, labels: ["NORMAL", "PNEUMONIA"], points: {}, curve: null,
  key: "", threshold: 0.5, items: [], nextId: 0, selected: null, touched: false,
  evidence: false, opacity: 0.65, invert: false, window: 255, level: 128, zoom: 1, x: 0, y: 0,
};

// --- Asking the server ----------------------------------------------------------------------------------------------

class Refusal extends Error {} // its message is a sentence for the person

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function secondsToWait(response, attempt) {
  const header = response.headers.get("Retry-After");
  const wished = header === null ? NaN : /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.min(Math.max(Number.isFinite(wished) ? wished : 0.5 * 2 ** attempt, 0.2), LONGEST_WAIT_S);
}

async function sentenceOf(response) {
  try {
    const detail = (await response.json()).detail;
    if (typeof detail === "string") return detail;
  } catch { /* not JSON: another server on the way spoke */ }
  return `The server answered ${response.status}.`;
}

let asking = null;

/** Ask for the API key once, however many requests wait for it. */
function askKey(used) {
  if (state.key !== used) return Promise.resolve(); // another request has asked meanwhile
  asking ??= new Promise((done, refused) => {
    const dialog = at("key");
    at("key-text").textContent = (used ? "The server does not take that key. " : "") + "It is kept in memory until the page is closed.";
    at("key-value").value = "";
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => {
      asking = null;
      const value = at("key-value").value.trim();
      if (dialog.returnValue !== "use" || !/^[\x20-\x7e]+$/.test(value)) return refused(new Refusal("The server asks for an API key."));
      state.key = value;
      return done();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** Fetch, with patience: asks for the key where one is needed, and waits where the server is busy. */
async function call(path, { body, signal } = {}) {
  let busy = 0;
  let lost = 0;
  for (;;) {
    const key = state.key;
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", body, signal, cache: "no-store", headers: key ? { "X-API-Key": key } : {} });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      lost += 1;
      if (lost >= TRIES_NETWORK) throw new Refusal("The server could not be reached, or the file could not be read.");
      await pause(lost);
      continue;
    }
    if (response.status === 401) {
      await askKey(key);
    } else if ((response.status === 429 || response.status === 503) && busy < TRIES_BUSY) {
      const seconds = secondsToWait(response, busy);
      busy += 1;
      say(`The server is busy; trying again in ${Math.ceil(seconds)} s.`);
      await pause(seconds);
    } else {
      return response;
    }
    signal?.throwIfAborted();
  }
}

/** Refuse what another model than the page's own has answered: it would stand beside this one's scores and threshold. */
function requireSameModel(sha256) {
  if (sha256 !== state.model.sha256) throw new Refusal("The server has another model now; load the page again.");
}

/** Files under neutral names: what the file is called may name a patient, and the server has no need of it. */
function formOf(items) {
  const form = new FormData();
  items.forEach((item, number) => form.append("files", item.file, String(number + 1)));
  return form;
}

// --- Taking files and sending them ----------------------------------------------------------------------------------

const waiting = [];
let inFlight = 0;
let stop = new AbortController();

/** A name as text that cannot rearrange the line it stands in. */
const shown = (name) => name.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, "\ufffd");

function take(files) {
  const known = new Set(state.items.map((item) => item.mark));
  let twice = 0;
  for (const { file, name } of files) {
    const mark = `${name}\n${file.size}\n${file.lastModified}`;
    if (known.has(mark)) { twice += 1; continue; }
    known.add(mark);
    const item = { id: state.nextId++, file, name, mark, status: "waiting", score: null, probability: null, assessable: null, reason: "" };
    item.row = rowOf(item);
    state.items.push(item);
    waiting.push(item);
  }
  say(twice ? `${twice} ${twice === 1 ? "file was" : "files were"} in the list already.` : "");
  refresh();
  pump();
}

/** Files of a drop, folders walked; names carry the folder, hidden files in folders are passed over. */
async function filesOfDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (entries.length === 0) return [...transfer.files].map((file) => ({ file, name: file.name }));
  const found = [];
  const walk = async (entry, folder) => {
    if (entry.isFile) {
      const file = await new Promise((done, failed) => entry.file(done, failed));
      found.push({ file, name: folder + file.name });
    } else if (entry.isDirectory && entry.name !== "__MACOSX") {
      const reader = entry.createReader();
      for (;;) {
        const some = await new Promise((done, failed) => reader.readEntries(done, failed)); // at most 100 a time
        if (some.length === 0) break;
        for (const each of some) if (!each.name.startsWith(".")) await walk(each, `${folder}${entry.name}/`);
      }
    }
  };
  for (const entry of entries) await walk(entry, "");
  return found;
}

function nextBatch() {
  const batch = [];
  let bytes = 0;
  while (waiting.length && batch.length < BATCH_FILES && (batch.length === 0 || bytes + waiting[0].file.size <= BATCH_BYTES)) {
    bytes += waiting[0].file.size;
    batch.push(waiting.shift());
  }
  return batch;
}

function pump() {
  while (inFlight < IN_FLIGHT && waiting.length) {
    inFlight += 1;
    send(nextBatch(), stop.signal).finally(() => { inFlight -= 1; pump(); refresh(); });
  }
}

async function send(items, signal) {
  for (const item of items) settle(item, { status: "sending" });
  try {
    await modelMet();
    const response = await call("predict", { body: formOf(items), signal });
    if (response.status === 413 && items.length > 1) { // too much together need not be too much alone
      for (const item of items) await send([item], signal);
      return;
    }
    if (!response.ok && response.status !== 422) throw new Refusal(await sentenceOf(response));
    const answer = await response.json();
    if (answer.results?.length !== items.length) throw new Refusal(typeof answer.detail === "string" ? answer.detail : "The server’s answer does not fit the question.");
    requireSameModel(answer.model?.sha256);
    items.forEach((item, number) => {
      const { score, probability, assessable, reason } = answer.results[number];
      settle(item, { status: score === null ? "unreadable" : "done", score, probability, assessable, reason: reason ?? "" });
    });
    say("");
  } catch (error) {
    if (signal.aborted) return;
    const reason = error instanceof Refusal ? error.message : "The server’s answer could not be read.";
    for (const item of items) settle(item, { status: "failed", reason });
  }
}

function settle(item, news) {
  Object.assign(item, news);
  item.stale = true;
  refresh();
}

function clearList() {
  stop.abort();
  stop = new AbortController();
  waiting.length = 0;
  wantedThumbs.clear();
  pictures.clear();
  state.items = [];
  at("rows").replaceChildren();
  say("");
  select(null);
  refresh();
}

function retryFailed() {
  for (const item of state.items) if (item.status === "failed") { settle(item, { status: "waiting", reason: "" }); waiting.push(item); }
  pump();
}

// --- The worklist ---------------------------------------------------------------------------------------------------

const callOf = (item) => (item.score === null ? "" : state.labels[Number(item.score > state.threshold)]);
const yesOf = (item) => (item.score === null || item.assessable === false ? "no" : item.assessable === true ? "yes" : "not known");

/** Enough digits to see on which side of the threshold a score lies. */
function scoreText(score) {
  const digits = Math.abs(score - state.threshold) < 0.0005 && score !== state.threshold ? 6 : 3;
  if (digits === 3 && score < 1 && score.toFixed(3) === "1.000") return ">0.999";
  if (digits === 3 && score > 0 && score.toFixed(3) === "0.000") return "<0.001";
  return score.toFixed(digits);
}

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

function rowOf(item) {
  const row = make("div", "row");
  row.setAttribute("role", "row");
  row.setAttribute("aria-selected", "false");
  row.tabIndex = -1;
  row.item = item;
  const cells = ["thumb-cell", "name", "score", "call", "assessable"].map((name) => {
    const cell = make("span", name);
    cell.setAttribute("role", "gridcell");
    row.append(cell);
    return cell;
  });
  const thumb = make("canvas", "thumb");
  thumb.width = thumb.height = THUMB_PX;
  thumb.setAttribute("aria-hidden", "true");
  cells[0].append(thumb);
  const name = make("b");
  for (const part of shown(item.name).split(/(?<=[_\-./ ])/)) name.append(part, document.createElement("wbr")); // breaks between words first
  name.title = shown(item.name);
  cells[1].append(name, make("small"));
  thumbs.observe(row);
  return row;
}

function fillRow(item) {
  item.stale = false;
  const [, name, score, verdict, assessable] = item.row.children;
  name.lastChild.textContent = item.status === "unreadable" ? `Not readable: ${item.reason}` : item.reason;
  item.row.classList.toggle("doubtful", item.assessable === false);
  if (item.score === null) {
    const words = { waiting: "waiting", sending: "sent", unreadable: "no answer", failed: "not sent" };
    score.replaceChildren();
    verdict.replaceChildren(make("span", item.status === "waiting" || item.status === "sending" ? "chip plain" : "chip doubt", words[item.status]));
    assessable.replaceChildren(make("span", "chip plain", item.status === "unreadable" ? "no" : "–"));
    return;
  }
  const number = make("data", "", scoreText(item.score));
  number.value = String(item.score);
  score.title = `${item.score}`;
  const bar = make("span", "bar");
  bar.style.setProperty("--score", item.score);
  score.replaceChildren(number, bar);
  verdict.replaceChildren(callChip(item));
  assessable.replaceChildren(make("span", yesOf(item) === "yes" ? "chip plain" : "chip doubt", yesOf(item)));
}

const callChip = (item) => make("span", `chip ${item.score > state.threshold ? "positive" : "negative"}`, callOf(item));

/** Highest score first; then what could not be read, what was not sent, and what has no answer yet, as it came. */
function inOrder() {
  const rank = { done: 0, unreadable: 1, failed: 2, sending: 3, waiting: 3 };
  return [...state.items].sort((a, b) => rank[a.status] - rank[b.status] || (b.score ?? 0) - (a.score ?? 0) || a.id - b.id);
}

let planned = false;

/** Bring the worklist up to date, once a frame however much has changed. */
function refresh() {
  if (planned) return;
  planned = true;
  setTimeout(() => { planned = false; redrawList(); }, state.items.length > 500 ? 250 : 16);
}

function redrawList() {
  const focused = document.activeElement;
  const rows = at("rows");
  let place = rows.firstChild;
  for (const item of inOrder()) {
    if (item.stale !== false) fillRow(item);
    if (place === item.row) place = place.nextSibling;
    else rows.insertBefore(item.row, place);
  }
  if (focused?.classList.contains("row") && focused.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
  const count = (test) => state.items.filter(test).length;
  const total = state.items.length;
  const pending = count((item) => item.status === "waiting" || item.status === "sending");
  at("progress").hidden = pending === 0;
  at("progress").max = total || 1;
  at("progress").value = total - pending;
  at("export").disabled = total === 0 || pending > 0;
  at("clear").disabled = total === 0;
  at("retry").hidden = count((item) => item.status === "failed") === 0;
  summarise(total, pending, count);
  const first = at("rows").firstChild?.item;
  if (!state.touched && pending < total && (state.selected === null || pending === 0) && state.selected !== first) select(first, { quietly: true });
  else if (state.selected) { describe(state.selected); if (!picture && !loading && !state.selected.broken) showPicture(); }
  drawThumbs();
}

let message = "";

function say(text) {
  message = text;
  refresh();
}

function summarise(total, pending, count) {
  const parts = [];
  if (total === 0) parts.push("No images yet.");
  else if (pending) parts.push(`${total - pending} of ${total} done.`);
  else {
    const of = (label) => count((item) => callOf(item) === label);
    parts.push(`${total} ${total === 1 ? "image" : "images"}: ${of(state.labels[1])} ${state.labels[1]}, ${of(state.labels[0])} ${state.labels[0]}`);
    const others = [
      [count((item) => item.score !== null && item.assessable === false), "not assessable"],
      [count((item) => item.status === "unreadable"), "not readable"],
      [count((item) => item.status === "failed"), "not sent"],
    ].filter(([n]) => n > 0).map(([n, what]) => `${n} ${what}`);
    parts[0] += others.length ? `; ${others.join(", ")}.` : ".";
  }
  if (message) parts.push(message);
  const text = parts.join(" ");
  if (at("status").textContent !== text) at("status").textContent = text; // else readers would say it again
}

function select(item, { quietly = false } = {}) {
  for (const row of at("rows").querySelectorAll('[aria-selected="true"]')) { row.setAttribute("aria-selected", "false"); row.tabIndex = -1; }
  state.selected = item;
  state.touched = item !== null && (state.touched || !quietly); // until a hand chooses, the highest score is shown
  if (item) {
    item.row.setAttribute("aria-selected", "true");
    item.row.tabIndex = 0;
    if (!quietly) {
      item.row.scrollIntoView({ block: "nearest" });
      requestAnimationFrame(() => item.row.scrollIntoView({ block: "nearest" })); // a row out of sight did not know its height
    }
    const focused = document.activeElement;
    if (!quietly && (focused === document.body || at("worklist").contains(focused))) item.row.focus({ preventScroll: true });
  }
  describe(item);
  showPicture();
}

function step(by) {
  const order = inOrder();
  if (order.length === 0) return;
  const now = order.indexOf(state.selected);
  select(order[Math.min(Math.max(now + by, 0), order.length - 1)]);
}

// --- The operating point --------------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const defaultPoint = () => Object.entries(state.points)[0];

/** Sensitivity and specificity at a threshold: those of the nearest listed threshold that is not above it. */
function ratesAt(threshold) {
  const reached = state.curve.thresholds.findIndex((each) => each <= threshold);
  const place = reached < 0 ? state.curve.thresholds.length - 1 : reached;
  return [state.curve.sensitivity[place], state.curve.specificity[place]];
}

function setThreshold(value) {
  if (state.model === null) return; // it has no operating point to move
  state.threshold = value;
  if (Number(at("threshold").value) !== value) at("threshold").value = String(value);
  at("threshold").removeAttribute("aria-invalid");
  at("threshold-slider").value = String(value);
  const [name, usual] = defaultPoint();
  at("point").value = Object.entries(state.points).find(([, each]) => each === value)?.[0] ?? "";
  at("moved").hidden = value === usual;
  at("moved").firstElementChild.textContent = `Calls are not at the model’s own operating point (${name}, ${Number(usual.toPrecision(4))}).`;
  if (state.curve) {
    const [sensitivity, specificity] = ratesAt(value);
    at("sensitivity").textContent = percent(sensitivity);
    at("specificity").textContent = percent(specificity);
  }
  const tests = state.model.metrics?.test;
  const there = tests?.operating_points?.[at("point").value]; // of this very threshold, not of one before a site's own
  at("rates-test").textContent = there?.threshold === value && Number.isFinite(there.sensitivity) && Number.isFinite(there.specificity)
    ? `On ${tests.n} test images: ${percent(there.sensitivity)} and ${percent(there.specificity)}.` : "";
  for (const item of state.items) item.stale = true;
  refresh();
}

function offerPoints() {
  const choices = Object.entries(state.points).map(([name, value], number) => {
    const option = make("option", "", `${name} (${Number(value.toPrecision(4))})${number === 0 ? ", the default" : ""}`);
    option.value = name;
    return option;
  });
  const own = make("option", "", "own threshold");
  own.value = "";
  own.disabled = true;
  at("point").replaceChildren(...choices, own);
  const curve = state.curve;
  at("rates-source").textContent = curve
    ? `On the ${curve.split} split (${curve.n_positive} ${state.labels[1]}, ${curve.n_negative} ${state.labels[0]}); the operating points were chosen on it, so expect less on other images. ${state.labels[1]} is called where the score is above the threshold.`
    : "The model came without labelled images to measure sensitivity and specificity on.";
  setThreshold(defaultPoint()[1]);
}

// --- The picture ----------------------------------------------------------------------------------------------------

const pictures = new Map(); // by item: {grey, width, height, evidence, from}; the last few, newest last
let picture = null;
let loading = null; // the item whose picture is on its way
const film = document.createElement("canvas"); // the picture in its own size, windowed

/** Whether the browser draws the file as the server reads it: JPEG and PNG by their first bytes, not by their name. */
async function isPlain(file) {
  const head = new Uint8Array(await file.slice(0, 8).arrayBuffer());
  const begins = (...bytes) => bytes.every((byte, place) => head[place] === byte);
  return begins(0xff, 0xd8, 0xff) || begins(0x89, 0x50, 0x4e, 0x47);
}

async function layerOf(item, layer) {
  const response = await call(`evidence?layer=${layer}`, { body: formOf([item]), signal: stop.signal });
  if (!response.ok) throw new Refusal(await sentenceOf(response));
  requireSameModel(response.headers.get("X-Model"));
  return createImageBitmap(await response.blob(), { colorSpaceConversion: "none" });
}

/** The decoded picture, and whether it is the server's; the server decodes what this browser cannot. */
async function bitmapOf(item) {
  if (await isPlain(item.file)) {
    try {
      return [await createImageBitmap(item.file, { colorSpaceConversion: "none" }), false];
    } catch { /* a JPEG that this browser does not know */ }
  }
  return [await layerOf(item, "image"), true];
}

/** Grey values as the server makes them: ITU-R 601 luma over black. */
function greyOf(bitmap) {
  const shrink = Math.min(1, LARGEST_SIDE_PX / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * shrink)));
  const paper = new OffscreenCanvas(width, height);
  const pen = paper.getContext("2d", { willReadFrequently: true });
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0, width, height);
  const { data } = pen.getImageData(0, 0, width, height);
  const grey = new Uint8Array(width * height);
  for (let pixel = 0, byte = 0; pixel < grey.length; pixel += 1, byte += 4) {
    grey[pixel] = (data[byte] * 19595 + data[byte + 1] * 38470 + data[byte + 2] * 7471 + 32768) >> 16;
  }
  return { grey, width, height };
}

function keep(item, content) {
  pictures.delete(item);
  pictures.set(item, content);
  if (pictures.size > KEPT_PICTURES) pictures.delete(pictures.keys().next().value);
  return content;
}

async function showPicture() {
  const item = state.selected;
  picture = null;
  loading = null;
  at("viewer-foot").textContent = "";
  if (item === null) return draw("Choose or drop images to begin.");
  if (item.status === "unreadable") return draw("No picture: the file could not be read.");
  if (item.status !== "done") return draw("The picture is shown when its answer is here.");
  loading = item;
  item.broken = false;
  draw("Reading …");
  try {
    let content = pictures.get(item);
    if (!content) {
      const [bitmap, served] = await bitmapOf(item);
      content = { ...greyOf(bitmap), served, evidence: null };
      bitmap.close();
    }
    if (state.selected !== item) return undefined;
    picture = keep(item, content);
    resetView();
    at("viewer-foot").textContent = content.served
      ? `Decoded by the server with the file’s own window; shown at ${content.width} × ${content.height} px in 256 greys.`
      : `Shown at ${content.width} × ${content.height} px in 256 greys.`;
    await showEvidence();
  } catch (error) {
    item.broken = true;
    if (state.selected === item) draw(error instanceof Refusal ? error.message : "The picture could not be shown.");
  } finally {
    if (loading === item) loading = null;
  }
  return undefined;
}

async function showEvidence() {
  at("evidence").setAttribute("aria-pressed", String(state.evidence));
  at("legend").classList.toggle("off", !state.evidence);
  const [item, content] = [state.selected, picture];
  if (state.evidence && content && !content.evidence) {
    at("stage").setAttribute("aria-busy", "true");
    try {
      content.evidence = await layerOf(item, "evidence");
    } catch (error) {
      if (state.selected === item) say(error instanceof Refusal ? error.message : "The evidence could not be shown.");
    } finally {
      at("stage").removeAttribute("aria-busy");
    }
  }
  draw();
}

/** Grey to grey, through window, level and inversion, as 32-bit pixels. */
function lookup() {
  const table = new Uint32Array(256);
  const low = state.level - state.window / 2;
  for (let grey = 0; grey < 256; grey += 1) {
    let value = Math.round(Math.min(Math.max((grey - low) / state.window, 0), 1) * 255);
    if (state.invert) value = 255 - value;
    table[grey] = 0xff000000 | (value << 16) | (value << 8) | value;
  }
  return table;
}

function develop() {
  const table = lookup();
  const print = new ImageData(picture.width, picture.height);
  const pixels = new Uint32Array(print.data.buffer);
  for (let pixel = 0; pixel < pixels.length; pixel += 1) pixels[pixel] = table[picture.grey[pixel]];
  film.width = picture.width;
  film.height = picture.height;
  film.getContext("2d").putImageData(print, 0, 0);
  film.of = picture;
  film.as = filmKey();
}

const filmKey = () => `${state.window} ${state.level} ${state.invert}`;

/** Where the picture lies on the canvas, in device pixels. */
function frameOf() {
  const canvas = at("canvas");
  const fit = Math.min(canvas.width / picture.width, canvas.height / picture.height);
  const [width, height] = [picture.width * fit * state.zoom, picture.height * fit * state.zoom];
  return { left: (canvas.width - width) / 2 + state.x * canvas.width, top: (canvas.height - height) / 2 + state.y * canvas.height, width, height };
}

let frame = 0;

function draw(text = "") {
  at("stage-text").textContent = text;
  if (!frame) frame = requestAnimationFrame(paint);
}

function paint() {
  frame = 0;
  const canvas = at("canvas");
  const dense = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.max(1, Math.round(side * dense)));
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  if (picture) {
    if (film.of !== picture || film.as !== filmKey()) develop();
    const { left, top, width: across, height: down } = frameOf();
    pen.imageSmoothingQuality = "high";
    pen.drawImage(film, left, top, across, down);
    if (state.evidence && picture.evidence) {
      pen.globalAlpha = state.opacity;
      pen.drawImage(picture.evidence, left, top, across, down);
      pen.globalAlpha = 1;
    }
  }
  at("zoom").textContent = `${Math.round(100 * state.zoom)} %`;
  at("window-value").textContent = at("window").value = String(Math.round(state.window));
  at("level-value").textContent = at("level").value = String(Math.round(state.level));
  at("opacity-value").textContent = `${Math.round(100 * state.opacity)} %`;
  at("invert").setAttribute("aria-pressed", String(state.invert));
}

function resetView() {
  Object.assign(state, { window: 255, level: 128, zoom: 1, x: 0, y: 0, invert: false });
  draw();
}

/** Zoom about a point of the canvas, given as shares of its sides from its middle. */
function zoomBy(factor, x = 0, y = 0) {
  const zoom = Math.min(Math.max(state.zoom * factor, 0.5), 16);
  const real = zoom / state.zoom;
  state.x = x - (x - state.x) * real;
  state.y = y - (y - state.y) * real;
  state.zoom = zoom;
  panBy(0, 0);
}

function panBy(x, y) {
  const far = Math.max(0.5, state.zoom * 0.75); // some of the picture always stays in sight
  state.x = Math.min(Math.max(state.x + x, -far), far);
  state.y = Math.min(Math.max(state.y + y, -far), far);
  draw();
}

function windowBy(across, down) {
  state.window = Math.min(Math.max(state.window + across, 1), 510);
  state.level = Math.min(Math.max(state.level + down, 0), 255);
  draw();
}

function describe(item) {
  const name = item ? shown(item.name) : "No image chosen";
  at("viewer-name").textContent = name;
  at("viewer-name").title = name;
  at("viewer-answer").replaceChildren();
  at("viewer-reason").textContent = item?.reason ?? "";
  at("canvas").setAttribute("aria-label", item ? `Picture ${name}` : name);
  if (item && item.score !== null) {
    const parts = [callChip(item), make("span", "", `score ${scoreText(item.score)}`)];
    if (item.probability !== null && item.probability !== undefined) parts.push(make("span", "quiet", `calibrated probability ${percent(item.probability)}`));
    if (yesOf(item) !== "yes") parts.push(make("span", "chip doubt", yesOf(item) === "no" ? "not assessable" : "assessability not known"));
    at("viewer-answer").replaceChildren(...parts);
  }
}

// --- Thumbnails: only of rows in sight, two at a time -----------------------------------------------------------------

const wantedThumbs = new Set();
let drawing = 0;

const thumbs = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (isIntersecting && !target.item.thumb) wantedThumbs.add(target.item);
    else wantedThumbs.delete(target.item);
  }
  drawThumbs();
}, { rootMargin: "200px" });

function drawThumbs() {
  for (const item of wantedThumbs) {
    if (drawing >= 2) return;
    if (item.status !== "done" && item.status !== "unreadable") continue;
    wantedThumbs.delete(item);
    thumbs.unobserve(item.row);
    item.thumb = true;
    if (item.status === "unreadable") continue;
    drawing += 1;
    drawThumb(item).catch(() => {}).finally(() => { drawing -= 1; drawThumbs(); });
  }
}

async function drawThumb(item) {
  const [bitmap] = await bitmapOf(item);
  const fit = THUMB_PX / Math.max(bitmap.width, bitmap.height);
  const [width, height] = [bitmap.width * fit, bitmap.height * fit];
  const pen = item.row.querySelector("canvas").getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, (THUMB_PX - width) / 2, (THUMB_PX - height) / 2, width, height);
  bitmap.close();
}

// --- CSV ------------------------------------------------------------------------------------------------------------

/** A cell that no spreadsheet runs as a formula; numbers stay as they are. */
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const lines = inOrder().map((item) => [
    item.name, item.score, callOf(item), item.status === "failed" ? "" : { yes: "yes", no: "no" }[yesOf(item)] ?? "unknown",
    item.reason, state.threshold,
  ]);
  return [["file", "score", "call", "assessable", "reason", "threshold"], ...lines].map((line) => `${line.map(cell).join(",")}\n`).join("");
}

function saveCsv() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "pneumoscope-worklist.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// --- About the model ------------------------------------------------------------------------------------------------

const isTree = (value) => value !== null && typeof value === "object";

/** Leaves of a tree as [path, text] lines. */
function leaves(tree, path = "") {
  return Object.entries(tree).flatMap(([name, value]) => {
    const here = path ? `${path}.${name}` : name;
    return isTree(value) && !Array.isArray(value) ? leaves(value, here) : [[here, isTree(value) ? JSON.stringify(value) : String(value ?? "–")]];
  });
}

function table(head, lines) {
  const frame = make("div", "table");
  const body = make("table");
  const row = (cells, tag) => { const line = make("tr"); line.append(...cells.map((text) => make(tag, "", text))); return line; };
  if (head.length) body.append(row(head, "th"));
  body.append(...lines.map((cells) => row(cells, "td")));
  frame.append(body);
  return frame;
}

function aboutModel(model) {
  const number = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : "–");
  const range = (interval) => (interval ? ` (${number(interval.low)} to ${number(interval.high)})` : "");
  const metrics = Object.entries(model.metrics ?? {}).filter(([, values]) => isTree(values)).map(([split, values]) => {
    const point = values.operating_point ?? {};
    return [split, number(values.n), number(values.auc) + range(values.auc_interval), point.name ?? "–", number(point.sensitivity), number(point.specificity)];
  });
  const text = at("about-text");
  text.replaceChildren(make("p", "", model.intended_use ?? ""));
  if (model.note) text.append(make("p", "", model.note));
  text.append(make("p", "", `${model.title ?? model.model}, on images of ${model.size_px} × ${model.size_px} px.`));
  if (metrics.length) text.append(make("h3", "", "Measured"), table(["split", "images", "AUC (interval)", "at", "sensitivity", "specificity"], metrics));
  if (isTree(model.provenance)) {
    const more = make("details");
    more.append(make("summary", "", "Provenance"), table([], leaves(model.provenance)));
    text.append(more);
  }
}

let meeting = null;

/** Wait until the model is known: without its operating point every call would be a guess. */
function modelMet() {
  if (state.model === null) meeting ??= meetModel().finally(() => { meeting = null; });
  return meeting;
}

async function meetModel() {
  try {
    const response = await call("model");
    if (!response.ok) throw new Refusal(await sentenceOf(response));
    const model = await response.json();
    const points = model.operating_points ?? {};
    Object.assign(state, { model, labels: model.labels ?? state.labels, curve: model.curve ?? null, points: Object.keys(points).length ? points : { half: 0.5 } });
    at("model").textContent = `${model.title || model.model} (${model.model})`;
    at("note").textContent = model.note ?? "";
    at("label-low").textContent = state.labels[0];
    at("label-high").textContent = state.labels[1];
    const scale = Number((model.evidence?.scale ?? NaN).toPrecision(2));
    at("scale-low").textContent = Number.isNaN(scale) ? "" : `−${scale} and beyond`;
    at("scale-high").textContent = Number.isNaN(scale) ? "" : `+${scale} and beyond`;
    aboutModel(model);
    at("about-open").disabled = false;
    offerPoints();
  } catch (error) {
    const sentence = error instanceof Refusal ? error.message : "The model’s description could not be read.";
    at("model").textContent = `${sentence} It is asked again with the next image.`;
    throw new Refusal(sentence);
  }
}

// --- Hands ----------------------------------------------------------------------------------------------------------

function listenToFiles() {
  at("files").addEventListener("change", (event) => {
    take([...event.target.files].map((file) => ({ file, name: file.name })));
    event.target.value = ""; // the same file may be chosen again after Clear
  });
  let depth = 0; // enter and leave come for every element on the way
  const mark = (by) => { depth = Math.max(0, depth + by); document.body.classList.toggle("dropping", depth > 0); };
  addEventListener("dragenter", () => mark(1));
  addEventListener("dragleave", () => mark(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", async (event) => {
    event.preventDefault(); // else the browser would leave the page for the file
    mark(-depth);
    try {
      take(await filesOfDrop(event.dataTransfer));
    } catch {
      say("The dropped files could not be read.");
    }
  });
}

function listenToList() {
  at("rows").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (!row) return;
    select(row.item);
    if (matchMedia("(max-width: 999px)").matches) at("viewer").scrollIntoView({ block: "start" });
  });
  at("worklist").addEventListener("focus", () => (state.selected?.row ?? at("worklist")).focus());
  at("export").addEventListener("click", saveCsv);
  at("clear").addEventListener("click", clearList);
  at("retry").addEventListener("click", retryFailed);
}

function listenToPoint() {
  at("point").addEventListener("change", (event) => setThreshold(state.points[event.target.value]));
  at("point-reset").addEventListener("click", () => { setThreshold(defaultPoint()[1]); at("point").focus(); });
  at("threshold-slider").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
  at("threshold").addEventListener("input", (event) => {
    const value = event.target.valueAsNumber;
    if (value >= 0 && value <= 1) setThreshold(value);
    else event.target.setAttribute("aria-invalid", "true");
  });
  at("threshold").addEventListener("change", (event) => { event.target.value = String(state.threshold); event.target.removeAttribute("aria-invalid"); });
}

const toggleInvert = () => { state.invert = !state.invert; draw(); };
const toggleEvidence = () => { state.evidence = !state.evidence; showEvidence(); };

function listenToTools() {
  const doing = {
    invert: toggleInvert, evidence: toggleEvidence, reset: resetView, "zoom-in": () => zoomBy(1.25), "zoom-out": () => zoomBy(0.8),
    "help-open": () => at("help").showModal(), "about-open": () => at("about").showModal(), theme: switchTheme,
  };
  for (const [id, act] of Object.entries(doing)) at(id).addEventListener("click", act);
  systemDark.addEventListener("change", nameTheme);
  nameTheme();
  at("window").addEventListener("input", (event) => { state.window = Number(event.target.value); draw(); });
  at("level").addEventListener("input", (event) => { state.level = Number(event.target.value); draw(); });
  at("opacity").addEventListener("input", (event) => { state.opacity = Number(event.target.value) / 100; draw(); });
  for (const radio of document.getElementsByName("drag")) radio.addEventListener("change", () => at("canvas").classList.toggle("pan", panning()));
  new ResizeObserver(() => { if (!frame) frame = requestAnimationFrame(paint); }).observe(at("stage"));
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemDark.matches;
}

const nameTheme = () => { at("theme").textContent = isDark() ? "Light colours" : "Dark colours"; };

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
}

const panning = () => document.querySelector('input[name="drag"]:checked').value === "pan";

function listenToCanvas() {
  const canvas = at("canvas");
  const fingers = new Map();
  const share = (event) => { const box = canvas.getBoundingClientRect(); return [(event.clientX - box.left) / box.width - 0.5, (event.clientY - box.top) / box.height - 0.5]; };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { at: share(event), pan: event.button > 0 || event.shiftKey || panning() });
  });
  canvas.addEventListener("pointermove", (event) => {
    const finger = fingers.get(event.pointerId);
    if (!finger) return;
    const [was, now] = [finger.at, share(event)];
    finger.at = now;
    const moved = [now[0] - was[0], now[1] - was[1]];
    if (fingers.size === 2) {
      const other = [...fingers.values()].find((each) => each !== finger).at;
      const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
      panBy(moved[0] / 2, moved[1] / 2);
      zoomBy(apart(now) / Math.max(apart(was), 0.01), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (finger.pan) panBy(...moved);
    else windowBy(moved[0] * 400, moved[1] * 255);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoomBy(1.0015 ** -event.deltaY, ...share(event)); }, { passive: false });
}

function listenToKeys() {
  const doing = {
    i: toggleInvert, e: toggleEvidence, 0: resetView, "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8),
    "?": () => at("help").showModal(), ArrowDown: () => step(1), ArrowUp: () => step(-1),
  };
  const pans = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
  const ends = { Home: -Infinity, End: Infinity };
  addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (target.matches("input:not([type=range], [type=radio], [type=file]), select")) return; // there a key is text
    if (target.matches("input") && /^(Arrow|Home|End)/.test(key)) return;
    let act = doing[key.length === 1 ? key.toLowerCase() : key];
    if (event.shiftKey && pans[key]) act = () => panBy(...pans[key]);
    else if (key in ends && at("worklist").contains(target)) act = () => step(ends[key] < 0 ? -state.items.length : state.items.length);
    if (!act) return;
    event.preventDefault();
    act();
  });
}

listenToFiles();
listenToList();
listenToPoint();
listenToTools();
listenToCanvas();
listenToKeys();
draw("Choose or drop images to begin.");
modelMet().catch(() => {}); // said where the model’s name would stand
