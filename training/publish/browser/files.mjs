// What is downloaded: a table, and XMP sidecars in a ZIP file.

const text = new TextEncoder();

/** A table with a row for each image: its labels, and the score of every label. */
export function csv(labels, images) {
  const cell = value => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const rows = images.map(image => [image.path, image.found.map(i => labels[i]).join("|"), ...Array.from(image.scores, s => s.toFixed(6))]);
  return [["file_name", "labels", ...labels], ...rows].map(row => row.map(cell).join(",") + "\r\n").join("");
}

// The properties that programs for photographs read keywords from; hsvlt tag writes the same (training/tagging/xmp.py).
const RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#";
const KEYWORDS = [
  ["dc", "http://purl.org/dc/elements/1.1/", "subject", "Bag"],
  ["lr", "http://ns.adobe.com/lightroom/1.0/", "hierarchicalSubject", "Bag"],
  ["digiKam", "http://www.digikam.org/ns/1.0/", "TagsList", "Seq"],
  ["MicrosoftPhoto", "http://ns.microsoft.com/photo/1.0/", "LastKeywordXMP", "Bag"],
];
const FORBIDDEN = /[^\t\n\r\x20-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu; // XML 1.0, Char

export function xmp(labels) {
  const escaped = label =>
    label.replace(FORBIDDEN, "").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const items = labels.map(label => `     <rdf:li>${escaped(label)}</rdf:li>\n`).join("");
  const properties = KEYWORDS.map(([prefix, uri, name, kind]) =>
    `   <${prefix}:${name} xmlns:${prefix}="${uri}">\n    <rdf:${kind} xmlns:rdf="${RDF}">\n${items}` +
    `    </rdf:${kind}>\n   </${prefix}:${name}>\n`).join("");
  return '<?xml version="1.0" encoding="UTF-8"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">\n' +
    ` <rdf:RDF xmlns:rdf="${RDF}">\n  <rdf:Description rdf:about="">\n${properties}  </rdf:Description>\n` +
    " </rdf:RDF>\n</x:xmpmeta>\n";
}

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

/** A ZIP file of `[name, text]`, not compressed (APPNOTE 6.3, names in UTF-8). */
export function zip(files) {
  const parts = [], directory = [];
  let place = 0;
  for (const [name, content] of files) {
    const path = text.encode(name), data = text.encode(content);
    const crc = ~data.reduce((sum, byte) => CRC[(sum ^ byte) & 255] ^ (sum >>> 8), -1) >>> 0;
    // Version 2.0, names in UTF-8, stored, 1 January 1980.
    const facts = [[20, 2], [0x800, 2], [0, 2], [0, 2], [33, 2], [crc, 4], [data.length, 4], [data.length, 4], [path.length, 2], [0, 2]];
    const head = little([0x04034b50, 4], ...facts);
    parts.push(head, path, data);
    directory.push(little([0x02014b50, 4], [20, 2], ...facts, [0, 2], [0, 2], [0, 2], [0, 4], [place, 4]), path);
    place += head.length + path.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = files.length;
  return new Blob([...parts, ...directory,
    little([0x06054b50, 4], [0, 2], [0, 2], [count, 2], [count, 2], [size, 4], [place, 4], [0, 2])], { type: "application/zip" });
}

function little(...numbers) {
  return Uint8Array.from(numbers.flatMap(([value, bytes]) => Array.from({ length: bytes }, (_, i) => (value >>> (8 * i)) & 255)));
}
