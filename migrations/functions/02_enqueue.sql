-- Putting jobs in: a plain INSERT or COPY into jobs, or these functions, which do the same.

-- Every function of the protocol refuses a bad argument in the same words; null is said, too.
create or replace function refuse(argument text, value text, allowed text) returns void
language plpgsql set search_path from current as $$
begin
  raise exception 'pgcue: % is %: give %', refuse.argument,
    case when refuse.value = '' then 'empty' when length(refuse.value) > 80
      then format('%s.. (%s bytes)', left(refuse.value, 80), octet_length(refuse.value)) else coalesce(refuse.value, 'null') end,
    refuse.allowed
    using errcode = 'invalid_parameter_value';
end $$;

-- A smallint of an argument that callers may write as a plain number; the trigger says the rest.
-- Every enqueue pays for it: so it goes by the search path of its caller.
create or replace function small(argument text, value int) returns smallint
language plpgsql as $$
begin
  if small.value not between -32768 and 32767 then
    perform refuse(small.argument, small.value::text, '-32768 to 32767');
  end if;
  return small.value;
end $$;

-- What is wrong with a job that is put in, by the column's name.
create or replace function check_job(job jobs) returns void
language plpgsql set search_path from current as $$
begin
  perform refuse(c.name, c.value, c.allowed)
    from (values
      ('queue', job.queue, octet_length(job.queue) between 1 and 512, '1 to 512 bytes'),
      ('kind', job.kind, octet_length(job.kind) between 1 and 512, '1 to 512 bytes'),
      ('cursor_key', job.cursor_key, octet_length(job.cursor_key) between 1 and 1024, '1 to 1024 bytes'),
      ('collapse_key', job.collapse_key, octet_length(job.collapse_key) between 1 and 1024, '1 to 1024 bytes'),
      ('run_at', job.run_at::text, isfinite(job.run_at), 'a finite time'),
      ('created_at', job.created_at::text, isfinite(job.created_at), 'a finite time'),
      ('max_attempts', job.max_attempts::text, job.max_attempts > 0, '1 or more'),
      ('timeout', job.timeout::text, job.timeout > interval '0' and job.timeout <= interval '1000 years',
        'more than zero, up to 1000 years')
    ) c(name, value, fits, allowed)
    where not c.fits;
end $$;

-- All that an insert does, in one trigger: is the job as it should be, is it for later, is its lane known, does somebody
-- sleep. PL/pgSQL keeps its expressions for the session, but a trigger's condition or a table's check is read anew by
-- each statement: as conditions of four triggers, this took 45 us instead of 5. No search path is set, which would take
-- as long again: so all names are PostgreSQL's own, or full.
-- Most jobs leave early. Who notifies, or notes a lane, remembers it to the end of the transaction or savepoint: a COPY
-- does it once.
create or replace function arrive() returns trigger
language plpgsql as $$
begin
  if not (octet_length(new.queue) between 1 and 512 and octet_length(new.kind) between 1 and 512
      and octet_length(new.cursor_key) between 1 and 1024 and octet_length(new.collapse_key) between 1 and 1024
      and isfinite(new.run_at) and isfinite(new.created_at) and new.max_attempts > 0
      and new.timeout > interval '0' and new.timeout <= interval '1000 years') then
    execute format('select %I.check_job($1)', tg_table_schema) using new;
  end if;
  if new.run_at <= now() and new.priority = 0
      and pg_try_advisory_xact_lock_shared(tg_relid::int, hashtext(new.queue) & 63) then -- see wake
    return new;
  end if;

  if new.run_at > now() then
    new.stage := 'scheduled';
  end if;
  if new.priority <> 0 and current_setting('pgcue.lane', true) is distinct from new.priority || ' ' || new.queue then
    execute format('insert into %1$I.lanes (queue, priority) select $1, $2
      where not exists (select from %1$I.lanes where queue = $1 and priority = $2)', tg_table_schema)
      using new.queue, new.priority;
    perform set_config('pgcue.lane', new.priority || ' ' || new.queue, true);
  end if;
  if current_setting('pgcue.notified', true) is distinct from new.queue
      and current_setting('pgcue.wake', true) is distinct from 'off'
      and not pg_try_advisory_xact_lock_shared(tg_relid::int, hashtext(new.queue) & 63) then
    if new.run_at > now() then
      perform pg_notify(tg_table_schema, 'due ' || new.queue);
    else
      perform pg_notify(tg_table_schema, 'wake ' || new.queue), set_config('pgcue.notified', new.queue, true);
    end if;
  end if;
  return new;
end $$;

create or replace trigger arrive before insert on jobs for each row execute function arrive();

create or replace function enqueue(
  kind text,
  payload json default 'null',
  queue text default 'default',
  priority int default 0,
  expected_at timestamptz default null,
  run_at timestamptz default null,
  max_attempts int default null,
  timeout interval default null,
  cursor_key text default null,
  headers json default null,
  on_retry on_retry default null,
  on_failure on_failure default null
) returns bigint
language plpgsql set search_path from current as $$ -- not sql: that would plan it again for each call
#variable_conflict use_column
declare
  new_id bigint;
begin
  insert into jobs (kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key, headers,
    on_retry, on_failure)
  values (
    coalesce(enqueue.kind, ''), coalesce(enqueue.payload, 'null'), coalesce(enqueue.queue, 'default'),
    small('priority', coalesce(enqueue.priority, 0)), coalesce(enqueue.expected_at, 'infinity'),
    coalesce(enqueue.run_at, now()), small('max_attempts', coalesce(enqueue.max_attempts, 25)),
    enqueue.timeout, enqueue.cursor_key, enqueue.headers, enqueue.on_retry, enqueue.on_failure
  ) returning id into new_id;
  return new_id;
end $$;

-- Many jobs of one kind with the same options; ids come back in the order of the payloads.
create or replace function enqueue_many(
  kind text,
  payloads json[],
  queue text default 'default',
  priority int default 0,
  expected_at timestamptz default null,
  run_at timestamptz default null,
  max_attempts int default null,
  timeout interval default null,
  cursor_key text default null,
  headers json default null,
  on_retry on_retry default null,
  on_failure on_failure default null
) returns setof bigint
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  return query insert into jobs (kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key, headers,
    on_retry, on_failure)
  select
    coalesce(enqueue_many.kind, ''), coalesce(p.payload, 'null'), coalesce(enqueue_many.queue, 'default'),
    (select small('priority', coalesce(enqueue_many.priority, 0))), coalesce(enqueue_many.expected_at, 'infinity'),
    coalesce(enqueue_many.run_at, now()), (select small('max_attempts', coalesce(enqueue_many.max_attempts, 25))),
    enqueue_many.timeout, enqueue_many.cursor_key, enqueue_many.headers, enqueue_many.on_retry, enqueue_many.on_failure
  from unnest(enqueue_many.payloads) with ordinality p(payload, n) order by p.n
  returning id;
end $$;

-- A payload's fields, for merging. What jsonb cannot hold (\u0000, half a surrogate pair, 1e400000) is
-- said of the payload that has it; the subtransaction writes nothing, and only merges pay for it.
create or replace function fields(payload json, whose text) returns jsonb
language plpgsql set search_path from current as $$
begin
  if json_typeof(fields.payload) = 'object' then
    return fields.payload::jsonb;
  end if;
  return null;
exception when data_exception or program_limit_exceeded then
  raise exception 'pgcue: % cannot be merged: %', fields.whose, sqlerrm
    using errcode = 'invalid_parameter_value', hint = 'Give on_conflict => ''replace'' or ''keep''.';
end $$;

-- Enqueue unless a job of this queue, kind and collapse_key (the cursor_key, if none is given) waits for
-- its first start; then return that one's id, and collapsed = true. The waiting job keeps its options and
-- its place; of the two times the earlier run_at wins. on_conflict says whose payload counts:
--   keep      the waiting job's
--   replace   the new one
--   merge     the fields of both objects, the new ones winning (what is no object is replaced)
-- A job that has started is not waiting: the call that races with its start is a new job, never lost.
-- For a rule of your own, insert the row yourself:
--   insert into jobs (kind, collapse_key, payload) values (..)
--   on conflict (queue, kind, collapse_key) where collapse_key is not null do update set payload = ..
create or replace function collapse(
  kind text,
  payload json default 'null',
  queue text default 'default',
  priority int default 0,
  expected_at timestamptz default null,
  run_at timestamptz default null,
  max_attempts int default null,
  timeout interval default null,
  cursor_key text default null,
  headers json default null,
  on_retry on_retry default null,
  on_failure on_failure default null,
  collapse_key text default null,
  on_conflict text default 'keep',
  out id bigint,
  out collapsed boolean
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  new_id bigint;
  new_fields jsonb;
begin
  if coalesce(collapse.collapse_key, collapse.cursor_key) is null then
    perform refuse('collapse_key', null, 'a collapse_key or a cursor_key');
  end if;
  if collapse.on_conflict in ('keep', 'replace', 'merge') is not true then
    perform refuse('on_conflict', collapse.on_conflict, 'keep, replace or merge');
  end if;
  if collapse.on_conflict = 'merge' then
    -- Also if nothing waits yet: else the next caller would be told of it.
    new_fields := fields(collapse.payload, 'payload');
  end if;
  lock table jobs in row exclusive mode; -- before an id is drawn: see move_horizon
  new_id := nextval('jobs_id_seq');
  insert into jobs as j (id, kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key,
    headers, on_retry, on_failure, collapse_key)
  overriding system value values (
    new_id, coalesce(collapse.kind, ''), coalesce(collapse.payload, 'null'), coalesce(collapse.queue, 'default'),
    small('priority', coalesce(collapse.priority, 0)), coalesce(collapse.expected_at, 'infinity'),
    coalesce(collapse.run_at, now()), small('max_attempts', coalesce(collapse.max_attempts, 25)),
    collapse.timeout, collapse.cursor_key, collapse.headers, collapse.on_retry, collapse.on_failure,
    coalesce(collapse.collapse_key, collapse.cursor_key)
  )
  on conflict (queue, kind, collapse_key) where collapse_key is not null do update set
    payload = case
      when collapse.on_conflict = 'keep' then j.payload
      when new_fields is not null
        then coalesce((fields(j.payload, 'payload of waiting job ' || j.id) || new_fields)::json, excluded.payload)
      else excluded.payload end,
    run_at = least(j.run_at, excluded.run_at),
    -- A cursor's job is moved into its mailbox by promote, which knows how.
    stage = case when j.stage = 'scheduled' and j.cursor_key is null then excluded.stage else j.stage end,
    pos = case when j.stage = 'scheduled' and j.cursor_key is null then excluded.pos else j.pos end
  returning j.id into id;
  collapsed := id <> new_id;
  if collapsed then
    perform wake(coalesce(collapse.queue, 'default'), 'due'); -- its time may be earlier now
  end if;
end $$;
