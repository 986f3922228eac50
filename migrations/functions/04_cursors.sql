-- Cursors: one owner at a time, jobs in order, no job left without somebody who will look at it.
-- Lock order everywhere: cursor rows by key, then jobs.

-- The first max_jobs jobs of one cursor's mailbox that may run now, in order: a held job first, then by
-- priority, expected_at and id. The run ends before a kind that the claimer lacks and before a row that
-- is locked. Suspects are left to claims of a suspect, which take only the head. A cursor held by a job
-- that is still scheduled has no run.
create or replace function take_run(
  queue text, key text, hold bigint, kinds text[], max_jobs int, suspect boolean, cutoff timestamptz,
  out tids tid[], out ids bigint[]
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
begin
  with mailbox as materialized (
    select row_number() over () as n, m.*
    from (
      (select h.id, h.kind, h.run_at, h.losses, h.stage from jobs h where h.id = take_run.hold)
      union all
      (select w.id, w.kind, w.run_at, w.losses, w.stage from jobs w
        where w.queue = take_run.queue and w.cursor_key = take_run.key and w.stage <> 'scheduled'
          and w.id is distinct from take_run.hold
        order by w.priority desc, w.expected_at, w.id limit take_run.max_jobs)
    ) m limit take_run.max_jobs
  ), locked as materialized (
    select j.id, j.ctid as tid from jobs j
    where j.id = any(array(select m.id from mailbox m)) and j.token is null for update skip locked
  ), judged as (
    select m.n, m.id, l.tid, bool_and(l.tid is not null and m.stage <> 'scheduled' and m.run_at <= take_run.cutoff
        and coalesce(m.kind = any(take_run.kinds), true)
        and case when take_run.suspect then m.n = 1 else m.losses = 0 end) over (order by m.n) as runs
    from mailbox m left join locked l on l.id = m.id
  )
  select array_agg(j.tid order by j.n), array_agg(j.id order by j.n) into tids, ids from judged j where j.runs;
end $$;

-- What a claim does with the candidates that have a cursor: own each free cursor and take a run of it
-- while there is room; park the other rows of owned and held cursors, out of the line until the
-- cursor lets go. A cursor that is locked this instant is being let go of: its head comes by again.
create or replace function own_cursors(
  token bigint, queue text, kinds text[], cutoff timestamptz,
  inout tids tid[], in keys text[], in suspect boolean, in room int, in run_length int,
  out ids bigint[], out no_room text[], out contended boolean, out parked int
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  met text;
  not_locked text[];
  cursor record;
  run record;
  run_tids tid[];
begin
  -- Only what is missing: ON CONFLICT alone would wait for running settles, and deadlock with them.
  insert into cursors (queue, key)
    select own_cursors.queue, m.key
    from (select distinct k.key from unnest(own_cursors.keys) k(key) where k.key is not null) m
    where not exists (select from cursors c where c.queue = own_cursors.queue and c.key = m.key)
    order by m.key on conflict do nothing;
  contended := false;
  for met in
    select k.key from unnest(own_cursors.keys) with ordinality k(key, n)
    where k.key is not null group by k.key order by min(k.n)
  loop
    if room <= 0 then
      no_room := no_room || met;
      continue;
    end if;
    select c.owner, c.hold into cursor from cursors c
      where c.queue = own_cursors.queue and c.key = met for update skip locked;
    if not found then
      contended := true;
      not_locked := not_locked || met;
    elsif cursor.owner is null then
      run := take_run(own_cursors.queue, met, cursor.hold, own_cursors.kinds, least(run_length, room), suspect,
        cutoff);
      if run.ids is not null then
        run_tids := run_tids || run.tids;
        ids := ids || run.ids;
        room := room - cardinality(run.ids);
        update cursors c set owner = own_cursors.token where c.queue = own_cursors.queue and c.key = met;
      end if;
    end if;
  end loop;

  -- Whatever else was met does not run now: its cursor is busy or held, or another job comes first.
  -- (NOT IN is a hash probe whatever the estimates say; = ANY of a variable is a linear search.)
  update jobs j set stage = 'blocked' where j.ctid = any(array(
    select j.ctid from unnest(own_cursors.tids, own_cursors.keys) c(tid, key) join jobs j on j.ctid = c.tid
    where c.key is not null and c.key not in (select unnest(no_room || not_locked)) and c.tid not in (select unnest(run_tids))
      and j.stage in ('ready', 'suspect') and j.token is null
    for update of j skip locked));
  get diagnostics parked = row_count;
  tids := run_tids;
end $$;

-- Put the head of each free cursor's mailbox back in the line, at its end. Every path that removes or
-- moves a job of a cursor ends here, holding the cursor's row lock. A held cursor waits for its job.
create or replace function pass_on(queues text[], keys text[]) returns void
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
begin
  update jobs j
    set stage = case when j.losses > 0 then 'suspect' else 'ready' end::stage, pos = nextval('line')
    where j.id = any(array(
      select h.id
      from (select distinct u.queue, u.key from unnest(pass_on.queues, pass_on.keys) u(queue, key)) k
      join cursors c on c.queue = k.queue and c.key = k.key
      cross join lateral (
        (select m.id, m.token, m.stage from jobs m where m.id = c.hold)
        union all
        (select m.id, m.token, m.stage from jobs m
          where m.queue = c.queue and m.cursor_key = c.key and m.stage <> 'scheduled'
          order by m.priority desc, m.expected_at, m.id limit 1)
        limit 1
      ) h
      where c.owner is null and h.token is null and h.stage <> 'scheduled'));
end $$;
