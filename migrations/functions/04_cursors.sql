-- Cursors: one owner at a time, jobs in order, no job left without somebody who will look at it.
-- Lock order everywhere: cursor rows by key, then jobs.
--
-- A cursor is free if nobody owns it and it is not halted. The head of its mailbox is the job that must
-- run next: a held job, else the first by priority, expected_at and id. The head of a free cursor stands
-- in the line; other jobs that a claim meets there are parked (blocked) until the cursor lets go.
--
-- The mark of a cursor says where its mailbox begins. It may pass an id only below the horizon: a job
-- with a smaller id whose transaction is still open would never be seen. Whatever enters a mailbox before
-- the mark otherwise (a promoted job, a parked one of an odd id) sets it back to the start.
--
-- A cursor is looked up by `cross join lateral (.. order by turn desc limit 1)`: its newest version, past
-- none of the dead ones, and once for each key (a plain join, planned when there were few cursors, would
-- read them all). It is locked by its ctid; a row that is not there any more changed at this instant.

-- The first jobs of a cursor's mailbox, in order: the one that holds it, if any, then from its mark on. Its callers have
-- `set search_path`, and their plans take it in. What may come before the mark is asked for in two parts: the scan of
-- an index does not end where (rank, expected_at) < (mark's) does, but walks over the whole mailbox.
create or replace function mailbox(queue text, key text, mark place, hold bigint, max_jobs int) returns table (
  tid tid, id bigint, rank int, expected_at timestamptz, kind text, run_at timestamptz, losses smallint, token bigint, stage stage
)
language sql stable as $$
  select * from (
    (select j.ctid, j.id, -(j.priority::int), j.expected_at, j.kind, j.run_at, j.losses, j.token, j.stage
      from jobs j where j.id = mailbox.hold)
    union all
    (select j.ctid, j.id, -(j.priority::int), j.expected_at, j.kind, j.run_at, j.losses, j.token, j.stage
      from jobs j
      where j.queue = mailbox.queue and j.cursor_key = mailbox.key and j.stage <> 'scheduled'
        and -(j.priority::int) < (mailbox.mark).rank and j.id is distinct from mailbox.hold
      order by -(j.priority::int), j.expected_at, j.id limit mailbox.max_jobs)
    union all
    (select j.ctid, j.id, -(j.priority::int), j.expected_at, j.kind, j.run_at, j.losses, j.token, j.stage
      from jobs j
      where j.queue = mailbox.queue and j.cursor_key = mailbox.key and j.stage <> 'scheduled'
        and -(j.priority::int) = (mailbox.mark).rank and j.expected_at < (mailbox.mark).expected_at
        and j.id is distinct from mailbox.hold
      order by j.expected_at, j.id limit mailbox.max_jobs)
    union all
    (select j.ctid, j.id, -(j.priority::int), j.expected_at, j.kind, j.run_at, j.losses, j.token, j.stage
      from jobs j
      where j.queue = mailbox.queue and j.cursor_key = mailbox.key and j.stage <> 'scheduled'
        and (-(j.priority::int), j.expected_at, j.id)
          >= ((mailbox.mark).rank, (mailbox.mark).expected_at, (mailbox.mark).id)
        and j.id is distinct from mailbox.hold
      order by -(j.priority::int), j.expected_at, j.id limit mailbox.max_jobs)
    limit mailbox.max_jobs
  ) m
$$;

-- The first claimable jobs of free cursors, as runs: what a claim does with candidates that have a cursor.
-- A run follows the order of the mailbox and ends before a kind that the claimer lacks and before a row
-- that another transaction holds. Suspects are left to claims of a suspect, which take only the head.
-- A run has up to run_length jobs; up to longest_run, when few cursors share the room. Cursors are
-- evaluated one by one until there is no room, so that no more rows are locked than needed: no_room.
-- rest: what was met and gave nothing.
create or replace function take_runs(
  token bigint, queue text, kinds text[], cutoff timestamptz, keys text[], suspect boolean,
  room int, run_length int, longest_run int,
  out run_tids tid[], out ids bigint[], out owned text[], out rest text[], out no_room text[]
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  longest int := case when take_runs.suspect then 1 else
    greatest(take_runs.run_length, least(take_runs.room / cardinality(take_runs.keys), take_runs.longest_run)) end;
  horizon bigint := (select last_value from horizon); -- before any mailbox is read
  taken record;
begin
  with mine as materialized (
    select m.n, c.tid as cursor_tid, c.hold, b.*
    from unnest(take_runs.keys) with ordinality m(key, n)
    cross join lateral (
      select c.ctid as tid from cursors c
      where c.queue = take_runs.queue and c.key = m.key order by c.turn desc limit 1
    ) newest
    cross join lateral (
      select c.ctid as tid, c.hold, c.mark from cursors c
      where c.ctid = newest.tid and c.owner is null and c.halted_at is null
      for update skip locked
    ) c
    cross join lateral (
      select row_number() over () as step, w.* from mailbox(take_runs.queue, m.key, c.mark, c.hold, longest) w
    ) b
    limit take_runs.room
  ), free as materialized (
    -- The ctid as it is now: an edit may have moved the row since it was read.
    select m.n, m.cursor_tid, m.hold, m.step, j.ctid as tid, m.id, m.rank, m.expected_at,
      m.run_at <= take_runs.cutoff and coalesce(m.kind = any(take_runs.kinds), true)
      and case when take_runs.suspect then m.step = 1 else m.losses = 0 end as fits
    from mine m join jobs j on j.ctid = m.tid
    where j.token is null and j.stage <> 'scheduled' for update of j skip locked
  ), sums as (
    select (select count(*) from mine) = count(*) filter (where f.fits) as all_fit from free f
  ), run as materialized (
    -- Without gaps: a run ends before the first row that is missing or does not fit.
    select f.n, f.cursor_tid, f.hold, f.step, f.tid, f.id, f.rank, f.expected_at
    from free f where (select all_fit from sums)
    union all
    select f.n, f.cursor_tid, f.hold, f.step, f.tid, f.id, f.rank, f.expected_at
    from (
      select f.*, row_number() over so_far as nth, bool_and(f.fits) over so_far as all_fit
      from free f window so_far as (partition by f.n order by f.step)
    ) f
    where not (select all_fit from sums) and f.nth = f.step and f.all_fit
  ), owner as (
    update cursors c set owner = take_runs.token, turn = c.turn + 1,
      -- The jobs behind a held one may stand before it.
      next_mark = case when r.hold is null
        then greatest(c.mark, row(r.rank, r.expected_at, least(r.id, horizon))::place)
        else c.mark end
    from (select distinct on (r.n) r.* from run r order by r.n, r.step desc) r
    where c.ctid = r.cursor_tid
    returning r.n
  )
  select
    array_agg(r.tid) filter (where r.n in (select o.n from owner o)) as tids,
    array_agg(r.id) filter (where r.n in (select o.n from owner o)) as ids,
    (select array_agg(o.n) from owner o) as owned,
    (select max(m.n)::int from mine m having count(*) = take_runs.room) as reached
    into taken from run r;
  run_tids := taken.tids;
  ids := taken.ids;
  owned := array(select keys[n] from unnest(taken.owned) n);
  if taken.reached is not null then
    no_room := take_runs.keys[taken.reached + 1 :];
  end if;
  rest := array(select m.key from unnest(take_runs.keys[: coalesce(taken.reached, cardinality(take_runs.keys))]) with ordinality m(key, n)
    where m.n not in (select unnest(taken.owned)) order by m.key);
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
    from unnest(park.rest) r(key)
    cross join lateral (
      select c.ctid as tid from cursors c
      where c.queue = park.queue and c.key = r.key order by c.turn desc limit 1
    ) newest
    cross join lateral (
      select c.ctid as tid, case when c.owner is null then c.mark else c.next_mark end as mark,
        c.owner is null and c.halted_at is null as free, c.hold
      from cursors c where c.ctid = newest.tid for update skip locked
    ) c
  ), early as materialized (
    -- Cursors of which something was met before the mark. By groups: a join would compare each with each.
    select distinct m.tid
    from (
      select max(c.tid) as tid, (array_agg(c.mark) filter (where c.tid is not null))[1] as mark, array_agg(c.met) as met
      from (
        select b.key, b.tid, b.mark, null::tid as met from busy b
        union all select t.key, null, null, t.tid from unnest(park.tids, park.keys) t(tid, key)
      ) c
      group by c.key
    ) m
    cross join lateral unnest(m.met) t(tid)
    join jobs j on j.ctid = t.tid
    where m.tid is not null
      and -(j.priority::int) = (m.mark).rank and j.expected_at = (m.mark).expected_at and j.id < (m.mark).id
  ), free as materialized (
    select b.key, b.hold, case when b.tid in (select e.tid from early e) then row(-40000, '-infinity', 0)::place else b.mark end as mark
    from busy b where b.free
  ), heads as materialized (
    select f.key, h.id from free f cross join lateral mailbox(park.queue, f.key, f.mark, f.hold, 1) h
  ), waiting as materialized (
    select j.ctid as tid from unnest(park.tids, park.keys) t(tid, key) join jobs j on j.ctid = t.tid
    where (t.key in (select b.key from busy b) or t.key in (select unnest(park.owned)))
      and t.tid not in (select unnest(park.run_tids)) and j.id not in (select h.id from heads h)
      and j.stage in ('ready', 'suspect') and j.token is null
      and j.collapse_key is null -- producers may lock it: see pass_on
    limit park.max_jobs for update of j skip locked
  ), moved as (
    update jobs j set stage = 'blocked' from waiting w where j.ctid = w.tid returning 1
  ), lowered as (
    update cursors c set mark = row(-40000, '-infinity', 0), next_mark = row(-40000, '-infinity', 0)
    from early e where c.ctid = e.tid
  )
  select (select count(*) from moved), count(b.key) < coalesce(cardinality(park.rest), 0) or coalesce(bool_or(b.free and b.hold is null), false)
    into parked, contended from busy b;
end $$;

-- Make the cursors that do not exist. Whoever makes one holds an advisory lock for its like (a 64th of the
-- keys), so that no claim ever waits for another one's cursors: it makes those that it can lock at once.
-- Operators wait. Returns how many were made.
create or replace function make_cursors(queue text, keys text[], wait boolean default false) returns bigint
language sql set search_path from current as $$
  with made as (
    insert into cursor_keys (queue, key)
    select make_cursors.queue, k.key
    from unnest(make_cursors.keys) k(key) left join lateral (
      select true as known from cursors c where c.queue = make_cursors.queue and c.key = k.key order by c.turn desc limit 1
    ) c on true
    cross join lateral (
      select hashtext('pgcue.' || current_schema()) as class, 100 + (hashtext(make_cursors.queue || k.key) & 63) as bucket
    ) l
    where known is null and case
      when make_cursors.wait then pg_advisory_xact_lock(l.class, l.bucket)::text = ''
      else pg_try_advisory_xact_lock(l.class, l.bucket) end
    order by k.key on conflict do nothing
    returning queue, key
  ), rows as (
    insert into cursors (queue, key) select queue, key from made returning 1
  )
  select count(*) from rows
$$;

-- Both, for the candidates of a claim, of which it may park to_park. Cursors that do not exist are made
-- when they are first met. left_at: the first candidate of a cursor that found no room.
create or replace function own_cursors(
  token bigint, queue text, kinds text[], cutoff timestamptz,
  inout tids tid[], in keys text[], in suspect boolean, in room int, in run_length int, in longest_run int, inout to_park int,
  out ids bigint[], out owned text[], out left_at int, out contended boolean
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  met text[] := array(select k.key from unnest(own_cursors.keys) with ordinality k(key, n)
    where k.key is not null group by k.key order by min(k.n));
  runs record;
  rest text[];
  taken tid[];
  made bigint;
begin
  contended := false;
  if room <= 0 then
    tids := null;
    left_at := array_position(own_cursors.keys, met[1]);
    return;
  end if;
  runs := take_runs(own_cursors.token, own_cursors.queue, own_cursors.kinds, own_cursors.cutoff, met,
    own_cursors.suspect, room, own_cursors.run_length, own_cursors.longest_run);
  ids := runs.ids; owned := runs.owned; rest := runs.rest;
  left_at := array_position(own_cursors.keys, runs.no_room[1]);
  if rest <> '{}' then
    room := room - coalesce(cardinality(ids), 0);
    made := make_cursors(own_cursors.queue, rest);
    if made > 0 and room <= 0 then
      left_at := least(left_at, (select min(k.n)::int from unnest(own_cursors.keys) with ordinality k(key, n)
        where (k.key in (select unnest(rest))) is true));
    elsif made > 0 then
      met := array(select m.key from unnest(met) with ordinality m(key, n)
        where (m.key in (select unnest(rest))) is true order by m.n);
      taken := runs.run_tids;
      runs := take_runs(own_cursors.token, own_cursors.queue, own_cursors.kinds, own_cursors.cutoff, met,
        own_cursors.suspect, room, own_cursors.run_length, own_cursors.longest_run);
      runs.run_tids := taken || runs.run_tids;
      ids := ids || runs.ids; owned := owned || runs.owned; rest := runs.rest;
      left_at := least(left_at, array_position(own_cursors.keys, runs.no_room[1]));
    end if;
  end if;
  if to_park > 0 and cardinality(own_cursors.tids) > coalesce(cardinality(ids), 0) or rest <> '{}' then
    select to_park - p.parked, p.contended into to_park, contended
      from park(own_cursors.queue, own_cursors.tids, own_cursors.keys, owned, rest, runs.run_tids, to_park) p;
  end if;
  tids := runs.run_tids;
end $$;

-- Put the head of each free cursor's mailbox back in the line, at its end. Every path that removes or
-- moves a job of a cursor ends here, holding the cursor's row lock. A held cursor waits for its job.
-- A head that a producer has locked (collapse edits jobs that wait) is in the line, for such jobs are never
-- parked: then this does not wait for the producer, and a later full pass finds it.
create or replace function pass_on(queues text[], keys text[]) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  with heads as materialized (
      select h.id, h.tid, h.stage
      from unnest(pass_on.queues, pass_on.keys) k(queue, key)
      cross join lateral (
        select c.hold, c.mark, c.owner is null and c.halted_at is null as free from cursors c
        where c.queue = k.queue and c.key = k.key order by c.turn desc limit 1
      ) c
      cross join lateral mailbox(k.queue, k.key, c.mark, c.hold, 1) h
      where c.free and h.token is null and h.stage <> 'scheduled'
  ), moves as materialized (
    select h.id from heads h where h.stage = 'blocked'
    union all
    select l.id from heads h cross join lateral (
      select j.id from jobs j where j.ctid = h.tid and j.token is null for update skip locked
    ) l where h.stage <> 'blocked'
  )
  update jobs j
    set stage = case when j.losses > 0 then 'suspect' else 'ready' end::stage, pos = nextval('line')
    where j.id = any(array(select m.id from moves m));
end $$;

-- Move the horizon, and the floors of the line: called with what the last call returned, by any number of nodes. An id, or
-- a pos, is drawn by a transaction that holds a lock on jobs already, so when the writers of that time have ended, no row
-- with one below those that were seen then can appear any more.
create or replace function move_horizon(
  seen bigint, line_end bigint, writers text[], out new_seen bigint, out new_line_end bigint, out new_writers text[]
)
language plpgsql set search_path from current as $$
begin
  new_seen := (select last_value from jobs_id_seq);
  new_line_end := (select last_value from line);
  new_writers := array(
    select distinct l.virtualtransaction from pg_locks l
    where l.locktype = 'relation' and l.relation = 'jobs'::regclass and l.mode = 'RowExclusiveLock'
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.virtualtransaction <> (select m.virtualtransaction from pg_locks m where m.pid = pg_backend_pid() limit 1));
  if not writers && new_writers then
    if seen > (select last_value from horizon) then
      perform setval('horizon', seen);
    end if;
    perform raise_floors(line_end);
  end if;
end $$;
