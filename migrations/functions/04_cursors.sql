-- Cursors: one owner at a time, jobs in order, no job left without somebody who will look at it.
-- Lock order everywhere: cursor rows by key, then jobs.
--
-- A cursor is free if nobody owns it and it is not halted. The head of its mailbox is the job that must
-- run next: a held job, else the first by priority, expected_at and id. The head of a free cursor stands
-- in the line; other jobs that a claim meets there are parked (blocked) until the cursor lets go.

-- The first claimable jobs of free cursors, as runs: what a claim does with candidates that have a cursor.
-- A run follows the order of the mailbox and ends before a kind that the claimer lacks and before a row
-- that another transaction holds. Suspects are left to claims of a suspect, which take only the head.
-- When few cursors are met, runs may be four times as long. Cursors are evaluated one by one until there
-- is no room, so that no more rows are locked than needed. rest: cursors that were met and gave nothing.
create or replace function take_runs(
  token bigint, queue text, kinds text[], cutoff timestamptz, keys text[], suspect boolean,
  room int, run_length int,
  out run_tids tid[], out ids bigint[], out owned text[], out rest text[], out no_room text[]
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cursors int := cardinality(array(select distinct unnest(take_runs.keys)));
  longest int := case when take_runs.suspect or take_runs.run_length <= 1 then 1 else
    greatest(take_runs.run_length, least(take_runs.room / cursors, take_runs.run_length * 4)) end;
  horizon bigint := (select last_value from horizon); -- before any mailbox is read
begin
  with met as materialized (
    select k.key, min(k.n) as n from unnest(take_runs.keys) with ordinality k(key, n) group by k.key
  ), mine as materialized (
    select m.n, m.key, c.tid as cursor_tid, c.hold, b.step, b.tid, b.id, b.place, b.kind, b.run_at, b.losses
    from (select * from met order by n) m
    cross join lateral (
      select c.ctid as tid, c.hold, c.mark
      from cursors c
      where c.queue = take_runs.queue and c.key = m.key and c.owner is null and c.halted_at is null
      for update skip locked
    ) c
    cross join lateral (
      select row_number() over () as step, w.tid, w.id, row(w.rank, w.expected_at, w.id)::place as place,
        w.kind, w.run_at, w.losses
      from (
        (select h.ctid as tid, h.id, -(h.priority::int) as rank, h.expected_at, h.kind, h.run_at, h.losses
          from jobs h where h.id = c.hold)
        union all
        (select j.ctid, j.id, -(j.priority::int), j.expected_at, j.kind, j.run_at, j.losses
          from jobs j
          where j.queue = take_runs.queue and j.cursor_key = m.key and j.stage <> 'scheduled'
            and (-(j.priority::int), j.expected_at) < ((c.mark).rank, (c.mark).expected_at)
            and j.id is distinct from c.hold
          order by -(j.priority::int), j.expected_at, j.id limit longest)
        union all
        (select j.ctid, j.id, -(j.priority::int), j.expected_at, j.kind, j.run_at, j.losses
          from jobs j
          where j.queue = take_runs.queue and j.cursor_key = m.key and j.stage <> 'scheduled'
            and (-(j.priority::int), j.expected_at, j.id) >= ((c.mark).rank, (c.mark).expected_at, (c.mark).id)
            and j.id is distinct from c.hold
          order by -(j.priority::int), j.expected_at, j.id limit longest)
        limit longest
      ) w
    ) b
    limit take_runs.room
  ), free as materialized (
    select j.ctid as tid from mine m join jobs j on j.ctid = m.tid
    where j.token is null and j.stage <> 'scheduled' for update of j skip locked
  ), judged as materialized (
    select m.*, bool_and(m.tid in (select f.tid from free f) and m.run_at <= take_runs.cutoff
        and coalesce(m.kind = any(take_runs.kinds), true)
        and case when take_runs.suspect then m.step = 1 else m.losses = 0 end)
      over (partition by m.n order by m.step) as runs
    from mine m
  ), owner as (
    update cursors c set owner = take_runs.token, turn = c.turn + 1,
      -- The jobs behind a held one may stand before it.
      next_mark = case when r.hold is null
        then greatest(c.mark, row((r.last).rank, (r.last).expected_at, least((r.last).id, horizon))::place)
        else c.mark end
    from (
      select j.cursor_tid, j.hold, (array_agg(j.place order by j.step desc))[1] as last
      from judged j where j.runs group by j.cursor_tid, j.hold
    ) r
    where c.ctid = r.cursor_tid
    returning c.key
  ), reached as (
    select count(*) = take_runs.room as everything, max(m.n) as n from mine m
  )
  select
    (select array_agg(j.tid order by j.n, j.step) filter (where j.runs and j.key in (select o.key from owner o)) from judged j),
    (select array_agg(j.id order by j.n, j.step) filter (where j.runs and j.key in (select o.key from owner o)) from judged j),
    array_agg(m.key order by m.n) filter (where m.key in (select o.key from owner o)),
    array_agg(m.key order by m.key) filter (where m.key not in (select o.key from owner o) and (not r.everything or m.n <= r.n)),
    array_agg(m.key) filter (where m.key not in (select o.key from owner o) and r.everything and m.n > r.n)
    into run_tids, ids, owned, rest, no_room
    from met m cross join reached r;
end $$;

-- Park what was met and does not run now: the rest of cursors that are owned now, and everything but the
-- head of those that were met and gave nothing; at most max_jobs of them. Cursors that are locked this
-- instant are being let go of, or claimed: contended says to look again.
create or replace function park(
  queue text, tids tid[], keys text[], owned text[], rest text[], run_tids tid[], max_jobs int,
  out parked int, out contended boolean
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  with busy as materialized (
    select r.key, c.*
    from unnest(park.rest) r(key) cross join lateral (
      select c.ctid as tid, c.mark, c.owner is null and c.halted_at is null as free, c.hold
      from cursors c where c.queue = park.queue and c.key = r.key for update skip locked
    ) c
  ), heads as materialized (
    select b.key, h.id from busy b
    cross join lateral (
      (select j.id from jobs j where j.id = b.hold)
      union all
      (select j.id from jobs j where j.queue = park.queue and j.cursor_key = b.key and j.stage <> 'scheduled'
        order by -(j.priority::int), j.expected_at, j.id limit 1)
      limit 1
    ) h
    where b.free
  ), waiting as materialized (
    select j.ctid as tid, j.cursor_key as key, row(-(j.priority::int), j.expected_at, j.id)::place as place
    from unnest(park.tids, park.keys) t(tid, key) join jobs j on j.ctid = t.tid
    where (t.key in (select b.key from busy b) or t.key in (select unnest(park.owned)))
      and t.tid not in (select unnest(park.run_tids)) and j.id not in (select h.id from heads h)
      and j.stage in ('ready', 'suspect') and j.token is null
    limit park.max_jobs for update of j skip locked
  ), moved as (
    update jobs j set stage = 'blocked' from waiting w where j.ctid = w.tid returning 1
  ), lowered as (
    update cursors c set mark = row(-40000, '-infinity', 0), next_mark = row(-40000, '-infinity', 0)
    from (select b.tid from busy b join waiting w on w.key = b.key
      where (w.place).rank = (b.mark).rank and (w.place).expected_at = (b.mark).expected_at and (w.place).id < (b.mark).id
      group by b.tid) b
    where c.ctid = b.tid
  )
  select (select count(*) from moved), count(b.key) < coalesce(cardinality(park.rest), 0) or coalesce(bool_or(b.free and b.hold is null), false)
    into parked, contended from busy b;
end $$;

-- Both, for the candidates of a claim, of which it may park to_park. Cursors that do not exist are made
-- when they are first met.
create or replace function own_cursors(
  token bigint, queue text, kinds text[], cutoff timestamptz,
  inout tids tid[], in keys text[], in suspect boolean, in room int, in run_length int, inout to_park int,
  out ids bigint[], out owned text[], out no_room text[], out contended boolean
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  met record;
  runs record;
begin
  select array_agg(k.tid) as tids, array_agg(k.key) as keys into met
    from unnest(own_cursors.tids, own_cursors.keys) k(tid, key) where k.key is not null;
  contended := false;
  if room <= 0 then
    tids := null;
    no_room := met.keys;
    return;
  end if;
  runs := take_runs(own_cursors.token, own_cursors.queue, own_cursors.kinds, own_cursors.cutoff, met.keys,
    own_cursors.suspect, room, own_cursors.run_length);
  tids := runs.run_tids; ids := runs.ids; owned := runs.owned; no_room := runs.no_room;
  if runs.rest is not null then
    -- Only what is missing: ON CONFLICT alone would wait for running settles, and deadlock with them.
    insert into cursors (queue, key)
      select own_cursors.queue, r.key
      from unnest(runs.rest) r(key) left join lateral (
        select true as known from cursors c where c.queue = own_cursors.queue and c.key = r.key limit 1
      ) c on true
      where known is null order by r.key on conflict do nothing;
    room := room - coalesce(cardinality(ids), 0);
    if found and room > 0 then
      runs := take_runs(own_cursors.token, own_cursors.queue, own_cursors.kinds, own_cursors.cutoff, runs.rest,
        own_cursors.suspect, room, own_cursors.run_length);
      tids := tids || runs.run_tids; ids := ids || runs.ids; owned := owned || runs.owned;
      no_room := no_room || runs.no_room;
    end if;
  end if;
  if to_park > 0 and cardinality(met.tids) > coalesce(cardinality(tids), 0) or runs.rest is not null then
    select to_park - p.parked, p.contended into to_park, contended
      from park(own_cursors.queue, met.tids, met.keys, owned, runs.rest, tids, to_park) p;
  end if;
end $$;

-- Put the head of each free cursor's mailbox back in the line, at its end. Every path that removes or
-- moves a job of a cursor ends here, holding the cursor's row lock. A held cursor waits for its job.
create or replace function pass_on(queues text[], keys text[]) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  update jobs j
    set stage = case when j.losses > 0 then 'suspect' else 'ready' end::stage, pos = nextval('line')
    where j.id = any(array(
      select h.id
      from unnest(pass_on.queues, pass_on.keys) k(queue, key)
      cross join lateral (
        select c.hold, c.mark from cursors c
        where c.queue = k.queue and c.key = k.key and c.owner is null and c.halted_at is null limit 1
      ) c
      cross join lateral (
        (select m.id, m.token, m.stage from jobs m where m.id = c.hold)
        union all
        (select m.id, m.token, m.stage from jobs m
          where m.queue = k.queue and m.cursor_key = k.key and m.stage <> 'scheduled'
            and (-(m.priority::int), m.expected_at) < ((c.mark).rank, (c.mark).expected_at)
          order by -(m.priority::int), m.expected_at, m.id limit 1)
        union all
        (select m.id, m.token, m.stage from jobs m
          where m.queue = k.queue and m.cursor_key = k.key and m.stage <> 'scheduled'
            and (-(m.priority::int), m.expected_at, m.id) >= ((c.mark).rank, (c.mark).expected_at, (c.mark).id)
          order by -(m.priority::int), m.expected_at, m.id limit 1)
        limit 1
      ) h
      where h.token is null and h.stage <> 'scheduled'));
end $$;

-- Move the horizon: called with what the last call returned, by any number of nodes. An id is drawn by a
-- transaction that holds a lock on jobs already, so when the writers of that time have ended, no insert
-- with an id below the one that was seen then can appear any more.
create or replace function move_horizon(seen bigint, writers text[], out new_seen bigint, out new_writers text[])
language plpgsql set search_path from current as $$
begin
  new_seen := (select last_value from jobs_id_seq);
  new_writers := array(
    select distinct l.virtualtransaction from pg_locks l
    where l.locktype = 'relation' and l.relation = 'jobs'::regclass and l.mode = 'RowExclusiveLock'
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.virtualtransaction <> (select m.virtualtransaction from pg_locks m where m.pid = pg_backend_pid() limit 1));
  if seen > (select last_value from horizon) and not writers && new_writers then
    perform setval('horizon', seen);
  end if;
end $$;
