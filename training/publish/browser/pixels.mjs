// An image as the model's processor in Python makes it, to the last bit: on white, resized as Pillow does it.

// Pillow's filters (src/libImaging/Resample.c): how far each reaches, and its weight there.
const sinc = x => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
  box: [0.5, x => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, x => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, x => {
    const a = -0.5, d = Math.abs(x);
    return d < 1 ? ((a + 2) * d - (a + 3)) * d * d + 1 : d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
  }],
  lanczos: [3, x => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const BITS = 22; // of a weight behind the point

/** Half to even, as Python rounds. */
export const round = x => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** What `load_image` makes of 1 to 4 channels: RGB, transparency laid on white as Pillow's alpha_composite rounds. */
export function onWhite(data, channels) {
  const count = data.length / channels, rgb = new Uint8Array(3 * count);
  const colours = channels < 3 ? 1 : 3, hasAlpha = channels % 2 === 0;
  for (let i = 0; i < count; i++) {
    const alpha = hasAlpha ? data[channels * i + channels - 1] : 255;
    for (let c = 0; c < 3; c++) {
      const value = data[channels * i + (colours === 1 ? 0 : c)];
      const mixed = 128 * (value * alpha + 255 * (255 - alpha) + 128);
      rgb[3 * i + c] = alpha === 255 ? value : ((mixed >> 8) + mixed) >> 15;
    }
  }
  return rgb;
}

/** For each place of one side, where the filter begins in the source, and its weights as whole numbers. */
function weights(from, to, [reach, filter]) {
  const scale = from / to, wide = Math.max(scale, 1), support = reach * wide;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const taps = Float64Array.from({ length: end - begin }, (_, k) => filter((k + begin - centre + 0.5) * (1 / wide)));
    const sum = taps.reduce((total, tap) => total + tap, 0);
    return { begin, taps: Int32Array.from(taps, tap => {
      const share = (sum ? tap / sum : tap) * 2 ** BITS;
      return Math.trunc(share + (share < 0 ? -0.5 : 0.5));
    }) };
  });
}

/** One direction: `lines` rows (or columns) side by side, of `from` to `to` pixels; `step` and `stride` in pixels. */
function pass(source, from, to, lines, step, stride, toStep, toStride, filter) {
  const target = new Uint8ClampedArray(3 * lines * to);
  const table = weights(from, to, filter);
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < to; place++) {
      const { begin, taps } = table[place];
      let at = 3 * (line * stride + begin * step), red = 1 << (BITS - 1), green = red, blue = red;
      for (let k = 0; k < taps.length; k++, at += 3 * step) {
        red += source[at] * taps[k];
        green += source[at + 1] * taps[k];
        blue += source[at + 2] * taps[k];
      }
      const out = 3 * (line * toStride + place * toStep);
      target[out] = red >> BITS;
      target[out + 1] = green >> BITS;
      target[out + 2] = blue >> BITS;
    }
  }
  return target;
}

/** RGB of `width` x `height` resized by one of Pillow's filters; rounded to 8 bits after each direction, as there. */
export function resize(rgb, width, height, toWidth, toHeight, name) {
  if (name === "nearest") return nearest(rgb, width, height, toWidth, toHeight);
  const filter = FILTERS[name];
  const across = () => {
    if (toWidth !== width) rgb = pass(rgb, width, toWidth, rgb.length / width / 3, 1, width, 1, toWidth, filter);
  };
  const down = columns => {
    if (toHeight !== height) rgb = pass(rgb, height, toHeight, columns, columns, 1, columns, 1, filter);
  };
  // Since Pillow 13 what loses much more height than width is resized downwards first.
  if (height > toHeight && height - toHeight > 2 * (width - toWidth)) {
    down(width);
    across();
  } else {
    across();
    down(toWidth);
  }
  return rgb;
}

function nearest(rgb, width, height, toWidth, toHeight) {
  const places = (from, to) => { // summed up, as there
    const step = from / to, found = new Int32Array(to);
    for (let i = 0, at = step * 0.5; i < to; i++, at += step) found[i] = Math.min(Math.trunc(at), from - 1);
    return found;
  };
  const across = places(width, toWidth), target = new Uint8ClampedArray(3 * toWidth * toHeight);
  places(height, toHeight).forEach((y, row) => across.forEach((x, column) => {
    for (let c = 0; c < 3; c++) target[3 * (row * toWidth + column) + c] = rgb[3 * (y * width + x) + c];
  }));
  return target;
}

/** The size after resizing, before padding or cropping; `size` as in a processor of transformers. */
function resizedSize(width, height, { size, resize_mode: mode }) {
  if (size.height && size.width) {
    if (mode !== "pad") return [size.width, size.height];
    const scale = Math.min(size.height / height, size.width / width);
    return [width, height].map(side => Math.max(round(side * scale), 1));
  }
  if (!size.shortest_edge) return [width, height];
  let short = size.shortest_edge, exact = short;
  const [least, most] = [Math.min(width, height), Math.max(width, height)];
  if (size.longest_edge && (most / least) * short > size.longest_edge) {
    exact = (size.longest_edge * least) / most;
    short = round(exact);
  }
  if (least === short) return [width, height];
  return width < height
    ? [short, Math.trunc((exact * height) / width)]
    : [Math.trunc((exact * width) / height), short];
}

/**
 * What the model sees: RGB, 8 bits, `settings.width` x `settings.height`.
 *
 * `box` is where the whole image lies in it (left, top, right, bottom, as shares), beyond it where it was cropped.
 */
export function prepare(rgb, width, height, settings) {
  const [w, h] = resizedSize(width, height, settings);
  const { width: toWidth, height: toHeight, fill } = settings;
  if (w * h > 8192 ** 2) throw new Error(`an image of ${width} x ${height} px is too long for this model`);
  const inner = resize(rgb, width, height, w, h, settings.resample);
  // Python rounds down what is left around an image, and what is cut off.
  const middle = settings.resize_mode === "pad" ? (to, side) => Math.floor((to - side) / 2) : (to, side) => -Math.floor((side - to) / 2);
  const left = middle(toWidth, w), top = middle(toHeight, h);
  const box = [left / toWidth, top / toHeight, (left + w) / toWidth, (top + h) / toHeight];
  if (w === toWidth && h === toHeight) return { rgb: inner, box };
  const canvas = new Uint8ClampedArray(3 * toWidth * toHeight);
  for (let y = 0; y < toHeight; y++) {
    for (let x = 0; x < toWidth; x++) {
      const [column, row] = [x - left, y - top], inside = column >= 0 && column < w && row >= 0 && row < h;
      for (let c = 0; c < 3; c++) canvas[3 * (y * toWidth + x) + c] = inside ? inner[3 * (row * w + column) + c] : fill[c];
    }
  }
  return { rgb: canvas, box };
}

/** `pixel_values` (3, height, width): rescaled, less the mean, by the deviation. */
export function normalise(rgb, { rescale_factor: factor, image_mean: mean, image_std: std }) {
  const count = rgb.length / 3, values = new Float32Array(rgb.length);
  for (let c = 0; c < 3; c++) {
    const table = Float32Array.from({ length: 256 }, (_, value) => (value * factor - mean[c]) / std[c]);
    for (let i = 0; i < count; i++) values[c * count + i] = table[rgb[3 * i + c]];
  }
  return values;
}
