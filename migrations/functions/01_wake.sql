-- Waking sleeping nodes. A node may sleep only while some idle node, the sentry, holds the queue's
-- advisory lock exclusively; whoever makes a row claimable tries the same lock shared, to the end of
-- its transaction. Refused: a sentry sleeps, so notify. Granted: nobody sleeps, and nobody can fall
-- asleep before this transaction ends; no NOTIFY, whose lock would serialize all commits.

-- The advisory lock of a queue: one of 64 buckets of this schema.
create or replace function wake_lock(queue text, out class int, out bucket int)
language sql stable set search_path from current as $$
  select hashtext('pgcue.' || current_schema()), hashtext(wake_lock.queue) & 63
$$;

create or replace function wake(queue text) returns void
language plpgsql set search_path from current as $$
declare
  lock record := wake_lock(wake.queue);
begin
  if current_setting('pgcue.wake', true) = 'off' then
    return; -- for transactions that will be prepared: PostgreSQL refuses NOTIFY in them
  end if;
  if not pg_try_advisory_xact_lock_shared(lock.class, lock.bucket) then
    perform pg_notify(current_schema(), 'wake ' || wake.queue);
  end if;
end $$;

-- Called on a Listener's own session before it sleeps: 'sentry' if this session now guards the queue,
-- 'guarded' if another one does, 'busy' if only open enqueuing transactions hold the lock.
create or replace function stand_sentry(queue text) returns text
language plpgsql set search_path from current as $$
declare
  lock record := wake_lock(stand_sentry.queue);
begin
  if pg_try_advisory_lock(lock.class, lock.bucket) then
    return 'sentry';
  end if;
  return case when exists (
    select from pg_locks l
    where l.locktype = 'advisory' and l.mode = 'ExclusiveLock' and l.granted and l.objsubid = 2
      and l.database = (select oid from pg_database where datname = current_database())
      and l.classid::bigint = lock.class::bigint & 4294967295 and l.objid::bigint = lock.bucket
  ) then 'guarded' else 'busy' end;
end $$;

-- The sentry wakes: let go and tell the other idle nodes, one of which takes over.
create or replace function leave_sentry(queue text) returns void
language plpgsql set search_path from current as $$
declare
  lock record := wake_lock(leave_sentry.queue);
begin
  if pg_advisory_unlock(lock.class, lock.bucket) then
    perform pg_notify(current_schema(), 'sentry ' || leave_sentry.queue);
  end if;
end $$;
