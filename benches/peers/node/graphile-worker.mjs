// graphile-worker (npm). See ../run.py for what the three commands have to do.
import { Logger, makeWorkerUtils, run } from 'graphile-worker'
import pg from 'pg'
import { command, hear, now, numbers, paced, say, setting, sleep } from './bench.mjs'

const pgPool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 25 })
pgPool.on('error', console.error).on('connect', (client) => client.on('error', console.error))
const utils = await makeWorkerUtils({ pgPool })
await utils.migrate()
const logger = new Logger(() => () => {})

if (command === 'burn') {
  // What its performance page measures with: local queue, batched completion, pool of 25. Its sizes, a local
  // queue of 500 and 24 at once, were slower; so were 48 at once, a local queue of 5,000, batches after 5 ms.
  const worker = {
    concurrentJobs: setting('CONCURRENCY', 200),
    localQueue: { size: setting('LOCAL', 2000) },
    completeJobBatchDelay: setting('BATCH_MS', 0),
    logger
  }
  let left = numbers[0]
  await pgPool.query(
    `select count(*) from graphile_worker.add_jobs(array(select json_populate_record(
     null::graphile_worker.job_spec, json_build_object('identifier', 'noop', 'payload',
     json_build_object('n', n))) from generate_series(1, $1::int) n))`, [left])
  await Promise.all(Array.from({ length: 10 }, () => pgPool.query('select pg_sleep(0.05)'))) // connect
  say('ready')
  await hear()
  await run({ preset: { worker }, pgPool, taskList: { noop: () => { if (--left === 0) say('handled') } } })
  await hear()
} else if (command === 'work') {
  // No local queue and no batching: both trade latency for throughput.
  const worker = { concurrentJobs: setting('CONCURRENCY', 10), logger }
  const latencies = []
  await run({ preset: { worker }, pgPool, taskList: { stamp: ({ us }) => { latencies.push(now() - us) } } })
  await sleep(1000)
  say('ready')
  while (latencies.length < numbers[0]) await sleep(10)
  say(JSON.stringify(latencies))
} else {
  await paced(...numbers, () => utils.addJob('stamp', { us: now() }))
}
process.exit(0) // without waiting for a shutdown that is not measured
