-- Waking sleeping nodes. A node may sleep only while some idle node, the sentry, holds the queue's
-- advisory lock exclusively; whoever makes a row claimable tries the same lock shared, to the end of
-- its transaction. Refused: a sentry sleeps, so notify. Granted: nobody sleeps, and nobody can fall
-- asleep before this transaction ends; no NOTIFY, whose lock would serialize all commits.
--
-- The lock of a queue is one of 64 buckets of this schema: (the oid of jobs, hashtext(queue) & 63). The trigger for
-- inserts (arrive) says it in the same words: a function would cost each insert, and need to be granted.

-- what: 'wake', rows became claimable; 'due', they will be later.
create or replace function wake(queue text, what text default 'wake') returns void
language plpgsql set search_path from current as $$
begin
  if current_setting('pgcue.wake', true) = 'off' then
    return; -- for transactions that will be prepared: PostgreSQL refuses NOTIFY in them
  end if;
  if not pg_try_advisory_xact_lock_shared('jobs'::regclass::oid::int, hashtext(wake.queue) & 63) then
    perform pg_notify(current_schema(), wake.what || ' ' || wake.queue);
  end if;
end $$;

-- Called on a Listener's own session before it sleeps: 'sentry' if this session now guards the queue,
-- 'guarded' if another one does, 'busy' if only open enqueuing transactions hold the lock.
create or replace function stand_sentry(queue text) returns text
language plpgsql set search_path from current as $$
declare
  bucket int := hashtext(stand_sentry.queue) & 63;
begin
  if pg_try_advisory_lock('jobs'::regclass::oid::int, bucket) then
    return 'sentry';
  end if;
  return case when exists (
    select from pg_locks l
    where l.locktype = 'advisory' and l.mode = 'ExclusiveLock' and l.granted and l.objsubid = 2
      and l.database = (select oid from pg_database where datname = current_database())
      and l.classid = 'jobs'::regclass and l.objid::bigint = bucket
  ) then 'guarded' else 'busy' end;
end $$;

-- The sentry has enough to do: let go and tell the other idle nodes, one of which takes over.
create or replace function leave_sentry(queue text) returns void
language plpgsql set search_path from current as $$
begin
  if pg_advisory_unlock('jobs'::regclass::oid::int, hashtext(leave_sentry.queue) & 63) then
    perform pg_notify(current_schema(), 'sentry ' || leave_sentry.queue);
  end if;
end $$;
