-- Ending attempts. Everything that takes a job away from its claim goes through settle.

-- The default delay before attempt + 1: between half and the whole of 1 s * 2^(attempt - 1), at most
-- an hour. The same formula as RetryPolicy::default in Rust.
create or replace function backoff(attempt int) returns interval
language sql volatile set search_path from current as $$
  select make_interval(secs => least(power(2, least(backoff.attempt, 30) - 1), 3600) * (0.5 + random() / 2))
$$;

-- Move live rows into history, addressed by (tid, id, token); token null means a job that no one runs.
-- Of a row that asks for another attempt, only what may not have one is finished here: cancelled
-- meanwhile, out of attempts, or lost too often. Returns the ids that were finished.
create or replace function finish(
  tids tid[], ids bigint[], tokens bigint[], outcomes text[], results text[], errors text[],
  ages_ms float8[], snapshots text[], versions bigint[],
  out done bigint[]
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
begin
  with gone as (
    delete from jobs j
    using unnest(finish.tids, finish.ids, finish.tokens, finish.outcomes, finish.results, finish.errors,
      finish.ages_ms, finish.snapshots, finish.versions)
      e(tid, id, token, outcome, result, error, age_ms, snapshot, version)
    where j.ctid = e.tid and j.id = e.id and j.token is not distinct from e.token
      and (e.outcome in ('completed', 'failed', 'cancelled')
        or j.cancelled_at is not null
        or e.outcome in ('retry', 'lost') and j.attempt >= j.max_attempts
        or e.outcome = 'lost' and j.losses >= 2)
    returning j.*, e.outcome, e.result, e.error as new_error, e.age_ms, e.snapshot, e.version
  ), kept as (
    insert into finished_jobs (id, queue, kind, state, payload, result, error, priority, expected_at, run_at,
      attempt, max_attempts, losses, timeout, cursor_key, cursor_snapshot, cursor_version, headers,
      created_at, started_at, finished_at)
    select g.id, g.queue, g.kind,
      case when g.outcome in ('completed', 'failed', 'cancelled') then g.outcome
        when g.cancelled_at is not null then 'cancelled'
        when g.outcome = 'retry' then 'failed' else 'lost' end::outcome,
      g.payload, g.result::json, coalesce(g.new_error, g.error), g.priority, g.expected_at, g.run_at,
      g.attempt, g.max_attempts, g.losses + (g.outcome = 'lost')::int, g.timeout,
      g.cursor_key, g.snapshot::json, g.version, g.headers, g.created_at,
      coalesce(clock_timestamp() - make_interval(secs => g.age_ms / 1000), g.started_at), clock_timestamp()
    from gone g
    returning id
  )
  select array_agg(k.id) into done from kept k;
end $$;

-- Put live rows back for another attempt: 'retry' and 'snooze' after their delay, 'release' (given back
-- unharmed) and 'lost' (the node died) at once. Snooze and release do not cost an attempt. A row of a
-- cursor that may run at once goes to the mailbox; pass_on picks the head.
create or replace function put_back(
  tids tid[], ids bigint[], tokens bigint[], outcomes text[], errors text[], delays_ms float8[],
  out done bigint[], out queues text[]
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
begin
  with back as (
    update jobs j set
      token = null, started_at = null, pos = nextval('line'),
      attempt = j.attempt - (e.outcome in ('snooze', 'release'))::int,
      losses = case e.outcome when 'lost' then j.losses + 1 when 'release' then j.losses else 0 end,
      error = coalesce(e.error, j.error),
      run_at = case when e.outcome in ('release', 'lost') then j.run_at
        else clock_timestamp() + coalesce(make_interval(secs => e.delay_ms / 1000), backoff(j.attempt)) end,
      stage = case
        when e.outcome in ('retry', 'snooze') and e.delay_ms is distinct from 0 then 'scheduled'
        when j.cursor_key is not null then 'blocked'
        when e.outcome = 'lost' or e.outcome = 'release' and j.losses > 0 then 'suspect'
        else 'ready' end::stage
    from unnest(put_back.tids, put_back.ids, put_back.tokens, put_back.outcomes, put_back.errors, put_back.delays_ms)
      e(tid, id, token, outcome, error, delay_ms)
    where j.ctid = e.tid and j.id = e.id and j.token = e.token
      and e.outcome in ('retry', 'snooze', 'release', 'lost')
    returning j.id, j.queue
  )
  select array_agg(b.id), array_agg(distinct b.queue) into done, queues from back b;
end $$;

-- Before a settle touches jobs: lock the cursors that they belong to. Per attempt (null where the job
-- has no cursor, or the token is stale): its cursor, and the version that its completion produces.
create or replace function lock_cursors(
  ids bigint[], tokens bigint[], outcomes text[], out queues text[], out keys text[], out versions bigint[]
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
begin
  perform from (
      select distinct j.queue, j.cursor_key
      from unnest(lock_cursors.ids, lock_cursors.tokens) e(id, token)
      join jobs j on j.id = e.id and j.token = e.token where j.cursor_key is not null
    ) k join cursors c on c.queue = k.queue and c.key = k.cursor_key
    order by c.queue, c.key for update of c;
  select array_agg(e.queue order by e.n), array_agg(e.key order by e.n), array_agg(e.version order by e.n)
    into queues, keys, versions
    from (
      select e.n, c.queue, c.key, case when e.outcome = 'completed' and c.owner = e.token then
        c.version + count(*) filter (where e.outcome = 'completed') over (partition by c.queue, c.key order by e.n)
        end as version
      from unnest(lock_cursors.ids, lock_cursors.tokens, lock_cursors.outcomes) with ordinality e(id, token, outcome, n)
      left join jobs j on j.id = e.id and j.token = e.token
      left join cursors c on c.queue = j.queue and c.key = j.cursor_key
    ) e;
end $$;

-- After a settle moved the jobs: the new state and version, no owner, held if a job of it retries.
create or replace function let_go(
  queues text[], keys text[], ids bigint[], tokens bigint[], versions bigint[], outcomes text[], new_states text[]
) returns void
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
begin
  update cursors c set
    owner = null,
    version = coalesce(r.version, c.version),
    state = coalesce(r.state::json, c.state),
    hold = (select j.id from jobs j where j.id = any(r.again) limit 1)
  from (
    select e.queue, e.key, e.token, max(e.version) as version,
      (array_agg(e.new_state order by e.n desc) filter (where e.outcome = 'completed' and e.new_state is not null))[1] as state,
      array_agg(e.id) filter (where e.outcome in ('retry', 'snooze')) as again
    from unnest(let_go.queues, let_go.keys, let_go.ids, let_go.tokens, let_go.versions, let_go.outcomes, let_go.new_states)
      with ordinality e(queue, key, id, token, version, outcome, new_state, n)
    where e.key is not null
    group by e.queue, e.key, e.token
  ) r
  where c.queue = r.queue and c.key = r.key and c.owner = r.token;
end $$;

-- Record how attempts ended, as parallel arrays with an entry an attempt. Returns the ids that were
-- refused: their token is not valid any more, the lease was lost and somebody else decides.
--   outcomes    completed, failed, cancelled: into history; retry, snooze: again after delays_ms (null:
--               backoff); release: again at once and not counted; lost: as the reaper does
--   ages_ms     how long ago the attempt started
--   snapshots   the cursor's state that the job began with
--   new_states  the cursor's state after the job (SQL null keeps the old one, JSON null is a state)
create or replace function settle(
  tids tid[], ids bigint[], tokens bigint[], outcomes text[], results text[], errors text[],
  delays_ms float8[], ages_ms float8[], snapshots text[], new_states text[]
) returns bigint[]
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  hints tid[] := settle.tids;
  cursors record;
  with_cursors boolean;
  back record;
  queues text[];
  done bigint[] := '{}';
begin
  perform require_read_committed();
  with_cursors := exists (select from claims c where c.token = any(settle.tokens) and c.has_cursors);
  select null::text[] as queues, null::text[] as keys, null::bigint[] as versions into cursors;
  if with_cursors then
    cursors := lock_cursors(settle.ids, settle.tokens, settle.outcomes);
  end if;

  for round in 1 .. 2 loop
    done := done || finish(hints, settle.ids, settle.tokens, settle.outcomes, settle.results, settle.errors,
      settle.ages_ms, settle.snapshots, cursors.versions);
    if settle.outcomes && '{retry,snooze,release,lost}' then
      back := put_back(hints, settle.ids, settle.tokens, settle.outcomes, settle.errors, settle.delays_ms);
      done := done || back.done;
      queues := queues || back.queues;
    end if;
    exit when cardinality(done) = cardinality(settle.ids);
    -- Hints age when a row is edited while it runs: find the rest by id, once.
    hints := array(select j.ctid from unnest(settle.ids, settle.tokens) with ordinality e(id, token, n)
      left join jobs j on j.id = e.id and j.token = e.token order by e.n);
  end loop;

  if with_cursors then
    perform let_go(cursors.queues, cursors.keys, settle.ids, settle.tokens, cursors.versions, settle.outcomes, settle.new_states);
    perform pass_on(cursors.queues, cursors.keys);
    queues := queues || cursors.queues;
  end if;
  update claims c set open = c.open - e.n
    from (select u.token, count(*) as n from unnest(settle.ids, settle.tokens) u(id, token)
      where cardinality(done) = cardinality(settle.ids) or u.id = any(done) group by u.token) e
    where c.token = e.token;
  delete from claims c where c.token = any(settle.tokens) and c.open <= 0;
  delete from leases l where l.id = any(settle.tokens) and not exists (select from claims c where c.lease = l.id);
  perform wake(q) from (select distinct q from unnest(queues) q where q is not null) w(q);
  if cardinality(done) < cardinality(settle.ids) then
    return array(select i from unnest(settle.ids) i where not i = any(done));
  end if;
  return '{}';
end $$;

-- The same for one attempt, for SQL consumers; a stale token is an error.
create or replace function settle(
  id bigint, token bigint, outcome text default 'completed', result json default null, error text default null,
  delay interval default null, new_state json default null
) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  if not settle.outcome in ('completed', 'failed', 'cancelled', 'retry', 'snooze', 'release') then
    raise exception 'pgcue: outcome % is none of completed, failed, cancelled, retry, snooze, release', settle.outcome
      using errcode = 'invalid_parameter_value';
  end if;
  if settle(array[(select j.ctid from jobs j where j.id = settle.id)], array[settle.id], array[settle.token],
      array[settle.outcome], array[settle.result::text], array[settle.error],
      array[(extract(epoch from settle.delay) * 1000)::float8], array[null::float8],
      array[(select c.state::text from jobs j join cursors c on c.queue = j.queue and c.key = j.cursor_key where j.id = settle.id)],
      array[settle.new_state::text]) <> '{}' then
    raise exception 'pgcue: job % is not running under this token', settle.id
      using hint = 'Its lease ran out, or it was settled before. Nothing was changed.';
  end if;
end $$;
