-- Watch: how a program that has nothing to do hears of new messages, without asking each stage all the time.
--
-- It asks for all of its stages in one statement (watch), a few times a second, and that alone suffices. In between it is
-- notified: enqueue and relay see in watched_until that somebody sleeps, and only then send a NOTIFY, one a transaction,
-- since each takes a lock at commit that the whole server shares. Under load nobody sleeps for long: relay ends the
-- watch when it has moved something, so that the producers of a busy system hardly ever send one. A program that is notified
-- again and again of messages that are not for it stops asking to be for a while.
-- A notification may get lost, or come for nothing: it costs a look more, or a moment.
--
-- Locks: none. Indexes: those of relay_is_due, and the primary keys of progress and queue, parked_due.

create or replace function pgonce.is_watched()
returns boolean
language sql volatile
return pg_sequence_last_value('pgonce.watched_until'::regclass) > extract(epoch from clock_timestamp()) * 1000;
comment on function pgonce.is_watched is 'Internal: whether a program sleeps that wants to be notified. Simple enough to be inlined.';

create or replace function pgonce.end_watch()
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if pgonce.is_watched() then
    perform setval('pgonce.watched_until', 0);
    perform pg_notify('pgonce.watch', '');
  end if;
end $$;
comment on function pgonce.end_watch is 'Internal: wakes whoever watches, when this transaction commits, and ends the watch for all.';

create or replace function pgonce.watch(topics text[], consumers text[], milliseconds integer)
returns setof pgonce.due
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  drawn bigint;
begin
  if milliseconds is null or milliseconds not between 0 and 60000 then
    raise exception using errcode = 'PO003', message = format('a watch of %s milliseconds', milliseconds),
      hint = 'A watch lasts 0 to 60000 milliseconds; renew it.';
  end if;
  -- First, and only then look: whoever enqueues after the look sees it.
  perform setval('pgonce.watched_until', greatest(
    coalesce(pg_sequence_last_value('pgonce.watched_until'::regclass), 0),
    floor(extract(epoch from clock_timestamp()) * 1000)::bigint + milliseconds));
  drawn := pgonce.last_drawn();
  return query
    select 'relay', t.topic
    from pgonce.topics t
    where not t.paused
      and (topics is null or t.topic = any (topics))
      and exists (
        select from pgonce.partitions p
        where p.topic_id = t.topic_id and pgonce.relay_is_due(p.topic_id, p.partition, drawn));
  return query
    select 'consumer', c.consumer
    from pgonce.consumers c
    where not c.paused
      and c.consumer = any (consumers)
      and exists (
        select from pgonce.consumer_partitions p
        cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) newest
        where p.consumer_id = c.consumer_id and pgonce.has_something(c, p.partition, newest.next_offset));
end $$;
comment on function pgonce.watch is 'Which of these topics (null: of all) have something to relay, and which of these consumers something to receive. For so many milliseconds from now on, whoever enqueues or relays notifies the channel pgonce.watch (with the schema''s name in quotes, as in "pgonce".watch). Errors: PO003.';
