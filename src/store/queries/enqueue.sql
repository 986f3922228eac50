insert into pgcue.jobs
  (kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key, headers, on_retry, on_failure)
select e.kind, e.payload, e.queue, e.priority, coalesce(e.expected_at, 'infinity'),
  coalesce(e.run_at, clock_timestamp() + make_interval(secs => e.delay), now()), e.max_attempts,
  make_interval(secs => e.timeout), e.cursor_key, e.headers, e.on_retry::pgcue.on_retry, e.on_failure::pgcue.on_failure
from unnest($1::text[], $2::json[], $3::text[], $4::int2[], $5::timestamptz[], $6::timestamptz[], $7::float8[],
    $8::int2[], $9::float8[], $10::text[], $11::json[], $12::text[], $13::text[]) with ordinality
  e(kind, payload, queue, priority, expected_at, run_at, delay, max_attempts, timeout, cursor_key, headers,
    on_retry, on_failure, n)
order by e.n
returning id
