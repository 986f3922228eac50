-- Whether the tables keep what the protocol promises of them, and how to mend them where they do not.

-- What is wrong: a row an offender, up to a hundred of each rule. It is one statement, so it sees one
-- snapshot, and each rule holds in every snapshot, whatever nodes, producers and operators do meanwhile.
-- It takes no lock that anybody waits for. It reads all live jobs, all cursors and the whole history, and
-- like every long query it keeps vacuum from what died since it began.
--   token    the claim; of a lease that nobody ends, the lease
--   repair   what repair() can do about it; null if only a human can decide
create or replace function verify() returns table (
  rule text, queue text, job bigint, cursor_key text, token bigint, found text, repair text
)
language plpgsql stable set search_path from current set work_mem = '32MB' set jit = off
  set enable_nestloop = off -- statistics are stale; tables that are read whole are hashed or sorted
as $$
#variable_conflict use_column
begin
  return query
  with running as materialized (
    select j.id, j.queue, j.cursor_key as key, j.token from jobs j where j.token is not null
  ), heads as (
    select distinct on (j.queue, j.cursor_key) j.queue, j.cursor_key as key, j.id, j.stage
    from jobs j where j.cursor_key is not null and j.stage <> 'scheduled'
    order by j.queue, j.cursor_key, (-(j.priority::int)), j.expected_at, j.id
  ), held as materialized (
    select c.queue, c.key, c.hold as id, j.stage, j.queue = c.queue and j.cursor_key = c.key as is_its
    from cursors c left join jobs j on j.id = c.hold where c.hold is not null
  ), versions as (
    -- A cursor that was deleted and comes back counts from 1 again. So what ended before it was made fills
    -- gaps, but proves no fault. Nor does what ended in the first minute of the history's first day: what ended
    -- in the same settle may have gone with the day before. Nor what ended before the queue kept a history (again).
    select f.queue, f.cursor_key as key, f.id, f.cursor_version as version,
      f.finished_at >= k.made_at as counts,
      f.finished_at >= k.made_at
        and f.finished_at > date_trunc('day', min(f.finished_at) over (), 'UTC') + interval '1 min'
        and f.finished_at > coalesce(q.history_from, '-infinity') as inside
    from finished_jobs f join cursor_keys k on k.queue = f.queue and k.key = f.cursor_key
    left join queues q on q.name = f.queue
    where f.cursor_version is not null
  ), chain as materialized (
    select v.*, lag(v.version) over w as before, lag(v.id) over w as job_before,
      lag(v.counts) over w as counts_before, lag(v.inside) over w as inside_before
    from versions v window w as (partition by v.queue, v.key order by v.version, v.counts)
  ), offenders as (
    -- Jobs.
    select 'wrong stage' as rule, j.queue, j.id as job, j.cursor_key, j.token,
      format('is %s%s%s, and lost its node %s times', j.stage, case when j.token is not null then ' though it runs' end,
        case when j.cursor_key is null then ' without a cursor' end, j.losses) as found,
      'put in line' as repair
    from jobs j
    where j.stage = 'blocked' and j.cursor_key is null or j.stage = 'scheduled' and j.token is not null
      or j.stage = 'ready' and j.losses > 0 or j.stage = 'suspect' and j.losses = 0
    union all
    select 'impossible count', j.queue, j.id, j.cursor_key, j.token,
      format('has begun %s attempts and lost its node %s times', j.attempt, j.losses), null
    from jobs j
    where j.attempt < 0 or j.attempt = 0 and j.token is not null or j.losses not between 0 and 2
    union all
    select 'waits though cancelled', j.queue, j.id, j.cursor_key, null,
      format('was cancelled at %s, and would run again', j.cancelled_at), 'cancel'
    from jobs j where j.cancelled_at is not null and j.token is null
    union all
    select 'more than once', null, e.id, null, null, format('is %s, and %s', e.state, e.state_before), null
    from (
      select u.id, u.state, lag(u.id) over w as before, lag(u.state) over w as state_before
      from (select j.id, 'live' as state from jobs j union all select f.id, f.state::text from finished_jobs f) u
      window w as (order by u.id)
    ) e where e.id = e.before
    union all
    select 'lane that is not read', l.queue, null, null, null,
      format('%s jobs of priority %s are in no lane: nobody reads them', l.jobs, l.priority), 'add the lane'
    from (select j.queue, j.priority, count(*) as jobs from jobs j group by j.queue, j.priority) l
    where l.priority <> 0 and not exists (select from lanes k where k.queue = l.queue and k.priority = l.priority)
    union all
    select 'stands before its floor', j.queue, j.id, j.cursor_key, j.token,
      format('stands at %s, and reading begins behind %s', j.pos, f.pos), 'put in line'
    from jobs j join floors f on f.queue = j.queue and f.priority = j.priority
    where j.stage = 'ready' and j.expected_at = 'infinity' and j.pos <= f.pos
    -- Claims and leases.
    union all
    select 'runs without a claim', r.queue, r.id, r.key, r.token, 'no claim holds it: nobody would take it back', 'put back'
    from running r
    where not exists (select from claims k cross join unnest(k.ids) i(id) where k.token = r.token and i.id = r.id)
    union all
    select 'miscounted claim', k.queue, null, null, k.token,
      format('counts %s jobs, and %s run', k.open, coalesce(r.jobs, 0)), 'recount'
    from claims k left join (select r.token, count(*) as jobs from running r group by r.token) r on r.token = k.token
    where k.open is distinct from coalesce(r.jobs, 0)
    union all
    select 'claim without a lease', k.queue, null, null, k.token,
      format('lease %s is gone: nobody would take %s jobs back', k.lease, k.open), 'give back'
    from claims k where not exists (select from leases l where l.id = k.lease)
    union all
    select 'lease that nobody ends', null, null, null, l.id,
      format('node %s was last seen at %s; nodes that live would have taken its jobs back', l.node, l.seen_at), 'reap'
    from leases l
    where greatest(l.expires_at, pg_postmaster_start_time()) + 10 * l.ttl + interval '1 min' < now()
    -- Cursors.
    union all
    select 'stranded cursor', m.queue, coalesce(h.id, m.id), m.key, null, 'is the next of a free cursor, and not in the line',
      'pass on'
    from heads m
    left join cursors c on c.queue = m.queue and c.key = m.key
    left join held h on h.queue = m.queue and h.key = m.key and h.stage is not null
    where c.owner is null and c.halted_at is null and coalesce(h.stage, m.stage) = 'blocked'
    union all
    select 'parked before the mark', j.queue, j.id, j.cursor_key, null, 'stands where nobody reads the mailbox any more',
      'reset the mark'
    from jobs j join cursors c on c.queue = j.queue and c.key = j.cursor_key
    cross join lateral (select case when c.owner is null then c.mark else c.next_mark end as mark) m
    where j.stage = 'blocked' and j.token is null and j.id is distinct from c.hold
      and -(j.priority::int) = (m.mark).rank and j.expected_at = (m.mark).expected_at and j.id < (m.mark).id
    union all
    select 'owner without a job', c.queue, null, c.key, c.owner, 'its owner runs no job of it', 'let go'
    from cursors c
    where c.owner is not null
      and not exists (select from running r where r.queue = c.queue and r.key = c.key and r.token = c.owner)
    union all
    select 'runs without its cursor', r.queue, r.id, r.key, r.token,
      coalesce('claim ' || c.owner || ' owns the cursor', 'nobody owns the cursor'), 'put back'
    from running r left join cursors c on c.queue = r.queue and c.key = r.key
    where r.key is not null and c.owner is distinct from r.token
    union all
    select 'hold of a job that is gone', h.queue, h.id, h.key, null, 'holds the cursor, and is no live job of it', 'drop the hold'
    from held h where h.is_its is not true
    union all
    select 'cursor without its key', c.queue, null, c.key, null, 'could be made a second time', 'add the key'
    from cursors c where not exists (select from cursor_keys k where k.queue = c.queue and k.key = c.key)
    union all
    -- Without its state its jobs should not run before somebody has looked.
    select 'key without its cursor', k.queue, null, k.key, null,
      'its row and state are gone: insert it again, or delete the key to begin without a state', null
    from cursor_keys k where not exists (select from cursors c where c.queue = k.queue and c.key = k.key)
    union all
    select 'cursor twice', c.queue, null, c.key, null, format('has %s rows', count(*)), null
    from cursors c group by c.queue, c.key having count(*) > 1
    union all
    select 'version fork', v.queue, v.id, v.key, null, format('made version %s, as job %s did', v.version, v.job_before), null
    from chain v where v.version = v.before and v.counts and v.counts_before
    union all
    select 'version gap', v.queue, v.id, v.key, null,
      format('made version %s, and no job made %s', v.version, v.before + 1), null
    from chain v where v.version > v.before + 1 and v.counts and v.inside_before
    union all
    select 'version of another history', c.queue, null, c.key, null,
      format('is at version %s, and its history at %s', c.version,
        case when v.newest > c.version then v.newest else v.last end), null
    from cursors c join (
      select v.queue, v.key, max(v.version) as last, max(v.version) filter (where v.counts) as newest, bool_or(v.inside) as inside
      from chain v group by v.queue, v.key
    ) v on v.queue = c.queue and v.key = c.key
    where v.newest > c.version or v.inside and v.last < c.version
    -- What everything else stands on.
    union all
    select 'number that comes again', null, null, null, null,
      format('sequence %s is at %s, and %s is in use: setval it further', s.name, s.at, s.used), null
    from (
      select 'jobs_id_seq' as name, (select last_value from jobs_id_seq) as at,
        greatest((select max(j.id) from jobs j), (select max(f.id) from finished_jobs f)) as used
      union all
      select 'line', (select last_value from line), (select max(j.pos) from jobs j)
    ) s where s.used > s.at
    union all
    select 'history without a partition', null, null, null, null, format('%s (UTC) has none', d.day), 'make partitions'
    from (select (now() at time zone 'UTC')::date + n as day from generate_series(1, 2) n) d
    where not exists (
      select from pg_inherits i join pg_class p on p.oid = i.inhrelid
      where i.inhparent = 'finished_jobs'::regclass and p.relname = 'finished_jobs_' || to_char(d.day, 'YYYYMMDD'))
  )
  select o.rule, o.queue, o.job, o.cursor_key, o.token, o.found, o.repair
  from (select o.*, row_number() over (partition by o.rule) as n from offenders o) o where o.n <= 100;
end $$;

-- Mend one offender that verify() found. It locks the cursor, then the jobs, looks again, and acts only if
-- the offence is still there; then the cursor's next job is put in the line. True if it did something.
create or replace function repair(repair text, queue text, job bigint, cursor_key text, token bigint) returns boolean
language plpgsql set search_path from current set lock_timeout = '10s' as $$
#variable_conflict use_column
declare
  cursor cursors;
  done boolean := false;
  moved int := 0;
begin
  perform require_read_committed();
  if repair.cursor_key is not null then
    if exists (select from jobs j where j.queue = repair.queue and j.cursor_key = repair.cursor_key) then
      perform make_cursors(repair.queue, array[repair.cursor_key], true);
    end if;
    select * into cursor from cursors c
      where c.queue = repair.queue and c.key = repair.cursor_key order by c.turn desc limit 1 for update;
  end if;
  case repair.repair
  when 'put in line' then
    update jobs j set stage = case when j.losses > 0 then 'suspect' else 'ready' end::stage, pos = nextval('line')
      where j.id = repair.job and (j.stage = 'blocked' and j.cursor_key is null or j.stage = 'scheduled' and j.token is not null
        or j.stage = 'ready' and j.losses > 0 or j.stage = 'suspect' and j.losses = 0
        or j.stage = 'ready' and exists (
          select from floors f where f.queue = j.queue and f.priority = j.priority and f.pos >= j.pos));
    done := found;
  when 'cancel' then
    perform from jobs j where j.id = repair.job and j.cancelled_at is not null and j.token is null for update;
    done := found and cancel(repair.job) = 'cancelled';
  when 'add the lane' then
    insert into lanes (queue, priority)
      select distinct j.queue, j.priority from jobs j
      where j.queue = repair.queue and j.priority <> 0
        and not exists (select from lanes l where l.queue = j.queue and l.priority = j.priority);
    done := found;
  when 'put back' then
    -- A run is settled whole: with the job goes what runs of its cursor under the same token.
    with lost as materialized (
      select j.id, j.ctid as tid, j.token from jobs j
      where j.token = repair.token
        and (j.id = repair.job or j.queue = repair.queue and j.cursor_key = repair.cursor_key and j.stage <> 'scheduled')
        and (cursor.owner is distinct from j.token and j.cursor_key is not null
          or not exists (select from claims k where k.token = j.token and repair.job = any(k.ids)))
      for update of j
    ), lists as (
      select array_agg(l.tid) as tids, array_agg(l.id) as ids, array_agg(l.token) as tokens, count(*)::int as n from lost l
    )
    select coalesce(cardinality(b.done), 0) into moved
      from lists l cross join lateral put_back(l.tids, l.ids, l.tokens, array_fill('release'::text, array[l.n]), null, null) b;
    done := moved > 0;
    update claims k set open = k.open - moved where k.token = repair.token;
    delete from claims k where k.token = repair.token and k.open <= 0;
    update cursors c set owner = null, turn = c.turn + 1
      where done and c.queue = cursor.queue and c.key = cursor.key and c.owner = repair.token;
  when 'recount' then
    perform from claims k where k.token = repair.token for update;
    update claims k set open = r.jobs
      from (
        select count(j.id) as jobs from claims k cross join unnest(k.ids) i(id)
        left join jobs j on j.id = i.id and j.token = k.token where k.token = repair.token
      ) r
      where k.token = repair.token and k.open <> r.jobs;
    done := found;
    delete from claims k where k.token = repair.token and k.open = 0;
    delete from leases l where l.id = repair.token and not exists (select from claims k where k.lease = l.id);
  when 'give back' then
    perform from claims k where k.token = repair.token and not exists (select from leases l where l.id = k.lease);
    if found then
      done := (give_back(repair.token, 'release')).stuck = 0;
    end if;
  when 'reap' then
    perform reap();
    done := not exists (select from leases l where l.id = repair.token);
  when 'pass on' then
    done := cursor.key is not null and cursor.owner is null and cursor.halted_at is null and 'blocked' = (
      select h.stage from mailbox(cursor.queue, cursor.key, row(-40000, '-infinity', 0)::place, cursor.hold, 1) h); -- no mark is trusted
  when 'reset the mark' then
    update cursors c set mark = row(-40000, '-infinity', 0), next_mark = row(-40000, '-infinity', 0)
      where c.queue = cursor.queue and c.key = cursor.key and exists (
        select from jobs j where j.id = repair.job and j.stage = 'blocked'
          and j.id < greatest((cursor.mark).id, (cursor.next_mark).id));
    done := found;
  when 'let go' then
    update cursors c set owner = null, turn = c.turn + 1
      where c.queue = cursor.queue and c.key = cursor.key and c.owner = repair.token and not exists (
        select from jobs j where j.queue = c.queue and j.cursor_key = c.key and j.token = c.owner);
    done := found;
  when 'drop the hold' then
    update cursors c set hold = null
      where c.queue = cursor.queue and c.key = cursor.key and c.hold = repair.job and not exists (
        select from jobs j where j.id = c.hold and j.queue = c.queue and j.cursor_key = c.key);
    done := found;
  when 'add the key' then
    insert into cursor_keys (queue, key) select cursor.queue, cursor.key where cursor.key is not null on conflict do nothing;
    done := found;
  when 'make partitions' then
    done := coalesce(tend_history(0) >= 2, false);
  else
    raise exception 'pgcue: there is no repair %: give one that verify() names', repair.repair
      using errcode = 'invalid_parameter_value';
  end case;
  if done and repair.cursor_key is not null then
    perform pass_on(array[repair.queue], array[repair.cursor_key]);
  end if;
  if done and repair.queue is not null then
    perform wake(repair.queue);
  end if;
  return coalesce(done, false);
end $$;
