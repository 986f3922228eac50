-- Putting jobs in: a plain INSERT or COPY into jobs, or these functions, which do the same.

-- A job for later is not born ready (only such rows pay for the call).
create or replace function schedule_later() returns trigger
language plpgsql set search_path from current as $$
begin
  new.stage := 'scheduled';
  return new;
end $$;

create or replace trigger schedule_later before insert on jobs
  for each row when (new.run_at > now()) execute function schedule_later();

-- After each statement that inserts: add lanes that are new, wake the queues.
create or replace function announce() returns trigger
language plpgsql set search_path from current as $$
begin
  insert into lanes (queue, priority)
    select distinct a.queue, a.priority from added a
    where not exists (select from lanes l where l.queue = a.queue and l.priority = a.priority);
  perform wake(a.queue) from (select distinct queue from added) a;
  return null;
end $$;

create or replace trigger announce after insert on jobs
  referencing new table as added for each statement execute function announce();

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
  headers json default null
) returns bigint
language sql set search_path from current as $$
  insert into jobs (kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key, headers)
  values (
    enqueue.kind, coalesce(enqueue.payload, 'null'), coalesce(enqueue.queue, 'default'),
    coalesce(enqueue.priority, 0), coalesce(enqueue.expected_at, 'infinity'),
    coalesce(enqueue.run_at, now()), coalesce(enqueue.max_attempts, 25),
    enqueue.timeout, enqueue.cursor_key, enqueue.headers
  ) returning id
$$;

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
  headers json default null
) returns setof bigint
language sql set search_path from current as $$
  insert into jobs (kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key, headers)
  select
    enqueue_many.kind, coalesce(p.payload, 'null'), coalesce(enqueue_many.queue, 'default'),
    coalesce(enqueue_many.priority, 0), coalesce(enqueue_many.expected_at, 'infinity'),
    coalesce(enqueue_many.run_at, now()), coalesce(enqueue_many.max_attempts, 25),
    enqueue_many.timeout, enqueue_many.cursor_key, enqueue_many.headers
  from unnest(enqueue_many.payloads) with ordinality p(payload, n) order by p.n
  returning id
$$;
