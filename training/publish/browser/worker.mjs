// The model beside the page: one message an image, one answer.

import { normalise, onWhite, prepare } from "./pixels.mjs";

const MAX_PIXELS = 89478485; // as `load_image` in Python
const MAX_SIDE = 1024, THUMBNAIL = 256; // px of what is shown
const here = name => new URL(name, import.meta.url).href;
let settings, session, ort;

/** Whether WebGPU has a GPU behind it; a browser may offer a stand-in that computes on the CPU, a hundred times slower. */
async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

/** Loads the model: on the GPU where the browser has WebGPU, else by WebAssembly. */
async function start() {
  settings = await (await found("model.json")).json();
  const bytes = await download(settings.file, loaded => postMessage({ loaded }));
  let device = "wasm";
  if (await hasGpu()) {
    try {
      await open("webgpu", bytes);
      device = "webgpu";
    } catch (error) {
      console.warn("WebGPU cannot run this model", error);
    }
  }
  if (device === "wasm") await open("wasm", bytes);
  postMessage({ settings, device, threads: ort.env.wasm.numThreads });
}

async function open(device, bytes) {
  ort = await import(here(`onnxruntime/ort.${device}.min.mjs`));
  ort.env.wasm.wasmPaths = here("onnxruntime/");
  // Threads share memory, which a browser allows only to pages that say so in their headers.
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
  session = await ort.InferenceSession.create(bytes, { executionProviders: [device] });
  await score(new Float32Array(3 * settings.height * settings.width)); // what is compiled at the first run is ready
}

async function found(name) {
  const response = await fetch(here(name));
  if (!response.ok) throw new Error(`${name} is not there (${response.status})`);
  return response;
}

async function download(name, progress) {
  const response = await found(name);
  const total = Number(response.headers.get("content-length")), parts = [];
  let done = 0;
  for (const reader = response.body.getReader(); ;) {
    const { value } = await reader.read();
    if (!value) break;
    parts.push(value);
    progress(total ? Math.min(1, (done += value.length) / total) : null);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** The image as it is shown, upright, and its RGB as Python decodes it. */
async function decode(file) {
  const asItIs = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, asItIs);
  } catch {
    throw new Error("this browser cannot decode it");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`${width} x ${height} px are too many`);
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.drawImage(bitmap, 0, 0);
  let { data } = canvas.getImageData(0, 0, width, height);
  if (hasAlpha(data)) data = (await exactly(bitmap)) ?? data;
  return { bitmap, width, height, rgb: onWhite(data, 4) };
}

function hasAlpha(data) {
  for (let i = 3; i < data.length; i += 4) if (data[i] < 255) return true;
  return false;
}

/** RGBA as in the file: a canvas multiplies colours with their alpha and rounds. */
async function exactly(bitmap) {
  try {
    const frame = new VideoFrame(bitmap, { timestamp: 0, alpha: "keep" });
    const data = new Uint8ClampedArray(frame.allocationSize({ format: "RGBA" }));
    await frame.copyTo(data, { format: "RGBA" });
    frame.close();
    return data;
  } catch {
    return null; // no WebCodecs here
  }
}

/** The logits of an image, and with a label the map of where it was found. */
async function score(pixels, label = 0) {
  const inputs = { pixel_values: new ort.Tensor("float32", pixels, [1, 3, settings.height, settings.width]) };
  if (settings.heat_map) inputs.label = new ort.Tensor("int64", BigInt64Array.of(BigInt(label)), [1]);
  return session.run(inputs);
}

function drawn(bitmap, longest) {
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map(side => Math.max(1, Math.round(side * scale)));
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return context;
}

/** The image, darkened where the map is low and glowing where it is high; the map lies on what the model saw. */
function overlay(context, { data: map, size: [rows, columns], box: [left, top, right, bottom] }) {
  const { width, height } = context.canvas, image = context.getImageData(0, 0, width, height), pixels = image.data;
  const stops = [0, 0.35, 0.7, 1], colours = [[60, 0, 110], [200, 40, 90], [255, 150, 20], [255, 245, 140]];
  const at = (row, column) =>
    map[Math.max(0, Math.min(rows - 1, row)) * columns + Math.max(0, Math.min(columns - 1, column))];
  for (let y = 0, i = 0; y < height; y++) {
    const down = top + ((y + 0.5) / height) * (bottom - top), v = down * rows - 0.5, row = Math.floor(v), dv = v - row;
    for (let x = 0; x < width; x++, i += 4) {
      const over = left + ((x + 0.5) / width) * (right - left), u = over * columns - 0.5, column = Math.floor(u);
      const du = u - column, seen = down >= 0 && down <= 1 && over >= 0 && over <= 1;
      const upper = at(row, column) * (1 - du) + at(row, column + 1) * du;
      const lower = at(row + 1, column) * (1 - du) + at(row + 1, column + 1) * du;
      const heat = seen ? Math.max(0, Math.min(1, upper * (1 - dv) + lower * dv)) : 0;
      const next = heat < 0.35 ? 1 : heat < 0.7 ? 2 : 3;
      const share = (heat - stops[next - 1]) / (stops[next] - stops[next - 1]), weight = heat ** 0.8;
      const grey = 0.299 * pixels[i] + 0.587 * pixels[i + 1] + 0.114 * pixels[i + 2];
      for (let c = 0; c < 3; c++) {
        const cold = 0.35 * grey + (c < 2 ? 10 : 40);
        const glow = colours[next - 1][c] * (1 - share) + colours[next][c] * share;
        pixels[i + c] = (1 - weight) * cold + weight * (0.55 * pixels[i + c] + 0.45 * glow);
      }
    }
  }
  context.putImageData(image, 0, 0);
}

/** The scores of an image with a thumbnail; or, to `show` it, the image, with the heat map of a label if one is given. */
async function answer({ file, label, show }) {
  const { bitmap, width, height, rgb } = await decode(file);
  const answered = {};
  if (!show || label !== undefined) {
    const seen = prepare(rgb, width, height, settings);
    const { logits, heat_map: map } = await score(normalise(seen.rgb, settings), label);
    answered.scores = Float32Array.from(logits.data, logit => 1 / (1 + Math.exp(-logit)));
    answered.map = map && { data: map.data, size: map.dims.slice(1), box: seen.box };
  }
  const context = drawn(bitmap, show ? MAX_SIDE : THUMBNAIL);
  if (!show) {
    answered.thumbnail = await context.canvas.convertToBlob({ type: "image/jpeg", quality: 0.8 });
  } else {
    if (label !== undefined) overlay(context, answered.map);
    answered.picture = context.canvas.transferToImageBitmap();
  }
  delete answered.map;
  bitmap.close();
  return answered;
}

// One after the other: a session runs one image at a time.
let last = start().catch(error => postMessage({ failed: error.message }));
onmessage = ({ data: { id, ...asked } }) => {
  last = last.then(async () => {
    try {
      postMessage({ id, ...(await answer(asked)) });
    } catch (error) {
      postMessage({ id, error: error.message });
    }
  });
};
