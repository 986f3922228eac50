// pg-boss (npm). See ../run.py for what the three commands have to do.
import { PgBoss } from 'pg-boss'
import { command, hear, now, numbers, paced, say, setting, sleep } from './bench.mjs'

// Listening is off by default; with it workers are woken instead of polling (every 2 s by default).
const boss = new PgBoss({ connectionString: process.env.DATABASE_URL, max: 25, useListenNotify: true })
boss.on('error', console.error)
await boss.start()
await boss.createQueue('noop', { notify: true })

if (command === 'burn') {
  // Batches are its way to throughput: a handler gets batchSize jobs, and they are completed together;
  // burstWhenBatchFull fetches the next at once, localConcurrency has several in flight. Tried: batches
  // of 200, 2,000 and 5,000; 2 and 8 in flight.
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
  // Batches of 1 lose wake-ups: some jobs wait for the next poll. 4 at once were slower.
  const latencies = []
  const options = { batchSize: setting('BATCH', 10), localConcurrency: setting('CONCURRENCY', 1) }
  await boss.work('noop', options, async (jobs) => {
    for (const { data } of jobs) latencies.push(now() - data.us)
  })
  await sleep(1000)
  say('ready')
  while (latencies.length < numbers[0]) await sleep(10)
  say(JSON.stringify(latencies))
} else {
  await paced(...numbers, () => boss.send('noop', { us: now() }))
}
process.exit(0) // without waiting for a shutdown that is not measured
