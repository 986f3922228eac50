-- What people see. The live table's infinities and stages become nulls and states.
create or replace view all_jobs as
  select j.id, j.queue, j.kind,
    case when j.token is not null then 'running' when j.stage = 'suspect' then 'ready' else j.stage::text end as state,
    j.payload, null::json as result, j.error, j.attempt, j.max_attempts, j.priority,
    nullif(j.expected_at, 'infinity') as expected_at, j.timeout, j.headers, j.losses,
    j.cursor_key, null::json as cursor_snapshot, null::bigint as cursor_version,
    j.created_at, j.run_at, j.started_at, null::timestamptz as finished_at
  from jobs j
  union all
  select f.id, f.queue, f.kind, f.state::text, f.payload, f.result, f.error, f.attempt, f.max_attempts, f.priority,
    nullif(f.expected_at, 'infinity'), f.timeout, f.headers, f.losses,
    f.cursor_key, f.cursor_snapshot, f.cursor_version, f.created_at, f.run_at, f.started_at, f.finished_at
  from finished_jobs f;

create or replace view all_cursors as
  select c.queue, c.key,
    case when c.halted_at is not null then 'halted' when c.owner is not null then 'owned'
      when c.hold is not null then 'held' else 'idle' end as status,
    c.state, c.version, l.node as owner, c.hold as held_by, h.run_at as held_until, c.halted_at, c.halted_by,
    w.jobs as waiting, w.since as waiting_since
  from cursors c
  left join claims k on k.token = c.owner
  left join leases l on l.id = k.lease
  left join jobs h on h.id = c.hold
  cross join lateral (
    select count(*) as jobs, min(greatest(j.run_at, j.created_at)) as since from jobs j
    where j.queue = c.queue and j.cursor_key = c.key and j.stage <> 'scheduled' and j.token is null
  ) w;

-- Nothing is public: grant what each role needs.
do $$ begin
  execute format('revoke all on all functions in schema %I from public', current_schema());
end $$;
