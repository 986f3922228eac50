// What both drivers share: talk with run.py over standard input and output.
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'

export { sleep }
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
export const hear = () => lines.next()
export const say = (line) => process.stdout.write(line + '\n')
export const setting = (name, other) => Number(process.env[name] ?? other)

// The wall clock in microseconds. Date.now() is cut to milliseconds and a pause may fall between the two
// readings; either makes the difference too small, so the greatest of many is the true one.
let offset = 0
for (const end = performance.now() + 20; performance.now() < end;) {
  offset = Math.max(offset, Date.now() - performance.now())
}
export const now = () => Math.round((offset + performance.now()) * 1000)

export const [command, ...numbers] = process.argv.slice(2).map((a, i) => (i ? Number(a) : a))

// Each at its time, whether the ones before were answered or not.
export async function paced (rate, seconds, send) {
  const sent = []
  const start = performance.now()
  for (let i = 0; i < rate * seconds; i++) {
    const wait = start + (i * 1000) / rate - performance.now()
    if (wait > 0) await sleep(wait)
    sent.push(send())
  }
  await Promise.all(sent)
}
