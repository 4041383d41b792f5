// A device written from docs/protocol.md alone: nothing here knows the Python programs.
// It does not train: its delta is zero in A and a pattern in B that the test knows.
//
//   node device.mjs URL TOKEN STATE [3.1.1|5]
//
// One JSON object a line on stdout says what happened. STATE keeps what has to outlive a crash.

import crypto from 'node:crypto'
import fs from 'node:fs'
import https from 'node:https'
import path from 'node:path'
import mqtt from 'mqtt'

const [url, token, folder, mqttVersion = '5'] = process.argv.slice(2)
const say = (event, fields = {}) => console.log(JSON.stringify({ event, ...fields }))
const sha256 = (data) => crypto.createHash('sha256').update(data).digest()
const compareBytes = (a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b))

// -- what is kept ---------------------------------------------------------------------------------

fs.mkdirSync(folder, { recursive: true, mode: 0o700 })
const inFolder = (name) => path.join(folder, name)
const load = (name) => (fs.existsSync(inFolder(name)) ? fs.readFileSync(inFolder(name)) : null)

function keep(name, data) {
  const file = fs.openSync(inFolder(name + '.new'), 'w', 0o600)
  fs.writeFileSync(file, data)
  fs.fsyncSync(file)
  fs.closeSync(file)
  fs.renameSync(inFolder(name + '.new'), inFolder(name))
}

const loadJson = (name) => JSON.parse(load(name) ?? 'null')
const keepJson = (name, value) => keep(name, JSON.stringify(value))

function privateKey(name, ...kind) {
  if (!load(name)) {
    const made = crypto.generateKeyPairSync(...kind).privateKey
    keep(name, made.export({ type: 'pkcs8', format: 'pem' }))
  }
  return crypto.createPrivateKey(load(name))
}

// -- the signed envelope --------------------------------------------------------------------------

const tlsKey = privateKey('tls.key', 'ec', { namedCurve: 'P-256' })
const signingKey = privateKey('signing.key', 'ed25519')
const ED25519 = Buffer.from('302a300506032b6570032100', 'hex') // before the 32 bytes, in DER
const publicKey = crypto.createPublicKey(signingKey).export({ type: 'spki', format: 'der' })
const ownKey = publicKey.subarray(ED25519.length).toString('base64')
const signed = (topic, body) => Buffer.from(`tunefleet/1\n${topic}\n${body}`)

function seal(topic, message) {
  const body = JSON.stringify(message)
  const signature = crypto.sign(null, signed(topic, body), signingKey).toString('base64')
  return JSON.stringify({ body, key: ownKey, signature })
}

// Left out here: refusing a key that stands twice in an object, which JSON.parse can't see.
function open(topic, payload) {
  if (payload.length > 512 * 1024) throw new Error('the envelope is too long')
  const { body, key, signature } = JSON.parse(payload)
  const der = Buffer.concat([ED25519, Buffer.from(key, 'base64')])
  const verifier = crypto.createPublicKey({ key: der, type: 'spki', format: 'der' })
  if (!crypto.verify(null, signed(topic, body), verifier, Buffer.from(signature, 'base64'))) {
    throw new Error(`the signature on ${topic} is wrong`)
  }
  const message = JSON.parse(body)
  if (message.protocol !== 1) throw new Error(`protocol ${message.protocol}`)
  return [message, key]
}

// -- joining a fleet ------------------------------------------------------------------------------

function der(tag, ...parts) {
  const content = Buffer.concat(parts)
  const n = content.length
  const length = n < 128 ? [n] : n < 256 ? [0x81, n] : [0x82, n >> 8, n & 255]
  return Buffer.concat([Buffer.from([tag, ...length]), content])
}

function certificateRequest(key) {
  const spki = crypto.createPublicKey(key).export({ type: 'spki', format: 'der' })
  const version = der(0x02, Buffer.from([0]))
  const info = der(0x30, version, der(0x30), spki, der(0xa0)) // no name and no extensions
  const ecdsaWithSha256 = der(0x30, der(0x06, Buffer.from('2a8648ce3d040302', 'hex')))
  const signature = der(0x03, Buffer.from([0]), crypto.sign('sha256', info, key))
  const text = der(0x30, info, ecdsaWithSha256, signature).toString('base64')
  const lines = text.match(/.{1,64}/g).join('\n')
  return `-----BEGIN CERTIFICATE REQUEST-----\n${lines}\n-----END CERTIFICATE REQUEST-----\n`
}

function ask(address, options, body) {
  return new Promise((resolve, reject) => {
    const settings = { agent: false, minVersion: 'TLSv1.2', ...options }
    const request = https.request(address, settings, (answer) => {
      const parts = []
      answer.on('data', (part) => parts.push(part))
      answer.on('end', () => {
        const text = Buffer.concat(parts)
        if (answer.statusCode === 200) resolve(text)
        else reject(new Error(`${answer.statusCode}: ${text}`))
      })
    })
    request.on('error', reject)
    request.end(body)
  })
}

async function join() {
  const fingerprint = Buffer.from(token.slice('tf1-'.length), 'base64url').subarray(0, 32)
  const ca = await ask(new URL('/ca.pem', url), { rejectUnauthorized: false })
  if (!sha256(new crypto.X509Certificate(ca).raw).equals(fingerprint)) {
    throw new Error("this is not the token's fleet")
  }
  const request = { protocol: 1, token, csr: certificateRequest(tlsKey) }
  const answered = await ask(
    new URL('/enroll', url),
    { ca, method: 'POST', headers: { 'Content-Type': 'application/json' } },
    seal('enrol/request', request)
  )
  const [answer, aggregator] = open('enrol/answer', answered)
  if (!new crypto.X509Certificate(answer.certificate).checkPrivateKey(tlsKey)) {
    throw new Error('the certificate is for another key')
  }
  keepJson('member.json', { ...answer, aggregator })
  say('joined', { device: answer.device, broker: answer.broker })
}

if (!load('member.json')) await join()
const member = loadJson('member.json')
const device = member.device

// -- tensors --------------------------------------------------------------------------------------

const ITEM_BYTES = { F32: 4, BF16: 2, I8: 1 }
const STORED = { f32: 'F32', bf16: 'BF16', int8: 'I8' }
const size = (shape) => shape.reduce((product, n) => product * n, 1)

// The tensors of a file: name → shape and the modules in it. `ranks` gives each module's.
function layout(modules, ranks) {
  const tensors = new Map()
  const add = (name, shape, module) => {
    if (!tensors.has(name)) tensors.set(name, { shape: [0, ...shape], modules: [] })
    tensors.get(name).shape[0] += 1
    tensors.get(name).modules.push(module)
  }
  for (const module of Object.keys(modules).sort(compareBytes)) {
    const [[out, into], r] = [modules[module], ranks(module)]
    if (r === 0) continue
    add(`A.${r}x${into}`, [r, into], module)
    add(`B.${out}x${r}`, [out, r], module)
  }
  return tensors
}

const withScales = (wanted, encoding) =>
  encoding !== 'int8'
    ? [...wanted.keys()]
    : [...wanted.keys()].flatMap((name) => [name, `${name}.row_scale`])

function numbers(bytes, kind) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  const found = new Float32Array(bytes.length / ITEM_BYTES[kind])
  const bits = new Uint32Array(found.buffer)
  for (let i = 0; i < found.length; i++) {
    if (kind === 'F32') found[i] = view.getFloat32(4 * i, true)
    else if (kind === 'I8') found[i] = view.getInt8(i)
    else bits[i] = view.getUint16(2 * i, true) << 16
  }
  if (!found.every(Number.isFinite)) throw new Error('a number is not finite')
  return found
}

// Read a file into module → {A, B}, both as Float32Array in rows.
function decode(data, wanted, encoding) {
  const headerBytes = Number(data.readBigUInt64LE(0))
  if (headerBytes > 1 << 20) throw new Error('the header is too long')
  const header = JSON.parse(data.subarray(8, 8 + headerBytes))
  delete header.__metadata__
  const names = withScales(wanted, encoding)
  if (Object.keys(header).sort().join() !== names.sort().join()) {
    throw new Error(`the file holds ${Object.keys(header)}, not ${names}`)
  }
  const body = data.subarray(8 + headerBytes)
  const spans = Object.values(header).map((entry) => entry.data_offsets)
  spans.sort((a, b) => a[0] - b[0])
  const end = spans.reduce((at, [from, to]) => (from === at ? to : NaN), 0)
  if (end !== body.length) throw new Error('tensors have gaps')
  const read = (name, shape, kind) => {
    const entry = header[name]
    const [from, to] = entry.data_offsets
    const fits = entry.dtype === kind && entry.shape.join() === shape.join()
    if (!fits || to - from !== size(shape) * ITEM_BYTES[kind]) throw new Error(`${name} is odd`)
    return numbers(body.subarray(from, to), kind)
  }
  const factors = {}
  for (const [name, { shape, modules }] of wanted) {
    const values = read(name, shape, STORED[encoding])
    if (encoding === 'int8') {
      const scales = read(`${name}.row_scale`, shape.slice(0, 2), 'F32')
      for (let i = 0; i < values.length; i++) values[i] *= scales[Math.floor(i / shape[2])]
    }
    const each = shape[1] * shape[2]
    modules.forEach((module, i) => {
      factors[module] ??= {}
      factors[module][name[0]] = values.subarray(i * each, (i + 1) * each)
    })
  }
  return factors
}

function stored(values, kind) {
  const bytes = Buffer.alloc(values.length * ITEM_BYTES[kind])
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length)
  for (let i = 0; i < values.length; i++) {
    if (kind === 'F32') bytes.writeFloatLE(values[i], 4 * i)
    else if (kind === 'I8') bytes.writeInt8(values[i], i)
    else bytes.writeUInt16LE((bits[i] + 0x7fff + ((bits[i] >>> 16) & 1)) >>> 16, 2 * i)
  }
  return bytes
}

function encode(factors, wanted, encoding) {
  const header = {}
  const parts = []
  let at = 0
  const add = (name, shape, values, kind) => {
    const bytes = stored(values, kind)
    header[name] = { dtype: kind, shape, data_offsets: [at, at + bytes.length] }
    at += bytes.length
    parts.push(bytes)
  }
  for (const [name, { shape, modules }] of wanted) {
    const values = new Float32Array(size(shape))
    const each = shape[1] * shape[2]
    modules.forEach((module, i) => values.set(factors[module][name[0]], i * each))
    if (encoding === 'int8') {
      const scales = new Float32Array(shape[0] * shape[1])
      for (let row = 0; row < scales.length; row++) {
        const cells = values.subarray(row * shape[2], (row + 1) * shape[2])
        scales[row] = cells.reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 127
        cells.forEach((x, i) => (cells[i] = scales[row] && Math.round(x / scales[row])))
      }
      add(`${name}.row_scale`, shape.slice(0, 2), scales, 'F32')
    }
    add(name, shape, values, STORED[encoding])
  }
  let text = JSON.stringify(header)
  text += ' '.repeat((8 - (text.length % 8)) % 8)
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(text.length))
  return Buffer.concat([length, Buffer.from(text), ...parts])
}

// -- chunks and hashes ----------------------------------------------------------------------------

const CHUNK_BYTES = 131072
const chunkHash = (chunk) => sha256(chunk).subarray(0, 16).toString('base64url')
const cut = (data, file, i) => data.subarray(i * file.chunk_bytes, (i + 1) * file.chunk_bytes)

function describe(data) {
  const file = { bytes: data.length, sha256: sha256(data).toString('hex'), chunk_bytes: CHUNK_BYTES }
  const count = Math.max(1, Math.ceil(data.length / CHUNK_BYTES))
  file.chunks = Array.from({ length: count }, (_, i) => chunkHash(cut(data, file, i)))
  return file
}

function takesPart(job, round) {
  const drawn = sha256(`${device}|${job.job}|${round.number}|cohort`).readBigUInt64BE(0)
  return Number(drawn) < round.fraction * 2 ** 64
}

function directions(job, round, module, rank, held) {
  const reach = Math.min(held, ...job.base.modules[module])
  const all = Array.from({ length: reach }, (_, i) => i)
  if (job.directions === 'top') return all.slice(0, rank)
  const drawn = (i) => sha256(`${job.job}|${device}|${round.number}|${i}`)
  const first = all.sort((a, b) => Buffer.compare(drawn(a), drawn(b))).slice(0, rank)
  return first.sort((a, b) => a - b)
}

// The factors of a round: their tensors' names begin with one of these letters.
function factors(job, round) {
  if (job.training.factors !== 'alternating') return 'AB'
  return round.number % 2 ? 'B' : 'A'
}

// -- what the device has --------------------------------------------------------------------------

const boot = (loadJson('boot.json') ?? 0) + 1
keepJson('boot.json', boot)
let job = null
let round = null
let have = null // {version, factors}
let getting = null // {version, manifest, files}
let state = 'idle'
let heard = Date.now()
const seen = loadJson('seen.json') ?? {
  job: null,
  round: 0,
  attempt: 0,
  version: 0,
  trained: [0, 0], // round and attempt
  refused: false // what was trained last
}

const held = () => job.ladder.at(-1) // small enough here for all bands
const rank = () => job.ladder[0]
const top = (rest) => `tunefleet/1/${job.job}/${rest}`
const mine = (rest) => top(`d/${device}/${rest}`)

function status(name, online = true) {
  state = name
  const version = have?.version ?? null
  const what = { online, boot, state: name, profile: 'node', rank: rank(), version, detail: '' }
  return seal(mine('status'), { protocol: 1, job: job.job, device, ...what })
}

const publish = (topic, payload, retain = false) =>
  client.publishAsync(topic, payload, { qos: 1, retain })
const publishStatus = (name, online) => publish(mine('status'), status(name, online), true)

// -- a version of the shared adapter --------------------------------------------------------------

async function get(version) {
  getting = { version, manifest: null, files: {} }
  await publishStatus('downloading')
  await client.subscribeAsync(top(`global/${version}/manifest`), { qos: 1 })
}

async function takeManifest(manifest) {
  if (manifest.version !== getting?.version || getting.manifest) return
  getting.manifest = manifest
  for (const [band, file] of Object.entries(manifest.bands)) {
    getting.files[band] = Array(file.chunks.length).fill(null)
    await client.subscribeAsync(top(`global/${manifest.version}/${band}/+`), { qos: 1 })
  }
}

async function takeChunk(version, band, index, chunk) {
  const file = version === getting?.version && getting.manifest?.bands[band]
  if (!file || chunkHash(chunk) !== file.chunks[index]) return
  getting.files[band][index] = Buffer.from(chunk)
  if (Object.values(getting.files).flat().includes(null)) return
  const bands = Object.keys(getting.manifest.bands)
  const filters = bands.map((name) => top(`global/${version}/${name}/+`))
  await client.unsubscribeAsync([top(`global/${version}/manifest`), ...filters])
  have = { version, factors: assemble(getting.manifest, getting.files) }
  getting = null
  say('version', { version, modules: summary() })
  await publishStatus('idle')
  await act()
}

// Put the bands together: rows of A, columns of B.
function assemble(manifest, files) {
  const { modules } = job.base
  const whole = {}
  for (const [name, [out, into]] of Object.entries(modules)) {
    const r = Math.min(held(), out, into)
    whole[name] = { r, A: new Float32Array(r * into), B: new Float32Array(out * r) }
  }
  for (const [band, chunks] of Object.entries(files)) {
    const data = Buffer.concat(chunks)
    const file = manifest.bands[band]
    if (data.length !== file.bytes || sha256(data).toString('hex') !== file.sha256) {
      throw new Error(`band ${band} is not what was announced`)
    }
    const [start, stop] = band.split('-').map(Number)
    const ranks = (module) => Math.max(0, Math.min(stop, whole[module].r) - start)
    const factors = decode(data, layout(modules, ranks), manifest.encoding)
    for (const [name, { A, B }] of Object.entries(factors)) {
      const [[out, into], r, width] = [modules[name], whole[name].r, ranks(name)]
      whole[name].A.set(A, start * into)
      for (let i = 0; i < out; i++) {
        whole[name].B.set(B.subarray(i * width, (i + 1) * width), i * r + start)
      }
    }
  }
  return whole
}

function summary() {
  const checksum = (x) => sha256(Buffer.from(x.buffer, x.byteOffset, x.byteLength)).toString('hex')
  const entries = Object.entries(have.factors)
  return Object.fromEntries(
    entries.map(([name, { r, A, B }]) => [name, { rank: r, A: checksum(A), B: checksum(B) }])
  )
}

// -- a round --------------------------------------------------------------------------------------

// In place of training: B' − B is a pattern of module, direction and row; A' − A is zero.
function train() {
  const { modules } = job.base
  const drawn = {}
  const delta = {}
  for (const [m, name] of Object.keys(modules).sort(compareBytes).entries()) {
    const [out, into] = modules[name]
    drawn[name] = directions(job, round, name, rank(), held())
    const r = drawn[name].length
    delta[name] = { A: new Float32Array(r * into), B: new Float32Array(out * r) }
    for (let i = 0; i < out; i++) {
      drawn[name].forEach((k, j) => {
        delta[name].B[i * r + j] = (((i % 3) - 1) * (m + 1) * (k + 1)) / 256
      })
    }
  }
  const whole = layout(modules, (name) => drawn[name].length)
  const wanted = new Map([...whole].filter(([name]) => factors(job, round).includes(name[0])))
  const data = encode(delta, wanted, job.encoding_up)
  const { attempt = 0 } = round
  const again = attempt ? `|${attempt}` : ''
  const manifest = {
    protocol: 1,
    job: job.job,
    device,
    upload: sha256(`${device}|${job.job}|${round.number}${again}`).toString('hex').slice(0, 32),
    round: round.number,
    attempt,
    version: have.version,
    rank: rank(),
    rank_trained: rank(),
    held: held(),
    encoding: job.encoding_up,
    file: describe(data),
    examples: 1000,
    metrics: { loss: 1.5 }
  }
  keep('upload.safetensors', data)
  keepJson('upload.json', manifest)
  seen.trained = [round.number, attempt]
  seen.refused = false
  keepJson('seen.json', seen)
  say('trained', { round: round.number, version: have.version, directions: drawn })
}

async function offer() {
  const manifest = loadJson('upload.json')
  if (!manifest) return
  const topic = mine(`up/${manifest.upload}/manifest`)
  if (state !== 'uploading') await publishStatus('uploading')
  await publish(topic, seal(topic, manifest))
  say('offered', { round: manifest.round, chunks: manifest.file.chunks.length })
}

async function takeControl(control) {
  const manifest = loadJson('upload.json')
  if (manifest?.upload !== control.upload) return
  if (control.kind === 'need') {
    const data = load('upload.safetensors')
    for (const i of control.chunks) {
      await publish(mine(`up/${manifest.upload}/${i}`), cut(data, manifest.file, i))
    }
    say('sent', { round: manifest.round, chunks: control.chunks })
    return
  }
  if (control.kind === 'wait') {
    say('wait', { round: manifest.round, reason: control.reason })
    return
  }
  if (control.kind === 'reject' && manifest.round === seen.trained[0]) {
    seen.refused = true
    keepJson('seen.json', seen)
  }
  fs.rmSync(inFolder('upload.json'))
  say(control.kind, { round: manifest.round, reason: control.reason })
  await publishStatus('idle')
  await act()
}

async function takeJob(message) {
  if (job) return
  const settings = sha256(JSON.stringify(message)).toString('hex')
  if (seen.job && seen.job !== settings) throw new Error('the job has other settings now')
  seen.job = settings
  keepJson('seen.json', seen)
  job = message
  say('job', { job: job.job, base: job.base.name })
  await work()
}

async function takeRound(message) {
  const { number, version, attempt = 0 } = message
  const old = number < seen.round || (number === seen.round && attempt < seen.attempt)
  if (old || version < seen.version) return
  round = message
  Object.assign(seen, { round: number, attempt, version })
  keepJson('seen.json', seen)
  say('round', { round: round.number, state: round.state, version: round.version })
  await offer()
  await act()
}

async function act() {
  if (have?.version !== round.version) {
    if (getting?.version !== round.version) await get(round.version)
    return
  }
  if (round.state === 'finished') {
    await publishStatus('stopped', false)
    say('stopped', { version: have.version })
    await client.endAsync()
    process.exit(0)
  }
  const [number, attempt] = seen.trained
  const inVain = seen.refused && number === round.number && attempt < (round.attempt ?? 0)
  const due = number < round.number || inVain
  const wanted = round.state === 'open' && takesPart(job, round) && due
  if (!wanted || load('upload.json')) return
  await publishStatus('training')
  train()
  await offer()
}

// -- the connection -------------------------------------------------------------------------------

let client = null

function connect(will) {
  const [, host, port = '8883'] = /^mqtts:\/\/([^?]+?)(?::(\d+))?(?:\?|$)/.exec(member.broker)
  const five = mqttVersion === '5'
  const made = mqtt.connect({
    protocol: 'mqtts',
    host,
    port: Number(port),
    protocolVersion: five ? 5 : 4,
    clientId: `tunefleet-${device}`,
    clean: false,
    properties: five ? { sessionExpiryInterval: 7 * 24 * 3600 } : undefined,
    resubscribe: false,
    minVersion: 'TLSv1.2',
    ca: member.ca,
    cert: member.certificate,
    key: tlsKey.export({ type: 'pkcs8', format: 'pem' }),
    will
  })
  made.on('error', fail)
  made.on('disconnect', (packet) => {
    if (packet.reasonCode === 0x8e) fail(new Error('the session was taken over'))
  })
  return made
}

function fail(error) {
  console.error(error)
  process.exit(1)
}

// One message after the other. One that can't be right is dropped, as docs/protocol.md says.
let queue = Promise.resolve()
const later = (task) => (queue = queue.then(task).catch(fail))

async function take(topic, payload) {
  if (payload.length === 0) return
  const parts = topic.split('/').slice(3)
  if (!job && parts[0] !== 'job') return // the session kept it for us: it will be said again
  if (parts[0] === 'global' && parts[2] !== 'manifest') {
    return takeChunk(Number(parts[1]), parts[2], Number(parts[3]), payload)
  }
  let message
  try {
    const [opened, key] = open(topic, payload)
    if (key !== member.aggregator) throw new Error(`${topic} is not from this fleet's aggregator`)
    message = opened
  } catch (error) {
    return say('refused', { topic, reason: error.message })
  }
  heard = Date.now()
  if (parts[0] === 'job') return takeJob(message)
  if (parts[0] === 'round') return takeRound(message)
  if (parts[0] === 'global') return takeManifest(message)
  return takeControl(message)
}

// Look for a job; the will needs its name, so that what follows is on another connection.
async function look() {
  client = connect()
  client.on('message', (topic, payload) => later(() => take(topic, payload)))
  await client.subscribeAsync('tunefleet/1/+/job', { qos: 1 })
}

async function work() {
  await client.unsubscribeAsync('tunefleet/1/+/job')
  await client.endAsync()
  client = connect({ topic: mine('status'), payload: status('idle', false), qos: 1, retain: true })
  client.on('message', (topic, payload) => later(() => take(topic, payload)))
  client.on('connect', () =>
    later(async () => {
      await publishStatus(state)
      await client.subscribeAsync([top('job'), top('round'), mine('ctl')], { qos: 1 })
      if (getting) await get(getting.version)
      await offer()
    })
  )
  setInterval(() => {
    if (Date.now() - heard < 30_000) return
    heard = Date.now()
    later(offer)
  }, 1000)
}

await look()
