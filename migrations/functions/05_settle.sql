-- Ending attempts. Everything that takes a job away from its claim goes through settle.

-- The default delay before attempt + 1: between half and the whole of 1 s * 2^(attempt - 1), at most
-- an hour. The same formula as RetryPolicy::default in Rust.
create or replace function backoff(attempt int) returns interval
language sql volatile set search_path from current as $$
  select make_interval(secs => least(power(2, greatest(least(backoff.attempt, 30), 1) - 1), 3600) * (0.5 + random() / 2))
$$;

-- Move live rows into history: those at tids that have an id and its token; token null means a job that no one runs.
-- Those that completed in a queue that keeps no history are deleted, which is cheaper. Of a row that asks for another
-- attempt, only what may not have one is finished here: cancelled meanwhile, out of attempts, or lost too often. Returns
-- the ids that were finished, and of these the failures that halt their cursor.
create or replace function finish(
  tids tid[], ids bigint[], tokens bigint[], outcomes text[], results text[], errors text[],
  ages_ms float8[], snapshots text[], versions bigint[],
  out done bigint[], out done_tokens bigint[], out halts bigint[], out halt_queues text[], out halt_keys text[]
)
-- One scan of all places and a hash join: a nested loop would begin a scan for each. Without indexes: when vacuum has
-- seen the table empty, a plan would walk through a whole one, and compare each row with all places.
language plpgsql set enable_nestloop = off set enable_hashjoin = on set enable_indexscan = off as $$
#variable_conflict use_column
declare
  ended timestamptz := clock_timestamp();
  forgetful text[] := array(select q.name from queues q where q.history_from > ended);
  forgotten bigint[];
  forgotten_tokens bigint[];
begin
  if forgetful <> '{}' then
    with gone as (
      delete from jobs j
      using unnest(finish.ids, finish.tokens, finish.outcomes) e(id, token, outcome)
      where j.ctid = any(finish.tids) and j.id = e.id and j.token is not distinct from e.token
        and e.outcome = 'completed' and j.queue = any(forgetful)
      returning j.id, j.token
    )
    select array_agg(g.id), array_agg(g.token) into done, done_tokens from gone g;
    if cardinality(done) = cardinality(finish.ids) then
      return;
    end if;
    forgotten := done;
    forgotten_tokens := done_tokens;
  end if;
  with gone as (
    delete from jobs j
    using unnest(finish.ids, finish.tokens, finish.outcomes, finish.results, finish.errors, finish.ages_ms,
      finish.snapshots, finish.versions) e(id, token, outcome, result, error, age_ms, snapshot, version)
    where j.ctid = any(finish.tids) and j.id = e.id and j.token is not distinct from e.token
      and (e.outcome in ('completed', 'failed', 'cancelled')
        or j.cancelled_at is not null
        or e.outcome in ('retry', 'lost') and j.attempt >= j.max_attempts
        or e.outcome = 'lost' and j.losses >= 2)
    returning j.id, j.token, j.queue, j.kind, j.payload, j.priority, j.expected_at, j.run_at, j.attempt, j.max_attempts,
      j.losses + (e.outcome = 'lost')::int as losses, j.timeout, j.cursor_key, j.headers, j.created_at, j.on_failure,
      coalesce(ended - make_interval(secs => e.age_ms / 1000), j.started_at) as started_at,
      e.result, coalesce(e.error, j.error) as error, e.snapshot, e.version,
      case when e.outcome = 'completed' then 'completed'::outcome when e.outcome = 'failed' then 'failed'
        when e.outcome = 'cancelled' or j.cancelled_at is not null then 'cancelled'
        when e.outcome = 'retry' then 'failed' else 'lost' end as state
  ), kept as (
    insert into finished_jobs (id, queue, kind, state, payload, result, error, priority, expected_at, run_at,
      attempt, max_attempts, losses, timeout, cursor_key, cursor_snapshot, cursor_version, headers,
      created_at, started_at, finished_at)
    select g.id, g.queue, g.kind, g.state, g.payload, g.result::json, g.error, g.priority, g.expected_at, g.run_at,
      g.attempt, g.max_attempts, g.losses, g.timeout, g.cursor_key, g.snapshot::json, g.version, g.headers,
      g.created_at, g.started_at, ended
    from gone g
  )
  select array_agg(g.id), array_agg(g.token), array_agg(g.id) filter (where g.halts), array_agg(g.queue) filter (where g.halts),
      array_agg(g.cursor_key) filter (where g.halts)
    into done, done_tokens, halts, halt_queues, halt_keys
    from (
      select g.id, g.token, g.queue, g.cursor_key, g.on_failure = 'halt' and g.state in ('failed', 'lost') as halts from gone g
    ) g;
  done := forgotten || done;
  done_tokens := forgotten_tokens || done_tokens;
end $$;

-- Put live rows back for another attempt: 'retry' and 'snooze' after their delay, 'release' (given back
-- unharmed) and 'lost' (the node died) at once. Snooze and release do not cost an attempt. A row of a
-- cursor that may run at once goes to the mailbox; pass_on picks the head.
create or replace function put_back(
  tids tid[], ids bigint[], tokens bigint[], outcomes text[], errors text[], delays_ms float8[],
  out done bigint[], out done_tokens bigint[], out queues text[], out later text[]
)
language plpgsql as $$
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
    where j.ctid = e.tid and j.id is not distinct from e.id and j.token = e.token
      and e.outcome in ('retry', 'snooze', 'release', 'lost')
    returning j.id, e.token, j.queue, j.stage
  )
  select array_agg(b.id), array_agg(b.token), array_agg(distinct b.queue) filter (where b.stage <> 'scheduled'),
      array_agg(distinct b.queue) filter (where b.stage = 'scheduled')
    into done, done_tokens, queues, later from back b;
end $$;

-- The first step of a settle: let go of the cursors, each with the state and version that its run made.
-- Fenced: only the claim that owns the cursor, at the version where its run began. Which job holds the
-- cursor from now on: the one that this run says, or the one that held it before if it is given back.
create or replace function let_go(
  ids bigint[], outcomes text[], queues text[], keys text[], tokens bigint[], versions bigint[], new_versions bigint[],
  states text[], holds bigint[], whole boolean[]
) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  moved int;
begin
  loop
    update cursors c set
      owner = null,
      turn = case when r.whole then c.turn else c.turn + 1 end,
      version = r.new_version,
      state = coalesce(r.state::json, c.state),
      hold = case
        when r.hold is not null then r.hold
        when c.hold is not null and exists (select from unnest(let_go.ids, let_go.outcomes) e(id, outcome)
          where e.id = c.hold and e.outcome in ('release', 'lost')) then c.hold end,
      mark = case when r.whole then c.next_mark else c.mark end
    from (
      select c.tid, r.*
      from unnest(let_go.queues, let_go.keys, let_go.tokens, let_go.versions, let_go.new_versions, let_go.states,
        let_go.holds, let_go.whole) r(queue, key, token, version, new_version, state, hold, whole)
      cross join lateral (
        select c.ctid as tid from cursors c where c.queue = r.queue and c.key = r.key order by c.turn desc limit 1
      ) c
      order by r.queue, r.key
    ) r
    where c.ctid = r.tid and c.owner = r.token and c.version = r.version;
    get diagnostics moved = row_count;
    -- A row that was changed at this instant (parking moved its mark, an operator halted it) is elsewhere now.
    exit when moved = cardinality(let_go.keys) or not exists (
      select from unnest(let_go.queues, let_go.keys, let_go.tokens, let_go.versions) r(queue, key, token, version)
      cross join lateral (
        select c.owner, c.version from cursors c
        where c.queue = r.queue and c.key = r.key order by c.turn desc limit 1
      ) c
      where c.owner = r.token and c.version = r.version);
  end loop;
end $$;

-- Record how attempts ended, as parallel arrays with an entry an attempt, and what became of the cursors
-- that they ran under, with an entry a run. A run is settled whole, jobs in order. Returns the places
-- (from 1) of those that were refused: their token is not valid any more, the lease was lost and somebody
-- else decides. A node that lost its lease may settle a job twice in one call, under an old and a new token. All but
-- the first four may be empty or null, where there is nothing to say.
--   outcomes     completed, failed, cancelled: into history; retry, snooze: again after delays_ms (null:
--                backoff); release: again at once and not counted; lost: as the reaper does
--   ages_ms      how long ago the attempt started
--   snapshots    the cursor's state that the job began with
--   versions     the cursor's version that the job produced: one more for each job that completed, or that
--                failed or was cancelled and left a state
--   run_versions, run_new_versions   the cursor's version before and after the run
--   run_states   the state that the run leaves (SQL null keeps the old one, JSON null is a state)
--   run_holds    the job that holds the cursor until its next attempt
--   run_whole    true if every job of the run is finished
create or replace function settle(
  tids tid[], ids bigint[], tokens bigint[], outcomes text[], results text[], errors text[],
  delays_ms float8[], ages_ms float8[], snapshots text[], versions bigint[],
  run_queues text[] default null, run_keys text[] default null, run_tokens bigint[] default null,
  run_versions bigint[] default null, run_new_versions bigint[] default null,
  run_states text[] default null, run_holds bigint[] default null, run_whole boolean[] default null
) returns bigint[]
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  hints tid[] := settle.tids;
  attempts int := cardinality(settle.ids);
  runs int := cardinality(settle.run_keys);
  with_cursors boolean := coalesce(runs > 0, false);
  finished record;
  back record;
  queues text[];
  later text[];
  done bigint[] := '{}';
  done_tokens bigint[] := '{}';
  spent bigint[]; -- tokens of claims of which nothing runs any more
begin
  if (current_setting('transaction_isolation') = 'read committed' and cardinality(settle.tids) = attempts
      and cardinality(settle.tokens) = attempts and cardinality(settle.outcomes) = attempts) is not true then
    perform require_read_committed();
    perform refuse('ids', coalesce(attempts::text || ' long', 'null'),
      'tids, ids, tokens and outcomes of one length');
  end if;
  if with_cursors and (cardinality(settle.run_queues) = runs and cardinality(settle.run_tokens) = runs
      and cardinality(settle.run_versions) = runs and cardinality(settle.run_new_versions) = runs
      and array_position(settle.run_new_versions, null) is null) is not true then
    perform refuse('run_keys', runs || ' long',
      'run_queues, run_keys, run_tokens, run_versions and run_new_versions of one length, without nulls');
  end if;
  if with_cursors then
    perform let_go(settle.ids, settle.outcomes, settle.run_queues, settle.run_keys, settle.run_tokens,
      settle.run_versions, settle.run_new_versions, settle.run_states, settle.run_holds, settle.run_whole);
  end if;

  for round in 1 .. 2 loop
    finished := finish(hints, settle.ids, settle.tokens, settle.outcomes, settle.results, settle.errors,
      settle.ages_ms, settle.snapshots, settle.versions);
    done := done || finished.done;
    done_tokens := done_tokens || finished.done_tokens;
    if with_cursors then
      perform from unnest(settle.run_holds) h(id) where h.id = any(finished.done);
      if found or settle.outcomes && '{release,lost}' or finished.halts is not null then
        -- A hold ends with its job; a failure may halt.
        update cursors c set
          hold = case when c.hold = any(finished.done) then null else c.hold end,
          halted_at = case when r.halts is null then c.halted_at else coalesce(c.halted_at, clock_timestamp()) end,
          halted_by = case when c.halted_at is null then r.halts else c.halted_by end
        from (
          select c.tid, (
            select h.id from unnest(finished.halts, finished.halt_queues, finished.halt_keys) h(id, queue, key)
            where h.queue = r.queue and h.key = r.key limit 1) as halts
          from unnest(settle.run_queues, settle.run_keys) r(queue, key)
          cross join lateral (
            select c.ctid as tid from cursors c where c.queue = r.queue and c.key = r.key order by c.turn desc limit 1
          ) c
        ) r
        where c.ctid = r.tid and (r.halts is not null or c.hold = any(finished.done));
      end if;
    end if;
    if settle.outcomes && '{retry,snooze,release,lost}' then
      back := put_back(hints, settle.ids, settle.tokens, settle.outcomes, settle.errors, settle.delays_ms);
      done := done || back.done;
      done_tokens := done_tokens || back.done_tokens;
      queues := queues || back.queues;
      later := later || back.later;
    end if;
    exit when cardinality(done) = cardinality(settle.ids);
    -- Hints age when a row is edited while it runs: find the rest by id, once.
    hints := array(select j.ctid from unnest(settle.ids, settle.tokens) with ordinality e(id, token, n)
      left join jobs j on j.id = e.id and j.token = e.token order by e.n);
  end loop;

  if with_cursors then
    perform pass_on(settle.run_queues, settle.run_keys);
    queues := queues || settle.run_queues;
  end if;
  with counted as (
    update claims c set open = c.open - (select count(*) from unnest(done_tokens) d(token) where d.token = c.token)
      where c.token = any(done_tokens) -- and no join: there the planner may walk through all claims instead
      returning c.token, c.open
  )
  select array_agg(c.token) into spent from counted c where c.open <= 0;
  if spent is not null then
    delete from claims c where c.token = any(spent);
    delete from leases l where l.id = any(spent) and not exists (select from claims c where c.lease = l.id);
  end if;
  if queues is not null then
    perform wake(q) from (select distinct q from unnest(queues) q where q is not null) w(q);
  end if;
  if later is not null then
    perform wake(q, 'due') from (select distinct q from unnest(later) q) w(q);
  end if;
  if cardinality(done) < cardinality(settle.ids) then
    return array(
      select e.n from unnest(settle.ids, settle.tokens) with ordinality e(id, token, n)
      where (e.id, e.token) not in (select d.id, d.token from unnest(done, done_tokens) d(id, token)));
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
declare
  job record;
  refused bigint[];
begin
  if settle.outcome in ('completed', 'failed', 'cancelled', 'retry', 'snooze', 'release') is not true then
    perform refuse('outcome', settle.outcome, 'completed, failed, cancelled, retry, snooze or release');
  end if;
  if not settle.delay between interval '0' and interval '1000 years' then
    perform refuse('delay', settle.delay::text, '0 to 1000 years');
  end if;
  select j.ctid as tid, j.on_retry, c.queue, c.key, c.state::text, c.version, c.version as new_version,
      null::bigint as hold into job
    from jobs j
    left join lateral (
      select * from cursors c where c.queue = j.queue and c.key = j.cursor_key order by c.turn desc limit 1
    ) c on true
    where j.id = settle.id and j.token = settle.token;
  if settle.outcome = 'completed' or settle.outcome in ('failed', 'cancelled') and settle.new_state is not null then
    job.new_version := job.version + 1;
  end if;
  if settle.outcome in ('retry', 'snooze') and job.on_retry is distinct from 'pass' then
    job.hold := settle.id;
  end if;
  refused := settle(array[job.tid], array[settle.id], array[settle.token], array[settle.outcome],
    array[settle.result::text], array[settle.error], array[(extract(epoch from settle.delay) * 1000)::float8],
    array[null::float8], array[job.state], array[nullif(job.new_version, job.version)],
    array_remove(array[job.queue], null), array_remove(array[job.key], null), array[settle.token],
    array[job.version], array[job.new_version],
    array[case when job.new_version > job.version then settle.new_state::text end], array[job.hold],
    array[settle.outcome in ('completed', 'failed', 'cancelled')]);
  if refused <> '{}' then
    raise exception 'pgcue: job % is not running under this token', settle.id
      using hint = 'Its lease ran out, or it was settled before. Nothing was changed.';
  end if;
end $$;
