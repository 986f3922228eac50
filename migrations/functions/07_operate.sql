-- What operators and the scheduler do.

-- Cancel a live job: 'cancelled' if it was waiting, 'requested' if it runs (its handler is told, and it
-- gets no further attempt), null if no such job lives.
create or replace function cancel(id bigint) returns text
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  job record;
begin
  perform require_read_committed();
  select j.queue, j.cursor_key into job from jobs j where j.id = cancel.id;
  if job.cursor_key is not null then
    perform make_cursors(job.queue, array[job.cursor_key], true);
    perform lock_cursor(job.queue, job.cursor_key);
  end if;
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

-- What operators do to a cursor. Each locks its row first, so that claims and settles come before or after.
-- Works on a cursor that was never met, as long as it has a job.
create or replace function lock_cursor(queue text, key text) returns cursors
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cursor cursors;
begin
  perform require_read_committed();
  -- A claim in flight may be about to make it: then this waits for the claim.
  if exists (select from jobs j where j.queue = lock_cursor.queue and j.cursor_key = lock_cursor.key and j.stage <> 'scheduled') then
    perform make_cursors(lock_cursor.queue, array[lock_cursor.key], true);
  end if;
  select * into cursor from cursors c
    where c.queue = lock_cursor.queue and c.key = lock_cursor.key order by c.turn desc limit 1 for update;
  if not found then
    raise exception 'pgcue: there is no cursor % in queue %', lock_cursor.key, lock_cursor.queue
      using errcode = 'no_data_found';
  end if;
  return cursor;
end $$;

create or replace function cursor_is_owned(cursor cursors) returns void
language plpgsql set search_path from current as $$
begin
  raise exception 'pgcue: cursor % in queue % is owned: its jobs run now', cursor.key, cursor.queue
    using errcode = 'object_in_use', hint = 'Halt it and wait until they end, or release it.';
end $$;

-- No job of the cursor starts any more; a run that has begun ends.
create or replace function halt_cursor(queue text, key text) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  perform lock_cursor(halt_cursor.queue, halt_cursor.key);
  update cursors c set halted_at = coalesce(c.halted_at, clock_timestamp())
    where c.queue = halt_cursor.queue and c.key = halt_cursor.key;
end $$;

create or replace function resume_cursor(queue text, key text) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  perform lock_cursor(resume_cursor.queue, resume_cursor.key);
  update cursors c set halted_at = null, halted_by = null
    where c.queue = resume_cursor.queue and c.key = resume_cursor.key;
  perform pass_on(array[resume_cursor.queue], array[resume_cursor.key]);
  perform wake(resume_cursor.queue);
end $$;

-- Take the cursor away from its owner: the jobs of the run go back uncounted, their handlers are told to
-- stop, and whatever the owner still says of them is refused. Returns how many jobs went back.
create or replace function release_cursor(queue text, key text) returns int
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cursor cursors := lock_cursor(release_cursor.queue, release_cursor.key);
  back record;
begin
  if cursor.owner is null then
    return 0;
  end if;
  perform pg_notify(current_schema(), 'cancel ' || j.id) from jobs j
    where j.queue = cursor.queue and j.cursor_key = cursor.key and j.stage <> 'scheduled' and j.token = cursor.owner;
  back := give_back(cursor.owner, 'release', cursor.key);
  if back.stuck > 0 then
    raise exception 'pgcue: jobs of cursor % are locked by another transaction', cursor.key
      using errcode = 'lock_not_available', hint = 'Try again.';
  end if;
  update cursors c set owner = null where c.queue = cursor.queue and c.key = cursor.key and c.owner = cursor.owner;
  perform pass_on(array[cursor.queue], array[cursor.key]);
  perform wake(cursor.queue);
  return back.moved;
end $$;

-- Cancel the job that would run next. Returns its id; null if none waits.
create or replace function skip_cursor(queue text, key text) returns bigint
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cursor cursors := lock_cursor(skip_cursor.queue, skip_cursor.key);
  head bigint;
begin
  if cursor.owner is not null then
    perform cursor_is_owned(cursor);
  end if;
  head := (select h.id from mailbox(cursor.queue, cursor.key, cursor.mark, cursor.hold, 1) h);
  perform cancel(head);
  return head;
end $$;

-- Replace the state; SQL null takes it away. The version stays: it counts jobs.
create or replace function set_cursor_state(queue text, key text, state json) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cursor cursors := lock_cursor(set_cursor_state.queue, set_cursor_state.key);
begin
  if cursor.owner is not null then
    perform cursor_is_owned(cursor);
  end if;
  update cursors c set state = set_cursor_state.state, turn = c.turn + 1
    where c.queue = cursor.queue and c.key = cursor.key;
end $$;

-- Forget a cursor with its state. Refused while jobs wait for it.
create or replace function delete_cursor(queue text, key text) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cursor cursors := lock_cursor(delete_cursor.queue, delete_cursor.key);
  waiting bigint;
begin
  if cursor.owner is not null then
    perform cursor_is_owned(cursor);
  end if;
  waiting := (select count(*) from jobs j
    where j.queue = cursor.queue and j.cursor_key = cursor.key and j.stage <> 'scheduled') + (cursor.hold is not null)::int;
  if waiting > 0 then
    raise exception 'pgcue: % jobs wait for cursor % in queue %', waiting, cursor.key, cursor.queue
      using errcode = 'object_in_use', hint = 'Cancel or skip them first.';
  end if;
  delete from cursors c where c.queue = cursor.queue and c.key = cursor.key;
  delete from cursor_keys k where k.queue = cursor.queue and k.key = cursor.key;
end $$;

-- One sentence on why a job is not running, or what became of it.
create or replace function why(id bigint) returns text
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  j jobs;
  f finished_jobs;
  c cursors;
  l leases;
  h jobs;
  ahead bigint;
  this text := format('job %s ', coalesce(why.id::text, 'null'));
begin
  select * into j from jobs where jobs.id = why.id;
  if not found then
    select * into f from finished_jobs where finished_jobs.id = why.id order by finished_at desc limit 1;
    return this || case
      when not found then 'does not exist'
      when f.state = 'completed' then format('completed at %s, attempt %s', f.finished_at, f.attempt)
      else format('%s at %s, attempt %s of %s%s',
        case f.state when 'failed' then 'failed' when 'cancelled' then 'was cancelled' else 'was lost with its nodes too often' end,
        f.finished_at, f.attempt, f.max_attempts, ': ' || f.error) end;
  end if;
  if j.token is not null then
    select l.* into l from claims k join leases l on l.id = k.lease where k.token = j.token;
    if l.dead_at is not null or l.expires_at < clock_timestamp() then
      return this || format('was claimed by node %s, which fell silent at %s; it is about to be taken back', l.node, l.seen_at);
    end if;
    return this || format('runs on node %s since %s, attempt %s of %s%s', l.node, j.started_at, j.attempt, j.max_attempts,
      case when j.cancelled_at is not null then format('; it was told to stop at %s', j.cancelled_at) end);
  end if;
  if j.stage = 'scheduled' and j.attempt > 0 and j.error is not null then
    return this || format('waits until %s for attempt %s of %s; the last one ended with: %s',
      j.run_at, j.attempt + 1, j.max_attempts, j.error);
  elsif j.stage = 'scheduled' and j.run_at > clock_timestamp() then
    return this || format('is scheduled for %s', j.run_at);
  elsif exists (select from queues q where q.name = j.queue and q.paused_at is not null) then
    return this || format('waits because queue %s is paused since %s', j.queue, (select q.paused_at from queues q where q.name = j.queue));
  elsif not exists (select from leases l where l.dead_at is null and l.expires_at > clock_timestamp()
      and coalesce(j.queue = any(l.queues), true) and coalesce(j.kind = any(l.kinds), true)) then
    return this || format('waits for a node: none that lives serves queue %s and kind %s', j.queue, j.kind);
  elsif j.stage = 'scheduled' then
    return this || format('is due since %s and about to be moved into the line', j.run_at);
  end if;
  if j.cursor_key is not null then
    select * into c from cursors where cursors.queue = j.queue and cursors.key = j.cursor_key;
    ahead := (select count(*) from jobs b where b.queue = j.queue and b.cursor_key = j.cursor_key and b.stage <> 'scheduled'
      and (-(b.priority::int), b.expected_at, b.id) < (-(j.priority::int), j.expected_at, j.id));
    if c.halted_at is not null then
      return this || format('waits for its cursor %s, which is halted since %s by %s', c.key, c.halted_at,
        coalesce('the failure of job ' || c.halted_by, 'an operator'));
    elsif c.owner is not null then
      select l.* into l from claims k join leases l on l.id = k.lease where k.token = c.owner;
      return this || format('waits for its cursor %s, which node %s owns; %s jobs stand before it', c.key, l.node, ahead);
    elsif c.hold is not null and c.hold <> why.id then
      select * into h from jobs where jobs.id = c.hold;
      return this || format('waits for its cursor %s, which job %s holds until it runs again at %s', c.key, c.hold, h.run_at);
    elsif ahead > 0 then
      return this || format('waits for its cursor %s: %s jobs stand before it', c.key, ahead);
    end if;
  end if;
  if j.stage = 'suspect' then
    return this || format('was lost with its node %s times, and waits to be claimed alone', j.losses);
  end if;
  ahead := (select count(*) from (
    select from jobs b where b.queue = j.queue and b.stage = 'ready' and b.token is null and b.priority > j.priority
    union all
    select from jobs b where b.queue = j.queue and b.stage = 'ready' and b.token is null and b.priority = j.priority
      and (b.expected_at, b.pos) < (j.expected_at, j.pos)
    limit 10000) b);
  return this || case ahead when 0 then 'is the next in line' when 10000 then 'is in line, 10000 or more jobs stand before it'
    else format('is in line, %s jobs stand before it', ahead) end;
end $$;

create or replace function pause(queue text) returns void
language plpgsql set search_path from current as $$
begin
  if octet_length(pause.queue) between 1 and 512 is not true then
    perform refuse('queue', pause.queue, 'a name of 1 to 512 bytes');
  end if;
  insert into queues (name, paused_at) values (pause.queue, clock_timestamp())
  on conflict (name) do update set paused_at = coalesce(queues.paused_at, excluded.paused_at);
end $$;

create or replace function resume(queue text) returns void
language plpgsql set search_path from current as $$
begin
  perform refuse('queue', null, 'its name') where resume.queue is null;
  update queues set paused_at = null where name = resume.queue;
  perform wake(resume.queue);
end $$;

-- Whether jobs of a queue that complete are kept in the history. What fails, is cancelled or lost always is.
create or replace function keep_history(queue text, keep boolean) returns void
language plpgsql set search_path from current as $$
begin
  if octet_length(keep_history.queue) between 1 and 512 is not true then
    perform refuse('queue', keep_history.queue, 'a name of 1 to 512 bytes');
  end if;
  perform refuse('keep', null, 'true or false') where keep_history.keep is null;
  insert into queues (name, history_from)
  values (keep_history.queue, case when keep_history.keep then '-infinity' else 'infinity' end::timestamptz)
  on conflict (name) do update set history_from = case
    when not keep_history.keep then 'infinity'
    when queues.history_from = 'infinity' then clock_timestamp()
    else queues.history_from end;
end $$;

-- Move up to max_jobs due jobs into the line. due_in_ms: how long until the next one is due; null
-- when none is scheduled. Any number of nodes may call it at once. A job whose cursor is locked this
-- instant is left for the next call.
create or replace function promote(max_jobs int, out promoted int, out due_in_ms float8)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cutoff timestamptz := clock_timestamp();
  queues text[];
begin
  if promote.max_jobs > 0 is not true then
    perform refuse('max_jobs', promote.max_jobs::text, '1 or more');
  end if;
  -- Every cursor that is concerned must be there to be locked.
  perform make_cursors(d.queue, array_agg(distinct d.key)) from (
    select j.queue, j.cursor_key as key from jobs j
    where j.stage = 'scheduled' and j.run_at <= cutoff order by j.run_at limit promote.max_jobs
  ) d where d.key is not null group by d.queue;
  with due as materialized (
    select j.ctid as tid, j.id, j.queue, j.cursor_key as key from jobs j
    where j.stage = 'scheduled' and j.run_at <= cutoff order by j.run_at limit promote.max_jobs
  ), keys as (
    select d.queue, d.key, array_agg(d.id) as ids from due d where d.key is not null group by d.queue, d.key
  ), known as materialized (
    select k.queue, k.key, k.ids, c.tid from keys k
    cross join lateral (
      select c.ctid as tid from cursors c where c.queue = k.queue and c.key = k.key order by c.turn desc limit 1
    ) c
  ), free as materialized (
    select k.queue, k.key, k.ids, c.tid, c.hold from known k
    cross join lateral (
      select c.ctid as tid, c.hold from cursors c where c.ctid = k.tid for update skip locked
    ) c
  ), back as (
    -- It may enter the mailbox before the mark; a held job is found by its id. Also a mark that is at the start
    -- is written: so a claim that reads the mailbox as it was before this sees that the row has changed.
    update cursors c set mark = row(-40000, '-infinity', 0), next_mark = row(-40000, '-infinity', 0)
    from free f where c.ctid = f.tid and f.ids <> array[coalesce(f.hold, 0)]
  ), locked as materialized (
    select j.ctid as tid from due d join jobs j on j.ctid = d.tid
    where j.stage = 'scheduled'
      and (d.key is null or (d.queue, d.key) in (select f.queue, f.key from free f))
    for update of j skip locked
  ), moved as (
    update jobs j set stage = case when j.losses > 0 then 'suspect' else 'ready' end::stage, pos = nextval('line')
    from locked l where j.ctid = l.tid returning j.queue
  )
  select count(*), array_agg(distinct m.queue) into promoted, queues from moved m;
  perform wake(q) from unnest(queues) q;
  due_in_ms := (select extract(epoch from j.run_at - clock_timestamp()) * 1000 from jobs j
    where j.stage = 'scheduled' order by j.run_at limit 1);
  if promoted = 0 and due_in_ms < 100 then
    due_in_ms := 100; -- what is due is locked
  end if;
end $$;

-- Keep history: partitions of a day for a week ahead, made standalone and attached; days older than
-- keep_days dropped (0 keeps all). What was added is summarized in the block range index. What a running dump, query or
-- vacuum blocks is left for the next time.
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
  whole boolean := true;
begin
  if keep_days between 0 and 36500 is not true then
    perform refuse('keep_days', keep_days::text, '0 to 36500');
  end if;
  if not pg_try_advisory_xact_lock(hashtext('pgcue.' || current_schema()), 64) then
    return null; -- another node is at it
  end if;
  for day in select generate_series(today, today + 7, '1 day') loop
    name := 'finished_jobs_' || to_char(day, 'YYYYMMDD');
    if to_regclass(format('%I', name)) is null then
      begin
        execute format('create table %I (like finished_jobs including defaults including indexes)
          with (autovacuum_vacuum_insert_threshold = -1)', name);
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
    order by 1 -- the history loses its beginning, never its middle
  loop
    begin
      execute format('alter table finished_jobs detach partition %I', name);
      execute format('drop table %I', name);
    exception when lock_not_available then
      whole := false;
      exit;
    end;
  end loop;
  if keep_days > 0 and whole then
    delete from finished_jobs_default where finished_at < (today - keep_days)::timestamptz;
  end if;
  begin
    perform brin_summarize_new_values(i.inhrelid)
      from pg_inherits i join pg_index x on x.indexrelid = i.inhrelid join pg_class c on c.oid = x.indrelid
      where i.inhparent = 'finished_jobs_id'::regclass
        and right(c.relname, 8) in (to_char(today, 'YYYYMMDD'), to_char(today - 1, 'YYYYMMDD'), '_default');
  exception when lock_not_available then -- vacuum is at it
  end;
  delete from lanes a using lanes b where a.queue = b.queue and a.priority = b.priority and a.ctid > b.ctid;
  return ahead;
end $$;
