// pg-boss (npm). See ../run.py for what the three commands have to do.
import { PgBoss } from 'pg-boss'
import { command, hear, now, numbers, paced, say, setting } from './bench.mjs'

// Listening is off by default; with it workers are woken instead of polling (every 2 s by default).
const boss = new PgBoss({ connectionString: process.env.DATABASE_URL, max: 25, useListenNotify: true })
boss.on('error', console.error)
await boss.start()
await boss.createQueue('noop', { notify: true })

if (command === 'burn') {
  // Batches are its way to throughput: a handler gets batchSize jobs, and they are completed together;
  // burstWhenBatchFull fetches the next at once, localConcurrency has several in flight.
  const options = {
    batchSize: setting('BATCH', 1000),
    localConcurrency: setting('CONCURRENCY', 4),
    burstWhenBatchFull: true,
    pollingIntervalSeconds: 0.5
  }
  let left = numbers[0]
  for (let n = 0; n < left; n += 10000) {
    await boss.insert('noop', Array.from({ length: Math.min(10000, left - n) }, (_, i) => ({ data: { n: n + i } })))
  }
  say('ready')
  await hear()
  await boss.work('noop', options, async (jobs) => {
    left -= jobs.length
    if (left === 0) say('handled')
  })
  await hear()
} else if (command === 'work') {
  const latencies = []
  const options = { batchSize: setting('BATCH', 1), localConcurrency: setting('CONCURRENCY', 4) }
  await boss.work('noop', options, async (jobs) => {
    for (const { data } of jobs) latencies.push(now() - data.us)
  })
  await new Promise((resolve) => setTimeout(resolve, 1000))
  say('ready')
  await hear()
  say(JSON.stringify(latencies))
} else {
  await paced(...numbers, () => boss.send('noop', { us: now() }))
}
process.exit(0) // without waiting for a shutdown that is not measured
