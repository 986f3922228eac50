-- What operators and the scheduler do.

-- Cancel a live job: 'cancelled' if it was waiting, 'requested' if it runs (its handler is told, and it
-- gets no further attempt), null if no such job lives.
create or replace function cancel(id bigint) returns text
language plpgsql set search_path from current
set enable_seqscan = off set jit = off
as $$
#variable_conflict use_column
declare
  job record;
begin
  perform require_read_committed();
  -- A claim in flight may be about to make the cursor's row: then this waits for it.
  insert into cursors (queue, key)
    select j.queue, j.cursor_key from jobs j where j.id = cancel.id and j.cursor_key is not null
    on conflict do nothing;
  perform from cursors c
    where (c.queue, c.key) = (select j.queue, j.cursor_key from jobs j where j.id = cancel.id) for update;
  select j.ctid as tid, j.token, j.queue, j.cursor_key into job from jobs j where j.id = cancel.id for update;
  if not found then
    return null;
  end if;
  if job.token is not null then
    update jobs j set cancelled_at = coalesce(j.cancelled_at, clock_timestamp()) where j.id = cancel.id;
    perform pg_notify(current_schema(), 'cancel ' || cancel.id);
    return 'requested';
  end if;
  perform finish(array[job.tid], array[cancel.id], array[null::bigint], '{cancelled}', null, null, null, null, null);
  if job.cursor_key is not null then
    update cursors c set hold = null where c.queue = job.queue and c.key = job.cursor_key and c.hold = cancel.id;
    perform pass_on(array[job.queue], array[job.cursor_key]);
    perform wake(job.queue);
  end if;
  return 'cancelled';
end $$;

create or replace function pause(queue text) returns void
language sql set search_path from current as $$
  insert into queues (name, paused_at) values (pause.queue, clock_timestamp())
  on conflict (name) do update set paused_at = coalesce(queues.paused_at, excluded.paused_at)
$$;

create or replace function resume(queue text) returns void
language sql set search_path from current as $$
  update queues set paused_at = null where name = resume.queue;
  select wake(resume.queue)
$$;

-- Move up to max_jobs due jobs into the line. due_in_ms: how long until the next one is due; null
-- when none is scheduled. Any number of nodes may call it at once.
create or replace function promote(max_jobs int, out promoted int, out due_in_ms float8)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  cutoff timestamptz := clock_timestamp();
  queues text[];
begin
  with due as materialized (
    select j.ctid as tid from jobs j where j.stage = 'scheduled' and j.run_at <= cutoff
    order by j.run_at limit promote.max_jobs for update skip locked
  ), moved as (
    update jobs j set stage = case when j.losses > 0 then 'suspect' else 'ready' end::stage, pos = nextval('line')
    where j.ctid = any(array(select d.tid from due d)) returning j.queue
  )
  select count(*), array_agg(distinct m.queue) into promoted, queues from moved m;
  perform wake(q) from unnest(queues) q;
  due_in_ms := (select extract(epoch from j.run_at - clock_timestamp()) * 1000 from jobs j
    where j.stage = 'scheduled' order by j.run_at limit 1);
end $$;

-- Keep history: partitions of a day for a week ahead, made standalone and attached; days older than
-- keep_days dropped (0 keeps all). What a running dump or query blocks is left for the next time.
-- Returns how many whole days ahead have a partition.
create or replace function tend_history(keep_days int) returns int
language plpgsql set search_path from current
set lock_timeout = '100ms' set timezone = 'UTC'
as $$
declare
  today date := current_date;
  day date;
  name text;
  ahead int := 0;
begin
  if not pg_try_advisory_xact_lock(hashtext('pgcue.' || current_schema()), 64) then
    return null; -- another node is at it
  end if;
  for day in select generate_series(today, today + 7, '1 day') loop
    name := 'finished_jobs_' || to_char(day, 'YYYYMMDD');
    if to_regclass(format('%I', name)) is null then
      begin
        execute format('create table %I (like finished_jobs including defaults including indexes)', name);
        execute format('alter table finished_jobs attach partition %I for values from (%L) to (%L)',
          name, day::timestamptz, (day + 1)::timestamptz);
      exception
        when lock_not_available then exit;
        when check_violation then continue; -- the default partition holds rows of that day
      end;
    end if;
    ahead := day - today;
  end loop;
  for name in
    select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'finished_jobs'::regclass and c.relname ~ '_\d{8}$'
      and keep_days > 0 and to_date(right(c.relname, 8), 'YYYYMMDD') < today - keep_days
  loop
    begin
      execute format('alter table finished_jobs detach partition %I', name);
      execute format('drop table %I', name);
    exception when lock_not_available then
      exit;
    end;
  end loop;
  if keep_days > 0 then
    delete from finished_jobs_default where finished_at < (today - keep_days)::timestamptz;
  end if;
  delete from lanes a using lanes b where a.queue = b.queue and a.priority = b.priority and a.ctid > b.ctid;
  return ahead;
end $$;
