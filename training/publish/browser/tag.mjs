// Labels with scores, by transformers.js; its own pipeline would apply softmax, and resize otherwise than in training.
//
//   npm install @huggingface/transformers
//   node tag.mjs photo.jpg

import { AutoImageProcessor, AutoModelForImageClassification, RawImage, env } from "@huggingface/transformers";
import { onWhite, prepare } from "./pixels.mjs";

/** A function from an image (path, address, Blob, RawImage) to its labels, highest score first. */
export async function tagger(model_id, options = {}) {
  const model = await AutoModelForImageClassification.from_pretrained(model_id, { dtype: "fp32", ...options });
  const processor = await AutoImageProcessor.from_pretrained(model_id, options);
  const { id2label, thresholds, thresholds_q8 } = model.config;
  const cuts = options.dtype === "q8" ? thresholds_q8 : thresholds;
  return async image => {
    const { data, width, height, channels } = await RawImage.read(image);
    const { pixels } = processor.config, seen = prepare(onWhite(data, channels), width, height, pixels);
    const { logits } = await model(await processor(new RawImage(seen.rgb, pixels.width, pixels.height, 3)));
    const scores = Array.from(logits.data, logit => 1 / (1 + Math.exp(-logit)));
    return scores
      .map((score, i) => ({ label: id2label[i], score, threshold: cuts[i], found: score >= cuts[i] }))
      .sort((a, b) => b.score - a.score);
  };
}

// In Node as a program, with the model of this folder.
if (globalThis.process?.argv[1]?.endsWith("tag.mjs")) {
  const { basename, dirname } = await import("node:path"), { fileURLToPath } = await import("node:url");
  const here = dirname(fileURLToPath(import.meta.url));
  [env.localModelPath, env.allowRemoteModels] = [dirname(here), false];
  const tag = await tagger(basename(here));
  for (const path of process.argv.slice(2)) console.log(path, (await tag(path)).filter(({ found }) => found));
}
