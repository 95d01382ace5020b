// The page: what was dropped goes to the worker one by one; names and labels are shown as text, never as HTML.

import { csv, xmp, zip } from "./files.mjs";

const SHOWN = 12; // bars, unless all are asked for
const $ = id => document.getElementById(id);
const images = [], queue = [], answers = new Map();
let settings, chosen = null, working = false, done = 0, asked = 0, showAll = false, label;

$("unstarted").remove();
say("Loading the model");
progress(null);

// Started from a blob, the worker is bound by this page's Content-Security-Policy; from an address it would not be.
const source = `import ${JSON.stringify(new URL("worker.mjs", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
worker.onerror = () => fail("a script of this page is missing, or the browser is too old for it");
worker.onmessage = ({ data }) => {
  if (data.failed) return fail(data.failed);
  if (data.settings) return ready(data);
  if ("loaded" in data) return progress(data.loaded);
  const { resolve, reject } = answers.get(data.id);
  answers.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data);
};

const ask = request => new Promise((resolve, reject) => {
  answers.set(++asked, { resolve, reject });
  worker.postMessage({ id: asked, ...request });
});

function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const counted = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

function say(text, problem = false) {
  $("status").textContent = text;
  $("status").classList.toggle("problem", problem);
}

function progress(share) {
  $("progress").hidden = share === undefined;
  if (share === null) $("progress").removeAttribute("value");
  else if (share !== undefined) $("progress").value = share;
}

function fail(words) {
  progress();
  say(`The model cannot be loaded: ${words.replace(/\.+$/, "")}. Reload the page.`, true);
}

function ready(data) {
  settings = data.settings;
  document.title = $("title").textContent = settings.title;
  const place = data.device === "webgpu" ? "on the GPU" : `on the CPU, ${counted(data.threads, "thread")}`;
  const bits = settings.int8 ? ", 8-bit weights" : "";
  $("about").textContent =
    `${counted(settings.labels.length, "label")}, ${place}${bits}. Images stay on this machine: nothing is uploaded.`;
  document.documentElement.dataset.device = data.device;
  progress();
  if (!images.length) say("Ready.");
  work();
}

// --- images come in

/** Files, with the paths they have in the folder they come from. */
function add(files) {
  const names = new Set(images.map(image => image.path));
  const fresh = files.map(({ file, path }) => {
    const [, stem, suffix] = path.match(/^(.*?)(\.[^./]*)?$/s);
    for (let number = 2; names.has(path); number++) path = `${stem} (${number})${suffix ?? ""}`;
    names.add(path);
    return { file, path };
  });
  if (!fresh.length) return say("There is no image among these.", true);
  for (const image of fresh) {
    images.push(image);
    queue.push(image);
    image.item = node("li");
    image.button = image.item.appendChild(node("button"));
    image.button.type = "button";
    image.button.append(node("span", "blank"), node("span", "file", image.path), node("span", "found", "waiting"));
    image.button.onclick = () => choose(image);
    $("list").append(image.item);
  }
  $("results").hidden = false;
  if (settings) work();
}

const isImage = file => file.type.startsWith("image/");
const withPath = file => ({ file, path: file.webkitRelativePath || file.name });

/** The images of a folder that was dropped, and of those in it; what cannot be read is listed as that. */
async function below(entry) {
  const path = entry.fullPath.replace(/^\/+/, ""), found = [];
  try {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      return isImage(file) ? [{ file, path }] : [];
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return found;
      for (const each of some) found.push(...(await below(each)));
    }
  } catch {
    return [...found, { file: new File([], path), path }];
  }
}

$("files").onchange = event => {
  add([...event.target.files].map(withPath));
  event.target.value = "";
};
$("folder").onchange = event => {
  add([...event.target.files].filter(isImage).map(withPath));
  event.target.value = "";
};
document.addEventListener("dragover", event => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", event => event.relatedTarget ?? $("drop").classList.remove("over"));
document.addEventListener("drop", async event => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const items = [...event.dataTransfer.items].filter(item => item.kind === "file");
  const entries = items.map(item => item.webkitGetAsEntry?.()), files = items.map(item => item.getAsFile());
  const found = entries.map((entry, i) => (entry?.isDirectory ? below(entry) : [withPath(files[i])]));
  add((await Promise.all(found)).flat());
});
document.addEventListener("paste", event => {
  add([...event.clipboardData.files].map(withPath));
});

$("camera").onclick = async () => {
  $("camera").disabled = true; // one stream: a second one would leave the first on
  try {
    if (!navigator.mediaDevices) throw new Error("a browser gives it to https: and localhost alone");
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    $("viewfinder").hidden = false;
    $("shoot").focus();
  } catch (error) {
    $("camera").disabled = false;
    say(`There is no camera for this page: ${error.message}.`, true);
  }
};
$("shoot").onclick = async () => {
  const video = $("video");
  if (!video.videoWidth) return; // it has just begun
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  add([{ file: await canvas.convertToBlob({ type: "image/png" }), path: "camera.png" }]);
};
$("close").onclick = () => {
  for (const track of $("video").srcObject?.getTracks() ?? []) track.stop();
  $("viewfinder").hidden = true;
  $("camera").disabled = false;
  $("camera").focus();
};

// --- and are labelled

async function work() {
  if (working) return;
  working = true;
  done = 0;
  $("stop").hidden = false;
  while (queue.length) {
    const image = queue.shift();
    const total = done + 1 + queue.length;
    say(`Labelling ${done + 1} of ${counted(total, "image")}`);
    progress(done / total);
    try {
      const { scores, thumbnail } = await ask({ file: image.file });
      take(image, scores, thumbnail);
    } catch (error) {
      image.error = error.message;
      image.button.lastChild.textContent = `not read: ${error.message}`;
      image.button.lastChild.classList.add("problem");
    }
    done++;
    if (image === chosen) bars();
    else if (!chosen && images.includes(image)) choose(image);
  }
  working = false;
  $("stop").hidden = true;
  progress();
  const wrong = images.filter(image => image.error).length;
  if (images.length) say(`${counted(images.length - wrong, "image")} labelled${wrong ? `, ${wrong} not read` : ""}.`, wrong > 0);
}

function take(image, scores, thumbnail) {
  image.scores = scores;
  image.order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  image.found = image.order.filter(i => scores[i] >= settings.thresholds[i]);
  const picture = node("img");
  picture.alt = "";
  picture.src = image.thumbnail = URL.createObjectURL(thumbnail);
  image.button.firstChild.replaceWith(picture);
  image.button.lastChild.textContent = image.found.map(i => settings.labels[i]).join(", ") || "no label";
}

$("stop").onclick = () => {
  for (const image of queue.splice(0)) {
    images.splice(images.indexOf(image), 1);
    image.item.remove();
  }
};
$("clear").onclick = () => {
  queue.length = 0;
  for (const image of images.splice(0)) {
    URL.revokeObjectURL(image.thumbnail);
    image.item.remove();
  }
  chosen = null;
  $("chosen").hidden = $("results").hidden = true;
  say("Ready.");
};

// --- one of them is looked at

function choose(image) {
  chosen?.button.setAttribute("aria-pressed", "false");
  chosen = image;
  label = undefined;
  image.button.setAttribute("aria-pressed", "true");
  $("chosen").hidden = false;
  bars();
  look();
}

/** The image, or with a label its heat map. */
async function look() {
  const image = chosen, of = label;
  if (image.error) {
    $("picture").hidden = true;
    $("caption").textContent = image.path;
    return;
  }
  try {
    const { picture } = await ask({ file: image.file, label: of, show: true });
    if (chosen !== image || label !== of) return;
    const canvas = $("picture");
    [canvas.width, canvas.height, canvas.hidden] = [picture.width, picture.height, false];
    canvas.getContext("bitmaprenderer").transferFromImageBitmap(picture);
    const words = of === undefined ? image.path : `Where “${settings.labels[of]}” was looked for: the brighter, the more.`;
    canvas.setAttribute("aria-label", words);
    canvas.dataset.label = of ?? "";
    $("caption").textContent = words;
  } catch (error) {
    $("caption").textContent = `This image cannot be shown: ${error.message}`;
  }
}

function bars() {
  const { scores, order, found, error } = chosen;
  $("bars").replaceChildren();
  $("all").hidden = true;
  if (error || !scores) {
    $("summary").textContent = error ? `Not read: ${error}.` : "Waiting for its turn.";
    return;
  }
  const rest = order.filter(i => !found.includes(i));
  const shown = [...found, ...(showAll ? rest : rest.slice(0, Math.max(0, SHOWN - found.length)))];
  const result = found.length ? `${counted(found.length, "label")} found among ${order.length}` : "No label reaches its threshold";
  const hint = settings.heat_map ? " Choose a label to see where it was looked for." : "";
  $("summary").textContent = `${result}. The mark on a bar is the label’s threshold.${hint}`;
  for (const i of shown) $("bars").append(bar(i, scores[i], settings.thresholds[i]));
  $("all").hidden = order.length <= Math.max(SHOWN, found.length);
  $("all").textContent = showAll ? "Show fewer labels" : `Show all ${order.length} labels`;
}

function bar(i, score, threshold) {
  const name = settings.labels[i], row = node("button", score >= threshold ? "above" : "below");
  const [track, fill, mark] = [node("span", "track"), node("span", "fill"), node("span", "mark")];
  row.type = "button";
  row.dataset.label = i;
  row.title = `${name}, score ${score.toFixed(2)}, threshold ${threshold.toFixed(2)}, ${score >= threshold ? "found" : "not found"}`;
  row.setAttribute("aria-label", row.title);
  row.setAttribute("aria-pressed", String(label === i));
  row.disabled = !settings.heat_map;
  fill.style.width = `${100 * score}%`;
  mark.style.left = `${100 * threshold}%`;
  track.append(fill, mark);
  row.append(node("span", "name", name), track, node("span", "score", score.toFixed(2)));
  row.onclick = () => {
    label = label === i ? undefined : i; // a second click takes the map away
    for (const each of $("bars").children) each.setAttribute("aria-pressed", String(Number(each.dataset.label) === label));
    look();
    $("picture").scrollIntoView({ block: "nearest", behavior: "smooth" });
  };
  return row;
}

$("all").onclick = () => {
  showAll = !showAll;
  bars();
};

// --- files go out

function save(name, blob) {
  const link = node("a");
  link.download = name;
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const labelled = () => images.filter(image => image.scores);
$("csv").onclick = () => save("labels.csv", new Blob([csv(settings.labels, labelled())], { type: "text/csv" }));
$("xmp").onclick = () => {
  const files = labelled().filter(image => image.found.length);
  if (!files.length) return say("No image has a label, so there is no sidecar to write.", true);
  save("sidecars.zip", zip(files.map(image => [`${image.path}.xmp`, xmp(image.found.map(i => settings.labels[i]))])));
};
