// Wire: a token comes as a short array, any other record as an object (cascadeexit/wire.py describes both).

const WIRE_STATUSES = ['emitted', 'draft', 'accepted', 'rejected'];
const wireSide = number => ['cascade', 'second', 'full'][number] || 'fork' + (number - 2);

function expand(values) {                    // the value of a line as a record with all its names
  if (!Array.isArray(values)) return values;
  const [side, i, id, status, text, exit, t, conf, read, ms, ran, special, bytes, part] = values;
  const record = { type: 'token', side: wireSide(side), i, id, status: WIRE_STATUSES[status] };
  if (text === undefined) return record;     // a rejected draft
  Object.assign(record, { text, exit, t: t / 1e6,
    conf: Array.isArray(conf) ? conf.map(c => c < 0 ? null : c / 1e5) : Array(conf).fill(null) });
  if (!missing(read)) record.read = read / 1e5;
  if (!missing(ms)) record.ms = ms / 1e3;
  if (!missing(ran)) record.ran = Array.from({ length: ran.length / 3 }, (_, k) => ran.slice(3 * k, 3 * k + 3));
  if (special) record.special = true;
  if (!missing(bytes)) record.bytes = bytes;
  if (part) record.part = true;
  return record;
}
